"""Denoising score matching: its noises, its control variate, its optimum."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import precision_model, some_slow, surrogate
from numpyro.infer import SVI, Trace_ELBO

import numpyro_ebm as ebm

COVARIANCE = jnp.array([[0.3, 0.1], [0.1, 0.2]])
ROWS = np.asarray(jax.random.normal(jax.random.key(0), (50, 2)) * jnp.array([1.0, 2.0]))
NOISES = {
    "scalar": ({"sigma": 0.5}, 0.25 * jnp.eye(2)),
    "per dimension": ({"sigma": [0.3, 0.6]}, jnp.diag(jnp.array([0.09, 0.36]))),
    "covariance": ({"covariance_matrix": COVARIANCE}, COVARIANCE),
    "Laplace": ({"noise": dist.Laplace(0, 0.4).expand([2]).to_event(1)}, 0.32 * jnp.eye(2)),
    "Student": ({"noise": dist.StudentT(6.0, 0, 0.5).expand([2]).to_event(1)}, 0.375 * jnp.eye(2)),
}
FAST = ["scalar"]


def gaussian(x):
    k = numpyro.param("k", jnp.eye(2))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * x @ k @ x, (2,)), obs=x)


def values_and_gradients(precision, num=400, **options):
    """Of the surrogate per row, for many draws of the noise."""
    wrapped = ebm.estimate(gaussian, "dsm", **options)
    one = lambda key: jax.value_and_grad(lambda k: surrogate(wrapped, {"k": k}, ROWS, key=key) / len(ROWS))(precision)  # noqa: E731
    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), num))


@pytest.mark.parametrize("control_variate", some_slow([True], [False]))
@pytest.mark.parametrize("noise", some_slow(FAST, [noise for noise in NOISES if noise not in FAST]))
def test_the_optimum_is_the_precision_of_the_smoothed_data(noise, control_variate):
    options, covariance = NOISES[noise]
    truth = jnp.linalg.inv(ROWS.T @ ROWS / len(ROWS) + covariance)
    _, gradients = values_and_gradients(truth, control_variate=control_variate, num_draws=4, **options)
    error = 5 * gradients.std(0) / np.sqrt(len(gradients))
    np.testing.assert_array_less(np.abs(gradients.mean(0)), error)
    elsewhere = values_and_gradients(1.3 * truth, control_variate=control_variate, num_draws=4, **options)[1]
    assert np.any(np.abs(elsewhere.mean(0)) > 2 * error)


@pytest.mark.filterwarnings("ignore:At site 'x'. sigma")
@pytest.mark.filterwarnings("ignore:At site 'x'. the noise")
@pytest.mark.parametrize("noise", some_slow(FAST, [noise for noise in NOISES if noise not in FAST]))
def test_the_control_variate_keeps_the_mean_and_lowers_the_variance(noise):
    options, _ = NOISES[noise]
    options = {name: jnp.asarray(value) * 0.1 for name, value in options.items() if name != "noise"} or options
    (plain, slope), (controlled, same) = (
        values_and_gradients(jnp.eye(2), control_variate=on, **options) for on in (False, True)
    )
    error = (plain - controlled).std() / np.sqrt(len(plain))
    assert np.abs((plain - controlled).mean()) < 5 * error
    error = 5 * (slope - same).std(0) / np.sqrt(len(plain)) + 1e-5
    np.testing.assert_array_less(np.abs((slope - same).mean(0)), error)
    if "noise" not in options:
        assert controlled.std() < 0.1 * plain.std()
        assert same.std(0).sum() < 0.7 * slope.std(0).sum()


class TestCaseEight:
    """XG at sigma = .01, where the sd of the plain loss is 161."""

    @pytest.mark.slow
    def test_the_control_variate_lowers_the_spread_of_the_loss_twentyfold(self, gaussian_data):
        def spread(on):
            wrapped = ebm.estimate(precision_model, "dsm", sigma=0.01, control_variate=on)
            loss = lambda key: surrogate(wrapped, {"t": 4.0}, gaussian_data, key=key) / len(gaussian_data)  # noqa: E731
            return float(jnp.std(jax.jit(jax.vmap(loss))(jax.random.split(jax.random.key(0), 200))))

        with pytest.warns(UserWarning, match="is 0.02 to 0.02 of the data's standard deviation"):
            plain, controlled = spread(False), spread(True)
        np.testing.assert_allclose(plain, 161, rtol=0.25)
        assert controlled < plain / 20

    @pytest.mark.slow
    def test_the_fit_lands_within_two_percent(self, gaussian_data):
        svi = SVI(ebm.estimate(precision_model, "dsm", sigma=0.01), ebm.empty_guide, optax.adam(0.02), Trace_ELBO())

        @jax.jit
        def run(key):
            update = lambda state, _: svi.update(state, gaussian_data)  # noqa: E731
            return svi.get_params(jax.lax.scan(update, svi.init(key, gaussian_data), None, length=3000)[0])["t"]

        with pytest.warns(UserWarning, match="standard deviation"):
            ends = [run(jax.random.key(seed)) for seed in range(2)]
        np.testing.assert_allclose(ends, 1 / (np.mean(gaussian_data**2) + 0.01**2), rtol=0.02)


class TestAuto:
    @pytest.mark.parametrize(("sigma", "is_on"), [(0.06, True), (0.5, False)])
    @pytest.mark.filterwarnings("ignore:At site 'x'. sigma")
    def test_it_is_on_where_the_noise_is_small_beside_the_data(self, sigma, is_on):
        # Whether the batch is known at compile time, which decides there, or not.
        x = np.random.default_rng(0).normal(size=300).astype(np.float32)
        for wrap in (lambda f: f, jax.jit):
            models = (ebm.estimate(precision_model, "dsm", sigma=sigma, control_variate=c) for c in ("auto", True, False))
            auto, on, off = (wrap(lambda x, m=m: surrogate(m, {"t": 1.0}, x))(x) for m in models)
            np.testing.assert_allclose(auto, on if is_on else off, rtol=1e-5)
            assert not np.isclose(on, off, rtol=1e-3)

    def test_the_plain_loss_costs_what_it_did(self):
        x = np.random.default_rng(0).normal(size=(64, 2))

        def cost(control_variate):
            wrapped = ebm.estimate(gaussian, "dsm", sigma=0.5, control_variate=control_variate)
            gradient = jax.grad(lambda k: surrogate(wrapped, {"k": k}, x))
            return jax.jit(gradient).lower(jnp.eye(2)).compile().cost_analysis()["flops"]

        assert cost("auto") == cost(False)
        assert cost(True) > 1.2 * cost(False)

    def test_one_row_has_no_scale(self):
        value = surrogate(ebm.estimate(precision_model, "dsm", sigma=0.01), {"t": 1.0}, np.ones(1))
        assert np.isfinite(value)


def test_draws_are_averaged():
    one, nine = (values_and_gradients(jnp.eye(2), sigma=0.5, num_draws=n)[0] for n in (1, 9))
    np.testing.assert_allclose(one.mean(), nine.mean(), atol=5 * one.std() / 20)
    np.testing.assert_allclose(one.std() / nine.std(), 3, rtol=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of sigma, covariance_matrix and noise; got none"),
        ({"sigma": 0.1, "noise": dist.Normal(0, 1)}, "exactly one of sigma, covariance_matrix and noise; got"),
        ({"covariance_matrix": -jnp.eye(2)}, "positive definite"),
        ({"covariance_matrix": jnp.array([[1.0, 0.5], [0.0, 1.0]])}, "symmetric"),
        ({"covariance_matrix": jnp.eye(3)}, r"site 'x'.*shape \(3, 3\), the event has \(2,\)"),
        ({"noise": dist.Normal(0, 1)}, r"site 'x'.*event_shape=\(2,\)"),
        ({"noise": dist.Uniform(-1, 1).expand([2]).to_event(1)}, "site 'x'.*on the real line"),
        ({"sigma": 0.1, "control_variate": "always"}, "control_variate is True, False or 'auto'"),
        ({"sigma": 0.1, "num_draws": 0}, "num_draws >= 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        surrogate(ebm.estimate(gaussian, "dsm", **options), {"k": jnp.eye(2)}, ROWS)


def test_noise_that_is_no_distribution():
    with pytest.raises(TypeError, match="noise needs a numpyro distribution; got float"):
        ebm.DenoisingScoreMatching(noise=0.1)
