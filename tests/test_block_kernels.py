"""Block Gibbs and Swendsen-Wang on ready-made energies: against enumeration, and what is refused."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import advanced, shares, some_slow
from numpyro.infer import MCMC, SVI, Trace_ELBO
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

import numpyro_ebm as ebm
from numpyro_ebm.energies import RBM, GaussianRBM, Graph, GraphPotts, Ising
from numpyro_ebm.kernels import chains
from numpyro_ebm.kernels.block_draws import draw_blocks
from numpyro_ebm.kernels.densities import Known
from numpyro_ebm.kernels.swendsen_wang import label

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
SQUARE = Graph.lattice(2, 2)
MIXED = [0.9, -0.7, 0.4, -0.3]
MACHINE = RBM(RNG.normal(size=(3, 2)), RNG.normal(size=3), RNG.normal(size=2))
ENERGIES = {
    "spins": Ising(SQUARE, 0.4, [[0.3, -0.5], [0.1, 0.0]]),
    "mixed signs": Ising(SQUARE, MIXED, 0.2),
    "units": Ising(SQUARE, [0.9, 0.2, 0.4, 1.3], -0.6, units="boolean"),
    "categories": GraphPotts(Graph([(0, 1), (1, 2)], 3), [1.1, 0.6], 3, RNG.normal(size=(3, 3)) * 0.5),
    "categories, mixed signs": GraphPotts(Graph([(0, 1), (1, 2)], 3), [1.1, -0.6], 3, RNG.normal(size=(3, 3)) * 0.5),
    "both layers": MACHINE.joint(),
    "free energy": MACHINE,
}
ON_GRAPHS = ["spins", "mixed signs", "units", "categories", "categories, mixed signs"]
CASES = [("block_gibbs", name) for name in ENERGIES] + [("swendsen_wang", name) for name in ON_GRAPHS]
QUICK = [("block_gibbs", "spins"), ("block_gibbs", "free energy"), ("swendsen_wang", "categories, mixed signs")]
SOME_SLOW = some_slow(QUICK, [case for case in CASES if case not in QUICK])
NUM = 40_000


def exact(name, temperature=1.0):
    """The distribution of an energy, its states, and their probabilities at a temperature."""
    d = ebm.EnergyDistribution(ENERGIES[name])
    states = np.array(list(itertools.product(d.discrete_values, repeat=int(np.prod(d.event_shape)))))
    states = states.reshape(-1, *d.event_shape)
    log_p = -np.asarray(jax.vmap(d.energy)(jnp.asarray(states)), float) / temperature
    return d, states, np.exp(log_p - np.logaddexp.reduce(log_p))


def from_draws(kernel, name, temperature=1.0, **options):
    """How often each state occurs among exact draws and after two transitions from them, and its probability."""
    d, states, p = exact(name, temperature)
    start = states[np.random.default_rng(0).choice(len(states), NUM, p=p)]
    return shares(start, states), shares(advanced(kernel, d, jnp.asarray(start), 2, **options), states), p


def kernel_of(name):
    return {"block_gibbs": ebm.BlockGibbs(), "swendsen_wang": ebm.SwendsenWang()}[name]


@pytest.mark.parametrize("case", SOME_SLOW)
def test_a_transition_leaves_the_distribution_as_it_is(case):
    kernel, name = case
    before, after, p = from_draws(kernel_of(kernel), name)
    # Start and end are not independent, so the variance of their difference is at most four times that of one.
    assert np.all(abs(after - before) < 5 * np.sqrt(2 * p * (1 - p) / NUM))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_chains_from_one_state_reach_the_distribution(case):
    kernel, name = case
    d, states, p = exact(name)
    start = jnp.broadcast_to(jnp.asarray(states[0]), (NUM, *d.event_shape))
    after = shares(advanced(kernel_of(kernel), d, start, 60), states)
    assert np.all(abs(after - p) < 5 * np.sqrt(p * (1 - p) / NUM))


@pytest.mark.parametrize(("name", "factor"), [("mixed signs", 0.4), ("units", 1.0), ("categories, mixed signs", 0.4)])
def test_chains_that_are_drawn_together_are_those_drawn_one_by_one(name, factor):
    d, states, _ = exact(name)
    known, values = (
        Known(ENERGIES[name], factor, 0.1 * RNG.normal(size=(states[0].size, len(d.discrete_values)))),
        d.discrete_values,
    )
    keys, start = jax.random.split(KEY, 64), jnp.asarray(states[RNG.integers(len(states), size=64)])
    together, _ = jax.vmap(lambda key, event: draw_blocks(key, known, values, event))(keys, start)
    one_by_one = [draw_blocks(key, known, values, event)[0] for key, event in zip(keys, start, strict=True)]
    np.testing.assert_array_equal(together, jnp.stack(one_by_one))
    assert together.dtype == start.dtype


def test_chains_with_energies_or_temperatures_of_their_own_are_drawn_by_them():
    d, states, _ = exact("units")
    keys, start = jax.random.split(KEY, 8), jnp.asarray(states[:8])
    fields, factors = jnp.linspace(-1, 1, 8), jnp.linspace(0.2, 2, 8)

    def draw(key, event, field, factor):
        return draw_blocks(key, Known(Ising(SQUARE, 0.3, field, units="boolean"), factor), d.discrete_values, event)[0]

    for axes in ((0, 0, 0, None), (0, 0, None, 0), (0, None, None, 0), (0, 0, 0, 0)):
        args = [a if axis == 0 else a[3] for a, axis in zip((keys, start, fields, factors), axes, strict=True)]
        each = [draw(*(a[k] if axis == 0 else a for a, axis in zip(args, axes, strict=True))) for k in range(8)]
        np.testing.assert_array_equal(jax.vmap(draw, axes)(*args), jnp.stack(each))


def test_a_base_without_mass_leaves_the_chains_in_place():
    _, states, _ = exact("spins")
    offsets, start = jnp.zeros((4, 2)).at[1].set(-jnp.inf), jnp.asarray(states[:5])
    known = Known(ENERGIES["spins"], 1.0, offsets)
    drawn, is_bad = jax.vmap(lambda key, event: draw_blocks(key, known, np.array([-1, 1]), event))(
        jax.random.split(KEY, 5), start
    )
    np.testing.assert_array_equal(drawn, start)
    assert np.all(is_bad)


@pytest.mark.parametrize("kernel", ["block_gibbs", "swendsen_wang"])
def test_a_temperature_reaches_the_blocks_and_the_bonds(kernel):
    before, after, p = from_draws(kernel_of(kernel), "mixed signs", 2.5, temperatures=jnp.array([2.5, 2.5]))
    assert np.all(abs(after - before) < 5 * np.sqrt(2 * p * (1 - p) / NUM))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["block_gibbs", "swendsen_wang"])
def test_tempered_replicas_follow_their_temperatures(kernel):
    d, states, _ = exact("mixed signs")
    tempering = ebm.ParallelTempering(kernel, temperatures=(1.0, 2.5)).bind(d)
    start = jnp.broadcast_to(jnp.asarray(states[0]), (NUM, 2, *d.event_shape))
    ends = chains.advance(KEY, tempering, d.target(tempering), start, num_steps=40).positions
    for replica, temperature in enumerate((1.0, 2.5)):
        p = exact("mixed signs", temperature)[2]
        assert np.all(abs(shares(ends[:, replica], states) - p) < 5 * np.sqrt(p * (1 - p) / NUM))


def test_clusters_are_the_connected_components():
    graph = Graph.lattice(12, 15, periodic=True)
    for density in (0.0, 0.3, 0.5, 0.7, 1.0):
        joined = np.random.default_rng(1).random(graph.num_edges) < density
        ours = np.asarray(label(graph, jnp.asarray(joined)))
        left, right = graph.edges[joined].T
        matrix = coo_array((np.ones(len(left)), (left, right)), shape=(graph.num_nodes, graph.num_nodes))
        _, theirs = connected_components(matrix, directed=False)
        smallest = np.array([np.flatnonzero(theirs == theirs[node])[0] for node in range(graph.num_nodes)])
        np.testing.assert_array_equal(ours, smallest)


def test_swendsen_wang_rejects_for_repulsive_edges_only():
    for name, always in (("spins", True), ("mixed signs", False)):
        d, _, _ = exact(name)
        run = ebm.sample(KEY, d, "swendsen_wang", num_warmup=0, num_samples=100)
        assert np.all(run.stats["acceptance_rate"] == 1) == always


def broken(energy):
    """An energy with parameters that are no numbers, as training may leave them."""
    return jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), energy)


def test_couplings_that_are_no_numbers_leave_the_chain_in_place_and_are_reported():
    energy = broken(ENERGIES["spins"])
    kernel = ebm.SwendsenWang(values=jnp.array([-1, 1]))
    target = ebm.EnergyDistribution(energy).target(kernel)
    start = jnp.ones((5, 2, 2), int)
    ended = chains.advance(KEY, kernel, target, start, num_steps=3)
    np.testing.assert_array_equal(ended.positions, start)
    assert ended.health.nonfinite_rate == 1
    for other, values in ((energy, [-1, 1]), (broken(MACHINE), [0, 1]), (broken(MACHINE.joint()), [0, 1])):
        d = ebm.EnergyDistribution(other)
        kernel, start = ebm.BlockGibbs(values=jnp.array(values)), jnp.ones((5, *d.event_shape), int)
        ended = chains.advance(KEY, kernel, d.target(kernel), start, num_steps=3)
        np.testing.assert_array_equal(ended.positions, start)
        assert ended.health.nonfinite_rate == 1


def test_a_gaussian_machine_is_sampled_at_its_mixture():
    energy = GaussianRBM(np.array([[1.0, -0.5], [0.3, 0.8]]), 0.2, [0.4, -0.3], 0.7)
    hidden = np.array(list(itertools.product([0, 1], repeat=2)))
    means = np.asarray(jax.vmap(energy.visible_means)(jnp.asarray(hidden)))
    gained = hidden @ np.array([0.4, -0.3]) + ((means**2 - 0.2**2) / (2 * 0.7**2)).sum(1)
    weights = np.exp(gained - np.logaddexp.reduce(gained))
    x = np.asarray(advanced(ebm.BlockGibbs(), ebm.EnergyDistribution(energy), jnp.zeros((NUM, 2)), 30))
    mean = weights @ means
    second = weights @ means**2 + 0.7**2
    assert np.all(abs(x.mean(0) - mean) < 5 * np.sqrt((second - mean**2) / NUM))
    assert np.all(abs((x**2).mean(0) - second) < 5 * (x**2).std(0) / np.sqrt(NUM))


@pytest.mark.slow
def test_a_model_and_its_distribution_give_the_same_blocks():
    energy = Ising(Graph.lattice(3, 3), 0.3, 0.1)

    def model():
        numpyro.sample("x", ebm.EnergyDistribution(energy))

    for kernel in ("block_gibbs", "swendsen_wang"):
        mcmc = MCMC(
            ebm.BlackJAXKernel(model, kernel),
            num_warmup=10,
            num_samples=400,
            num_chains=16,
            chain_method="vectorized",
            progress_bar=False,
        )
        mcmc.run(KEY)
        draws = np.asarray(mcmc.get_samples(group_by_chain=True)["x"]).sum((-1, -2))
        ours = np.asarray(ebm.sample(KEY, model, kernel, num_warmup=10, num_samples=400, num_chains=16).samples["x"]).sum(
            (-1, -2)
        )
        for totals in (draws, ours):
            assert abs(totals.mean() - 2.1874309) < 5 * totals.mean(1).std() / 4


@pytest.mark.slow
def test_log_z_by_blocks_also_from_rates_of_its_own():
    joint = ebm.EnergyDistribution(MACHINE.joint())
    exact = float(MACHINE.log_partition())
    rates = dist.Bernoulli(logits=jnp.array([1.0, -1.0, 0.5, 0.0, 2.0])).to_event(1)
    found = ebm.log_partition(KEY, joint, method="ais", kernel="block_gibbs", start=rates)
    assert abs(found.value - exact) < 5 * found.standard_error < 0.2


@pytest.mark.slow
def test_pcd_by_sweeps_reaches_the_maximum_likelihood_of_the_machine():
    states = np.array(list(itertools.product([0, 1], repeat=3)))
    log_p = -np.asarray(jax.vmap(MACHINE)(jnp.asarray(states)))
    x = states[np.random.default_rng(3).choice(8, 3000, p=np.exp(log_p - np.logaddexp.reduce(log_p)))]

    def model(x):
        biases = numpyro.param("visible", jnp.zeros(3))
        energy = RBM(MACHINE.weights, biases, MACHINE.hidden_biases)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(energy), obs=x)

    def trained(name, **options):
        wrapped = ebm.estimate(model, name, **options)
        schedule = optax.exponential_decay(0.05, 400, 0.05)
        svi = SVI(wrapped, ebm.empty_guide, optax.adam(schedule), Trace_ELBO())
        return np.asarray(svi.run(KEY, 800, x, progress_bar=False).params["visible"])

    np.testing.assert_allclose(
        trained("pcd", kernel="block_gibbs", num_steps=2, num_chains=3000), trained("exact"), atol=0.05
    )


@pytest.mark.slow
def test_an_element_with_a_rare_value_is_not_called_frozen():
    x = np.zeros((200, 3), int)
    x[:, :2] = np.random.default_rng(0).integers(0, 2, (200, 2))
    x[0, 2] = 1  # so rare that the chains hardly ever visit it

    def model(x):
        energy = RBM(jnp.zeros((3, 1)), numpyro.param("visible", jnp.array([0.0, 0.0, -15.0])))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(energy), obs=x)

    estimated = ebm.estimate(model, "pcd", kernel="block_gibbs", num_steps=1, num_chains=50)
    svi = SVI(estimated, ebm.empty_guide, optax.sgd(1e-9), Trace_ELBO())
    state = svi.run(KEY, 60, x, progress_bar=False).state
    assert "frozen" not in ebm.training_report(estimated, state).sites[0].held


def sampled(energy, kernel, **options):
    return lambda: ebm.sample(KEY, ebm.EnergyDistribution(energy, **options), kernel)


PLAIN = {"event_shape": (3,), "support": dist.constraints.boolean}
COINS = dist.Bernoulli(0.3 * jnp.ones((2, 2))).to_event(2)
REFUSED = {
    "a function": (sampled(lambda x: jnp.sum(x), "block_gibbs", **PLAIN), "got an ordinary function.*kernel='gibbs'"),
    "a function without bonds": (
        sampled(lambda x: jnp.sum(x), "swendsen_wang", **PLAIN),
        r"EnergyDistribution\(numpyro_ebm",
    ),
    "a base": (sampled(ENERGIES["units"], "block_gibbs", base=COINS), "base"),
    "an energy without bonds": (sampled(MACHINE.joint(), "swendsen_wang"), "JointRBM"),
    "an energy without blocks": (
        sampled(ebm.energies.Potts(jnp.zeros((2, 3, 2, 3)), jnp.zeros((2, 3))), "swendsen_wang"),
        "Potts",
    ),
    "a tempered free energy": (
        sampled(MACHINE, ebm.ParallelTempering("block_gibbs", temperatures=(1.0, 2.0))),
        r"RBM draws.*joint\(\)",
    ),
    "a real event": (sampled(lambda x: x**2, "swendsen_wang"), "continuous"),
    "values of another support": (sampled(ENERGIES["spins"], ebm.BlockGibbs([0, 1])), "leave states"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_does_not_fit_is_refused(how):
    call, words = REFUSED[how]
    with pytest.raises(ebm.EnergyError, match=words):
        call()


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ([[0, 3], [1, 2, 3]], "each of its 4 elements once.*element 3 is in 2"),
        ([[0, 3], [1]], "element 2 is in 0 of them.*Graph"),
        ([[0, 3], [1, 2, 4]], "4 elements.*element 4 is in 1"),
    ],
)
def test_blocks_of_ones_own_hold_each_element_once(monkeypatch, blocks, words):
    monkeypatch.setattr(Ising, "blocks", property(lambda self: tuple(map(np.array, blocks))))
    with pytest.raises(ebm.EnergyError, match=words):
        sampled(ENERGIES["spins"], "block_gibbs")()
