"""Energy discrepancy on discrete events: its noise, its expected loss by enumeration, and what it recovers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from helpers import fit, rows_of, some_slow, surrogate
from numpyro.distributions import constraints
from scipy.linalg import expm

import numpyro_ebm as ebm
from numpyro_ebm.estimators.parts.graph_noise import GraphNoise, decay_time, generator, transitions_of

STATES = np.array(list(itertools.product((0, 1), repeat=3)))
PAIRS = np.array([[0, 1], [0, 2], [1, 2]])
FEATURES = np.concatenate([STATES, STATES[:, PAIRS[:, 0]] * STATES[:, PAIRS[:, 1]]], axis=1)
TRUTH = np.array([0.3, -0.5, 0.8, 1.0, -0.7, 0.4])
P = np.exp(FEATURES @ TRUTH) / np.sum(np.exp(FEATURES @ TRUTH))
SKEWED = np.array([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]])
NOISES = {"uniform": 0.8, "absorbing": 0.8, "cyclic": 0.5, "skewed": None}


def machine(x):
    """A Boltzmann machine of three units with all pairs."""
    t = numpyro.param("t", jnp.zeros(6))
    energy = lambda x: -t[:3] @ x - t[3:] @ (x[PAIRS[:, 0]] * x[PAIRS[:, 1]])  # noqa: E731
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(energy, (3,), support=constraints.boolean), obs=x)


def options_of(name):
    return {"noise": SKEWED} if name == "skewed" else {"noise": name, "time": NOISES[name]}


@functools.cache
def joint(name):
    """q(c | x) of three units, ``(8, num_copies)``, and the recovery r(x' | c)."""
    one = SKEWED if name == "skewed" else transitions_of(name, NOISES[name], 2)
    forward = functools.reduce(np.kron, [one] * 3)
    return forward, (forward / forward.sum(axis=0)).T


def expected(t, name, w):
    """Mean loss of two negatives over rows, copies and negatives, by enumeration."""
    forward, recovery = joint(name)
    log_p = jnp.asarray(FEATURES, float) @ t
    rise = log_p - log_p[:, None]
    losses = jnp.log((w + jnp.exp(rise)[:, :, None] + jnp.exp(rise)[:, None, :]) / 2)
    return jnp.einsum("x,xc,ca,cb,xab->", P, forward, recovery, recovery, losses)


def limit(t, name):
    """The same without w, for negatives without number."""
    forward, recovery = joint(name)
    log_p = jnp.asarray(FEATURES, float) @ t
    return jnp.einsum("x,xc,xc->", P, forward, jnp.log(recovery @ jnp.exp(log_p)) - log_p[:, None])


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.usefixtures("x64")
def test_the_loss_has_its_optimum_at_the_truth(name):
    for loss in (functools.partial(limit, name=name), functools.partial(expected, name=name, w=1.0)):
        np.testing.assert_allclose(jax.grad(loss)(TRUTH), 0.0, atol=1e-12)
        assert np.linalg.eigvalsh(jax.hessian(loss)(TRUTH)).min() > 1e-3
    assert np.abs(jax.grad(expected)(TRUTH, name, 0.0)).max() > 1e-3


@pytest.mark.parametrize("w", some_slow([1.0], [0.0, 3.0]))
@pytest.mark.parametrize("name", some_slow(["absorbing", "skewed"], ["uniform", "cyclic"]))
def test_the_loss_of_rows_against_enumeration(name, w):
    x = STATES[np.random.default_rng(0).choice(8, 20_000, p=P)]
    at = TRUTH + 0.3
    value, slope = rows_of("energy_discrepancy", machine, x, at, num_negatives=2, w_stable=w, **options_of(name))
    for got, wanted in ((-value, expected(at, name, w)), (-slope, jax.grad(expected)(at, name, w))):
        error = np.std(got, axis=0) / np.sqrt(20_000)
        assert np.all(np.abs(np.mean(got, axis=0) - wanted) < 5 * error)
        assert np.all(error < 0.01)


@pytest.mark.parametrize("name", some_slow(["absorbing"], ["uniform", "cyclic", "skewed"]))
@pytest.mark.slow
def test_a_machine_is_recovered(name):
    # Maximum likelihood matches the means of the features, whose standard errors are 0.05.
    counts = np.array([14, 9, 6, 12, 18, 7, 21, 13])
    params = fit(ebm.estimate(machine, "energy_discrepancy", **options_of(name)), np.repeat(STATES, counts, axis=0))
    log_p = FEATURES @ np.asarray(params["t"])
    rows = np.repeat(FEATURES, counts, axis=0)
    found = np.exp(log_p - np.logaddexp.reduce(log_p)) @ FEATURES
    np.testing.assert_allclose(found, rows.mean(0), atol=0.02)


def categories(x):
    field, coupling = numpyro.param("field", jnp.zeros((2, 2))), numpyro.param("coupling", jnp.zeros((2, 2)))
    energy = lambda x: -jnp.sum(field * x[:, 1:]) - x[0, 1:] @ coupling @ x[1, 1:]  # noqa: E731
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(energy, (2, 3), support=ebm.one_hot), obs=x)


@pytest.mark.parametrize("noise", some_slow([None], ["absorbing", "ordinal", "cyclic"]))
@pytest.mark.slow
def test_one_hot_categories_are_recovered(noise):
    codes = np.array(list(itertools.product(range(3), repeat=2)))
    counts = np.array([8, 3, 5, 2, 9, 4, 6, 1, 7])
    x = np.eye(3, dtype=int)[np.repeat(codes, counts, axis=0)]
    params = fit(ebm.estimate(categories, "energy_discrepancy", noise=noise), x, steps=1500)
    one_hot = np.eye(3)[codes]
    log_p = np.sum(np.asarray(params["field"]) * one_hot[:, :, 1:], (1, 2))
    log_p += np.einsum("ia,ab,ib->i", one_hot[:, 0, 1:], np.asarray(params["coupling"]), one_hot[:, 1, 1:])
    np.testing.assert_allclose(np.exp(log_p - np.logaddexp.reduce(log_p)), counts / 45, atol=0.02)


def test_transitions_are_the_exponential_of_the_rates():
    for noise, slowest in (("uniform", 1.0), ("cyclic", 1 - np.cos(2 * np.pi / 5)), ("ordinal", 1 - np.cos(np.pi / 5))):
        rates = generator(noise, 5)
        np.testing.assert_allclose(rates.sum(axis=1), 0.0, atol=1e-14)
        np.testing.assert_allclose(transitions_of(noise, 1.7, 5), expm(1.7 * rates), atol=1e-12)
        np.testing.assert_allclose(decay_time(noise, 5, 0.3), -np.log(0.7) / slowest)
    np.testing.assert_allclose(generator("uniform", 4), np.full((4, 4), 0.25) - np.eye(4))
    np.testing.assert_allclose(generator("cyclic", 2), [[-1.0, 1.0], [1.0, -1.0]])
    np.testing.assert_allclose(generator("ordinal", 3), [[-0.5, 0.5, 0.0], [0.5, -1.0, 0.5], [0.0, 0.5, -0.5]])
    hidden = transitions_of("absorbing", 0.4, 2)
    np.testing.assert_allclose(hidden, [[np.exp(-0.4), 0, 1 - np.exp(-0.4)], [0, np.exp(-0.4), 1 - np.exp(-0.4)]])
    # Far from the ends a walk at rate 1/2 each way has the variance t.
    walk = transitions_of("ordinal", 3.0, 101)[50]
    np.testing.assert_allclose(walk @ (np.arange(101) - 50) ** 2, 3.0, rtol=1e-9)


def test_draws_follow_the_noise_and_its_recovery():
    matrix = np.array([[0.5, 0.0, 0.2, 0.3], [0.1, 0.1, 0.8, 0.0], [0.0, 0.6, 0.0, 0.4]])
    noise, num = GraphNoise.of(matrix), 40_000
    for draw, table in ((noise.draw, matrix), (noise.recover, (matrix / matrix.sum(0)).T)):
        for code, row in enumerate(table):
            found = np.bincount(draw(jax.random.key(code), jnp.full(num, code)), minlength=len(row)) / num
            assert np.all(np.abs(found - row) <= 5 * np.sqrt(row * (1 - row) / num))


def test_hidden_elements_alone_change():
    # At a time of 0.05 most copies hide nothing, and then all negatives are the row: the loss has no gradient.
    x = STATES[np.random.default_rng(0).choice(8, 200)]
    options = {"noise": "absorbing", "time": 0.05, "num_draws": 1, "num_negatives": 4}
    value, slope = rows_of("energy_discrepancy", machine, x, TRUTH, **options)
    untouched = np.abs(value + np.log(5 / 4)) < 1e-6
    assert abs(untouched.mean() - np.exp(-0.15)) < 0.12
    assert not np.any(slope[untouched])


def integers(x):
    t = numpyro.param("t", 0.5)
    with numpyro.plate("rows", len(x)):
        d = ebm.EnergyDistribution(lambda x: t * jnp.sum(x), x.shape[1:], support=constraints.integer_interval(2, 7))
        numpyro.sample("x", d, obs=x)


@pytest.mark.parametrize("noise", some_slow([None], ["uniform", "cyclic", "absorbing"]))
@pytest.mark.slow
def test_integers_are_recovered(noise):
    weights = np.exp(-0.4 * np.arange(6))
    x = np.random.default_rng(0).choice(np.arange(2, 8), (400, 2), p=weights / weights.sum())
    params = fit(ebm.estimate(integers, "energy_discrepancy", noise=noise), x, steps=300)
    log_p = -params["t"] * np.arange(2, 8)
    mean = np.exp(log_p - np.logaddexp.reduce(log_p)) @ np.arange(2, 8)
    spread = x.std() / np.sqrt(x.size)
    assert abs(mean - x.mean()) < 1.5 * spread  # of the order of the error of maximum likelihood


def test_defaults_follow_the_support():
    x = np.zeros((4, 12), int)
    for support, noise in ((constraints.boolean, "uniform"), (constraints.integer_interval(0, 4), "ordinal")):

        def model(x, support=support):
            numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.0 * jnp.sum(x), (12,), support=support), obs=x)

        default, given = (
            surrogate(ebm.estimate(model, "energy_discrepancy", **options), {}, x)
            for options in ({}, {"noise": noise, "time": decay_time(noise, 2 if noise == "uniform" else 5, 0.25)})
        )
        assert default == given


REFUSED = {
    "an unknown noise": (machine, {"noise": "unifrom"}, "Did you mean 'uniform'"),
    "a time of zero": (machine, {"time": 0.0}, "time > 0"),
    "a matrix with a time": (machine, {"noise": SKEWED, "time": 1.0}, "holds its time already"),
    "no probabilities": (machine, {"noise": np.ones((2, 2))}, "sum to 1"),
    "no matrix": (machine, {"noise": np.ones(2)}, r"shape \(2,\)"),
    "values never compared": (machine, {"noise": np.eye(2)}, "never compared"),
    "a matrix of another size": (machine, {"noise": np.full((3, 3), 1 / 3)}, "3 rows.*2 values"),
    "a scale": (machine, {"noise_scale": 0.5}, r"\['noise_scale'\] have no meaning.*noise='uniform'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    model, options, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        surrogate(ebm.estimate(model, "energy_discrepancy", **options), {}, STATES)


def test_continuous_events_take_no_graph():
    def model(x):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(lambda x: x**2), obs=x)

    with pytest.raises(ValueError, match=r"\['noise', 'time'\] have no meaning.*noise_scale"):
        surrogate(ebm.estimate(model, "energy_discrepancy", noise="uniform", time=0.5), {}, np.linspace(-1, 1, 5))


@pytest.mark.slow
def test_states_without_density_warn():
    def model(x):
        with numpyro.plate("rows", len(x)):
            energy = lambda x: 1e4 * jnp.sum(x)  # noqa: E731
            numpyro.sample("x", ebm.EnergyDistribution(energy, (12,), support=constraints.boolean), obs=x)

    wrapped = numpyro.handlers.seed(ebm.estimate(model, "energy_discrepancy", time=5.0), 0)
    with pytest.warns(UserWarning, match="noise leads to states that have no density.*smaller time"):
        numpyro.handlers.trace(wrapped).get_trace(np.zeros((5, 12), int))
