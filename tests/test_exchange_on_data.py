"""The exchange algorithm on real data: posteriors that are known exactly, within Monte Carlo errors."""

import jax
import numpy as np
import pytest
from known_posteriors import EDGES, ising, moments_of_ising, six_symptoms, spins, symptoms
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC

from numpyro_ebm.bayes import ExchangeKernel


def run(kernel, *args, num_samples, num_chains=8):
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
def test_a_network_of_symptoms_has_its_exact_posterior():
    x, which = six_symptoms()
    mean, sd = np.array(list(EDGES.values())).T
    kernel = ExchangeKernel(symptoms, "gibbs", exact_sampler="enumeration", num_bridges=20)
    draws = run(kernel, x, num_samples=3500)["s"][..., which]
    ess = np.asarray(effective_sample_size(draws))
    assert np.all(ess > 1800)
    # The reference has Monte Carlo errors, too, of .01 standard deviations.
    assert np.all(abs(draws.mean((0, 1)) - mean) < 3 * sd / np.sqrt(ess) + 0.03 * sd)
    np.testing.assert_allclose(draws.std((0, 1)) / sd, 1.0, atol=3 / np.sqrt(2 * ess.min()))


@pytest.mark.slow
def test_one_lattice_has_its_exact_posterior():
    mean, sd = moments_of_ising()
    kernel = ExchangeKernel(ising, "block_gibbs", num_steps=20, proposal="crank_nicolson")
    draws = run(kernel, spins()[None], num_samples=6000)
    for name, most in (("coupling", 0.01), ("field", 0.02)):
        ess = float(effective_sample_size(draws[name]))
        assert ess > 1500
        assert abs(draws[name].mean() - mean[name]) < most
        assert abs(draws[name].std() / sd[name] - 1) < 0.05
