"""Efficiency of estimators that compare a row with its neighbours, for the precision of a Gaussian in one dimension.

Efficiency is the variance of maximum likelihood divided by that of the estimator, on the same replicates of 1000 rows with
frozen random draws, in double precision. Scales are in standard deviations of the data. The docstrings of "mpf",
"energy_discrepancy" and "ksd" quote these figures.

python benchmarks/efficiency.py
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import handlers
from numpyro.infer.util import log_density

import numpyro_ebm as ebm

ROWS = 1000
PAIRED, ONE = {"num_draws": 2}, {"num_draws": 1}
CASES = [("mpf", {"sd": 0.5, "num_draws": num}) for num in (1, 2, 10)]
CASES += [("energy_discrepancy", {"noise_scale": s} | draws) for draws in (ONE, PAIRED) for s in (0.1, 0.5, 1.0, 2.0, 4.0)]
CASES += [("ksd", {"bandwidth": length}) for length in (0.1, 0.95, 5.0)]


def model(x):
    """Declare the energy E = t x^2 / 2 of each row."""
    t = numpyro.param("t", 1.0)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * x**2), obs=x)


def efficiency(name, options, replicates):
    """Return the efficiency of estimates by Newton's method from the truth. Maximum likelihood is 1 / mean(x^2)."""
    estimated = ebm.estimate(model, name, **options)

    def estimate_one(key):
        key_rows, key_noise = jax.random.split(key)
        x = jax.random.normal(key_rows, (ROWS,))
        loss = lambda t: -log_density(handlers.seed(estimated, key_noise), (x,), {}, {"t": t})[0]  # noqa: E731
        slope = jax.grad(loss)
        step = lambda t, _: (t - slope(t) / jax.grad(slope)(t), None)  # noqa: E731
        return jax.lax.scan(step, 1.0, None, length=6)[0], 1 / jnp.mean(x**2)

    estimates = jax.jit(lambda keys: jax.lax.map(estimate_one, keys))(jax.random.split(jax.random.key(0), replicates))
    ours, best = (np.var(np.asarray(each)) for each in estimates)
    return best / ours


def main(argv=None):
    """Print a table, and return its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicates", type=int, default=1500)
    args = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)  # noqa: FBT003
    table = []
    for name, options in CASES:
        table.append(efficiency(name, options, args.replicates))
        words = ", ".join(f"{key}={value}" for key, value in options.items())
        print(f"{name:>18} {words:<34} {table[-1]:.3f}", flush=True)
    return table


if __name__ == "__main__":
    main()
