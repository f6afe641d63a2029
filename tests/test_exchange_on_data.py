"""The exchange algorithm on real data: posteriors that are known exactly, within Monte Carlo errors."""

import jax
import numpy as np
import pytest
from known_posteriors import ising, moments_of_ising, spins
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC

from numpyro_ebm.bayes import ExchangeKernel


def run(kernel, *args, num_samples, num_chains):
    mcmc = MCMC(
        kernel,
        num_warmup=500,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), *args)
    return {name: np.asarray(draws) for name, draws in mcmc.get_samples(group_by_chain=True).items()}


@pytest.mark.slow
def test_one_lattice_has_its_exact_posterior():
    mean, sd = moments_of_ising()
    kernel = ExchangeKernel(ising, "block_gibbs", num_steps=20, proposal="random_walk")
    draws = run(kernel, spins()[None], num_samples=6000, num_chains=16)
    for name, most in (("coupling", 0.01), ("field", 0.02)):
        ess = float(effective_sample_size(draws[name]))
        assert ess > 1500
        assert abs(draws[name].mean() - mean[name]) < most
        assert abs(draws[name].std() / sd[name] - 1) < 0.05
