"""Sixteen votes of the US House in 1984: one Boltzmann machine by seven estimators, judged by its exact likelihood.

The rows are the 232 members with a vote on all 16 questions (UCI 105). With 2^16 states log Z is a sum, so the mean negative
log likelihood (NLL) of each fit is exact, and so is the error of the log Z that "nce" learns beside the energy. The machine
has 136 parameters, without a prior, and is centred at the means of the data. Deterministic objectives are minimised by BFGS
in double precision, the others by Adam with a rate that decays to 0. Seconds include compilation.

With the default settings: exact 6.6234, pcd 6.6246, pseudolikelihood 6.6407, ratio matching 7.522, independent votes 10.671;
nce with nu = 20, 5 and 1 6.825, 7.258 and 8.374, and its log Z is too low by 0.25, 1.2 and 3.2. NumPy, by enumeration, gives
the same for the deterministic objectives. Noise of independent votes is 4 nats from the data, a gap that few draws of it do
not fill, and 232 rows do not determine 136 parameters well: without a prior, the optima of nce and ratio matching lie far
out.

    python benchmarks/votes.py
    python benchmarks/votes.py --methods exact pseudolikelihood
"""

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
from numpyro.infer import SVI, Trace_ELBO
from tqdm import tqdm

import numpyro_ebm as ebm

DATA = Path(__file__).parents[1] / "examples" / "data" / "house-votes-84.csv"


class Method(NamedTuple):
    """An estimator, its options, and the learning rate of Adam; None for BFGS."""

    estimator: str
    options: dict[str, Any]
    rate: float | None


METHODS = {
    "exact": Method("exact", {}, None),
    "pseudolikelihood": Method("pseudolikelihood", {}, None),
    "ratio_matching": Method("ratio_matching", {}, None),
    "pcd": Method("pcd", {"num_steps": 2, "num_chains": 2000}, 0.05),
    "nce nu=1": Method("nce", {"nu": 1}, 0.05),
    "nce nu=5": Method("nce", {"nu": 5}, 0.05),
    "nce nu=20": Method("nce", {"nu": 20}, 0.05),
}


def load() -> np.ndarray:
    """Return the votes of the members with a vote on every question: 1 for yes, 0 for no."""
    votes = np.genfromtxt(DATA, delimiter=",", skip_header=1, dtype=str)[:, 1:]
    complete = np.all(votes != "?", axis=1)
    return (votes[complete] == "y").astype(int)


def machine(couplings, biases, x) -> ebm.energies.BoltzmannMachine:
    """Return the energy of given couplings, one per pair."""
    return ebm.energies.BoltzmannMachine.from_pairs(couplings, biases, offsets=x.mean(axis=0))


def model(x):
    """Observe the votes under a Boltzmann machine."""
    size = x.shape[1]
    couplings = numpyro.param("couplings", jnp.zeros(size * (size - 1) // 2))
    biases = numpyro.param("biases", jnp.zeros(size))
    with numpyro.plate("members", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(machine(couplings, biases, x)), obs=x)


def train(method: Method, x: np.ndarray, num_steps: int) -> tuple[dict[str, Any], float]:
    """Return the parameters and the seconds."""
    start = time.time()
    estimated = ebm.estimate(model, method.estimator, **method.options)
    if method.rate is None:
        svi = SVI(estimated, ebm.empty_guide, numpyro.optim.Minimize(), Trace_ELBO())
        state = svi.init(jax.random.key(0), x)
        params = svi.get_params(jax.jit(lambda state: svi.update(state, x)[0])(state))
    else:
        optimizer = optax.adam(optax.cosine_decay_schedule(method.rate, num_steps))
        svi = SVI(estimated, ebm.empty_guide, optimizer, Trace_ELBO())
        params = ebm.fit(jax.random.key(0), svi, num_steps, x, progress_bar=False).params
    return jax.block_until_ready(params), time.time() - start


def judge(params: dict[str, Any], x: np.ndarray) -> dict[str, float]:
    """Return the mean NLL under the exact log Z, and the error of a learned log Z."""
    distribution = ebm.EnergyDistribution(machine(params["couplings"], params["biases"], x))
    log_z = ebm.log_partition(None, distribution, method="enumerate")
    figures = {"nll": -ebm.log_likelihood(distribution, None, x, log_partition=log_z).mean}
    if "x$log_normalizer" in params:
        figures["log_z_error"] = float(params["x$log_normalizer"] - log_z.value)
    return figures


def print_table(table: dict[str, dict[str, float]]) -> None:
    print("\nMean NLL of the members, nats, under the exact log Z over 2^16 states")
    print(f"{'method':>18} {'NLL':>8} {'over exact':>11} {'error of log Z':>15} {'seconds':>8}")
    exact = table.get("exact", {}).get("nll")
    for name, figures in table.items():
        over = "-" if exact is None else f"{figures['nll'] - exact:.4f}"
        log_z = f"{figures['log_z_error']:.3f}" if "log_z_error" in figures else "-"
        print(f"{name:>18} {figures['nll']:8.4f} {over:>11} {log_z:>15} {figures['seconds']:8.1f}")


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=4000, help="updates of Adam")
    args = parser.parse_args(argv)
    x, table = load(), {}
    for name in tqdm(args.methods, desc="method", leave=False):
        with jax.enable_x64(METHODS[name].rate is None):
            params, seconds = train(METHODS[name], x, args.steps)
        table[name] = judge(params, x) | {"seconds": seconds}
    print_table(table)
    return table


if __name__ == "__main__":
    main()
