"""Simulation based calibration of generalised posteriors: are credible intervals right before and after `calibrate`?

Couplings of an Ising model on small lattices come from their prior, and each has a data set drawn exactly. The posterior
under the pseudolikelihood is drawn on a grid, and its draws go through the maps of `calibrate`. If intervals are right, the
ranks of the true couplings among the draws are uniform (Talts et al. 2018): the table has the p-value of a chi-squared test
of ten bins, the largest distance of their distribution from the uniform one beside the limit of its 95 % band (Kolmogorov),
and the share of truths in central intervals of 50 and 90 %. "exact" is the posterior under the likelihood.

    python benchmarks/calibrated_posteriors.py                  200 data sets, half an hour to an hour
    python benchmarks/calibrated_posteriors.py --replicates 10  a look
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer.util import log_density
from scipy import stats
from tqdm.auto import tqdm

import numpyro_ebm as ebm
from numpyro_ebm.energies import Graph, Ising

SIDE, PRIOR_SCALE = 3, 0.5
MAPS = ("open_faced", "curvature")


def model(s):
    coupling = numpyro.sample("coupling", dist.Normal(0, PRIOR_SCALE))
    with numpyro.plate("rows", len(s)):
        numpyro.sample("s", ebm.EnergyDistribution(Ising(Graph.lattice(SIDE, SIDE), coupling)), obs=s)


def simulate(rng_key: Any, num: int, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return couplings from the prior, and a data set for each, from the table of all states."""
    key_coupling, key_rows = jax.random.split(rng_key)
    states = np.array(np.unravel_index(np.arange(2**SIDE**2), (2,) * SIDE**2)).T.reshape(-1, SIDE, SIDE) * 2 - 1
    couplings = PRIOR_SCALE * jax.random.normal(key_coupling, (num,))
    lattice = Graph.lattice(SIDE, SIDE)
    logits = jax.vmap(lambda j: -jax.vmap(Ising(lattice, j))(jnp.asarray(states)))(couplings)
    which = jax.random.categorical(key_rows, logits[:, None], shape=(num, num_rows))
    return np.asarray(couplings), states[np.asarray(which)]


def draws_of(estimator: str, num_samples: int) -> Any:
    """Return a compiled function of key and data set: independent draws of the posterior, by its sums over a grid."""
    weighted, grid = ebm.estimate(model, estimator, weight=1.0), jnp.linspace(-6 * PRIOR_SCALE, 6 * PRIOR_SCALE, 6001)

    @jax.jit
    def draw(rng_key, rows):
        log_p = jax.lax.map(lambda j: log_density(weighted, (rows,), {}, {"coupling": j})[0], grid, batch_size=500)
        sums = jnp.cumsum(jnp.exp(log_p - jnp.max(log_p)))
        return jnp.interp(jax.random.uniform(rng_key, (num_samples,)), sums / sums[-1], grid)

    return draw


def ranks_of(truth: np.ndarray, data: np.ndarray, num_samples: int) -> dict[str, np.ndarray]:
    """Return by method the share of draws below each true coupling."""
    posteriors = {name: draws_of(name, num_samples) for name in ("exact", "pseudolikelihood")}
    shares: dict[str, list[float]] = {name: [] for name in (*posteriors, *MAPS)}
    for k, (coupling, rows) in enumerate(zip(truth, tqdm(data, desc="data sets"), strict=True)):
        key = jax.random.key(k)
        draws = {name: {"coupling": draw(key, rows)} for name, draw in posteriors.items()}
        for method in MAPS:
            found = ebm.calibrate(key, ebm.estimate(model, "pseudolikelihood"), rows, method=method)
            draws[method] = found.adjust(draws["pseudolikelihood"])
        for name, each in draws.items():
            shares[name].append(float(np.mean(np.asarray(each["coupling"]) < coupling)))
    return {name: np.array(each) for name, each in shares.items()}


def print_table(shares: dict[str, np.ndarray]) -> None:
    """Print how far the ranks are from uniform ones."""
    num = len(next(iter(shares.values())))
    print(f"{'posterior':>18}  {'p-value':>8}  {'distance':>8}  {'limit':>6}  {'in 50 %':>7}  {'in 90 %':>7}")
    for name, each in shares.items():
        counts = np.histogram(each, 10, (0, 1))[0]
        p = stats.chi2.sf(np.sum((counts - num / 10) ** 2 / (num / 10)), 9)
        distance, limit = stats.kstest(each, "uniform").statistic, stats.kstwo.ppf(0.95, num)
        inside = [np.mean(abs(each - 0.5) < half) for half in (0.25, 0.45)]
        print(f"{name:>18}  {p:8.2g}  {distance:8.3f}  {limit:6.3f}  {inside[0]:7.2f}  {inside[1]:7.2f}")


def main(argv: list[str] | None = None) -> dict[str, np.ndarray]:
    """Print the table, and return the ranks by method, as shares of the draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=200)
    parser.add_argument("--rows", type=int, default=20, help="lattices in a data set")
    parser.add_argument("--samples", type=int, default=1000, help="draws that a coupling is ranked among")
    args = parser.parse_args(argv)
    truth, data = simulate(jax.random.key(0), args.replicates, args.rows)
    shares = ranks_of(truth, data, args.samples)
    print_table(shares)
    return shares


if __name__ == "__main__":
    main()
