"""Networks whose parameters have priors: names are checked, and inference sees the same model as one written by hand."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import linen, nnx
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.util import log_density

import numpyro_ebm as ebm

KEY = jax.random.key(0)
ROWS = np.random.default_rng(0).normal([1.0, -0.5], 1.0, (30, 2))


class Tilt(nnx.Module):
    """Minus the log density of a unit Gaussian with a mean, up to log Z."""

    def __init__(self):
        self.mean = nnx.Param(jnp.zeros(2))

    def __call__(self, x):
        return 0.5 * x @ x - self.mean[...] @ x


class Linear(linen.Module):
    @linen.compact
    def __call__(self, x):
        return 0.5 * x @ x + linen.Dense(1)(x)[0]


class Slope(eqx.Module):
    layer: eqx.nn.Linear

    def __call__(self, x):
        return 0.5 * x @ x + self.layer(x)[0]


MODULES = {
    "nnx": (Tilt(), {}, "mean"),
    "linen": (Linear(), {"input_shape": (2,)}, "Dense_0.kernel"),
    "equinox": (Slope(eqx.nn.Linear(2, 1, key=KEY)), {}, "layer.weight"),
}


def model(x, name="nnx", prior=None):
    module, options, parameter = MODULES[name]
    prior = {parameter: dist.Normal(0, 3)} if prior is None else prior
    network = ebm.random_module("net", module, prior, **options)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(network, (2,)), obs=x)


@pytest.mark.parametrize("name", MODULES)
def test_an_unknown_parameter_is_refused_with_the_known_ones(name):
    with (
        pytest.raises(ebm.EnergyError, match=rf"\['bais'\].*'net'.*Known names:.*{MODULES[name][2]}"),
        numpyro.handlers.seed(rng_seed=0),
    ):
        model(ROWS, name, {"bais": dist.Normal(0, 1)})


@pytest.mark.parametrize("name", MODULES)
def test_priors_become_latent_sites(name):
    with numpyro.handlers.seed(rng_seed=0), numpyro.handlers.trace() as trace:
        model(ROWS, name)
    latents = [key for key, site in trace.items() if site["type"] == "sample" and not site["is_observed"]]
    assert latents == [f"net/{MODULES[name][2]}"]


def test_other_objects_are_refused():
    with pytest.raises(TypeError, match=r"flax\.nnx, flax\.linen, equinox; got function"):
        ebm.random_module("net", lambda x: x, dist.Normal(0, 1))


def by_hand(x):
    mean = numpyro.sample("net/mean", dist.Normal(0, 3).expand([2]).to_event(1))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * x @ x - mean @ x, (2,)), obs=x)


@pytest.mark.parametrize("estimator", ["sm", pytest.param("pcd", marks=pytest.mark.slow)])
def test_a_guide_gets_the_model_that_is_written_by_hand(estimator):
    losses = []
    for each in (model, by_hand):
        estimated = ebm.estimate(each, estimator, weight=1.0 if estimator == "sm" else None)
        svi = SVI(estimated, AutoNormal(estimated), optax.adam(0.05), Trace_ELBO())
        losses.append(svi.run(KEY, 20, ROWS, progress_bar=False).losses)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_the_generalised_posterior_is_that_of_the_model_written_by_hand():
    draw = {"net/mean": jnp.array([0.3, -0.7])}
    values = [log_density(ebm.estimate(each, "sm", weight=1.0), (ROWS,), {}, draw)[0] for each in (model, by_hand)]
    np.testing.assert_allclose(*values, rtol=1e-5)
    mcmc = MCMC(NUTS(ebm.estimate(model, "sm", weight=1.0)), num_warmup=5, num_samples=5, progress_bar=False)
    mcmc.run(KEY, ROWS)
    assert mcmc.get_samples()["net/mean"].shape == (5, 2)


@pytest.mark.slow
def test_exchange_finds_the_posterior_of_a_network():
    def exact_rows(key, latents):
        return latents["net/mean"] + jax.random.normal(key, ROWS.shape)

    kernel = ebm.ExchangeKernel(model, exact_sampler=exact_rows)
    mcmc = MCMC(kernel, num_warmup=200, num_samples=2000, num_chains=8, chain_method="vectorized", progress_bar=False)
    mcmc.run(KEY, ROWS)
    draws = np.asarray(mcmc.get_samples(group_by_chain=True)["net/mean"])
    variance = 1 / (len(ROWS) + 1 / 9)
    ess = effective_sample_size(draws)
    assert np.all(ess > 400)
    assert np.all(abs(draws.mean((0, 1)) - variance * ROWS.sum(0)) < 5 * np.sqrt(variance / ess))
    np.testing.assert_allclose(draws.var((0, 1)), variance, rtol=5 * np.sqrt(2 / ess.min()))


def test_parameters_without_a_prior_need_values_under_exchange():
    kernel = ebm.ExchangeKernel(model, num_newton_steps=0)
    with pytest.raises(ebm.EnergyError, match=r"parameters \['net\$params'\] without values"):
        kernel.init(KEY, 0, None, (ROWS, "linen"), {})
