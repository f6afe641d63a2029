"""The exchange algorithm on real data: posteriors that are known exactly, within Monte Carlo errors."""

import jax
import numpy as np
import pytest
from known_posteriors import EDGES, ising, moments_of_ising, six_symptoms, spins, symptoms
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
    kernel = ExchangeKernel(ising, "block_gibbs", num_steps=20, proposal="crank_nicolson")
    draws = run(kernel, spins()[None], num_samples=3000, num_chains=16)
    for name, most in (("coupling", 0.01), ("field", 0.02)):
        ess = float(effective_sample_size(draws[name]))
        assert ess > 1500
        assert abs(draws[name].mean() - mean[name]) < most
        assert abs(draws[name].std() / sd[name] - 1) < 0.05


@pytest.mark.slow
def test_a_network_of_symptoms_has_its_exact_posterior():
    x, edges = six_symptoms()
    kernel = ExchangeKernel(symptoms, exact_sampler="enumeration", proposal="crank_nicolson")
    draws = run(kernel, x, num_samples=20_000, num_chains=8)["s"][..., edges]
    mean, sd = np.array(list(EDGES.values())).T
    ess = effective_sample_size(draws)
    assert ess.min() > 1200
    assert np.all(abs(draws.mean((0, 1)) - mean) < 3 * sd / np.sqrt(ess))
    np.testing.assert_allclose(draws.std((0, 1)), sd, rtol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_newton_steps_arrive_where_elements_hardly_vary(scale):
    """From couplings at which most symptoms have one value, and where the beta-prime prior has exponential tails."""
    x, edges = six_symptoms()
    mean, sd = np.array(list(EDGES.values())).T
    keys = jax.random.split(jax.random.key(3), 16)
    start = {
        name: scale * jax.random.normal(keys[k], (16, size)) for k, (name, size) in enumerate({"s": 15, "share": 6}.items())
    }
    kernel = ExchangeKernel(symptoms, exact_sampler="enumeration", proposal="crank_nicolson")
    proposal = kernel.init(keys, 100, start, (x,), {}).warmup.kernel
    np.testing.assert_array_less(abs(proposal.center[:, edges] - mean) / sd, 1.5)
    widths = np.sqrt(np.diagonal(proposal.inverse_mass_matrix, axis1=1, axis2=2))[:, edges]
    np.testing.assert_allclose(widths, np.broadcast_to(sd, widths.shape), rtol=0.2)
