"""Measures of fit on held-out rows against what is known exactly, and the table that compares models by them."""

import json
import math
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from scipy import stats
from sklearn.naive_bayes import GaussianNB

import numpyro_ebm as ebm
from numpyro_ebm.estimators import ksd as ksd_estimator
from numpyro_ebm.evaluation import kernel_two_sample

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(0, 0.5, (300, 2))
NORMAL = ebm.EnergyDistribution(lambda x: 0.5 * jnp.sum(x**2), (2,))
RING = 4 * np.stack([np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)], axis=1)


def standard_model(x):
    t = numpyro.param("t", 1.0)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * jnp.sum(x**2), (2,)), obs=x)


# --- kernel Stein test


def brute_ksd(x, score, bandwidth):
    """The mean over pairs of the Stein kernel of the inverse multiquadric, by automatic differentiation."""

    def k(a, b):
        return (1 + jnp.sum((a - b) ** 2) / bandwidth**2) ** -0.5

    def u(a, b):
        cross = jnp.trace(jax.jacfwd(jax.grad(k, 1), 0)(a, b))
        return score(a) @ score(b) * k(a, b) + score(a) @ jax.grad(k, 1)(a, b) + score(b) @ jax.grad(k, 0)(a, b) + cross

    values = np.array(jax.jit(jax.vmap(jax.vmap(u, (None, 0)), (0, None)))(x, x))
    np.fill_diagonal(values, 0)
    return values


@pytest.mark.slow
def test_ksd_is_the_mean_of_the_stein_kernel(monkeypatch):
    x = X[:30]
    pairs = brute_ksd(x, lambda x: -x, 0.7)
    result = ebm.ksd_test(KEY, NORMAL, x, bandwidth=0.7, num_bootstraps=50)
    np.testing.assert_allclose(result.statistic, pairs.sum() / (30 * 29), rtol=1e-4)
    influence = pairs.sum(1) / 29
    np.testing.assert_allclose(result.standard_error, 2 * influence.std(ddof=1) / math.sqrt(30), rtol=1e-4)
    monkeypatch.setattr(ksd_estimator, "PAIRS_AT_ONCE", 100)  # three rows at once
    parts = ebm.ksd_test(KEY, ebm.EnergyDistribution(lambda x: 0.5 * x @ x, (2,)), x, bandwidth=0.7, num_bootstraps=50)
    np.testing.assert_allclose(parts, result, rtol=1e-4)


@pytest.mark.slow
def test_ksd_p_values_are_uniform_where_the_model_is_true_and_small_elsewhere():
    @partial(jax.jit, static_argnums=(0, 1))
    def p_values(scale, loc):
        def one(key):
            key_rows, key_test = jax.random.split(key)
            x = loc + scale * jax.random.normal(key_rows, (50, 2))
            return ebm.ksd_test(key_test, NORMAL, x, num_bootstraps=99).p_value

        return jax.lax.map(one, jax.random.split(KEY, 200), batch_size=50)

    null = np.asarray(p_values(1.0, 0.0))
    assert stats.chisquare(np.histogram(null, 5, (0, 1))[0]).pvalue > 1e-4
    for level in (0.05, 0.2):
        assert abs(np.mean(null <= level) - level) < 5 * math.sqrt(level * (1 - level) / 200)
    assert np.mean(np.asarray(p_values(1.0, 0.7)) <= 0.05) > 0.9
    assert np.mean(np.asarray(p_values(0.5, 0.0)) <= 0.05) > 0.9


def autoregressive(rng_key, num, persistence):
    """A chain ``(num, 2)`` whose law is standard normal."""
    noise = jax.random.normal(rng_key, (num, 2))
    advance = lambda x, z: (x := persistence * x + jnp.sqrt(1 - persistence**2) * z, x)  # noqa: E731
    return jax.lax.scan(advance, noise[0], noise)[1]


@jax.jit
def ksd_of_chain(rng_key, persistence, shift):
    key_chain, key_test = jax.random.split(rng_key)
    return ebm.ksd_test(key_test, NORMAL, autoregressive(key_chain, 500, persistence) + shift, num_bootstraps=200)


@pytest.mark.slow
@pytest.mark.parametrize(("persistence", "at_most"), [(0.0, 0.09), (0.5, 0.1), (0.9, 0.12)])
def test_ksd_keeps_its_level_on_correlated_draws(persistence, at_most):
    """Of 300 true models at level 0.05; independent signs reject 41 % and 97 % of the latter two."""
    keys = jax.random.split(KEY, 300)
    found = jax.lax.map(lambda key: ksd_of_chain(key, persistence, 0.0), keys)
    assert jnp.mean(found.p_value <= 0.05) < at_most
    worth = 500 * (1 - persistence**2) / (1 + persistence**2) if persistence else 500  # squares forget faster
    assert 0.5 * worth * (1 - persistence) / (1 + persistence) < jnp.mean(found.ess) < 1.3 * worth


@pytest.mark.slow
def test_ksd_of_chains_sees_their_autocorrelation_and_independent_rows_as_they_are():
    independent = ksd_of_chain(KEY, 0.0, 0.0)
    assert independent.ess == 500
    assert ksd_of_chain(KEY, 0.0, 0.3).p_value < 0.01  # power is kept
    chain = ksd_of_chain(KEY, 0.9, 0.0)
    assert 10 < chain.ess < 60  # 500 / 19
    assert chain.p_value > 0.01
    assert ksd_of_chain(KEY, 0.5, 0.6).p_value < 0.01
    by_chain = jax.vmap(lambda key: autoregressive(key, 125, 0.5))(jax.random.split(KEY, 4))
    found = ebm.ksd_test(KEY, NORMAL, by_chain, num_bootstraps=200)
    assert 80 < found.ess < 350  # 500 / 3
    assert found.p_value > 0.01


@pytest.mark.slow
def test_two_sample_tests_say_that_draws_are_those_of_a_chain():
    chain = autoregressive(KEY, 400, 0.9)
    with pytest.warns(UserWarning, match="mmd: consecutive draws are correlated, 400 of them are worth"):
        ebm.mmd(KEY, chain, chain[::20], num_permutations=10)
    ebm.mmd(KEY, chain[::40], chain[::20], num_permutations=10)


@pytest.mark.slow
def test_ksd_of_models_scores_and_normalised_distributions_agree():
    expected = ebm.ksd_test(KEY, NORMAL, X, num_bootstraps=20)
    score = ebm.ScoreDistribution(lambda x: -x, (2,))
    for same in (score, dist.Normal(0, 1).expand([2]).to_event(1), (standard_model, {"t": 1.0})):
        np.testing.assert_allclose(ebm.ksd_test(KEY, same, X, num_bootstraps=20), expected, rtol=1e-4)
    assert expected.p_value < 0.1


@pytest.mark.slow
def test_masked_rows_take_no_part_in_ksd_and_sm():
    keep = np.arange(300) < 200

    def model(x):
        with numpyro.handlers.mask(mask=keep), numpyro.plate("rows", len(x)):
            numpyro.sample("x", NORMAL, obs=x)

    x = np.where(keep[:, None], X, np.nan)
    masked, whole = (
        ebm.ksd_test(KEY, d, x, bandwidth=1.0, num_bootstraps=500) for d, x in (((model, {}), x), (NORMAL, X[:200]))
    )
    np.testing.assert_allclose(masked[:2], whole[:2], rtol=1e-4)
    masked, whole = ebm.sm_loss((model, {}), x), ebm.sm_loss(NORMAL, X[:200])
    np.testing.assert_allclose(masked[1:], whole[1:], rtol=1e-5)
    np.testing.assert_array_equal(np.isnan(masked.rows), ~keep)


def test_what_ksd_and_sm_refuse():
    rows = ebm.EnergyDistribution(lambda x, c: c * x**2, context=np.ones(5), batch_shape=(5,))
    spins = ebm.EnergyDistribution(jnp.sum, (2,), support=constraints.boolean)
    with pytest.raises(ebm.EnergyError, match="a context or a base of its own"):
        ebm.ksd_test(KEY, rows, np.ones(5))
    for measure in (partial(ebm.ksd_test, KEY), ebm.sm_loss):
        with pytest.raises(ebm.EnergyError, match="discrete"):
            measure(spins, np.ones((5, 2), int))
        with pytest.raises(ebm.EnergyError, match="Row 0 of the data is not finite"):
            measure(NORMAL, np.full((5, 2), np.nan))
        with pytest.raises(TypeError, match=r"a pair \(model, params\); got function"):
            measure(standard_model, X)
        with pytest.raises(ebm.EnergyError, match="ImproperUniform has no normaliser"):
            measure(dist.ImproperUniform(constraints.real, (), ()), np.ones(5))
    with pytest.raises(ebm.EnergyError, match="needs two or more; got 1"):
        ebm.ksd_test(KEY, NORMAL, X[:1])
    with pytest.raises(ebm.EnergyError, match="num_bootstraps >= 1"):
        ebm.ksd_test(KEY, NORMAL, X, num_bootstraps=0)


# --- score matching loss


def test_sm_loss_of_a_gaussian_is_exact():
    expected = 0.5 * (X**2).sum(1) - 2
    for subject in (NORMAL, dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)), (standard_model, {"t": 1.0})):
        result = ebm.sm_loss(subject, X)
        np.testing.assert_allclose(result.rows, expected, rtol=1e-5, atol=1e-6)
    assert result.mean == pytest.approx(expected.mean(), rel=1e-5)
    assert result.standard_error == pytest.approx(expected.std(ddof=1) / math.sqrt(300), rel=1e-5)
    mixture = dist.MixtureSameFamily(dist.Categorical(jnp.ones(2) / 2), dist.Normal(jnp.array([-1.0, 1.0]), 0.5))
    assert np.all(np.isfinite(ebm.sm_loss(mixture, X[:, 0]).rows))


# --- MMD


def brute_mmd(x, y, lengths):
    z = np.concatenate([x, y])
    squares = ((z[:, None] - z) ** 2).sum(-1)
    k = np.mean([np.exp(-squares / (2 * length**2)) for length in np.atleast_1d(lengths)], axis=0)
    m, n = len(x), len(y)
    within = (k[:m, :m].sum() - m) / (m * (m - 1)) + (k[m:, m:].sum() - n) / (n * (n - 1))
    return within - 2 * k[:m, m:].mean()


@pytest.mark.parametrize("bandwidth", [0.8, (0.3, 1.0, 2.0)])
def test_mmd_is_the_sum_over_pairs(bandwidth, monkeypatch):
    x, y = X[:20], X[20:55] + 0.3
    result = ebm.mmd(KEY, x, y, bandwidth=bandwidth, num_permutations=30)
    np.testing.assert_allclose(result.statistic, brute_mmd(x, y, bandwidth), rtol=1e-4)
    monkeypatch.setattr(kernel_two_sample, "PAIRS_AT_ONCE", 200)
    parts = ebm.mmd(KEY, np.float32(x), y, bandwidth=np.asarray(bandwidth) * 1.0, num_permutations=31)
    np.testing.assert_allclose(parts.statistic, result.statistic, rtol=1e-4)


def test_mmd_is_unbiased_for_its_closed_form_with_an_error_that_covers():
    shift, length, dim, num = 0.6, 1.3, 3, 60

    @jax.jit
    @partial(jax.vmap)
    def replicates(key):
        key_draws, key_rows, key_test = jax.random.split(key, 3)
        x = jax.random.normal(key_draws, (num, dim)) + shift / math.sqrt(dim)
        return ebm.mmd(key_test, x, jax.random.normal(key_rows, (num, dim)), bandwidth=length, num_permutations=1)

    results = replicates(jax.random.split(KEY, 300))
    spread = length**2 + 2
    exact = 2 * (length**2 / spread) ** (dim / 2) * (1 - math.exp(-(shift**2) / (2 * spread)))
    found = np.asarray(results.statistic)
    assert abs(found.mean() - exact) < 5 * found.std() / math.sqrt(300)
    ratio = np.sqrt(np.mean(np.asarray(results.standard_error) ** 2)) / found.std()
    assert 1 - 5 / math.sqrt(2 * 300) < ratio < 1.3


def test_mmd_does_not_depend_on_the_units_of_the_columns():
    x, y = jax.random.normal(KEY, (2, 100, 3))
    y, units = y.at[:, 0].add(1.0), jnp.array([0.01, 1.0, 800.0])
    plain, scaled = ebm.mmd(KEY, x, y, num_permutations=99), ebm.mmd(KEY, units * x + 5, units * y + 5, num_permutations=99)
    np.testing.assert_allclose(plain.statistic, scaled.statistic, rtol=1e-3)
    assert plain.p_value == scaled.p_value == 0.01


@pytest.mark.slow
def test_mmd_p_values_are_uniform_where_laws_are_equal_and_small_elsewhere():
    @partial(jax.jit, static_argnums=0)
    def p_values(shift):
        def one(key):
            key_draws, key_rows, key_test = jax.random.split(key, 3)
            x = jax.random.normal(key_draws, (30, 2)) + shift
            return ebm.mmd(key_test, x, jax.random.normal(key_rows, (40, 2)), num_permutations=99).p_value

        return jax.lax.map(one, jax.random.split(KEY, 200), batch_size=50)

    null = np.asarray(p_values(0.0))
    assert stats.chisquare(np.histogram(null, 5, (0, 1.0001))[0]).pvalue > 1e-4
    assert abs(np.mean(null <= 0.1) - 0.1) < 5 * math.sqrt(0.09 / 200)
    assert np.mean(np.asarray(p_values(1.0)) <= 0.05) > 0.9


def test_what_two_sample_tests_refuse():
    for test in (ebm.mmd, ebm.classifier_two_sample_test):
        with pytest.raises(ebm.EnergyError, match="draws have 2 numbers per event, rows have 1"):
            test(KEY, X, X[:, :1])
        with pytest.raises(ebm.EnergyError, match="Row 3 of rows is not finite"):
            test(KEY, X, np.where(np.arange(300)[:, None] == 3, np.nan, X))
        with pytest.raises(ebm.EnergyError, match="at least two"):
            test(KEY, X[:1], X)
    for bandwidth in (-1.0, (), np.ones((2, 2))):
        with pytest.raises(ebm.EnergyError, match="bandwidth"):
            ebm.mmd(KEY, X, X, bandwidth=bandwidth)
    with pytest.raises(ebm.EnergyError, match="num_folds=4"):
        ebm.classifier_two_sample_test(KEY, X[:4], X)
    with pytest.raises(TypeError, match="real numbers"):
        ebm.mmd(KEY, X + 1j, X)


# --- classifier two-sample test


@pytest.mark.slow
def test_a_classifier_reaches_the_accuracy_of_bayes():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(600, 2)) + [1.0, 0.0], rng.normal(size=(800, 2))
    result = ebm.classifier_two_sample_test(KEY, x, y)
    assert result.num_events == 600
    assert abs(result.accuracy - stats.norm.cdf(0.5)) < 5 * result.standard_error
    assert abs(result.auc - stats.norm.cdf(math.sqrt(0.5))) < 5 * result.standard_error
    assert result.standard_error == pytest.approx(1.5 * math.sqrt(result.accuracy * (1 - result.accuracy) / 1200))
    assert result.p_value < 1e-9
    assert result == ebm.classifier_two_sample_test(KEY, x, y)


@pytest.mark.slow
def test_a_classifier_is_at_one_half_where_laws_are_equal():
    rng = np.random.default_rng(2)
    pairs = [rng.normal(size=(2, 100, 2)) for _ in range(50)]
    results = [ebm.classifier_two_sample_test(KEY, *pair, classifier=GaussianNB()) for pair in pairs]
    accuracy = np.array([result.accuracy for result in results])
    assert abs(accuracy.mean() - 0.5) < 5 * accuracy.std() / math.sqrt(50)
    assert accuracy.std() < (1 + 5 / math.sqrt(2 * 50)) * np.mean([result.standard_error for result in results])
    rejected = np.mean([result.p_value <= 0.1 for result in results])
    assert rejected < 0.1 + 5 * math.sqrt(0.09 / 50)
    permuted = ebm.classifier_two_sample_test(KEY, *pairs[0], classifier=GaussianNB(), num_permutations=39)
    assert permuted.accuracy == results[0].accuracy
    assert permuted.p_value > 1 / 40
    assert ebm.classifier_two_sample_test(KEY, X, X + 2, classifier=GaussianNB(), num_permutations=19).p_value == 1 / 20


def test_scikit_learn_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"numpyro-ebm\[evaluation\]"):
        ebm.classifier_two_sample_test(KEY, X, X)


# --- weights of modes


def ring(rng, num, weights):
    return RING[rng.choice(8, num, p=weights)] + 0.3 * rng.normal(size=(num, 2))


def test_mode_weights_of_eight_gaussians():
    rng = np.random.default_rng(0)
    even, odd = np.full(8, 1 / 8), np.array([0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.0])
    draws, rows = ring(rng, 4000, odd), ring(rng, 3000, even)
    result = ebm.mode_weights(RING, draws, rows)
    np.testing.assert_allclose(result.rows_error, np.sqrt(result.rows * (1 - result.rows) / 3000))
    assert np.all(np.abs(result.draws - odd) <= 5 * np.maximum(result.draws_error, 1e-12))
    assert np.all(np.abs(result.rows - even) < 5 * result.rows_error)
    assert abs(result.total_variation - 0.25) < 5 * math.sqrt(np.sum(result.draws_error**2 + result.rows_error**2)) / 2
    assert result.num_missed == 1
    angle = lambda x: jnp.round(jnp.arctan2(x[1], x[0]) / (jnp.pi / 4)).astype(int) % 8  # noqa: E731
    for a, b in zip(ebm.mode_weights(angle, draws, rows, num_modes=8), result, strict=True):
        np.testing.assert_allclose(a, b)


def test_by_chance_is_what_equal_laws_show():
    rng = np.random.default_rng(1)
    weights = np.array([0.4, 0.3, 0.2, 0.1])
    results = [
        ebm.mode_weights(np.arange(4.0), rng.choice(4, 300, p=weights) * 1.0, rng.choice(4, 200, p=weights) * 1.0)
        for _ in range(40)
    ]
    found, said = (np.array([getattr(r, name) for r in results]) for name in ("total_variation", "by_chance"))
    assert abs(found.mean() - said.mean()) < 5 * found.std() / math.sqrt(40)


def test_chains_count_for_what_they_are_worth():
    rng = np.random.default_rng(2)
    rows = rng.choice([-1.0, 1.0], 500)
    frozen = np.repeat([[-1.0], [1.0], [1.0], [1.0]], 100, axis=1)
    result = ebm.mode_weights(lambda x: x > 0, frozen, rows)
    np.testing.assert_allclose(result.draws_error, math.sqrt(0.25 * 0.75 / 4))
    stay = 0.9  # in one of two modes: the integrated autocorrelation time is (1 + 0.8) / (1 - 0.8) = 9
    flips = rng.random((4, 2000)) > stay
    chains = np.where((rng.integers(2, size=(4, 1)) + flips.cumsum(1)) % 2, 1.0, -1.0)
    error = ebm.mode_weights(lambda x: x > 0, chains, rows).draws_error[0]
    assert 0.8 < error / math.sqrt(0.25 * 9 / 8000) < 1.25
    independent = ebm.mode_weights(lambda x: x > 0, chains.ravel(), rows)
    np.testing.assert_allclose(independent.draws_error, np.sqrt(independent.draws * independent.draws[::-1] / 8000))
    nowhere = ebm.mode_weights(lambda x: x > 0, np.ones((4, 100)), rows)
    assert nowhere.num_missed == 1
    assert nowhere.total_variation == pytest.approx(np.mean(rows < 0))


def test_labels_that_are_none_are_refused():
    rows = X[:, 0]
    for labels, words in (
        (lambda x: jnp.where(x > 0, 1, -1), "got -1"),
        (lambda x: 0.5 * x, "one whole number"),
        (lambda x: jnp.arange(3), r"of shape \(3,\)"),
        (np.ones((2, 3)), "labels_of needs centres"),
    ):
        with pytest.raises(ebm.EnergyError, match=words):
            ebm.mode_weights(labels, rows, rows)
    with pytest.raises(ebm.EnergyError, match="num_modes - 1 = 0; got 1"):
        ebm.mode_weights(lambda x: x > 0, rows, rows, num_modes=1)
    with pytest.raises(ebm.EnergyError, match=r"the rows' events \(\); got \(1, 300, 2\)"):
        ebm.mode_weights(lambda x: x > 0, X[None], rows)


# --- the table


def gaussian(scale):
    return ebm.EnergyDistribution(lambda x: 0.5 * jnp.sum(x**2) / scale**2, (2,))


def log_z(scale, error=0.0, bound=None):
    return ebm.LogPartition(math.log(2 * math.pi * scale**2), error, math.inf, bound)


TRUTH = dist.Normal(0, 0.5).expand([2]).to_event(1)
MODELS = {
    "truth": TRUTH,
    "energy": gaussian(0.5),
    "wide": gaussian(0.8),
    "score": ebm.ScoreDistribution(lambda x: -4 * x, (2,)),
    "model": (standard_model, {"t": 4.0}),
    "apart": gaussian(0.5),
}
LOG_Z = {
    "energy": log_z(0.5),
    "wide": log_z(0.8, 0.02, "lower"),
    "model": log_z(0.5, 0.3),
    "apart": ebm.LogPartitionBounds(log_z(0.5), log_z(2.0), *[np.zeros(2)] * 3),
}
DRAWS = {name: 0.5 * np.random.default_rng(i).normal(size=(300, 2)) for i, name in enumerate(MODELS, 5)}
DRAWS["wide"] = DRAWS["wide"] * 1.6
QUADRANTS = lambda x: (x[0] > 0).astype(int) + 2 * (x[1] > 0)  # noqa: E731
MEASURES = {
    "log_likelihood": {},
    "sm": {},
    "ksd": {"num_bootstraps": 200},
    "mmd": {"num_permutations": 200, "bandwidth": 0.7},
    "c2st": {"classifier": GaussianNB()},
    "modes": {"num_modes": 4},
}


@pytest.fixture(scope="module")
def table():
    return ebm.evaluate(KEY, MODELS, X, measures=MEASURES, log_partition=LOG_Z, draws=DRAWS, modes=QUADRANTS)


def test_evaluate_holds_what_each_measure_says(table):
    exact = np.asarray(TRUTH.log_prob(X)).mean()
    for name in ("truth", "energy", "model"):
        assert table.results[name]["log_likelihood"].mean == pytest.approx(exact, rel=1e-5)
    assert table.results["model"]["log_likelihood"].standard_error > 0.3
    loss = [float(table.results[name]["sm"].mean) for name in ("truth", "energy", "score", "model", "apart")]
    np.testing.assert_allclose(loss, ebm.sm_loss(TRUTH, X).mean, rtol=1e-5)
    discrepancy = [float(table.results[name]["ksd"].p_value) for name in ("truth", "energy", "score", "model", "apart")]
    assert np.ptp(discrepancy) < 0.02
    statistic = ebm.mmd(KEY, DRAWS["energy"], X, bandwidth=0.7, num_permutations=200).statistic
    np.testing.assert_allclose(table.results["energy"]["mmd"].statistic, statistic, atol=1e-6)
    expected = ebm.mode_weights(QUADRANTS, DRAWS["wide"], X)
    assert table.results["wide"]["modes"].total_variation == expected.total_variation
    assert all(float(table.results["wide"][name].p_value) < 0.01 for name in ("ksd", "mmd"))
    assert all(float(table.results["truth"][name].p_value) > 0.01 for name in ("ksd", "mmd", "c2st"))
    np.testing.assert_array_equal(table.draws["wide"], np.float32(DRAWS["wide"]))


def test_what_does_not_exist_is_blank_and_never_a_number(table):
    assert [name for name, each in table.results.items() if each["log_likelihood"] is None] == ["score", "apart"]
    text = str(table).splitlines()
    assert text[0] == "300 held-out rows"
    assert text[1].split() == ["model", *MEASURES]
    rows = {line.split()[0]: line for line in text[3:9]}
    assert rows.keys() == MODELS.keys()
    assert rows["score"].split()[1] == rows["apart"].split()[1] == "-"
    assert len({line.index("+-") for name, line in rows.items() if name in ("truth", "energy")}) == 1
    notes = "\n".join(text[9:])
    for measure in MEASURES:
        assert f"\n{measure}: " in f"\n{notes}"
    assert "note on apart: The bounds on log Z are 2.77 nats apart" in notes
    assert "note on wide: in expectation the true value is at most this" in notes
    assert "-: the measure does not exist for this model" in notes


def test_other_forms_of_the_table(table):
    plain = json.loads(json.dumps(table.as_dict()))
    assert plain["score"]["log_likelihood"] is None
    assert plain["truth"]["log_likelihood"]["mean"] == table.results["truth"]["log_likelihood"].mean
    assert plain["wide"]["modes"]["draws"] == pytest.approx(table.results["wide"]["modes"].draws.tolist())
    assert "at most this" in plain["wide"]["notes"][0]
    html = table._repr_html_()
    assert html.count("<tr>") == 7
    assert html.count("<td>-</td>") == 2
    named = ebm.evaluate(KEY, {"<b>": TRUTH}, X, measures="sm")
    assert "&lt;b&gt;" in named._repr_html_()


def test_a_figure_depends_on_its_model_and_measure_alone(table):
    alone = ebm.evaluate(KEY, {"wide": MODELS["wide"]}, X, measures={"mmd": MEASURES["mmd"]}, draws={"wide": DRAWS["wide"]})
    assert alone.results["wide"]["mmd"] == table.results["wide"]["mmd"]
    assert alone.measures == ("mmd",)


def test_pairs_of_rows_tell_models_apart(table):
    found = table.difference("energy", "wide")
    rows = np.asarray(TRUTH.log_prob(X)) - stats.norm.logpdf(X, scale=0.8).sum(1)
    assert found.mean == pytest.approx(rows.mean(), rel=1e-4)
    assert found.standard_error == pytest.approx(math.hypot(rows.std(ddof=1) / math.sqrt(300), 0.02), rel=1e-3)
    assert table.difference("wide", "energy", "sm").mean > 0
    for names, words in (
        (("energy", "score"), "does not exist for 'score'"),
        (("energy", "wade"), "Did you mean 'wide'"),
        (("energy", "wide", "mmd"), "no row-by-row difference of 'mmd'"),
    ):
        with pytest.raises(ebm.EnergyError, match=words):
            table.difference(*names)


@pytest.mark.slow
def test_what_chains_are_worth_is_said():
    rng = np.random.default_rng(0)
    stuck = rng.normal(size=(80, 1, 2)).repeat(200, axis=1)
    draws = {"stuck": stuck[:4], "slow": stuck, "fine": 0.5 * rng.normal(size=(4, 100, 2))}
    measures = {"mmd": {"num_permutations": 99}, "c2st": {"classifier": GaussianNB()}}
    found = ebm.evaluate(KEY, dict.fromkeys(draws, TRUTH), X, measures=measures, draws=draws)
    assert len(found.draws["stuck"]) == 4
    assert found.results["stuck"] == {"mmd": None, "c2st": None}
    assert len(found.draws["slow"]) == 80
    assert any("compare only 80" in note for note in found.notes["slow"])
    assert 200 < len(found.draws["fine"]) <= 400
    assert found.notes["fine"] == ()
    assert any("too few for mmd and c2st" in note for note in found.notes["stuck"])
    assert any("chains disagree" in note for note in found.notes["stuck"])


@pytest.mark.slow
def test_draws_are_the_models_own():
    models = {"truth": TRUTH, "energy": gaussian(0.5), "score": MODELS["score"]}
    found = ebm.evaluate(KEY, models, X, measures="mmd", num_draws=200)
    assert [len(draws) for draws in found.draws.values()] == [200, pytest.approx(150, abs=50), 200]
    assert all(each["mmd"].p_value > 0.01 for each in found.results.values())


@pytest.mark.slow
def test_log_z_is_estimated_by_the_method_given():
    models = {"truth": TRUTH, "energy": gaussian(0.5), "narrow": gaussian(0.01)}
    start = dist.Normal(0, 1).expand([2]).to_event(1)
    poor = ebm.AnnealedImportanceSampling(num_levels=2, num_chains=16, start=start)
    options = {"measures": "log_likelihood", "log_partition": {"energy": "grid", "narrow": poor}}
    found = ebm.evaluate(KEY, models, X, **options)
    truth, energy, narrow = (each["log_likelihood"] for each in found.results.values())
    assert energy.mean == pytest.approx(truth.mean, rel=1e-5)
    assert energy.log_partition_error < 1e-5
    assert narrow.bound == "upper"
    assert narrow.ess < 10
    assert not narrow.is_reliable
    assert "(see note)" in str(found)
    assert any("neither its value nor its error is reliable" in note for note in found.notes["narrow"])
    assert any("means nothing" in note and "'ais'" in note for note in found.notes["narrow"])  # what log_partition warned of


@pytest.mark.slow
def test_discrete_models():
    logits = jnp.array([0.5, -1.0, 0.0])
    energy = ebm.EnergyDistribution(lambda x: -jnp.sum(logits * x), (3,), support=constraints.boolean)
    truth = dist.Bernoulli(logits=logits).to_event(1)
    rows = truth.sample(KEY, (200,))
    exact = ebm.LogPartition(np.log1p(np.exp(logits)).sum(), 0.0, math.inf, None)
    found = ebm.evaluate(
        KEY, {"energy": energy, "truth": truth}, rows, log_partition={"energy": exact}, num_draws=200
    ).results
    assert found["energy"]["sm"] is found["truth"]["ksd"] is None
    expected = float(truth.log_prob(rows).mean())
    assert [each["log_likelihood"].mean for each in found.values()] == pytest.approx([expected] * 2, rel=1e-5)
    assert all(each["mmd"].p_value > 0.01 for each in found.values())


@pytest.mark.slow
def test_rows_with_a_context_each_are_compared_with_a_draw_each():
    context = np.linspace(-2, 2, 200)
    truth = dist.Normal(context, 0.5)
    rows = truth.sample(KEY)
    sampler = ebm.ChainSampler("mala", num_warmup=100, num_steps=50)
    rows_of_own = {"context": context, "batch_shape": (200,)}
    energy = ebm.EnergyDistribution(lambda x, c: 2 * (x - c) ** 2, **rows_of_own, sampler=sampler)
    value = np.full(200, 0.5 * math.log(2 * math.pi) + math.log(0.5))
    exact = ebm.LogPartition(value, 0 * value, math.inf, None)
    found = ebm.evaluate(KEY, {"energy": energy, "truth": truth}, rows, log_partition={"energy": exact})
    for each in found.results.values():
        assert each["log_likelihood"].mean == pytest.approx(float(truth.log_prob(rows).mean()), rel=1e-4)
        assert each["ksd"] is None
        assert each["mmd"].p_value > 0.01
    assert [draws.shape for draws in found.draws.values()] == [(200,)] * 2


def test_what_evaluate_refuses():
    one = {"truth": TRUTH}
    for options, words in (
        ({"measures": ("ks",)}, "Unknown measure 'ks'. Did you mean 'ksd'"),
        ({"measures": ()}, "needs a measure"),
        ({"measures": ("modes",)}, "modes=labels_of"),
        ({"measures": ("sm",), "modes": QUADRANTS}, "measures="),
        ({"draws": {"truht": X}}, "draws has 'truht'.*'truth'"),
        ({"log_partition": {"x": None}}, "log_partition has 'x'"),
        ({"log_partition": log_z(0.5)}, "log Z of a single model"),
        ({"draws": {"truth": X[:, :1]}, "measures": ("mmd",)}, "Model 'truth': draws need shape"),
        ({"num_draws": 0}, "num_draws >= 2"),
    ):
        with pytest.raises(ebm.EnergyError, match=words):
            ebm.evaluate(KEY, one, X, **options)
    with pytest.raises(ebm.EnergyError, match="dict of models"):
        ebm.evaluate(KEY, {}, X)
    with pytest.raises(ebm.EnergyError, match="Model 'truth': .*Row 0 of the data is not finite"):
        ebm.evaluate(KEY, one, np.full((5, 2), np.nan))
    with pytest.raises(TypeError, match="got function"):
        ebm.evaluate(KEY, {"model": standard_model}, X)

    def half(x):
        with numpyro.handlers.mask(mask=np.arange(len(x)) < 20), numpyro.plate("rows", len(x)):
            numpyro.sample("x", NORMAL, obs=x)

    with pytest.raises(ebm.EnergyError, match="different numbers of rows"):
        ebm.evaluate(KEY, {"truth": TRUTH, "half": (half, {})}, X, measures="sm")


def test_ksd_of_two_rows_has_no_error():
    assert np.isinf(ebm.ksd_test(jax.random.key(0), dist.Normal(0.0, 1.0), jnp.array([0.0, 1.0])).standard_error)
