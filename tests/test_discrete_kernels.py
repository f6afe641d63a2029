"""Kernels on discrete supports: against enumeration, and what is refused."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from energy_cases import ENERGIES, plainly, probabilities, states_of
from helpers import advanced, check_moments, shares, some_slow
from numpyro.distributions import constraints

import numpyro_ebm as ebm
from numpyro_ebm.kernels import chains
from numpyro_ebm.kernels.names import KERNELS as NAMED

KEY = jax.random.key(0)
EDGES = [(3 * i + j, 3 * i + j + 1) for i in range(3) for j in range(2)] + [(i, i + 3) for i in range(6)]
LEFT, RIGHT = np.array(EDGES).T


def ising(x):
    """3 x 3 spins, open edges, beta = .3, h = .1, as 0 and 1."""
    s = 2.0 * x - 1
    return -0.3 * jnp.sum(s[LEFT] * s[RIGHT]) - 0.1 * jnp.sum(s)


def law(energy, values, size, log_base=lambda x: 0.0):
    states = np.array(list(itertools.product(values, repeat=size)))
    log_p = np.asarray(jax.vmap(lambda x: log_base(x) - energy(x))(jnp.asarray(states)), float)
    return states, np.exp(log_p - np.logaddexp.reduce(log_p))


def draws_of(distribution, kernel="gibbs", **options):
    run = ebm.sample(jax.random.key(0), distribution, kernel, num_warmup=50, num_samples=2000, **options)
    return run, np.asarray(run.samples["x"])


@pytest.mark.slow
def test_ising_moments_are_those_of_the_enumeration():
    run, x = draws_of(ebm.EnergyDistribution(ising, (9,), support=constraints.boolean))
    assert np.issubdtype(x.dtype, np.integer)
    s = 2 * x - 1
    statistics = np.stack([(s[..., LEFT] * s[..., RIGHT]).sum(-1), s.sum(-1)], -1)
    states, p = law(ising, (0, 1), 9)
    exact = 2 * states - 1
    exact = np.stack([(exact[:, LEFT] * exact[:, RIGHT]).sum(-1), exact.sum(-1)], -1)
    np.testing.assert_allclose(p @ exact, [4.2576176, 2.1874309], rtol=1e-6)
    check_moments(statistics, p @ exact, p @ exact**2 - (p @ exact) ** 2)
    assert set(run.stats) == {"num_gradients", "is_nonfinite"}
    assert (np.asarray(run.stats["num_gradients"]) == 9).all()
    assert not run.stats["is_nonfinite"].any()


@pytest.mark.slow
def test_three_values_a_base_and_a_forbidden_state():
    energy = lambda x: jnp.where(jnp.all(x == 2), jnp.inf, 0.3 * x[0] * x[1] - 0.2 * x[1])  # noqa: E731
    base = dist.Binomial(2, 0.4).expand([2]).to_event(1)
    _, x = draws_of(ebm.EnergyDistribution(energy, (2,), support=constraints.integer_interval(0, 2), base=base))
    states, p = law(energy, (0, 1, 2), 2, base.log_prob)
    flags = (x[:, :, None] == states).all(-1).astype(float)[..., p > 0]
    assert not (x == 2).all(-1).any()
    check_moments(flags, p[p > 0], p[p > 0] * (1 - p[p > 0]))


@pytest.mark.slow
def test_rows_keep_their_context():
    shift = jnp.array([-1.0, 2.0])
    d = ebm.EnergyDistribution(lambda x, c: -c * x, (), context=shift, batch_shape=(2,), support=constraints.boolean)
    _, x = draws_of(d)
    p = np.asarray(jax.nn.sigmoid(shift))
    check_moments(x.astype(float), p, p * (1 - p))


@pytest.mark.slow
def test_values_may_be_a_list():
    energy = lambda x: 0.7 * jnp.sum(x)  # noqa: E731
    d = ebm.EnergyDistribution(energy, (2,), support=constraints.integer_interval(0, 2))
    _, x = draws_of(d, ebm.Gibbs(values=[0, 1, 2]))
    _, again = draws_of(d)
    np.testing.assert_array_equal(x, again)


def test_tempered_replicas_of_a_discrete_event_keep_fractions_of_a_temperature():
    temperatures = np.array([1.0, 1.5, 2.0])
    kernel = ebm.ParallelTempering(ebm.Gibbs(values=[0, 1]), temperatures=tuple(temperatures))
    start = jnp.zeros((20_000, 3, 1), jnp.int32)
    moved = chains.advance(jax.random.key(0), kernel, lambda x, _: -2.0 * jnp.sum(x), start, num_steps=3).positions
    p = 1 / (1 + np.exp(2 / temperatures))
    np.testing.assert_array_less(abs(moved.mean((0, 2)) - p), 5 * np.sqrt(p * (1 - p) / 20_000))


def test_nan_is_stayed_away_from_and_counted():
    kernel = ebm.Gibbs(values=jnp.arange(2))
    log_density = lambda x, _: jnp.where(x[0] == 1, jnp.nan, 0.5 * x[1])  # noqa: E731
    run = chains.run(jax.random.key(0), kernel, log_density, jnp.zeros((2, 2), jnp.int32), num_warmup=0, num_samples=50)
    assert (run.positions[..., 0] == 0).all()
    assert run.info.is_nonfinite.all()


KERNELS = {
    "gibbs": ebm.Gibbs(),
    "gibbs, random": ebm.Gibbs(scan="random"),
    "gibbs, one update": ebm.Gibbs(scan="random", num_updates=1),
    "flips": ebm.Flips(),
    "one flip": ebm.Flips(num_flips=1),
    "gwg": ebm.GibbsWithGradients(),
    "gwg, barker": ebm.GibbsWithGradients(balance="barker"),
    "dmala": ebm.DMALA(0.5),
    "dmala, barker": ebm.DMALA(2.0, balance="barker"),
}
FIELD = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
COUPLING = np.random.default_rng(1).normal(size=(3, 3, 3, 3)).astype(np.float32)


def quadratic(x):
    """An energy of at most 3 x 3 numbers, of which none is independent of the others."""
    x = jnp.pad(jnp.atleast_2d(1.0 * x), ((0, 3 - len(jnp.atleast_2d(x))), (0, 3 - jnp.atleast_2d(x).shape[1])))
    return -0.4 * jnp.sum(FIELD * x) - 0.2 * jnp.einsum("iajb,ia,jb->", COUPLING, x, x)


SUPPORTS = {
    "units": ((3,), constraints.boolean, list(itertools.product((0, 1), repeat=3))),
    "spins": ((3,), ebm.spins, list(itertools.product((-1, 1), repeat=3))),
    "levels": ((2,), constraints.integer_interval(0, 2), list(itertools.product((0, 1, 2), repeat=2))),
    "categories": ((2, 3), ebm.one_hot, list(itertools.product(np.eye(3, dtype=int), repeat=2))),
}


def exact(support):
    """The distribution of `quadratic`, its states and their probabilities."""
    shape, constraint, states = SUPPORTS[support]
    log_p = -np.asarray(jax.vmap(quadratic)(jnp.asarray(np.array(states))), float)
    d = ebm.EnergyDistribution(quadratic, shape, support=constraint)
    return d, np.array(states), np.exp(log_p - np.logaddexp.reduce(log_p))


QUICK = ["gibbs", "flips", "gwg", "dmala"]
SOME_SLOW = some_slow(QUICK, [name for name in KERNELS if name not in QUICK])


@pytest.mark.parametrize("kernel", SOME_SLOW)
@pytest.mark.parametrize("support", SUPPORTS)
def test_a_transition_leaves_the_distribution_as_it_is(support, kernel):
    d, states, p = exact(support)
    num = 40_000
    start = states[np.random.default_rng(0).choice(len(states), num, p=p)]
    after = shares(advanced(KERNELS[kernel], d, jnp.asarray(start), 2), states)
    # Start and end are not independent, so the variance of their difference is at most four times that of one.
    assert np.all(abs(after - shares(start, states)) < 5 * np.sqrt(2 * p * (1 - p) / num))


@pytest.mark.parametrize("kernel", some_slow(["dmala"], [name for name in KERNELS if name != "dmala"]))
def test_chains_from_one_state_reach_the_distribution(kernel):
    d, states, p = exact("categories")
    num = 10_000
    start = jnp.broadcast_to(jnp.asarray(states[0]), (num, 2, 3))
    after = shares(advanced(KERNELS[kernel], d, start, 40), states)
    assert np.all(abs(after - p) < 5 * np.sqrt(p * (1 - p) / num))


@pytest.mark.parametrize(
    "name",
    some_slow(
        ["ising, lattice", "potts, one-hot", "graph potts"], ["boltzmann machine, spins", "rbm", "counts", "deep machine"]
    ),
)
def test_flips_by_conditionals_are_those_by_densities(name):
    """The same key gives the same draws, up to the rounding of a ratio close to the uniform number."""
    energy = ENERGIES[name]
    d, _, states = states_of(energy)
    start = jnp.asarray(states[np.random.default_rng(0).choice(len(states), 2000)])
    ours, theirs = (advanced(ebm.Flips(), each, start, 2) for each in (d, plainly(energy)))
    same = np.asarray(ours == theirs).reshape(len(start), -1).all(1)
    assert same.mean() > 0.998
    assert np.mean(np.asarray(ours != start)) > 0.1


def test_flips_by_conditionals_leave_the_distribution_as_it_is(monkeypatch):
    energy, num = ENERGIES["counts"], 40_000
    d, _, states = states_of(energy)
    # The energy itself is evaluated at the start and at the end of a transition, whatever the number of flips.
    calls, call = [], type(energy).__call__
    monkeypatch.setattr(type(energy), "__call__", lambda self, event: calls.append(1) or call(self, event))
    start = states[np.random.default_rng(0).choice(len(states), num, p=probabilities(energy, states))]
    p = probabilities(energy, states)
    calls.clear()
    after = shares(advanced(ebm.Flips(), d, jnp.asarray(start), 2), states)
    assert len(calls) <= 4
    assert np.all(abs(after - shares(start, states)) < 5 * np.sqrt(2 * p * (1 - p) / num))


@pytest.mark.parametrize("support", SUPPORTS)
def test_dula_draws_each_element_by_its_slope_and_distance(support):
    d, states, _ = exact(support)
    kernel, num = ebm.DULA(0.7), 40_000
    start = jnp.asarray(states[1])
    slope = -jax.grad(quadratic)(1.0 * start)
    moves = jnp.asarray(states) - start
    # The elements are independent, so the log probability of a state is a sum over all numbers of the event.
    unit = {"units": 1, "spins": 4, "levels": 1, "categories": 2}[support]  # the smallest squared distance of two values
    log_p = 0.5 * jnp.sum(slope * moves, axis=tuple(range(1, moves.ndim))) - jnp.sum(
        moves**2, axis=tuple(range(1, moves.ndim))
    ) / (2 * 0.7 * unit)
    p = np.asarray(jax.nn.softmax(log_p))
    after = shares(advanced(kernel, d, jnp.broadcast_to(start, (num, *start.shape)), 1), states)
    assert np.all(abs(after - p) < 5 * np.sqrt(p * (1 - p) / num))


def test_a_warm_up_adapts_the_step_of_dmala():
    d = ebm.EnergyDistribution(lambda x: -2 * jnp.sum(x[1:] * x[:-1]) + 3 * x[0], (30,), support=ebm.spins)
    run = ebm.sample(KEY, d, ebm.DMALA(10.0), num_warmup=500, num_samples=500)
    np.testing.assert_allclose(run.stats["acceptance_rate"].mean(), 0.574, atol=0.1)


@pytest.mark.parametrize("kernel", ["dula", "dmala"])
def test_the_step_size_does_not_depend_on_how_values_are_coded(kernel):
    """The same energy of units and of spins: the chains are the same, and the default step moves them."""
    bits = ebm.EnergyDistribution(
        lambda b: -jnp.sum((2 * b - 1) * jnp.array([0.5, -0.2, 1.0])), (3,), support=constraints.boolean
    )
    spins = ebm.EnergyDistribution(lambda s: -jnp.sum(s * jnp.array([0.5, -0.2, 1.0])), (3,), support=ebm.spins)
    start = {"num_warmup": 0, "num_samples": 2000, "num_chains": 1}
    ours, theirs = (ebm.sample(KEY, d, kernel, **start).samples["x"] for d in (bits, spins))
    np.testing.assert_array_equal(2 * ours - 1, theirs)
    assert np.mean(theirs[:, 1:] != theirs[:, :-1]) > 0.02


@pytest.mark.parametrize("kernel", ["gibbs", "block_gibbs", "flips", "gwg", "dula", "dmala", "swendsen_wang"])
def test_draws_are_integers_whose_products_do_not_overflow(kernel):
    d = ebm.EnergyDistribution(ebm.energies.Ising(ebm.energies.Graph.lattice(3), 0.3))
    draws = ebm.sample(KEY, d, kernel, num_warmup=1, num_samples=200).samples["x"].reshape(-1, 3)
    assert draws.dtype == jnp.zeros(0, int).dtype
    np.testing.assert_array_equal(jnp.diag(draws.T @ draws), len(draws))


def test_the_kernels_are_those_of_the_table():
    discrete = {name for name, cls in NAMED.classes.items() if cls.is_discrete is True}
    assert {kernel.name for kernel in KERNELS.values()} | {"dula", "swendsen_wang", "lattice_walk"} == discrete
    assert NAMED.classes["block_gibbs"]().is_discrete is None


def test_an_energy_draws_by_gibbs_unless_told_otherwise():
    d = ebm.EnergyDistribution(ising, (9,), support=constraints.boolean)
    assert d.sample(jax.random.key(0), (3,)).shape == (3, 9)
    assert isinstance(d.sampler.kernel, ebm.Gibbs)


def draw(energy=ising, shape=(9,), support=constraints.boolean, **options):
    return ebm.EnergyDistribution(energy, shape, support=support, **options).sample(jax.random.key(0), (2,))


BINARY = ebm.EnergyDistribution(ising, (9,), support=constraints.boolean)
LEVELS = ebm.EnergyDistribution(lambda x: 0.0 * x, support=constraints.integer_interval(0, 2))
REFUSED = {
    "a continuous support": (
        lambda: draw(shape=(9,), support=constraints.real, sampler=ebm.ChainSampler("gibbs")),
        "contin",
    ),
    "a gradient kernel": (lambda: draw(sampler=ebm.ChainSampler("nuts")), "discrete support.*gibbs"),
    "a score": (lambda: BINARY.unconstrained_score(jnp.zeros(9, int)), "discrete.*gibbs"),
    "no end of values": (
        lambda: draw(support=constraints.nonnegative_integer, sampler=ebm.ChainSampler("gibbs")),
        "two bounds.*lattice_walk",
    ),
    "an unknown scan": (lambda: ebm.Gibbs(scan="sweep"), "systematic"),
    "updates of a sweep": (lambda: ebm.Gibbs(num_updates=3), "scan='random'"),
    "no updates": (lambda: ebm.Gibbs(scan="random", num_updates=0), "num_updates"),
    "no flips": (lambda: ebm.Flips(num_flips=0), "num_flips"),
    "an unknown weight": (lambda: ebm.GibbsWithGradients(balance="square"), "sqrt"),
    "no step": (lambda: ebm.DMALA(0.0), "step_size"),
    "some values of the support": (
        lambda: ebm.sample(KEY, LEVELS, ebm.Gibbs([0, 1])),
        r"\[0, 1\].*\[0, 1, 2\]",
    ),
    "spins for units": (lambda: draw(sampler=ebm.ChainSampler(ebm.Flips(values=[-1, 1]))), "leave states out"),
    "values out of order": (lambda: ebm.Flips(values=[1, 0]), "increasing"),
    "replicas of a continuous kernel": (
        lambda: ebm.sample(KEY, BINARY, "parallel_tempering"),
        r"by 'mala'.*discrete.*ParallelTempering\('gibbs'\)",
    ),
    "a walk over spins": (
        lambda: ebm.sample(KEY, ebm.EnergyDistribution(ising, (9,), support=ebm.spins), "lattice_walk"),
        "are not integers.*kernel='gibbs' for spins",
    ),
    "no values": (lambda: ebm.Gibbs().step(jax.random.key(0), ebm.Gibbs().init(None, jnp.zeros(2), jnp.sum), None), "needs"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_does_not_fit_is_refused(how):
    call, words = REFUSED[how]
    with pytest.raises(ebm.EnergyError, match=words):
        call()
