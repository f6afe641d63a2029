"""Log likelihood of held-out rows: exact values, errors, and what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from scipy import stats

import numpyro_ebm as ebm
from numpyro_ebm._core import programs

X = np.random.default_rng(0).normal(0.3, 0.5, (300, 2))
LOG_Z = 0.5 * 2 * math.log(2 * math.pi) + math.log(0.5 * 2.0)


def known(value, standard_error=0.0, ess=math.inf, bound=None):
    """With the fields of an exact one where nothing is said."""
    return ebm.LogPartition(value, standard_error, ess, bound)


def bounds_of(lower, upper):
    """Without the path."""
    return ebm.LogPartitionBounds(lower, upper, *[np.zeros(2)] * 3)


def gaussian(scale=(0.5, 2.0)):
    return ebm.EnergyDistribution(lambda x: 0.5 * jnp.sum((x / jnp.asarray(scale)) ** 2), (2,))


def model(x=None, mask=True, batch_size=None):
    scale = numpyro.param("scale", jnp.ones(2), constraint=constraints.positive)
    with numpyro.plate("rows", len(x), subsample_size=batch_size), numpyro.handlers.mask(mask=mask):
        numpyro.sample("x", gaussian(scale), obs=numpyro.subsample(x, event_dim=1))


PARAMS = {"scale": jnp.array([0.5, 2.0])}


def test_new_parameters_of_a_model_compile_nothing():
    known_model = {"log_partition": known(LOG_Z)}
    first = ebm.log_likelihood(model, PARAMS, X, **known_model)
    kept = set(programs._kept)
    second = ebm.log_likelihood(model, {"scale": 2 * PARAMS["scale"]}, 2 * X, **known_model)
    assert set(programs._kept) <= kept
    np.testing.assert_allclose(second.rows, first.rows, rtol=1e-5)
    assert ebm.log_likelihood(model, PARAMS, 2 * X, **known_model).mean < first.mean - 1


def test_a_gaussian_is_exact():
    result = ebm.log_likelihood(gaussian(), None, X, log_partition=known(LOG_Z))
    expected = stats.norm.logpdf(X, scale=[0.5, 2.0]).sum(1)
    np.testing.assert_allclose(result.rows, expected, rtol=2e-6, atol=1e-6)
    assert result.mean == pytest.approx(expected.mean(), rel=1e-6)
    assert result.standard_error == pytest.approx(expected.std(ddof=1) / math.sqrt(300), rel=1e-5)
    assert result.bits_per_dim == pytest.approx(-expected.mean() / (2 * math.log(2)), rel=1e-6)
    assert result.bits_per_dim_error == pytest.approx(result.standard_error / (2 * math.log(2)))
    assert (result.bound, result.interval, result.num_rows, result.remarks()) == (None, None, 300, ())
    assert str(result).startswith(f"log likelihood {result.mean:.4f} +- ")


def test_the_error_of_log_z_is_common_to_the_rows():
    exact = ebm.log_likelihood(gaussian(), None, X, log_partition=known(LOG_Z))
    noisy = ebm.log_likelihood(gaussian(), None, X, log_partition=known(LOG_Z, 0.3, 4.0, "lower"))
    assert noisy.standard_error == pytest.approx(math.hypot(exact.standard_error, 0.3))
    assert noisy.log_partition_error == 0.3
    assert noisy.bound == "upper"
    assert "at most this" in str(noisy)
    assert "4.0 effective samples" in str(noisy)
    assert ebm.log_likelihood(gaussian(), None, X, log_partition=known(LOG_Z, bound="upper")).bound == "lower"
    assert math.isnan(ebm.log_likelihood(gaussian(), None, X[:1], log_partition=known(LOG_Z)).standard_error)


def test_errors_cover_what_new_rows_and_new_log_z_give():
    rng = np.random.default_rng(1)
    truth = stats.norm.logpdf(0, scale=1) - 0.5  # mean log density of a standard normal
    far = []
    for _ in range(50):
        log_z = known(0.5 * math.log(2 * math.pi) + 0.05 * rng.normal(), 0.05, 400.0)
        result = ebm.log_likelihood(normal_energy, None, rng.normal(size=200), log_partition=log_z)
        far.append((result.mean - truth) / result.standard_error)
    assert abs(np.std(far) - 1) < 5 / math.sqrt(2 * 50)


normal_energy = ebm.EnergyDistribution(lambda x: x**2 / 2)


def test_bounds_give_an_interval_and_a_wide_gap_is_refused():
    bounds = bounds_of(known(LOG_Z - 0.2, 0.03, 90.0, "lower"), known(LOG_Z + 0.4, 0.04, 30.0, "upper"))
    exact = ebm.log_likelihood(gaussian(), None, X, log_partition=known(LOG_Z))
    result = ebm.log_likelihood(gaussian(), None, X, log_partition=bounds)
    low, high = 0.4 + stats.t.ppf(0.975, 29) * 0.04, 0.2 + stats.t.ppf(0.975, 89) * 0.03
    assert result.interval == pytest.approx((exact.mean - low, exact.mean + high), abs=1e-5)
    assert result.mean == pytest.approx(exact.mean - 0.1, abs=1e-5)
    assert result.standard_error == pytest.approx(math.hypot(exact.standard_error, 0.025, 0.3), rel=1e-4)
    assert result.ess == 30
    assert result.bound is None
    assert "at level 0.95, by bounds on log Z from both sides" in str(result)
    crossed = bounds_of(known(LOG_Z + 0.1, 0.03, bound="lower"), known(LOG_Z - 0.1, 0.02, bound="upper"))
    low, high = ebm.log_likelihood(gaussian(), None, X, log_partition=crossed).interval
    assert (low, high) == pytest.approx((exact.mean - 0.1 - 1.96 * 0.03, exact.mean + 0.1 + 1.96 * 0.02), abs=1e-4)
    wide = bounds_of(known(LOG_Z - 0.6), known(LOG_Z + 0.5))
    with pytest.raises(ebm.EnergyError, match="1.10 nats apart.*too uncertain to report.*num_levels"):
        ebm.log_likelihood(gaussian(), None, X, log_partition=wide)


def test_rows_with_a_log_z_each_average_the_errors_of_their_bounds():
    scale = np.linspace(0.5, 2.0, 300)
    context = ebm.EnergyDistribution(lambda x, c: 0.5 * (x / c) ** 2, context=scale, batch_shape=(300,))
    log_z = np.log(scale * math.sqrt(2 * math.pi))
    ends = (known(log_z - 0.1, np.full(300, 0.3), bound="lower"), known(log_z + 0.2, np.full(300, 0.6), bound="upper"))
    result = ebm.log_likelihood(context, None, X[:, 0], log_partition=bounds_of(*ends))
    expected = stats.norm.logpdf(X[:, 0], scale=scale).mean()
    reach = 1.96 / math.sqrt(300)
    ends = (expected - 0.2 - 0.6 * reach, expected + 0.1 + 0.3 * reach)
    assert result.interval == pytest.approx(ends, abs=1e-4)


@pytest.mark.slow
def test_intervals_by_bounds_hold_the_truth_at_their_level():
    """The ends themselves are on their sides of log Z in the mean only."""
    energy = ebm.EnergyDistribution(lambda v: 0.25 * v**4 + 0.5 * v**2)
    grid = np.linspace(-8, 8, 160001)
    weights = np.exp(-0.25 * grid**4 - 0.5 * grid**2)
    exact, cdf = math.log(weights.sum() * (grid[1] - grid[0])), np.cumsum(weights) / weights.sum()
    rows = np.interp(np.random.default_rng(77).random(200), cdf, grid)
    truth = np.mean(-0.25 * rows**4 - 0.5 * rows**2) - exact
    inside = []
    for seed in range(60):
        draws = jnp.asarray(np.interp(np.random.default_rng(seed).random(100), cdf, grid))
        bounds = ebm.log_partition_bounds(jax.random.key(seed), energy, draws=draws, num_levels=100)
        low, high = ebm.log_likelihood(energy, None, rows, log_partition=bounds).interval
        assert bounds.interval[0] <= exact <= bounds.interval[1] or not low <= truth <= high
        inside.append(low <= truth <= high)
    assert sum(inside) >= 52  # 95 % of 60 is 57; fewer than 52 has a chance of 0.003


def test_a_model_agrees_with_its_distribution():
    of = lambda *args, **kwargs: ebm.log_likelihood(  # noqa: E731
        model, PARAMS, *args, log_partition=known(LOG_Z), **kwargs
    )
    expected = ebm.log_likelihood(gaussian(), None, X, log_partition=known(LOG_Z))
    np.testing.assert_allclose(of(X).rows, expected.rows, rtol=1e-6)
    np.testing.assert_allclose(of(X, batch_size=50).rows, expected.rows, rtol=1e-6)  # the plate holds all rows here
    keep = np.arange(300) < 200
    masked = of(np.where(keep[:, None], X, np.nan), mask=keep)
    np.testing.assert_allclose(masked.rows[:200], expected.rows[:200], rtol=1e-6)
    assert np.all(np.isnan(masked.rows[200:]))
    first = ebm.log_likelihood(gaussian(), None, X[:200], log_partition=known(LOG_Z))
    assert (masked.num_rows, masked.mean) == (200, pytest.approx(first.mean, rel=1e-6))
    assert masked.standard_error == pytest.approx(first.standard_error, rel=1e-6)
    with pytest.raises(ebm.EnergyError, match="No row takes part"):
        of(X, mask=np.zeros(300, bool))


def test_latent_parameters_and_one_of_several_sites():
    def bayesian(x):
        t = numpyro.sample("t", dist.Gamma(1.0, 1.0))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * x**2), obs=x)
            numpyro.sample("y", ebm.EnergyDistribution(lambda x: 0.5 * x**2), obs=x)

    log_z = known(0.5 * math.log(2 * math.pi / 4.0))
    result = ebm.log_likelihood(bayesian, {"t": 4.0}, X[:, 0], log_partition=log_z, site="x")
    np.testing.assert_allclose(result.rows, stats.norm.logpdf(X[:, 0], scale=0.5), rtol=1e-5, atol=1e-6)
    with pytest.raises(ebm.EnergyError, match=r"\['t'\] are latent"):
        ebm.log_likelihood(bayesian, {}, X[:, 0], log_partition=log_z, site="x")
    with pytest.raises(ebm.EnergyError, match=r"sites \['x', 'y'\]. Write log_likelihood\(..., site='x'\)"):
        ebm.log_likelihood(bayesian, {"t": 4.0}, X[:, 0], log_partition=log_z)
    with pytest.raises(ebm.EnergyError, match="no energy site 'z'"):
        ebm.log_likelihood(bayesian, {"t": 4.0}, X[:, 0], log_partition=log_z, site="z")


def test_each_context_has_its_own_log_z():
    scale = np.linspace(0.5, 2.0, 300)
    context = ebm.EnergyDistribution(lambda x, c: 0.5 * (x / c) ** 2, context=scale, batch_shape=(300,))
    log_z = np.log(scale * math.sqrt(2 * math.pi))
    result = ebm.log_likelihood(context, None, X[:, 0], log_partition=known(log_z, np.full(300, 0.1)))
    expected = stats.norm.logpdf(X[:, 0], scale=scale)
    np.testing.assert_allclose(result.rows, expected, rtol=1e-5, atol=1e-6)
    assert result.standard_error == pytest.approx(expected.std(ddof=1) / math.sqrt(300), rel=1e-4)
    with pytest.raises(ebm.EnergyError, match="a log Z of its own"):
        ebm.log_likelihood(context, None, X[:, 0], log_partition=known(0.0))
    with pytest.raises(ebm.EnergyError, match=r"values of shape \(7,\), the rows have shape \(300,\)"):
        ebm.log_likelihood(context, None, X[:, 0], log_partition=known(np.zeros(7), np.zeros(7)))


def test_a_joint_event_of_factors():
    def pair(x, y):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", dist.Normal(0, 1), obs=x)
            numpyro.sample("y", dist.Normal(0, 1), obs=y)
            ebm.energy_factor("phi", lambda x, y: -0.5 * x * y, x=x, y=y)

    result = ebm.log_likelihood(pair, None, X[:, 0], X[:, 1], log_partition=known(-0.5 * math.log(0.75)))
    covariance = np.linalg.inv([[1, -0.5], [-0.5, 1]])
    np.testing.assert_allclose(result.rows, stats.multivariate_normal([0, 0], covariance).logpdf(X), rtol=1e-5)


def test_a_support_keeps_the_density_of_the_event_itself():
    gamma = ebm.EnergyDistribution(lambda x: 2 * x - 2 * jnp.log(x), support=constraints.positive)
    x = np.random.default_rng(0).gamma(3.0, 0.5, 50)
    result = ebm.log_likelihood(gamma, None, x, log_partition=known(math.lgamma(3) - 3 * math.log(2)))
    np.testing.assert_allclose(result.rows, stats.gamma.logpdf(x, 3, scale=0.5), rtol=1e-5, atol=1e-6)


def test_many_rows_are_taken_in_parts(monkeypatch):
    from numpyro_ebm.distributions import site

    monkeypatch.setattr(site, "ROWS_AT_ONCE", 128)
    result = ebm.log_likelihood(gaussian(), None, X, log_partition=known(LOG_Z))
    np.testing.assert_allclose(result.rows, stats.norm.logpdf(X, scale=[0.5, 2.0]).sum(1), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("energy", "x", "words"),
    [
        (normal_energy, np.array([0.0, 1.0, np.nan]), "Row 2 of the data is not finite"),
        (
            ebm.EnergyDistribution(lambda x: x, support=constraints.positive),
            np.array([1.0, -1.0]),
            "Row 1 of the data lies outside the support",
        ),
        (
            ebm.EnergyDistribution(jnp.sum, (2,), support=constraints.boolean),
            np.array([[0, 1], [1, 1], [0, 2]]),
            "Row 2 of the data lies outside the support",
        ),
        (ebm.EnergyDistribution(lambda x: jnp.log(x)), np.array([1.0, 1.0, -1.0]), "log density of row 2 is NaN"),
        (ebm.EnergyDistribution(lambda x: jnp.log(x)), np.array([1.0, 0.0]), "log density of row 1 is infinite"),
        (ebm.ScoreDistribution(lambda x: -x), np.zeros(3), "has no log density"),
    ],
)
def test_rows_without_a_density_are_refused(energy, x, words):
    with pytest.raises(ebm.EnergyError, match=words):
        ebm.log_likelihood(energy, None, x, log_partition=known(0.0))


def test_what_is_no_log_z_is_refused():
    with pytest.raises(TypeError, match="There is no default.*got float"):
        ebm.log_likelihood(gaussian(), None, X, log_partition=LOG_Z)
    with pytest.raises(TypeError, match="log_partition"):
        ebm.log_likelihood(gaussian(), None, X)
    with pytest.raises(ebm.EnergyError, match="log Z is not finite"):
        ebm.log_likelihood(gaussian(), None, X, log_partition=known(np.inf))
    with pytest.raises(ebm.EnergyError, match="'lower', 'upper' or None; got 'both'"):
        ebm.log_likelihood(gaussian(), None, X, log_partition=known(0.0, bound="both"))


def test_what_is_no_energy_is_refused():
    log_z = known(0.0)
    with pytest.raises(TypeError, match=r"Normal is normalised. Write distribution.log_prob\(rows\)"):
        ebm.log_likelihood(dist.Normal(0, 1), None, X, log_partition=log_z)
    with pytest.raises(TypeError, match="got int"):
        ebm.log_likelihood(3, None, X, log_partition=log_z)
    with pytest.raises(TypeError, match="takes None for params"):
        ebm.log_likelihood(gaussian(), PARAMS, X, log_partition=log_z)
    with pytest.raises(ebm.EnergyError, match=r"\['scale'\] have no value"):
        ebm.log_likelihood(model, None, X, log_partition=log_z)
    with pytest.raises(ebm.EnergyError, match="observes no energy site"):
        ebm.log_likelihood(lambda x: numpyro.sample("x", dist.Normal(0, 1), obs=x), None, X, log_partition=log_z)
    with pytest.raises(ebm.EnergyError, match="do not match event_shape"):
        ebm.log_likelihood(gaussian(), None, X[:, :1], log_partition=log_z)
    with pytest.raises(ebm.EnergyError, match=r"got none: shape \(0, 2\)"):
        ebm.log_likelihood(gaussian(), None, X[:0], log_partition=known(0.0))


def test_log_z_as_it_is_estimated():
    log_z = ebm.log_partition(None, model, method="grid", params=PARAMS, model_args=(X,))
    result = ebm.log_likelihood(model, PARAMS, X, log_partition=log_z)
    assert result.mean == pytest.approx(stats.norm.logpdf(X, scale=[0.5, 2.0]).sum(1).mean(), rel=1e-5)
    context = ebm.EnergyDistribution(lambda x, c: 0.5 * (x - c) ** 2, context=X[:, 1], batch_shape=(300,))
    log_z = ebm.log_partition(None, context, method="grid")
    result = ebm.log_likelihood(context, None, X[:, 0], log_partition=log_z)
    np.testing.assert_allclose(result.rows, stats.norm.logpdf(X[:, 0], X[:, 1]), rtol=1e-5, atol=1e-5)
