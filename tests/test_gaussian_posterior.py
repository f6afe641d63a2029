"""Generalised posteriors in closed form: against their formulas and NUTS, and robustness to contamination."""

import functools
from math import factorial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import rows_of, some_slow
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS

import numpyro_ebm as ebm
from numpyro_ebm.bayes import gaussian_posterior

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(0.3, 0.5, 100)
VELOCITIES = Path(__file__).parents[1] / "examples" / "data" / "galaxy.csv"


def gaussian(x, prior=None):
    """E = t x^2 / 2 - b x under Gaussian priors, whose score matching loss is (b - t x)^2 / 2 - t."""
    t, b = numpyro.sample("t", prior or dist.Normal(1.0, 2.0)), numpyro.sample("b", dist.Normal(0.0, 3.0))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * x**2 - b * x), obs=x)


def test_score_matching_has_its_normal_equations(x64):
    for weight in (1.0, 0.3):
        found = gaussian_posterior(ebm.estimate(gaussian, "sm", weight=weight), X)
        h = weight * np.array([[len(X), -X.sum()], [-X.sum(), (X**2).sum()]]) + np.diag([1 / 9, 1 / 4])
        mean = np.linalg.solve(h, [0.0, weight * len(X) + 1 / 4])
        np.testing.assert_allclose([found.mean["b"], found.mean["t"]], mean, rtol=1e-8)
        np.testing.assert_allclose(found.covariance, np.linalg.inv(h), rtol=1e-8)
        assert found.standard_deviation["t"] == pytest.approx(np.sqrt(np.linalg.inv(h)[1, 1]), rel=1e-8)


def test_draws_have_its_moments():
    found = gaussian_posterior(ebm.estimate(gaussian, "sm", weight=1.0), X)
    draws = found.sample(KEY, (200, 50))
    flat = np.stack([draws["b"].ravel(), draws["t"].ravel()])
    assert draws["b"].shape == (200, 50)
    np.testing.assert_allclose(
        flat.mean(1), [found.mean["b"], found.mean["t"]], atol=5 * np.sqrt(found.covariance.max() / 1e4)
    )
    np.testing.assert_allclose(np.cov(flat), found.covariance, atol=5 * found.covariance.max() * np.sqrt(2 / 1e4))


def test_it_warns_like_nuts_without_a_weight():
    with pytest.warns(ebm.UncalibratedPosteriorWarning):
        gaussian_posterior(ebm.estimate(gaussian, "sm"), X)


def switch(s):
    c = numpyro.sample("c", dist.Normal(0, 1))
    with numpyro.plate("rows", len(s)):
        numpyro.sample("s", ebm.EnergyDistribution(lambda s: -c * s[0] * s[1], (2,), support=ebm.spins), obs=s)


REFUSED = {
    "no estimate": (lambda: gaussian_posterior(gaussian, X), "as estimate returned it"),
    "a positive latent": (
        lambda: gaussian_posterior(ebm.estimate(gaussian, "sm", weight=1.0), X, dist.Gamma(2.0, 1.0)),
        "'t' has the support.*no bounds",
    ),
    "another loss": (
        lambda: gaussian_posterior(ebm.estimate(switch, "pseudolikelihood", weight=1.0), np.ones((5, 2), int)),
        "not quadratic.*NUTS",
    ),
    "another prior": (
        lambda: gaussian_posterior(ebm.estimate(gaussian, "sm", weight=1.0), X, dist.StudentT(3.0)),
        "not quadratic",
    ),
    "no prior": (
        lambda: gaussian_posterior(
            ebm.estimate(gaussian, "sm", weight=1.0), np.zeros(5), dist.ImproperUniform(dist.constraints.real, (), ())
        ),
        "improper",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused(case):
    call, message = REFUSED[case]
    with pytest.raises((ebm.EnergyError, TypeError), match=message):
        call()


def robust(x):
    return (1 + jnp.sum(x**2)) ** -0.5


@pytest.mark.parametrize("kernel", some_slow(["imq"], ["rbf"]))
def test_a_row_weight_is_that_of_the_kernel(x64, kernel):
    x = np.random.default_rng(1).normal(size=(6, 2))
    score = lambda x: -jnp.array([1.5, 0.7]) * x - 0.3 * x[::-1]  # noqa: E731

    def k(x, y):
        r = jnp.sum((x - y) ** 2) / 0.8**2
        return robust(x) * robust(y) * ((1 + r) ** -0.5 if kernel == "imq" else jnp.exp(-r / 2))

    def u(x, y):
        cross = jnp.trace(jax.jacfwd(jax.grad(k, 1), 0)(x, y))
        return score(x) @ score(y) * k(x, y) + score(x) @ jax.grad(k, 1)(x, y) + score(y) @ jax.grad(k)(x, y) + cross

    def model(x):
        t = numpyro.param("t", jnp.array([1.5, 0.7]))
        with numpyro.plate("rows", len(x)):
            energy = lambda x: 0.5 * jnp.sum(t * x**2) + 0.3 * x[0] * x[1]  # noqa: E731
            numpyro.sample("x", ebm.EnergyDistribution(energy, (2,)), obs=x)

    options = {"kernel": kernel, "bandwidth": 0.8, "statistic": "v", "row_weight": robust}
    values, _ = rows_of("ksd", model=model, x=x, t=np.array([1.5, 0.7]), **options)
    pairs = jax.vmap(lambda one: jax.vmap(lambda other: u(one, other))(x))(jnp.asarray(x))
    np.testing.assert_allclose(values, -pairs.mean(1), rtol=1e-9)
    with pytest.raises(ebm.EnergyError, match="'ksd' needs a positive number"):
        rows_of("ksd", model=model, x=x, t=np.array([1.5, 0.7]), row_weight=lambda x: x[0])


NUM_BASIS = 25
K = np.arange(NUM_BASIS)
NORMS = np.array([factorial(k) for k in K], float) ** -0.5
PRIOR = 10 * np.arange(1, NUM_BASIS + 1) ** -0.55


def statistics(x):
    return NORMS * x**K * jnp.exp(-(x**2) / 2)


def kernel_family(x):
    """The kernel exponential family of Matsubara et al. (2022), with as many basis functions."""
    theta = numpyro.sample("theta", dist.Normal(0, PRIOR).to_event(1))
    with numpyro.plate("rows", len(x)):
        energy = lambda x: -theta @ statistics(x)  # noqa: E731
        numpyro.sample("x", ebm.EnergyDistribution(energy, base=dist.Normal(0, 3)), obs=x)


def velocities(share):
    """The standardised velocities, a share of them replaced by draws far from all others."""
    v, rng = np.genfromtxt(VELOCITIES, skip_header=1), np.random.default_rng(0)
    away, uniform = 5 + 0.1 * rng.normal(size=len(v)), rng.random(len(v))
    return np.where(uniform < share, away, (v - v.mean()) / v.std(ddof=1))


def quadratic_form(x, m):
    """A, v of ``n KSD^2 = theta^T A theta + theta^T v + const``, by the definition."""
    k = lambda x, y: m(x) * m(y) * (1 + (x - y) ** 2) ** -0.5  # noqa: E731
    slope = jax.grad(lambda x, theta: theta @ statistics(x) - x**2 / 18)

    def pair(x, y, theta):
        sx, sy = slope(x, theta), slope(y, theta)
        cross = jax.grad(jax.grad(k, 1), 0)(x, y)
        return sx * sy * k(x, y) + sx * jax.grad(k, 1)(x, y) + sy * jax.grad(k)(x, y) + cross

    def total(theta):
        return jnp.sum(jax.vmap(lambda x: jax.vmap(lambda y: pair(x, y, theta))(xs))(xs)) / len(x)

    xs, zero = jnp.asarray(x), jnp.zeros(NUM_BASIS)
    return np.asarray(jax.jit(jax.hessian(total))(zero)) / 2, np.asarray(jax.jit(jax.grad(total))(zero))


def estimated(m=None, **options):
    return ebm.estimate(kernel_family, "ksd", bandwidth=1.0, statistic="v", row_weight=m, **options)


@functools.cache
def density_of(share, m):
    grid = jnp.linspace(-9, 9, 1801)
    x = velocities(share)
    weight = min(1.0, ebm.calibrate(KEY, estimated(m), x).weight)
    theta = gaussian_posterior(estimated(m, weight=weight), x).mean["theta"]
    log_p = jax.vmap(lambda x: theta @ statistics(x) - x**2 / 18)(grid)
    return np.asarray(jax.nn.softmax(log_p))


@pytest.mark.slow
@pytest.mark.parametrize("m", [None, robust], ids=["plain", "robust"])
def test_the_galaxies_have_the_posterior_of_the_paper(x64, m):
    x = velocities(0.1)
    a, v = quadratic_form(x, m or (lambda x: 1.0))
    precision = 2 * 0.7 * a + np.diag(PRIOR**-2.0)
    found = gaussian_posterior(estimated(m, weight=0.7), x)
    np.testing.assert_allclose(found.covariance, np.linalg.inv(precision), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.mean["theta"], -np.linalg.solve(precision, 0.7 * v), rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_nuts_on_the_loss_of_the_galaxies_agrees(x64):
    x = velocities(0.0)
    found = gaussian_posterior(estimated(weight=0.7), x)
    kernel = NUTS(estimated(weight=0.7), dense_mass=True)
    mcmc = MCMC(kernel, num_warmup=700, num_samples=1000, num_chains=4, chain_method="vectorized", progress_bar=False)
    mcmc.run(KEY, x)
    draws = np.asarray(mcmc.get_samples(group_by_chain=True)["theta"])
    ess = effective_sample_size(draws)
    assert ess.min() > 400
    sd = np.asarray(found.standard_deviation["theta"])
    assert np.all(abs(draws.mean((0, 1)) - found.mean["theta"]) < 5 * sd / np.sqrt(ess))
    np.testing.assert_allclose(draws.std((0, 1)), sd, rtol=5 / np.sqrt(2 * ess.min()))


@pytest.mark.slow
def test_contamination_moves_the_robust_posterior_less(x64):
    moved = {}
    for m in (None, robust):
        at = [density_of(share, m) for share in (0.0, 0.1, 0.2)]
        moved[m] = [0.5 * np.abs(density - at[0]).sum() for density in at[1:]]
        assert moved[m][0] < moved[m][1]  # further, the more rows are replaced
    # The weight of a row at 5 is 0.196, that of one at 0 is 1.
    assert all(far < 0.6 * near for near, far in zip(moved[None], moved[robust], strict=True))
