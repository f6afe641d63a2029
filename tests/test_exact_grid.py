"""Exact likelihoods in one to three continuous dimensions: closed forms, gradients, posteriors, and what the grid misses."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import fit, precision_model, rows_of, surrogate
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS
from scipy.integrate import quad
from scipy.stats import gamma, multivariate_normal, norm

import numpyro_ebm as ebm

X = np.random.default_rng(0).normal(0, 0.5, 300)


def quartic(x):
    """E = t1 x^4 + t2 x^2."""
    t = numpyro.param("t", jnp.array([0.5, 0.5]))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: t[0] * x**4 + t[1] * x**2), obs=x)


def quartic_moments(t):
    """log Z, E x^4 and E x^2 by adaptive quadrature."""
    density = lambda x: np.exp(-t[0] * x**4 - t[1] * x**2)  # noqa: E731
    z, fourth, second = (quad(lambda x, k=k: x**k * density(x), -np.inf, np.inf)[0] for k in (0, 4, 2))
    return np.log(z), fourth / z, second / z


@pytest.mark.parametrize("t", [(1.0, 0.0), (0.25, 0.5), (1.0, -2.0)])
@pytest.mark.usefixtures("x64")
def test_rows_of_a_quartic_and_their_gradients(t):
    values, slopes = rows_of("exact", quartic, X, np.array(t))
    log_z, fourth, second = quartic_moments(t)
    np.testing.assert_allclose(values, -t[0] * X**4 - t[1] * X**2 - log_z, rtol=1e-8)
    np.testing.assert_allclose(slopes, np.stack([fourth - X**4, second - X**2], axis=1), rtol=1e-8, atol=1e-10)


def test_the_optimum_matches_the_moments_of_the_data():
    x = np.random.default_rng(0).uniform(-1, 1, 300)
    t = fit(ebm.estimate(quartic, "exact"), x, steps=900)["t"]
    _, fourth, second = quartic_moments(np.asarray(t, float))
    np.testing.assert_allclose([fourth, second], [np.mean(x**4), np.mean(x**2)], rtol=5e-3)


@pytest.mark.usefixtures("x64")
def test_gaussians_of_one_to_three_dimensions():
    rng = np.random.default_rng(1)
    for d in (1, 2, 3):
        root = rng.normal(size=(d, d))
        precision, x = root @ root.T + np.eye(d), rng.normal(size=(4, d))

        def model(x, precision=precision, d=d):
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * x @ precision @ x, (d,)), obs=x)

        expected = multivariate_normal(np.zeros(d), np.linalg.inv(precision)).logpdf(x).sum()
        np.testing.assert_allclose(surrogate(ebm.estimate(model, "exact", low=-6.0, high=6.0), {}, x), expected, rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_a_bounded_support_has_the_density_of_the_event():
    x = np.random.default_rng(0).gamma(3.0, 0.5, 20)

    def model(x):
        with numpyro.plate("rows", len(x)):
            energy = lambda x: 2.0 * x - 2.0 * jnp.log(x)  # noqa: E731
            numpyro.sample("x", ebm.EnergyDistribution(energy, support=constraints.positive), obs=x)

    expected = gamma(3.0, scale=0.5).logpdf(x).sum()
    np.testing.assert_allclose(surrogate(ebm.estimate(model, "exact"), {}, x), expected, rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_rows_with_a_context_and_a_base_have_log_z_of_their_own():
    scales, centres = np.array([0.5, 1.0, 2.0]), np.array([-1.0, 0.0, 3.0])

    def model(x):
        with numpyro.plate("rows", 3):
            base = dist.Normal(jnp.asarray(centres), 1.0)
            energy = lambda x, c: 0.5 * x**2 / c**2  # noqa: E731
            numpyro.sample("x", ebm.EnergyDistribution(energy, context=jnp.asarray(scales), base=base), obs=x)

    x = np.array([0.3, -0.2, 1.0])
    variances = 1 / (1 + 1 / scales**2)
    expected = norm(variances * centres, np.sqrt(variances)).logpdf(x)
    values = numpyro.handlers.trace(ebm.estimate(model, "exact", low=-12.0, high=12.0)).get_trace(x)["x"]["fn"].log_prob(x)
    np.testing.assert_allclose(values, expected, rtol=1e-8)


def test_columns_of_any_unit():
    def model(x):
        a = numpyro.param("a", jnp.array([-12.0, 5.0]))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * jnp.sum((x * jnp.exp(a)) ** 2), (2,)), obs=x)

    x = np.random.default_rng(0).normal(size=(200, 2)) * np.exp([11.0, -5.5])
    value = surrogate(ebm.estimate(model, "exact"), {"a": jnp.array([-11.5, 5.0])}, x)
    np.testing.assert_allclose(value, norm(0, np.exp([11.5, -5.0])).logpdf(x).sum(), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not cover the density")  # warm-up tries parameters of any size
def test_nuts_samples_the_posterior_of_the_likelihood():
    x = X[:40]

    def model(x):
        t = numpyro.sample("t", dist.Gamma(2.0, 1.0))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * x**2), obs=x)

    wrapped = ebm.estimate(model, "exact", low=-12.0, high=12.0)
    mcmc = MCMC(NUTS(wrapped), num_warmup=300, num_samples=2000, progress_bar=False)
    mcmc.run(jax.random.key(0), x)
    draws = np.asarray(mcmc.get_samples()["t"])
    posterior = gamma(2 + 20, scale=1 / (1 + 0.5 * np.sum(x**2)))
    ess = numpyro.diagnostics.effective_sample_size(draws[None])
    assert ess > 300
    assert abs(draws.mean() - posterior.mean()) < 5 * posterior.std() / np.sqrt(ess)
    np.testing.assert_allclose(draws.std(), posterior.std(), rtol=5 / np.sqrt(2 * ess))


WORDS = "site 'x'.*does not cover the density.*low=.*num_points"


@pytest.mark.parametrize(
    ("t", "options"),
    [(1e-3, {}), (4.0, {"low": -0.5, "high": 3.0}), (1e6, {}), (4.0, {"low": -3.0, "high": 3.0, "num_points": 5})],
    ids=["a wide density", "a box beside it", "a narrow density", "a coarse grid"],
)
def test_a_density_that_the_grid_does_not_cover_is_refused(t, options):
    model = numpyro.handlers.substitute(ebm.estimate(precision_model, "exact", **options), {"t": t})
    with pytest.raises(ebm.EnergyError, match=WORDS):
        numpyro.handlers.trace(model).get_trace(X)
    with pytest.raises(jax.errors.JaxRuntimeError, match="does not cover the density"):
        jax.block_until_ready(surrogate(ebm.estimate(precision_model, "exact", **options), {"t": t}, X))


@pytest.mark.slow
def test_mcmc_rejects_parameters_that_the_grid_does_not_cover():
    def model(x):
        t = numpyro.sample("t", dist.LogNormal(0, 4))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * x**2), obs=x)

    mcmc = MCMC(NUTS(ebm.estimate(model, "exact", low=-2.5, high=2.5)), num_warmup=50, num_samples=100, progress_bar=False)
    with pytest.warns(UserWarning, match="does not cover the density.*MCMC rejects"):
        mcmc.run(jax.random.key(0), X)
    draws = np.asarray(mcmc.get_samples()["t"])
    assert np.all(np.isfinite(draws))
    assert abs(draws.mean() - 1 / np.mean(X**2)) < 1.0


def test_masked_rows_take_no_part():
    model = ebm.estimate(vector, "exact")
    x, mask = np.random.default_rng(0).normal(size=(6, 2)), np.array([1, 0, 1, 1, 0, 1], bool)
    holes = np.where(mask[:, None], x, np.nan)
    value = surrogate(model, {"t": 1.3}, holes, mask)
    np.testing.assert_allclose(value, surrogate(model, {"t": 1.3}, x[mask], np.ones(4, bool)), rtol=1e-4)
    slope = jax.grad(lambda t: surrogate(model, {"t": t}, holes, mask))(1.3)
    np.testing.assert_allclose(slope, 4 / 1.3 - 0.5 * np.sum(x[mask] ** 2), rtol=1e-4)


def vector(x, mask):
    t = numpyro.param("t", 1.0)
    with numpyro.plate("rows", len(x)), numpyro.handlers.mask(mask=mask):
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * jnp.sum(x**2), (2,)), obs=x)


REFUSED = {
    "edges out of order": ({"low": 1.0, "high": -1.0}, (2,), "low < high"),
    "edges that are no numbers": ({"low": "data"}, (2,), "numbers low and high"),
    "an even number": ({"num_points": 100}, (2,), "num_points=101"),
    "edges of another shape": ({"low": -np.ones(3)}, (2,), r"low as one number or 2; got shape \(3,\)"),
    "four dimensions": ({}, (4,), "1 to 3 dimensions, and this event has 4.*'nce'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    options, shape, words = REFUSED[case]

    def model(x):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(lambda x: jnp.sum(x**2), shape), obs=x)

    with pytest.raises(ValueError, match=words):
        surrogate(ebm.estimate(model, "exact", **options), {}, np.zeros((3, *shape)))


def test_states_take_no_grid():
    def model(x):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(lambda x: 1.0 * x, support=constraints.boolean), obs=x)

    with pytest.raises(ValueError, match=r"\['low', 'num_points'\] do not apply"):
        surrogate(ebm.estimate(model, "exact", low=0.0, num_points=5), {}, np.array([0, 1]))


def test_a_derivative_of_log_z_by_the_grid_is_refused_and_not_zero():
    def value(t):
        return ebm.log_partition(None, ebm.EnergyDistribution(lambda x: 0.5 * t * x**2), method="grid").value

    with pytest.raises(ebm.EnergyError, match=r"none inside jax\.jit, vmap or grad"):
        jax.grad(value)(2.0)
