"""Evaluate trained energies and their chains: log Z by several methods, held-out rows, diagnosis and pictures.

Three estimators train the deep energy of `wine.py` (11 chemical measurements of red wines, a Gaussian base): "pcd", whose
persistent chains are recorded during training, and "nce" and "dsm", which stop by their loss on validation rows. Then the
script

* estimates log Z of the first by five methods and by bounds from both sides, each with its error; they have to agree;
* compares the three with a Gaussian and a mixture on held-out rows: likelihood, score matching loss, Stein discrepancy, and
  two-sample tests of draws against rows;
* diagnoses the NUTS chains and each training, as text and as HTML; computes R-hat of the energy; and writes an ArviZ file
  with the chains that gave the gradient;
* draws pictures: the paths to log Z, data against draws, training curves, ranks of training chains, the nce classifier.

    python examples/evaluate.py            about four minutes
    python examples/evaluate.py --quick    two minutes, nearly all of it compilation
"""

import argparse
import itertools
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro.distributions as dist
import optax
from flax import nnx
from numpyro.infer import SVI, Trace_ELBO
from sklearn.mixture import GaussianMixture
from tqdm import tqdm

import numpyro_ebm as ebm
from numpyro_ebm import plots

sys.path.insert(0, str(Path(__file__).parent))
import wine  # noqa: E402

matplotlib.use("Agg")

PCD = {"num_steps": 10, "kernel": wine.MALA, "num_chains": 1000}
OPTIONS = {"pcd": PCD, "nce": {"nu": 10}, "dsm": {"sigma": 0.3}}


class Trained(NamedTuple):
    """The model that `estimate` returned, the result of `fit`, the parameters of the energy, and NUTS draws."""

    estimated: Any
    result: ebm.FitResult
    params: dict
    draws: ebm.Draws


def train(name: str, splits: wine.Splits, args: argparse.Namespace) -> Trained:
    """Train by `fit`. Objectives stop early by the validation rows, "pcd" when its learning rate has decayed to 0."""
    estimated = ebm.estimate(wine.model, name, **OPTIONS[name])
    rate = optax.cosine_decay_schedule(1e-3, args.steps)
    svi = SVI(estimated, ebm.empty_guide, optax.adamw(rate), Trace_ELBO())
    options = {"record_chains": args.recorded} if name == "pcd" else {"held_out": (splits.valid,), "patience": 10}
    result = ebm.fit(jax.random.key(args.seed), svi, args.steps, splits.train, check_every=args.check_every, **options)
    params = {"net$params": result.params["net$params"]}
    draws = ebm.sample(
        jax.random.key(args.seed + 1),
        wine.model,
        ebm.NUTS(max_num_doublings=6),
        params=params,
        num_warmup=args.warmup,
        num_samples=args.samples,
    )
    return Trained(estimated, result, params, draws)


def ais(args: argparse.Namespace) -> ebm.AnnealedImportanceSampling:
    """Return annealing from a wide Gaussian, which covers any mass that the energy has far from the data."""
    return ebm.AnnealedImportanceSampling(num_levels=args.levels, num_chains=args.chains, start=wine.WIDE)


def ways_to_log_z(trained: Trained, args: argparse.Namespace) -> tuple[list[dict], ebm.LogPartitionBounds]:
    """Estimate log Z by each method. Return one table row per method, and the bounds from both sides."""
    draws = trained.draws.get_samples()["x"]
    some = draws[:: max(1, len(draws) // args.chains)][: args.chains]  # thinned, so nearly independent
    methods = {
        "importance": ebm.ImportanceSampling(data=draws, num_samples=args.proposals),
        "ais": ais(args),
        "smc": ebm.SequentialMonteCarlo(num_particles=args.particles, start=wine.WIDE),
        "bridge": ebm.BridgeSampling(draws=draws, num_chains=4),
        "nce": ebm.NoiseContrast(data=some, nu=args.proposals // len(some)),
    }
    rows = []
    bar = tqdm(methods.items(), desc="log Z", leave=False)
    for i, (name, method) in enumerate(bar):
        bar.set_postfix_str(name)
        start = time.time()
        log_z = ebm.log_partition(jax.random.key(args.seed + i), wine.model, params=trained.params, method=method)
        rows.append(summary(name, log_z, time.time() - start))
    start = time.time()
    options = {"num_levels": args.levels, "num_chains": args.chains, "start": wine.WIDE}
    bounds = ebm.log_partition_bounds(
        jax.random.key(args.seed + len(rows)), wine.model, params=trained.params, draws=some, **options
    )
    seconds = time.time() - start
    rows += [summary("lower bound", bounds.lower, seconds), summary("upper bound", bounds.upper, seconds)]
    return rows, bounds


def summary(name: str, log_z: ebm.LogPartition, seconds: float) -> dict:
    numbers = {"value": log_z.value, "se": log_z.standard_error, "ess": log_z.ess}
    return {"method": name, **{key: float(value) for key, value in numbers.items()}, "seconds": seconds}


def disagreement(rows: list[dict]) -> tuple[float, str]:
    """Return the largest difference of two rows, in units of their joint standard error, and the pair's names."""
    pairs = itertools.combinations(rows, 2)
    return max(
        (abs(a["value"] - b["value"]) / np.hypot(a["se"], b["se"]), f"{a['method']}, {b['method']}") for a, b in pairs
    )


def print_log_z(rows: list[dict], bounds: ebm.LogPartitionBounds) -> None:
    print("\nLog Z of the energy trained by pcd (nats):")
    print(f"{'method':>12} {'log Z':>8} {'se':>7} {'ESS':>7} {'seconds':>8}")
    for row in rows:
        print(f"{row['method']:>12} {row['value']:8.3f} {row['se']:7.3f} {row['ess']:7.0f} {row['seconds']:8.1f}")
    for what, some in (("importance, ais and smc", rows[:3]), ("all", rows)):
        size, whose = disagreement(some)
        print(f"The largest difference among {what}: {size:.1f} standard errors ({whose}).")
    print(f"Bounds: {bounds}.\nseconds: compilation included; both bounds come from one call.")


def baselines(splits: wine.Splits, args: argparse.Namespace) -> dict[str, dist.Distribution]:
    """Return a Gaussian, and a mixture whose number of components the validation rows choose."""
    sizes = (4,) if args.quick else (4, 8, 12)
    mixtures = [GaussianMixture(k, random_state=args.seed, reg_covar=1e-3).fit(splits.train) for k in sizes]
    chosen = max(mixtures, key=lambda m: m.score(splits.valid))
    components = dist.MultivariateNormal(jnp.asarray(chosen.means_), jnp.asarray(chosen.covariances_))
    return {
        "gaussian": dist.MultivariateNormal(splits.train.mean(0), np.cov(splits.train.T)),
        "mixture": dist.MixtureSameFamily(dist.Categorical(jnp.asarray(chosen.weights_)), components),
    }


def compare(trained: dict[str, Trained], splits: wine.Splits, args: argparse.Namespace) -> ebm.Evaluation:
    """Evaluate all models on the test rows."""
    log_z = {
        name: ebm.log_partition(jax.random.key(args.seed), wine.model, params=each.params, method=ais(args))
        for name, each in tqdm(trained.items(), desc="log Z of each", leave=False)
    }
    return ebm.evaluate(
        jax.random.key(args.seed + 2),
        {name: (wine.model, each.params) for name, each in trained.items()} | baselines(splits, args),
        splits.test,
        measures=("log_likelihood", "sm", "ksd", "mmd", "c2st"),
        log_partition=log_z,
        draws={name: each.draws.samples["x"] for name, each in trained.items()},
    )


def print_comparison(evaluation: ebm.Evaluation) -> None:
    print(f"\n{evaluation}")
    for first, second in (("pcd", "mixture"), ("nce", "mixture"), ("dsm", "mixture")):
        gain = evaluation.difference(first, second)
        word = "gains" if gain.mean > 0 else "loses"
        error = f"{abs(gain.mean):.2f} +- {gain.standard_error:.2f}"
        print(f"{first} {word} {error} nats per row {'on' if gain.mean > 0 else 'to'} the {second}, row by row")


def diagnoses(trained: dict[str, Trained], splits: wine.Splits) -> dict[str, ebm.Diagnosis]:
    """Diagnose the NUTS chains against the training rows, and each training."""
    found = {}
    for name, each in trained.items():
        found[f"{name}: draws by NUTS"] = ebm.diagnose(each.draws, data=splits.train)
        found[f"{name}: training"] = ebm.diagnose(each.estimated, each.result, splits.train)
    return found


def print_diagnoses(found: dict[str, ebm.Diagnosis]) -> None:
    """Print the diagnoses of pcd in full, and only the warnings of the others."""
    for name, each in found.items():
        text = each if name.startswith("pcd") else "\n".join([f"{len(each.warnings)} warnings", *map(str, each.warnings)])
        print(f"\n{name}: {text}")


def print_mixing(trained: Trained) -> None:
    """Print R-hat of the energy, for the NUTS chains and for the training chains."""
    net = nnx.merge(nnx.graphdef(wine.NET), trained.params["net$params"])

    def energy(x):
        return net(x)[0] - wine.BASE.log_prob(x)

    print("\nConvergence of the energy (pcd):")
    for name, chains in (("NUTS", trained.draws), ("training", trained.result)):
        print(f"{name:>10}: {ebm.split_rhat(chains, {'energy': energy})['energy']}")


def write_html(path: Path, evaluation: ebm.Evaluation, found: dict[str, ebm.Diagnosis]) -> None:
    parts = [f"<h2>{name}</h2>{each._repr_html_()}" for name, each in {"held-out rows": evaluation, **found}.items()]
    path.write_text(f"<!doctype html><meta charset='utf-8'><title>evaluate.py</title>{''.join(parts)}", encoding="utf-8")


def draw_pictures(
    folder: Path, trained: dict[str, Trained], idata: Any, bounds: Any, splits: wine.Splits, args: argparse.Namespace
) -> None:
    """Draw each picture into its own file."""
    pcd, nce = trained["pcd"], trained["nce"]
    few = wine.COMPONENTS[:4]
    sizes = len(splits.train), len(splits.valid)
    ratios = plots.log_ratios(jax.random.key(args.seed), nce.estimated, nce.result, splits.test)
    axes = {
        "log_z": plots.plot_annealing(bounds),
        "pairs": plots.plot_pairs(splits.train, pcd.draws.samples["x"], names=wine.COMPONENTS, dims=few),
        "marginals": plots.plot_marginals(splits.train, pcd.draws.samples["x"], names=wine.COMPONENTS),
        "training_pcd": plots.plot_training(pcd.result, num_rows=sizes),
        "training_nce": plots.plot_training(nce.result, num_rows=sizes),
        "training_ranks": plots.plot_rank(idata, group="training", var_names=["x"], coords={"component": few}),
        "calibration": plots.plot_calibration(*ratios),
    }
    for name, each in axes.items():
        if args.quick:
            wine.mark_untrained(each.flat[0].figure)
        each.flat[0].figure.savefig(folder / f"evaluate_{name}.png", dpi=100)
        matplotlib.pyplot.close(each.flat[0].figure)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500, help="maximum number of training steps")
    parser.add_argument("--check-every", type=int, default=25, help="steps between two checks of validation rows and chains")
    parser.add_argument("--recorded", type=int, default=6, help="persistent chains to record during training")
    parser.add_argument("--warmup", type=int, default=300, help="NUTS warm-up steps per chain")
    parser.add_argument("--samples", type=int, default=1000, help="NUTS draws per chain")
    parser.add_argument("--levels", type=int, default=500, help="annealing levels")
    parser.add_argument("--chains", type=int, default=200, help="annealing chains")
    parser.add_argument("--particles", type=int, default=2000, help="particles of sequential Monte Carlo")
    parser.add_argument("--proposals", type=int, default=50_000, help="proposals of importance sampling, noise draws of nce")
    parser.add_argument("--seed", type=int, default=2019)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the files")
    parser.add_argument("--quick", action="store_true", help="run small, to check that everything works")
    args = parser.parse_args(argv)
    wine.check_netcdf()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.quick:
        args.steps, args.check_every, args.warmup, args.samples = 100, 5, 100, 200
        args.levels, args.chains, args.particles, args.proposals = 50, 100, 200, 5000

    splits = wine.load(args.seed)
    trained = {name: train(name, splits, args) for name in tqdm(OPTIONS, desc="train and sample", leave=False)}
    rows, bounds = ways_to_log_z(trained["pcd"], args)
    print_log_z(rows, bounds)
    evaluation = compare(trained, splits, args)
    print_comparison(evaluation)
    found = diagnoses(trained, splits)
    print_diagnoses(found)
    print_mixing(trained["pcd"])

    write_html(args.out / "evaluate.html", evaluation, found)
    idata = ebm.to_arviz(
        trained["pcd"].draws,
        training=trained["pcd"].result,
        observed_data={"x_test": splits.test},
        dims={"x": ["component"], "x_test": ["row", "component"]},
        coords={"component": wine.COMPONENTS},
    )
    idata.to_netcdf(args.out / "evaluate.nc")
    draw_pictures(args.out, trained, idata, bounds, splits, args)
    print(f"\nWrote evaluate.html, evaluate.nc and seven pictures to {args.out}.")
    return {"log_z": rows, "bounds": bounds, "evaluation": evaluation, "diagnoses": found}


if __name__ == "__main__":
    main()
