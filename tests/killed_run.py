"""A training with checkpoints, to be killed: `python killed_run.py FOLDER RESULT [NUM_STEPS]` prints the step of each check.

RESULT gets the bits of all that it has trained.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

import numpyro_ebm as ebm

X = np.random.default_rng(0).normal(0, 0.5, (300, 2)).astype(np.float32)


def model(x):
    """An energy with a latent precision, a network and chains, of which nothing may get lost."""
    t = numpyro.sample("t", dist.Gamma(2.0, 1.0))
    w = numpyro.param("w", lambda key: jax.random.normal(key, (2, 8)))
    with numpyro.plate("rows", len(x)):
        energy = ebm.EnergyDistribution(lambda v: 0.5 * t * jnp.sum(v**2) + jnp.sum(jnp.tanh(v @ w)), (2,))
        numpyro.sample("x", energy, obs=x)


def bits(tree):
    """Return all leaves as arrays, random keys as numbers."""
    is_key = lambda leaf: jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.prng_key)  # noqa: E731
    leaves = [leaf for leaf in jax.tree.leaves(tree) if not isinstance(leaf, str)]
    return [np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf) for leaf in leaves]


def run(folder, num_steps=2000, callback=None, **options):
    """Train with everything that a checkpoint holds: batches, averages, chains that are recorded, moments of Adam."""
    estimated = ebm.estimate(model, "replay", num_steps=2, buffer_size=500)
    optimizer = optax.chain(optax.clip_by_global_norm(100.0), optax.adam(optax.cosine_decay_schedule(0.01, 2000)))
    svi = SVI(estimated, AutoNormal(estimated), optimizer, Trace_ELBO())
    settings = {"batch_size": 64, "check_every": 25, "ema": 0.99, "record_chains": 2, "on_unhealthy": "rollback"} | options
    data = settings.pop("batches", X)
    return ebm.fit(
        jax.random.key(3), svi, num_steps, batches=data, checkpoint=folder, callback=callback, progress_bar=False, **settings
    )


def kept(result):
    """Return what two runs must agree on: all but the times."""
    figures = {name: values for name, values in result.history.items() if name != "steps_per_second"}
    return bits(result._replace(model=None, history=figures))


if __name__ == "__main__":
    folder, out, *more = sys.argv[1:]
    result = run(folder or None, *map(int, more), callback=lambda figures: print(int(figures["step"]), flush=True))
    np.savez(out, *kept(result))
