"""Chains on simulated devices, one on each: `python parallel_run.py FOLDER`; it fails if they are not those of one run."""

import os
import sys

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"

import jax
import numpy as np
from numpyro.infer import MCMC
from test_saved_mcmc import CASES

import numpyro_ebm as ebm

KEY = jax.random.key(0)


def draws(mcmc):
    return jax.tree.map(np.asarray, mcmc.get_samples(group_by_chain=True))


def mcmc_of(name, num_samples=10):
    kernel, x, _ = CASES[name]
    options = {"num_chains": 2, "chain_method": "parallel", "progress_bar": False}
    return MCMC(kernel(), num_warmup=10, num_samples=num_samples, **options), x


assert jax.local_device_count() == 2
for name in ("blackjax", "exchange"):
    whole, x = mcmc_of(name)
    whole.run(KEY, x)
    warm, _ = mcmc_of(name)
    warm.warmup(KEY, x)
    warm.run(warm.last_state.rng_key, x)
    jax.tree.map(np.testing.assert_array_equal, draws(warm), draws(whole))
    for num_samples in (5, 10):
        blocks, _ = mcmc_of(name, num_samples)
        ebm.run_mcmc(KEY, blocks, x, checkpoint=os.path.join(sys.argv[1], name), save_every=5)
    jax.tree.map(np.testing.assert_array_equal, draws(blocks), draws(whole))
