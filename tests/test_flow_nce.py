"""Noise that learns against the energy: flow_nce and adversarial_nce."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flowjax.distributions import Normal as FlowNormal
from flowjax.experimental.numpyro import register_params, sample
from flowjax.flows import coupling_flow
from helpers import fit, precision_model, some_slow, surrogate
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO

import numpyro_ebm as ebm

NAMES = ("flow_nce", "adversarial_nce")


def normal_flow():
    numpyro.sample("x", dist.Normal(numpyro.param("loc", 0.5), jnp.exp(numpyro.param("log_scale", 0.0))))


def options(name, flow=normal_flow, **more):
    own = {"noise": flow} if name == "flow_nce" else {"noise": dist.Normal(0, 2.0), "proposal": flow}
    return own | more


class TestTheGame:
    """The loss is that of nce under the same noise; the energy descends in it, the flow ascends."""

    params = {"t": 3.0, "loc": 0.2, "log_scale": -0.3, "x$log_normalizer": 0.4}

    def slopes(self, name, x, keys, **more):
        wrapped = ebm.estimate(precision_model, name, **options(name, **more))
        slope = jax.grad(lambda params, key: surrogate(wrapped, params, x, key=key))
        return jax.tree.map(np.asarray, jax.lax.map(lambda key: slope(self.params, key), keys))

    def expected(self, params, x, name, nu):
        """The mean loss over the rows, the noise integrated on a grid."""
        at = lambda x: -0.5 * params["t"] * x**2 - params["x$log_normalizer"]  # noqa: E731
        flow = dist.Normal(params["loc"], jnp.exp(params["log_scale"]))

        def log_q(x):
            if name == "flow_nce":
                return flow.log_prob(x)
            return jnp.logaddexp(jnp.log(0.3) + dist.Normal(0, 2.0).log_prob(x), jnp.log(0.7) + flow.log_prob(x))

        odds = lambda x: at(x) - log_q(x) - jnp.log(nu)  # noqa: E731
        grid = jnp.linspace(-15, 15, 6001)
        over_noise = jnp.sum(jnp.exp(log_q(grid)) * jax.nn.softplus(odds(grid))) * (grid[1] - grid[0])
        return jnp.sum(jax.nn.softplus(-odds(x)) + nu * over_noise)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", some_slow(["adversarial_nce"], ["flow_nce"]))
    @pytest.mark.usefixtures("x64")
    def test_gradients_are_those_of_the_expected_loss(self, name):
        x, nu, num = np.linspace(-1, 1, 8), 3, 4000
        more = {} if name == "flow_nce" else {"noise_share": 0.3}
        slopes = self.slopes(name, x, jax.random.split(jax.random.key(0), num), nu=nu, **more)
        truth = jax.grad(self.expected)(self.params, x, name, nu)
        for param, sign in {"t": -1, "x$log_normalizer": -1, "loc": 1, "log_scale": 1}.items():
            error = slopes[param].std() / np.sqrt(num)
            assert abs(slopes[param].mean() - sign * truth[param]) < 5 * error
            assert error < 0.05 * abs(truth[param])

    @pytest.mark.slow
    def test_the_energy_sees_the_noise_as_nce_does(self):
        x, key = np.linspace(-1, 1, 8), jax.random.split(jax.random.key(0), 1)
        fixed = ebm.estimate(precision_model, "nce", noise=normal_flow, nu=3)
        slope = jax.grad(lambda params: surrogate(fixed, params, x, key=key[0]))(self.params)
        flow = self.slopes("flow_nce", x, key, nu=3)
        for param in ("t", "x$log_normalizer"):
            np.testing.assert_allclose(flow[param][0], slope[param], rtol=1e-5)

    @pytest.mark.slow
    def test_the_flow_comes_to_the_data(self, gaussian_data):
        wrapped = numpyro.handlers.scale(ebm.estimate(precision_model, "flow_nce", noise=normal_flow, nu=2), 1 / 2000)
        params = fit(wrapped, gaussian_data, steps=1500)
        np.testing.assert_allclose(params["loc"], gaussian_data.mean(), atol=0.03)
        np.testing.assert_allclose(np.exp(params["log_scale"]), gaussian_data.std(), rtol=0.05)
        figures = ebm.training_report(ebm.estimate(precision_model, "flow_nce", noise=normal_flow), params, gaussian_data)
        np.testing.assert_allclose(figures.sites[0].figures["overlap"], 1.0, atol=0.05)

    @pytest.mark.slow
    def test_a_sampler_fills_what_a_wide_law_leaves(self, gaussian_data):
        # .5 N(0, 2^2) + .5 q is nearest to N(0, .5^2) for a q that is narrower than the data.
        wrapped = numpyro.handlers.scale(
            ebm.estimate(precision_model, "adversarial_nce", **options("adversarial_nce")), 1e-3
        )
        scale = np.exp(fit(wrapped, gaussian_data, steps=1500)["log_scale"])
        assert 0.3 < scale < 0.45


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_flow_of_flowjax(name):
    # A ring: no Gaussian noise fits it.
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, 1000)
    x = ((2 + 0.2 * rng.normal(size=(1000, 1))) * np.stack([np.cos(angle), np.sin(angle)], 1)).astype(np.float32)
    flow = coupling_flow(
        jax.random.key(0), base_dist=FlowNormal(jnp.zeros(2), 2 * jnp.ones(2)), flow_layers=2, nn_width=16, nn_depth=1
    )

    def noise():
        sample("x", register_params("flow", flow))

    def model(x):
        radius, width = numpyro.param("radius", 1.5), numpyro.param("width", 0.5, constraint=constraints.positive)
        energy = lambda x: 0.5 * ((jnp.sqrt(jnp.sum(x**2) + 1e-6) - radius) / width) ** 2  # noqa: E731
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(energy, (2,)), obs=x)

    law = dist.Normal(0, 2).expand([2]).to_event(1)
    given = {"noise": noise} if name == "flow_nce" else {"noise": law, "proposal": noise}
    svi = SVI(ebm.estimate(model, name, **given), ebm.empty_guide, optax.adam(0.01), Trace_ELBO())
    params = svi.run(jax.random.key(0), 1000, x, progress_bar=False).params
    # With density r exp(-(r - radius)^2 / (2 width^2)) of the radius: r = 2 has 1 / r more weight than on the line.
    np.testing.assert_allclose(params["radius"], 2.0 - 0.2**2 / 2.0, atol=0.04)
    np.testing.assert_allclose(params["width"], 0.2, atol=0.02)
    grid = np.linspace(0.01, 4, 4000)
    z = 2 * np.pi * np.trapezoid(grid * np.exp(-0.5 * ((grid - params["radius"]) / params["width"]) ** 2), grid)
    np.testing.assert_allclose(params["x$log_normalizer"], np.log(z), atol=0.1)


@pytest.mark.slow
def test_each_row_has_the_flow_of_its_context():
    rng = np.random.default_rng(0)
    k = rng.uniform(-1, 1, 1000).astype(np.float32)
    y = (k + np.exp(-0.5) * rng.normal(size=1000)).astype(np.float32)

    def model(y):
        t = numpyro.param("t", 0.1)
        d = ebm.EnergyDistribution(lambda y, k: 0.5 * jnp.exp(1.0) * (y - t * k) ** 2, context=k, batch_shape=(1000,))
        with numpyro.plate("rows", 1000):
            numpyro.sample("y", d, obs=y)

    def noise(k):
        numpyro.sample("y", dist.Normal(numpyro.param("slope", 0.0) * k, 1.0))

    wrapped = ebm.estimate(model, "flow_nce", noise=noise, nu=5, log_normalizer="learned")
    params = fit(wrapped, y, steps=400)
    np.testing.assert_allclose(params["t"], k @ y / (k @ k), atol=0.05)
    np.testing.assert_allclose(params["slope"], k @ y / (k @ k), atol=0.1)


def latent_flow():
    numpyro.sample("x", dist.Normal(numpyro.sample("z", dist.Normal(0, 1)), 1))


class Unreparameterised(dist.Normal):
    """A normal whose draws NumPyro takes for constants."""

    reparametrized_params = []


class TestRefusals:
    @pytest.mark.parametrize("name", NAMES)
    def test_without_a_flow(self, name):
        option = "noise" if name == "flow_nce" else "proposal"
        with pytest.raises(ValueError, match=f"needs a {option}. Write estimate"):
            ebm.estimate(precision_model, name)
        with pytest.raises(TypeError, match=f"{option} needs a NumPyro model of one event.*got Normal"):
            ebm.estimate(precision_model, name, **{option: dist.Normal(0, 1)})

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize(
        ("flow", "message"),
        [
            (latent_flow, "has a latent 'z'"),
            (lambda: numpyro.sample("x", Unreparameterised(0.0, 1.0)), "no differentiable function of its parameters"),
            (lambda: numpyro.sample("x", dist.LogNormal(0.0, 1.0)), "support"),
            (lambda: None, "does not sample 'x'"),
        ],
    )
    def test_flows_that_cannot_be(self, name, flow, message):
        with pytest.raises(ValueError, match=f"site 'x': .*{message}"):
            surrogate(ebm.estimate(precision_model, name, **options(name, flow)), {"t": 1.0}, np.linspace(-1, 1, 4))

    @pytest.mark.parametrize("name", NAMES)
    def test_a_parameter_of_both_players(self, name):
        flow = lambda: numpyro.sample("x", dist.Normal(0, numpyro.param("t", 1.0)))  # noqa: E731
        with pytest.raises(ValueError, match=r"site 'x': .*has parameters \['t'\], and so has the model"):
            surrogate(ebm.estimate(precision_model, name, **options(name, flow)), {"t": 1.0}, np.linspace(-1, 1, 4))

    @pytest.mark.parametrize("weight", [0.0, 1.0, -0.1, np.nan, np.ones(2)])
    def test_weights_that_cannot_be(self, weight):
        with pytest.raises(ValueError, match="noise_share of the fixed noise above 0 and below 1"):
            ebm.estimate(precision_model, "adversarial_nce", **options("adversarial_nce", noise_share=weight))

    @pytest.mark.parametrize("name", NAMES)
    def test_the_value_is_no_objective(self, name, gaussian_data):
        svi = SVI(ebm.estimate(precision_model, name, **options(name)), ebm.empty_guide, optax.adam(0.1), Trace_ELBO())
        with pytest.raises(ValueError, match="only the gradient of its surrogate"):
            ebm.fit(jax.random.key(0), svi, 10, gaussian_data, held_out=(gaussian_data,))
