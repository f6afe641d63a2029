"""Walks on integers: against Poisson distributions, enumeration far out, and estimates without chains."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from energy_cases import check_shares, log_weights, plainly, probabilities
from helpers import advanced, check_moments, fit, shares, some_slow, surrogate
from jax.scipy.special import gammaln
from numpyro.distributions import constraints
from numpyro.infer import MCMC

import numpyro_ebm as ebm
from numpyro_ebm.energies import PoissonGraphicalModel, Tempered
from numpyro_ebm.kernels.lattice_walk import fold

KEY = jax.random.key(0)
COUNTS = constraints.nonnegative_integer
PAIR = PoissonGraphicalModel([(0, 1)], -0.4, [1.0, 0.5])
FAR = np.array(list(itertools.product(range(40), repeat=2)))
MEANS = probabilities(PAIR, FAR) @ FAR


def poisson(rates, low=0):
    """Independent Poisson counts above a lowest value."""
    support = constraints.integer_greater_than(low)
    return ebm.EnergyDistribution(lambda x: jnp.sum(gammaln(x - low + 1.0) - jnp.log(rates) * x), (2,), support=support)


@pytest.mark.parametrize("value", range(-12, 13))
def test_jumps_are_folded_at_the_bounds(value):
    inside = [0, 1, 2, 2, 1, 0] * 10  # a walk between 0 and 2 that stays one step at each end
    assert int(fold(jnp.asarray(value), jnp.asarray(0.0), jnp.asarray(2.0))) == inside[value + 24]
    assert int(fold(jnp.asarray(value), jnp.asarray(0.0), jnp.asarray(jnp.inf))) == (value if value >= 0 else -1 - value)
    assert int(fold(jnp.asarray(value), jnp.asarray(-jnp.inf), jnp.asarray(2.0))) == (value if value <= 2 else 5 - value)


STEPS = some_slow([0.01, 3.0], [0.5, 30.0])


@pytest.mark.parametrize("step_size", STEPS)
@pytest.mark.parametrize("num_moves", [None, 1])
def test_a_transition_leaves_poisson_counts_as_they_are(step_size, num_moves):
    rates, low, num = np.array([0.4, 6.0]), 2, 40_000
    start = np.random.default_rng(0).poisson(rates, (num, 2)) + low
    kernel = ebm.LatticeWalk(step_size, num_moves=num_moves)
    after = np.asarray(advanced(kernel, poisson(jnp.asarray(rates), low), jnp.asarray(start), 2)) - low
    assert np.mean(after != start - low) > 0.02
    for power in (1, 2):
        before, moved = ((x.astype(float) ** power) for x in (start - low, after))
        assert np.all(abs(moved.mean(0) - before.mean(0)) < 5 * np.sqrt(2 / num) * before.std(0))
    for k in range(4):
        p = np.exp(dist.Poisson(rates).log_prob(k))
        assert np.all(abs((after == k).mean(0) - p) < 5 * np.sqrt(2 * p * (1 - p) / num))


@pytest.mark.parametrize("high", [1, 3])
def test_two_bounds_are_kept_too(high):
    d = ebm.EnergyDistribution(lambda x: -0.5 * x * (x - 1.0), (), support=constraints.integer_interval(-1, high))
    states = np.arange(-1, high + 1)
    p = np.exp(0.5 * states * (states - 1.0))
    start = np.random.default_rng(0).choice(states, 40_000, p=p / p.sum())
    after = shares(np.asarray(advanced(ebm.LatticeWalk(5.0), d, jnp.asarray(start), 2))[:, None], states[:, None])
    assert np.all(abs(after - p / p.sum()) < 5 * np.sqrt(2 * p / p.sum() / 40_000))


@pytest.mark.slow
def test_bounds_may_differ_between_elements():
    support = constraints.integer_interval(jnp.array([-1, 0]), jnp.array([1, 3]))
    d = ebm.EnergyDistribution(lambda x: 0.5 * x[0] * x[1], (2,), support=support)
    states = np.array(list(itertools.product((-1, 0, 1), range(4))))
    log_p = -0.5 * states.prod(1)
    p = np.exp(log_p - np.logaddexp.reduce(log_p))
    x = np.asarray(ebm.sample(KEY, d, num_warmup=100, num_samples=3000).samples["x"])
    flags = (x[:, :, None] == states).all(-1).astype(float)
    assert np.all(flags.sum(-1) == 1)
    check_moments(flags, p, p * (1 - p))
    found = ebm.log_partition(KEY, d, method="importance", proposal=d.reference, num_samples=4000)
    assert abs(found.value - np.logaddexp.reduce(log_p)) < 5 * found.standard_error < 0.2


def negative(maximum=None):
    """Three counts that repel each other, one of them strongly."""
    return PoissonGraphicalModel([(0, 1), (1, 2)], [-0.2, -1.5], [0.7, 0.3, 0.9], maximum=maximum)


MODELS = {"two nodes": PAIR, "two nodes by energies": plainly(PAIR), "three": negative(), "tempered": Tempered(PAIR, 1.5)}


@pytest.mark.parametrize("name", MODELS)
def test_a_transition_leaves_a_graphical_model_as_it_is(name):
    model = MODELS[name]
    is_distribution, shape = isinstance(model, ebm.EnergyDistribution), model.event_shape
    energy, d = (model.energy, model) if is_distribution else (model, ebm.EnergyDistribution(model))
    states = np.array(list(itertools.product(range(30 if shape == (2,) else 16), repeat=shape[0])))
    p = probabilities(energy, states)
    start = states[np.random.default_rng(0).choice(len(states), 40_000, p=p)]
    kept = p > 1e-4  # rarer states have no normal error
    check_shares(advanced(ebm.LatticeWalk(2.0), d, jnp.asarray(start), 3), states[kept], p[kept])


def test_ratios_are_those_of_the_energy():
    for energy in (PAIR, negative(), negative(maximum=6)):
        x = jnp.arange(1, 1 + energy.event_shape[0])
        for i, value in itertools.product(range(len(x)), (0, 3, 6)):
            expected = energy(x) - energy(x.at[i].set(value))
            np.testing.assert_allclose(energy.log_ratio(x, jnp.asarray(i), jnp.asarray(value)), expected, atol=1e-5)
    traced = jax.jit(
        lambda j: PoissonGraphicalModel([(0, 1)], j).log_ratio(jnp.array([1, 2]), jnp.asarray(0), jnp.asarray(3))
    )
    assert np.isnan(traced(0.1))


@pytest.mark.slow
def test_it_is_the_default_and_reaches_the_distribution_from_anywhere():
    d = ebm.EnergyDistribution(PAIR)
    run = ebm.sample(KEY, d, num_warmup=300, num_samples=2000)
    assert isinstance(run.kernel, ebm.LatticeWalk)
    x = np.asarray(run.samples["x"])
    assert np.issubdtype(x.dtype, np.integer)
    variances = probabilities(PAIR, FAR) @ FAR**2 - MEANS**2
    check_moments(x, MEANS, variances)
    assert isinstance(d.sampler.kernel, ebm.LatticeWalk)
    drawn = np.asarray(d.sample(KEY, (3000,)))
    assert np.all(abs(drawn.mean(0) - MEANS) < 5 * np.sqrt(variances / 3000))


@pytest.mark.slow
def test_the_width_follows_the_scale():
    for rate in (3.0, 2000.0):
        run = ebm.sample(KEY, poisson(jnp.full(2, rate)), num_warmup=500, num_samples=1000)
        assert abs(float(run.stats["acceptance_rate"].mean()) - 0.44) < 0.05
        assert 0.3 * np.sqrt(rate) < float(run.stats["step_size"].mean()) < 6 * np.sqrt(rate)
        check_moments(np.asarray(run.samples["x"]), rate, rate)


@pytest.mark.slow
def test_a_search_for_starts_goes_far_up():
    far = ebm.EnergyDistribution(lambda x: jnp.where(x < 300, jnp.inf, 0.1 * x), support=COUNTS)
    x = np.asarray(ebm.sample(KEY, far, num_warmup=300, num_samples=4000).samples["x"])
    assert x.min() >= 300
    ratio = np.exp(-0.1)
    check_moments(x, 300 + ratio / (1 - ratio), ratio / (1 - ratio) ** 2)


def latent():
    numpyro.sample("x", ebm.EnergyDistribution(PAIR))


def counts_and_coin():
    n = numpyro.sample("n", dist.Poisson(4.0))
    b = numpyro.sample("b", dist.Bernoulli(0.3))
    numpyro.factor("f", 0.3 * b * n)


@pytest.mark.slow
def test_latent_counts_of_a_model():
    run = ebm.sample(KEY, latent, num_warmup=200, num_samples=2000)
    assert isinstance(run.kernel, ebm.LatticeWalk)
    assert np.all(abs(np.asarray(run.samples["x"]).mean((0, 1)) - MEANS) < 0.1)
    run = ebm.sample(KEY, counts_and_coin, num_warmup=200, num_samples=4000)
    assert {kernel.name for kernel in run.kernel.kernels} == {"gibbs", "lattice_walk"}
    gain = np.exp(4 * (np.exp(0.3) - 1)) * 0.3
    p = gain / (gain + 0.7)
    check_moments(np.asarray(run.samples["b"]).astype(float), p, p * (1 - p))
    mean = (1 - p) * 4 + p * 4 * np.exp(0.3)
    square = (1 - p) * (4 + 16) + p * (4 * np.exp(0.3) + 16 * np.exp(0.6))
    check_moments(np.asarray(run.samples["n"]), mean, square - mean**2)


@pytest.mark.slow
def test_numpyro_runs_it_and_so_does_tempering():
    mcmc = MCMC(ebm.BlackJAXKernel(latent, "lattice_walk"), num_warmup=300, num_samples=3000, progress_bar=False)
    mcmc.run(KEY)
    variances = probabilities(PAIR, FAR) @ FAR**2 - MEANS**2
    check_moments(np.asarray(mcmc.get_samples(group_by_chain=True)["x"]), MEANS, variances)
    tempering = ebm.ParallelTempering("lattice_walk", temperatures=(1.0, 2.0, 4.0))
    run = ebm.sample(KEY, ebm.EnergyDistribution(PAIR), tempering, num_warmup=200, num_samples=3000)
    check_moments(np.asarray(run.samples["x"]), MEANS, variances)
    assert 0.3 < float(run.stats["swap_rate"].mean()) < 1


N = np.arange(30)
BLOCKS = ebm.Blocks(("x", "n"), (constraints.real, COUNTS), ((), ()))


@pytest.mark.slow
def test_counts_beside_a_continuous_member():
    d = ebm.EnergyDistribution(
        lambda e: 0.5 * e[0] ** 2 - 0.5 * e[0] * jnp.minimum(e[1], 5) + gammaln(e[1] + 1), (2,), support=BLOCKS
    )
    shift = 0.5 * np.minimum(N, 5)
    weights = np.exp(0.5 * shift**2 - np.asarray(gammaln(N + 1.0)))
    p = weights / weights.sum()
    assert {kernel.name for kernel in d.sampler.kernel.kernels} == {"nuts", "lattice_walk"}
    run = ebm.sample(KEY, d, {"x": "mala", "n": "lattice_walk"}, num_warmup=300, num_samples=4000)
    x = np.asarray(run.samples["x"])
    mean = np.array([p @ shift, p @ N])
    check_moments(x, mean, np.array([p @ (1 + shift**2), p @ N**2]) - mean**2)
    proposal = d.reference
    found = ebm.log_partition(KEY, d, method="importance", proposal=proposal, num_samples=4000)
    assert abs(found.value - np.log(weights.sum() * np.sqrt(2 * np.pi))) < 5 * found.standard_error < 0.5


@pytest.mark.slow
def test_log_z_starts_from_a_geometric_distribution():
    found = ebm.log_partition(KEY, ebm.EnergyDistribution(PAIR), method="ais", num_levels=200, num_chains=256)
    assert abs(found.value - np.logaddexp.reduce(log_weights(PAIR, FAR))) < 5 * found.standard_error < 0.3
    d = ebm.EnergyDistribution(PAIR)
    reference = np.exp(np.asarray(jax.vmap(d.unconstrained_log_reference)(jnp.arange(400)[:, None] * jnp.array([1, 0]))))
    np.testing.assert_allclose(reference.sum(), 0.5, rtol=1e-4)  # the second count is 0
    np.testing.assert_allclose(d.reference.sample(KEY, (20_000,)).mean(0), 1.0, atol=5 * np.sqrt(2 / 20_000))


def pair_model(x):
    coupling = numpyro.param("coupling", -0.1, constraint=constraints.less_than(0.0))
    fields = numpyro.param("fields", jnp.zeros(2))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(PoissonGraphicalModel([(0, 1)], coupling, fields)), obs=x)


ROWS = FAR[np.random.default_rng(1).choice(len(FAR), 1000, p=probabilities(PAIR, FAR))]


def maximum_likelihood():
    """By Newton steps on the sum far out, in the coupling and the fields, with the standard errors."""
    states = jnp.asarray(FAR, float)
    statistics = jnp.stack([states[:, 0] * states[:, 1], states[:, 0], states[:, 1]], 1)
    own = jnp.mean(jnp.asarray(np.stack([ROWS[:, 0] * ROWS[:, 1], ROWS[:, 0], ROWS[:, 1]], 1), float), 0)

    def loss(t):
        return jax.nn.logsumexp(statistics @ t - jnp.sum(gammaln(states + 1), 1)) - own @ t

    t = jnp.array([-0.3, 0.8, 0.4])
    for _ in range(8):
        t = t - jnp.linalg.solve(jax.hessian(loss)(t), jax.grad(loss)(t))
    return t, jnp.sqrt(jnp.diag(jnp.linalg.inv(jax.hessian(loss)(t))) / len(ROWS))


ESTIMATORS = {
    "pcd": {"num_steps": 3},
    "cd": {"num_steps": 5},
    "replay": {"num_steps": 5, "buffer_size": 1000},
    "mle": {"num_steps": 15},
    "ranking_nce": {"nu": 10},
    "discrete_fisher": {},
}


@pytest.mark.parametrize("name", some_slow([], list(ESTIMATORS)))
def test_estimators_recover_the_parameters(name):
    best, errors = maximum_likelihood()
    found = fit(ebm.estimate(pair_model, name, **ESTIMATORS[name]), ROWS, steps=400, rate=0.15)
    ours = jnp.array([found["coupling"], *found["fields"]])
    assert np.all(abs(ours - best) < (3 if name in ("discrete_fisher", "ranking_nce") else 1.5) * errors)


def test_a_coupling_above_zero_moves_no_chain():
    def model(x):
        coupling = numpyro.param("coupling", 0.1)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(PoissonGraphicalModel([(0, 1)], coupling)), obs=x)

    with pytest.warns(ebm.UnhealthyChainsWarning, match="nonfinite"):
        value = surrogate(ebm.estimate(model, "pcd"), {"coupling": 0.1}, ROWS[:20])
    assert np.isnan(value)


def sampled(kernel, support=COUNTS, shape=(2,)):
    return lambda: ebm.sample(
        KEY, ebm.EnergyDistribution(lambda x: jnp.sum(x * x), shape, support=support), kernel, num_samples=1
    )


def without_bounds():
    state = ebm.LatticeWalk().init(KEY, jnp.zeros(2, int), jnp.sum)
    ebm.LatticeWalk().step(KEY, state, jnp.sum)


REFUSED = {
    "no step": (lambda: ebm.LatticeWalk(0.0), "step_size > 0"),
    "no moves": (lambda: ebm.LatticeWalk(num_moves=0), "num_moves >= 1"),
    "spins": (sampled("lattice_walk", ebm.spins), "Spins are not integers between bounds of their own"),
    "categories": (sampled("lattice_walk", ebm.one_hot), "OneHot are not integers between bounds of their own"),
    "reals": (sampled("lattice_walk", constraints.real), "cannot sample a continuous support"),
    "bounds of another support": (
        sampled(ebm.LatticeWalk(bounds=np.array([0.0, 9.0]))),
        r"LatticeWalk has the bounds.*LatticeWalk\(\)",
    ),
    "no bounds": (without_bounds, "needs the bounds"),
    "gibbs": (sampled("gibbs"), "two bounds.*lattice_walk"),
    "pseudolikelihood": (lambda: surrogate(ebm.estimate(pair_model, "pseudolikelihood"), {}, ROWS[:3]), "two bounds"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_does_not_fit_is_refused(how):
    call, words = REFUSED[how]
    with pytest.raises(ebm.EnergyError, match=f"(?s){words}"):
        call()
