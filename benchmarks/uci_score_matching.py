"""Exact score matching loss of held-out red wines: a Gaussian, a mixture, and one energy by sm, ssm_vr and dsm.

The model and the rows are those of `examples/wine.py` (the protocol of Wenliang et al. 2019), over several random splits.
Each training stops by its own loss on the validation rows (`numpyro_ebm.fit` with patience). The table shows the mean over
splits and its standard error; lower is better, and the population value of a standard normal on whitened data is -d / 2.

    python benchmarks/uci_score_matching.py
    python benchmarks/uci_score_matching.py --splits 1 --steps 200
"""

import argparse
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpyro.infer import SVI, Trace_ELBO
from tqdm import tqdm

import numpyro_ebm as ebm

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import wine  # noqa: E402

METHODS = {"sm": {}, "ssm_vr": {"num_projections": 4}, "dsm": {"sigma": 0.3}}


def train(name: str, splits: wine.Splits, args: argparse.Namespace) -> ebm.FitResult:
    """Train by `fit`, and return the result at the smallest loss on the validation rows."""
    svi = SVI(ebm.estimate(wine.model, name, **METHODS[name]), ebm.empty_guide, optax.adamw(1e-3), Trace_ELBO())
    train, valid = jnp.asarray(splits.train), jnp.asarray(splits.valid)
    stop = {"check_every": 20, "patience": 10, "progress_bar": False}
    return ebm.fit(jax.random.key(0), svi, args.steps, train, held_out=(valid,), **stop)


def losses_of(seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Return the loss per test row of each method."""
    splits = wine.load(seed)
    losses = {row["method"].split(" ")[0]: row["sm_loss"] for row in wine.baselines(splits, seed)}
    for name in METHODS:
        params = {"net$params": train(name, splits, args).params["net$params"]}
        losses[name] = ebm.sm_loss((wine.model, params), splits.test).mean
    return losses


def main(argv: list[str] | None = None) -> dict[str, np.ndarray]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000, help="maximum number of training steps")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore", ebm.OverfittingWarning)
    rows = [losses_of(2019 + i, args) for i in tqdm(range(args.splits), desc="splits")]
    table = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    print("Exact score matching loss of the test rows of red wine, mean over splits (standard error)")
    for name, values in table.items():
        error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
        print(f"{name:>10} {values.mean():8.2f} ({error:.2f})")
    return table


if __name__ == "__main__":
    main()
