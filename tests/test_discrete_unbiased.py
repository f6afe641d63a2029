"""Coupled chains of discrete events: their laws, their meetings, and the unbiased gradient that they give."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from helpers import some_slow, surrogate
from numpyro.distributions import constraints

import numpyro_ebm as ebm
from numpyro_ebm.energies import BoltzmannMachine
from numpyro_ebm.kernels.coupled_gibbs import couple_values, coupled_gibbs
from numpyro_ebm.kernels.coupling import coupled_step
from numpyro_ebm.kernels.densities import ChainDensity
from numpyro_ebm.kernels.elements import DiscreteState

GRID = np.arange(9).reshape(3, 3)
LEFT = np.r_[GRID[:, :-1].ravel(), GRID[:-1].ravel()]
RIGHT = np.r_[GRID[:, 1:].ravel(), GRID[1:].ravel()]
SPINS = np.array(list(itertools.product((-1, 1), repeat=9)))
FEATURES = np.stack([(SPINS[:, LEFT] * SPINS[:, RIGHT]).sum(1), SPINS.sum(1)], axis=1)
AT = {"beta": 0.4, "h": 0.2}


def ising(x):
    """The 3 x 3 Ising model with open edges."""
    beta, h = numpyro.param("beta", 0.0), numpyro.param("h", 0.0)
    energy = lambda s: -beta * jnp.sum(s[LEFT] * s[RIGHT]) - h * jnp.sum(s)  # noqa: E731
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(energy, (9,), support=ebm.spins), obs=x)


def gradients(model, x, at, num):
    slope = jax.grad(lambda p, key: surrogate(model, p, x, key=key))
    found = jax.jit(partial(jax.lax.map, partial(slope, at)))(jax.random.split(jax.random.key(0), num))
    return np.stack([np.asarray(found[name]) for name in at], axis=-1)


def within(values, truth, errors=5.0):
    return np.all(np.abs(values.mean(0) - truth) < errors * values.std(0) / np.sqrt(len(values)))


@pytest.mark.parametrize("kernel", some_slow(["gibbs"], [ebm.Gibbs(scan="random", num_updates=18)]))
def test_the_gradient_is_that_of_the_likelihood_where_that_of_cd_is_biased(kernel):
    x = np.array([[1] * 9, [1] * 4 + [-1] * 5, [-1, 1] * 4 + [1]])
    log_p = FEATURES @ np.array([0.4, 0.2])
    p = np.exp(log_p - np.logaddexp.reduce(log_p))
    own = np.stack([(x[:, LEFT] * x[:, RIGHT]).sum(1), x.sum(1)], axis=1)
    exact = np.sum(own, axis=0) - 3 * (p @ FEATURES)
    options = {"kernel": kernel, "burn_in": 2, "num_steps": 6, "num_chains": 10, "start": "data"}
    found = gradients(ebm.estimate(ising, "unbiased", **options), x, AT, 400)
    assert within(found, exact)
    assert np.all(found.std(0) / np.sqrt(400) < 0.6)
    assert not within(gradients(ebm.estimate(ising, "cd"), x, AT, 400), exact)


@pytest.mark.slow
def test_rows_with_a_context_have_pairs_of_their_own():
    fields = jnp.array([-1.0, 0.3, 2.0])

    def model(x):
        t = numpyro.param("t", 1.0)
        with numpyro.plate("rows", 3):
            energy = lambda x, c: -t * c * jnp.sum(x)  # noqa: E731
            d = ebm.EnergyDistribution(energy, (2,), support=constraints.boolean, context=fields)
            numpyro.sample("x", d, obs=x)

    x = np.array([[0, 1], [1, 1], [0, 0]])
    exact = np.sum(fields * (x.sum(1) - 2 / (1 + np.exp(-0.5 * fields))))
    found = gradients(ebm.estimate(model, "unbiased", burn_in=0, num_steps=1), x, {"t": 0.5}, 1000)
    assert within(found, exact)


@pytest.mark.slow
def test_a_ready_made_energy_gives_the_gradient_by_its_conditionals():
    pairs = np.array([[0.0, 0.8, -0.4], [0.8, 0.0, 0.5], [-0.4, 0.5, 0.0]])

    def model(x):
        biases = numpyro.param("biases", jnp.zeros(3))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(BoltzmannMachine(jnp.asarray(pairs), biases)), obs=x)

    x = np.array([[0, 1, 1], [1, 1, 0]])
    at = {"biases": jnp.array([0.5, -0.3, 0.2])}
    exact = jax.grad(lambda p: surrogate(ebm.estimate(model, "exact"), p, x))(at)["biases"]
    found = gradients(ebm.estimate(model, "unbiased", burn_in=1, num_steps=3), x, at, 1000)[..., 0]
    assert within(found, np.asarray(exact))


@pytest.mark.parametrize("seed", range(3))
def test_two_values_are_coupled_maximally(seed):
    probabilities = jnp.asarray(np.random.default_rng(seed).dirichlet(np.ones(4), 2), jnp.float32)
    probabilities = probabilities.at[0, 1].set(0.0)
    probabilities = probabilities / jnp.sum(probabilities, axis=1, keepdims=True)
    draws = np.asarray(jax.vmap(couple_values, (0, None))(jax.random.split(jax.random.key(seed), 40_000), probabilities))
    for drawn, p in zip(draws.T, np.asarray(probabilities), strict=True):
        found = np.bincount(drawn, minlength=4) / 40_000
        assert np.all(np.abs(found - p) <= 5 * np.sqrt(p * (1 - p) / 40_000))
    meets = float(jnp.sum(jnp.min(probabilities, axis=0)))
    assert abs(np.mean(draws[:, 0] == draws[:, 1]) - meets) < 5 * np.sqrt(meets * (1 - meets) / 40_000)


def test_equal_distributions_give_equal_values():
    p = jnp.asarray(np.random.default_rng(0).dirichlet(np.ones(5)), jnp.float32)
    draws = jax.vmap(couple_values, (0, None))(jax.random.split(jax.random.key(0), 20_000), jnp.stack([p, p]))
    np.testing.assert_array_equal(draws[:, 0], draws[:, 1])


LOG_P = np.log(np.random.default_rng(1).dirichlet(np.ones(9)).reshape(3, 3))


@pytest.mark.parametrize("options", [{}, {"scan": "random", "num_updates": 3}], ids=["systematic", "random"])
@pytest.mark.slow
def test_either_chain_follows_its_kernel(options):
    """Transitions of two elements of three values, by chain, against those of the kernel alone."""
    kernel = ebm.Gibbs(np.arange(3), **options)
    table = jnp.asarray(LOG_P, jnp.float32)
    density = ChainDensity(lambda x: table[x[0], x[1]])
    starts = jnp.array([[0, 2], [1, 1]])
    pair = DiscreteState(starts, jax.vmap(density)(starts))
    num = 20_000
    moved = jax.vmap(lambda key: coupled_gibbs(key, kernel, pair, density))(jax.random.split(jax.random.key(0), num))
    positions = np.asarray(moved.position)
    np.testing.assert_allclose(moved.logdensity, LOG_P[positions[..., 0], positions[..., 1]], rtol=1e-5)
    for chain, start in enumerate(starts):
        alone = lambda key, start=start: kernel.step(key, kernel.init(key, start, density), density)  # noqa: E731
        state, _ = jax.vmap(alone)(jax.random.split(jax.random.key(1), num))
        counts = [np.bincount(np.asarray(x) @ [3, 1], minlength=9) / num for x in (positions[:, chain], state.position)]
        p = np.mean(counts, axis=0)
        assert np.all(np.abs(counts[0] - counts[1]) <= 5 * np.sqrt(2 * p * (1 - p) / num))


def test_chains_stay_together():
    table = jnp.asarray(LOG_P, jnp.float32)
    density = ChainDensity(lambda x: table[x[0], x[1]])
    starts = jnp.array([[0, 2], [1, 1]])
    kernel = ebm.Gibbs(np.arange(3))

    def run(key):
        def body(carry, key):
            pair, is_met = carry
            pair, is_met, _ = coupled_step(key, kernel, pair, is_met, density, "maximal")
            return (pair, is_met), (pair.position, is_met)

        start = (DiscreteState(starts, jax.vmap(density)(starts)), jnp.zeros((), bool))
        return jax.lax.scan(body, start, jax.random.split(key, 30))[1]

    positions, is_met = jax.vmap(run)(jax.random.split(jax.random.key(0), 500))
    assert np.all(np.asarray(is_met)[:, -1])
    assert not np.all(np.asarray(is_met)[:, 0])
    equal = np.all(np.asarray(positions)[:, :, 0] == np.asarray(positions)[:, :, 1], axis=-1)
    assert np.all(equal[np.asarray(is_met)])


def test_pairs_that_do_not_meet_are_told():
    # A strong coupling, under which the two chains of a pair end in either ordered phase.
    wrapped = ebm.estimate(ising, "unbiased", num_steps=5, burn_in=1, max_num_steps=5, num_chains=40)
    seeded = numpyro.handlers.substitute(numpyro.handlers.seed(wrapped, 0), {"beta": 3.0, "h": 0.0})
    with pytest.raises(ValueError, match=r"had not met after max_num_steps=5.*ordered phase"):
        seeded(SPINS[[0, -1]])


REFUSED = {
    "a continuous kernel": ({"kernel": "mala"}, "'mala' cannot sample a discrete support"),
    "a kernel without a coupling": ({"kernel": "dmala"}, "'dmala' has no coupling.*discrete supports gibbs.*kernel='gibbs'"),
    "flips": ({"kernel": "flips"}, "'flips' has no coupling.*kernel='gibbs'"),
    "a reflection": ({"kernel": "gibbs", "coupling": "reflection"}, "coupling='maximal'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    options, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        surrogate(ebm.estimate(ising, "unbiased", **options), AT, SPINS[:3])
