"""Cooperative learning: the energy and the generator teach each other."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import fit, precision_model, surrogate
from numpyro.infer import SVI, Trace_ELBO

import numpyro_ebm as ebm

MLE = 3.99528


def scale_generator():
    """A normal whose scale it learns, begun five times too wide for the data."""
    numpyro.sample("x", dist.Normal(0.0, jnp.exp(numpyro.param("log_scale", 1.0))))


def latent_generator():
    """x = w z + noise: what the chains find can only be taught through z."""
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    w = numpyro.param("w", 2.0)
    numpyro.sample("x", dist.Normal(w * z, 0.2))


@pytest.mark.slow
def test_short_chains_are_enough_once_the_generator_has_learnt(gaussian_data):
    options = {"num_steps": 4, "kernel": ebm.MALA(0.08), "adapt_step_size": False}
    model = ebm.estimate(precision_model, "cooperative", proposal=scale_generator, **options)
    params = fit(model, gaussian_data, steps=3000)
    np.testing.assert_allclose(params["t"], MLE, atol=0.15)
    np.testing.assert_allclose(jnp.exp(params["log_scale"]), 0.5, atol=0.03)
    # The same chains from the generator as it began: at the truth their gradient, per row, is still large.
    short = ebm.estimate(precision_model, "mle", start=dist.Normal(0.0, np.e), **options)
    gradient = jax.grad(lambda t: surrogate(short, {"t": t}, gaussian_data))(MLE) / len(gaussian_data)
    assert gradient > 0.1


@pytest.mark.slow
def test_a_generator_with_a_latent(gaussian_data):
    params = fit(ebm.estimate(precision_model, "cooperative", proposal=latent_generator, num_steps=5), gaussian_data)
    np.testing.assert_allclose(params["t"], MLE, atol=0.15)
    np.testing.assert_allclose(np.sqrt(params["w"] ** 2 + 0.04), 0.5, atol=0.05)


@pytest.mark.slow
def test_the_generator_learns_from_the_chains_ends_alone(gaussian_data):
    # Its gradient is that of log q at fixed ends: with a kernel that hardly moves, at its own draws, so 0 on average.
    model = ebm.estimate(precision_model, "cooperative", proposal=scale_generator, kernel=ebm.Langevin(1e-12), num_steps=1)
    x = np.tile(gaussian_data, 5)
    grads = jax.lax.map(
        lambda key: jax.grad(lambda s: surrogate(model, {"t": 1.0, "log_scale": s}, x, key=key))(1.0) / len(x),
        jax.random.split(jax.random.key(0), 50),
    )
    assert abs(np.mean(grads)) < 5 * np.std(grads) / np.sqrt(50)
    assert np.std(grads) < 0.05


@pytest.mark.slow
def test_each_row_has_a_proposal_for_its_context():
    k = np.linspace(-1, 1, 400).astype(np.float32)
    y = (np.random.default_rng(0).normal(size=400) * np.exp(k)).astype(np.float32)

    def model(y):
        t = numpyro.param("t", 0.0)
        d = ebm.EnergyDistribution(lambda y, k: 0.5 * jnp.exp(t * k) * y**2, context=k, batch_shape=(400,))
        with numpyro.plate("rows", 400):
            numpyro.sample("y", d, obs=y)

    def proposal(k):
        numpyro.sample("y", dist.Normal(0.0, jnp.exp(numpyro.param("a", 0.0) * k)))

    params = fit(ebm.estimate(model, "cooperative", proposal=proposal, num_steps=5), y, steps=400)
    t = -2.0 * params["a"]
    np.testing.assert_allclose(params["t"], t, atol=0.15)
    np.testing.assert_allclose(params["t"], -2.0, atol=0.25)


@pytest.mark.parametrize(
    ("proposal", "error", "message"),
    [
        (None, ValueError, "needs a proposal"),
        (3.0, TypeError, "needs a NumPyro model"),
        (lambda: numpyro.sample("z", dist.Normal(0, 1)), ValueError, r"site 'x': The proposal does not sample 'x'"),
        (lambda: numpyro.sample("x", dist.Normal(0, 1).expand([2])), ValueError, r"shape \(2,\); one event has shape \(\)"),
    ],
)
def test_proposals_that_do_not_fit_are_refused(proposal, error, message, gaussian_data):
    with pytest.raises(error, match=message):
        surrogate(ebm.estimate(precision_model, "cooperative", proposal=proposal), {"t": 1.0}, gaussian_data[:8])


@pytest.mark.slow
def test_the_generators_parameters_are_among_those_of_svi(gaussian_data):
    model = ebm.estimate(precision_model, "cooperative", proposal=scale_generator)
    svi = SVI(model, ebm.empty_guide, optax.adam(0.01), Trace_ELBO())
    state = svi.init(jax.random.key(0), gaussian_data[:16])
    assert set(svi.get_params(state)) == {"t", "log_scale"}
