"""Random graph models: statistics against their definitions, posteriors of real networks against exact ones."""

import dataclasses
import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from energy_cases import surrogate
from helpers import check_moments
from numpyro.infer import MCMC, NUTS

import numpyro_ebm as ebm
from numpyro_ebm._core.discrete import state_at
from numpyro_ebm.bayes import ExchangeKernel
from numpyro_ebm.energies import (
    ERGM,
    GWESP,
    AbstractNetworkStatistic,
    Dyads,
    EdgeCovariate,
    Edges,
    GWDegree,
    KStars,
    Mutual,
    Network,
    NodeCovariate,
    NodeMatch,
    Triangles,
)

DATA = Path(__file__).parents[1] / "examples" / "data"
FAMILIES = np.genfromtxt(DATA / "flomarriage.csv", delimiter=",", dtype=int)
WEALTH = np.genfromtxt(DATA / "flomarriage_wealth.csv")
SEVEN = FAMILIES[np.ix_([1, 3, 4, 6, 8, 10, 14], [1, 3, 4, 6, 8, 10, 14])]
# Whom each of the monks likes in the third wave of Sampson, A novitiate in a period of change (1968).
LIKES = """
    001000000001010000 100000100001000000 100000000000100011 000011000010000000 000100001010000000 000110001000000000
    010000000001000100 000101001000000000 000010010001000000 000110001000100000 000010010000010000 110000100000000000
    000010100000000001 100000000001001000 010000100001000000 010000100000001000 011000000000000001 011000000000000010
"""
MONKS = np.array([list(map(int, row)) for row in LIKES.split()])
RNG = np.random.default_rng(0)
ATTRIBUTE, COVARIATE = list("abbaca"), RNG.normal(size=6)
DISTANCE = np.abs(COVARIATE[:, None] - COVARIATE)
UNDIRECTED = [
    Edges(),
    NodeMatch(ATTRIBUTE),
    NodeCovariate(COVARIATE),
    EdgeCovariate(DISTANCE),
    KStars(2),
    KStars(3),
    Triangles(),
    GWDegree(0.0),
    GWDegree(0.7),
    GWESP(0.0),
    GWESP(0.4),
]
DIRECTED = [Edges(), NodeMatch(ATTRIBUTE), NodeCovariate(COVARIATE), EdgeCovariate(RNG.normal(size=(6, 6))), Mutual()]
KINDS = {"undirected": (Dyads(6), UNDIRECTED), "directed": (Dyads(6, is_directed=True), DIRECTED)}


def random_networks(dyads, num):
    """Adjacency matrices of many densities, empty and full ones among them."""
    y = RNG.random((num, dyads.num_nodes, dyads.num_nodes)) < np.linspace(-0.01, 1, num)[:, None, None]
    y = y if dyads.is_directed else np.triu(y) | np.swapaxes(np.triu(y), 1, 2)
    return (y & ~np.eye(dyads.num_nodes, dtype=bool)).astype(int)


def weigh(decay, counts):
    """The geometrically weighted sum of `Hunter and Handcock (2006)`, from how many have each count."""
    numbers = np.bincount(counts, minlength=2)
    return math.exp(decay) * sum((1 - (1 - math.exp(-decay)) ** i) * numbers[i] for i in range(1, len(numbers)))


def defined(statistic, y, pairs):
    """A statistic by its definition, one structure after another."""
    nodes, degrees = range(len(y)), y.sum(1)
    match statistic:
        case Edges():
            return sum(y[i, j] for i, j in pairs)
        case NodeMatch():
            return sum(y[i, j] for i, j in pairs if ATTRIBUTE[i] == ATTRIBUTE[j])
        case NodeCovariate():
            return sum(y[i, j] * (COVARIATE[i] + COVARIATE[j]) for i, j in pairs)
        case EdgeCovariate():
            return sum(y[i, j] * float(statistic.values[i, j]) for i, j in pairs)
        case Mutual():
            return sum(y[i, j] and y[j, i] for i, j in itertools.combinations(nodes, 2))
        case KStars():
            return sum(y[i, list(others)].all() for i in nodes for others in itertools.combinations(nodes, statistic.k))
        case Triangles():
            return sum(y[i, j] and y[j, k] and y[i, k] for i, j, k in itertools.combinations(nodes, 3))
        case GWDegree():
            return weigh(float(statistic.decay), degrees)
        case GWESP():
            shared = [sum(y[i, k] and y[j, k] for k in nodes) for i, j in pairs if y[i, j]]
            return weigh(float(statistic.decay), np.array(shared, int))
    raise AssertionError(statistic)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_their_definitions(kind):
    dyads, statistics = KINDS[kind]
    energy, networks = ERGM(dyads, statistics, np.zeros(len(statistics))), random_networks(dyads, 20)
    ours = jax.jit(jax.vmap(energy.values))(dyads.from_adjacency(networks))
    pairs = list(zip(*(nodes.tolist() for nodes in dyads.ends), strict=True))
    expected = [[defined(statistic, y, pairs) for statistic in statistics] for y in networks]
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_changes_are_differences_of_values(kind):
    dyads, statistics = KINDS[kind]
    energy = ERGM(dyads, statistics, RNG.normal(size=len(statistics)))
    y = dyads.from_adjacency(random_networks(dyads, 8))

    @jax.jit
    def both(y):
        values = lambda tie: jax.vmap(lambda k: energy.values(y.at[k].set(tie)))(np.arange(dyads.num_ties))  # noqa: E731
        return energy.changes(y), values(1) - values(0), energy.local_fields(y)

    changes, differences, fields = jax.vmap(both)(y)
    np.testing.assert_allclose(changes, differences, atol=2e-5)
    np.testing.assert_allclose(fields, differences @ energy.coefficients, atol=1e-4)


def test_a_network_that_is_built_tie_by_tie_gains_its_statistics(x64):
    dyads, statistics = KINDS["undirected"]
    energy, y = ERGM(dyads, statistics, np.zeros(len(statistics))), dyads.from_adjacency(random_networks(dyads, 3)[1])

    def add(network, k):
        gained = y[k] * energy.changes(network, k)
        return network.at[k].set(y[k]), gained

    _, gained = jax.jit(lambda: jax.lax.scan(add, jnp.zeros_like(y), RNG.permutation(dyads.num_ties)))()
    np.testing.assert_allclose(gained.sum(0), energy.values(y) - energy.values(jnp.zeros_like(y)), atol=1e-12)


def test_the_marriages_have_the_statistics_and_the_estimate_of_statnet(x64):
    """Figures of the tutorial of the R package ergm: summary and ergm(flomarriage ~ edges + nodecov("wealth"))."""
    dyads = Dyads(16)
    y = dyads.from_adjacency(FAMILIES)
    energy = ERGM(dyads, [Edges(), Triangles(), NodeCovariate(WEALTH)], np.zeros(3))
    np.testing.assert_allclose(energy.values(y), [20, 3, 2168])

    def loss(theta):
        energy = ERGM(dyads, [Edges(), NodeCovariate(WEALTH)], theta)
        return energy(y) + energy.log_partition()

    slopes, theta = jax.jit(lambda theta: (jax.grad(loss)(theta), jax.hessian(loss)(theta))), np.zeros(2)
    for _ in range(10):
        gradient, hessian = slopes(theta)
        theta = theta - np.linalg.solve(hessian, gradient)
    np.testing.assert_allclose(theta, [-2.594929, 0.010546], atol=1e-6)
    np.testing.assert_allclose(np.sqrt(np.diag(np.linalg.inv(hessian))), [0.536056, 0.004674], atol=1e-6)


def marriages(y):
    theta = numpyro.sample("theta", dist.Normal(0, 10).expand([2]).to_event(1))
    numpyro.sample("y", ebm.EnergyDistribution(ERGM(16, [Edges(), NodeCovariate(WEALTH)], theta)), obs=y)


def monks(y):
    theta = numpyro.sample("theta", dist.Normal(0, 10).expand([2]).to_event(1))
    numpyro.sample("y", ebm.EnergyDistribution(ERGM(EIGHTEEN, [Edges(), Mutual()], theta)), obs=y)


def seven(y):
    theta = numpyro.sample("theta", dist.Normal(0, 2).expand([2]).to_event(1))
    numpyro.sample("y", ebm.EnergyDistribution(ERGM(7, [Edges(), KStars(2)], theta)), obs=y)


EIGHTEEN = Dyads(18, is_directed=True)
# Model, data, mean and standard deviation of the posterior, log evidence: with their digits, the last one uncertain by 1.
KNOWN = {
    "marriages": (marriages, Dyads(16).from_adjacency(FAMILIES), (-2.639, 0.0107), (0.546, 0.00478), -62.924),
    "monks": (monks, EIGHTEEN.from_adjacency(MONKS), (-2.1654, 2.2899), (0.219, 0.4835), -141.350),
}


def grid_around(mean, sd, num=201):
    """A grid of 8 standard deviations to either side, and the log of the volume of its cells."""
    axes = [np.linspace(m - 8 * s, m + 8 * s, num) for m, s in zip(mean, sd, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    return points, np.log(np.prod([axis[1] - axis[0] for axis in axes]))


def check_posterior(points, log_p, mean, sd):
    """Mean and standard deviation of a density on a grid, to the digits that are given; return the correlation."""
    p = np.exp(log_p - np.logaddexp.reduce(log_p))
    covariance = np.cov(points.T, aweights=p, ddof=0)
    found = [*(p @ points), *np.sqrt(np.diag(covariance))]
    for ours, figure in zip(found, (*mean, *sd), strict=True):
        unit = 10.0 ** -len(str(figure).partition(".")[2])
        assert abs(ours - figure) < unit, (ours, figure)
    return covariance[0, 1] / np.sqrt(np.prod(np.diag(covariance)))


@pytest.mark.parametrize("name", KNOWN)
def test_the_exact_posterior_and_evidence_of_independent_pairs(name, x64):
    model, y, mean, sd, log_evidence = KNOWN[name]
    likelihood = ebm.estimate(model, "exact")
    points, log_cell = grid_around(mean, sd)

    def log_joint(theta):
        return numpyro.infer.util.log_density(likelihood, (y,), {}, {"theta": theta})[0]

    log_p = np.asarray(jax.jit(lambda points: jax.lax.map(log_joint, points, batch_size=512))(points))
    correlation = check_posterior(points, log_p, mean, sd)
    np.testing.assert_allclose(np.logaddexp.reduce(log_p) + log_cell, log_evidence, atol=1e-3)
    assert name == "marriages" or abs(correlation + 0.821) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_nuts_on_the_exact_likelihood_gives_the_posterior(name):
    model, y, mean, sd, _ = KNOWN[name]
    kernel = NUTS(ebm.estimate(model, "exact"))
    mcmc = MCMC(kernel, num_warmup=500, num_samples=2000, num_chains=4, chain_method="vectorized", progress_bar=False)
    mcmc.run(jax.random.key(0), y)
    check_moments(mcmc.get_samples(group_by_chain=True)["theta"], np.array(mean), np.array(sd) ** 2, min_ess=400)


@pytest.mark.slow
def test_the_exact_posterior_of_seven_families_by_all_their_networks(x64):
    """The sum over 2^21 networks, by how many of them have the same statistics."""
    dyads = Dyads(7)
    energy = ERGM(dyads, [Edges(), KStars(2), Triangles()], np.zeros(3))
    y = dyads.from_adjacency(SEVEN)
    np.testing.assert_array_equal(energy.values(y), [8, 12, 2])
    each = lambda k: energy.values(state_at(np.arange(2), (21,), k))[:2]  # noqa: E731
    values = jax.jit(lambda: jax.lax.map(each, jnp.arange(2**21), batch_size=2**14))()
    values, counts = np.unique(np.asarray(values), axis=0, return_counts=True)
    points, _ = grid_around((1.7606, -0.7013), (1.4580, 0.4323))
    log_z = np.logaddexp.reduce(points @ values.T + np.log(counts), axis=1)
    log_p = points @ np.array([8, 12]) - log_z - 0.5 * (points**2).sum(1) / 4
    check_posterior(points, log_p, (1.7606, -0.7013), (1.458, 0.4323))


def exchanged(model, y, inner, num_steps, **counts):
    kernel = ExchangeKernel(model, inner, num_steps=num_steps)
    mcmc = MCMC(kernel, **counts, chain_method="vectorized", progress_bar=False)
    mcmc.run(jax.random.key(0), y)
    return np.asarray(mcmc.get_samples(group_by_chain=True)["theta"])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "inner"), [("marriages", "block_gibbs"), ("monks", "gibbs")])
def test_exchange_gives_the_posterior_of_independent_pairs(name, inner):
    model, y, mean, sd, _ = KNOWN[name]
    draws = exchanged(model, y, inner, 20, num_warmup=300, num_samples=1000, num_chains=16)
    check_moments(draws, np.array(mean), np.array(sd) ** 2, min_ess=400)


@pytest.mark.slow
def test_no_chain_is_lost_where_one_network_is_all_the_data():
    """The covariate is in its own units: a first step along it as wide as the prior leads to full networks for good."""
    _, y, mean, sd, _ = KNOWN["marriages"]
    draws = exchanged(marriages, y, "block_gibbs", 5, num_warmup=0, num_samples=1, num_chains=64)
    assert np.all(np.abs(draws[:, 0] - mean) < 7 * np.array(sd))


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["gibbs", "block_gibbs"])
def test_exchange_gives_the_posterior_of_seven_families(inner):
    y = Dyads(7).from_adjacency(SEVEN)
    draws = exchanged(seven, y, inner, 60, num_warmup=500, num_samples=1500, num_chains=16)
    check_moments(draws, np.array([1.7606, -0.7013]), np.array([1.4580, 0.4323]) ** 2, min_ess=400)


def test_pseudolikelihood_is_the_logistic_regression_on_changes():
    dyads, theta = Dyads(7), jnp.array([-1.5, -0.1, 0.4])
    energy = ERGM(dyads, [Edges(), KStars(2), GWESP(0.5)], theta)
    y = dyads.from_adjacency(SEVEN)
    expected = jnp.sum(jax.nn.log_sigmoid((2 * y - 1) * (energy.changes(y) @ theta)))
    np.testing.assert_allclose(surrogate(ebm.EnergyDistribution(energy), y[None], "pseudolikelihood"), expected, rtol=1e-5)


def operations(num_nodes):
    """Operations of one conditional, as XLA counts them."""
    energy = ERGM(num_nodes, [KStars(2), Triangles(), GWDegree(0.5)], np.ones(3))
    program = jax.jit(energy.local_fields).lower(jnp.zeros(energy.event_shape, int), 0).compile()
    return program.cost_analysis()["flops"]


def test_a_conditional_costs_as_much_as_a_row_of_the_matrix():
    assert operations(128) < 6 * operations(32)


@pytest.mark.parametrize("num_nodes", [2, 7, 8])
def test_ties_of_a_block_share_no_node(num_nodes):
    dyads = Dyads(num_nodes)
    energy = ERGM(dyads, [Edges(), KStars(2), Triangles(), GWDegree(0.5)], np.zeros(4))
    assert len(energy.blocks) == num_nodes - 1 + num_nodes % 2
    assert sorted(np.concatenate(energy.blocks)) == list(range(dyads.num_ties))
    for block in energy.blocks:
        nodes = np.concatenate([nodes[block] for nodes in dyads.ends])
        assert len(set(nodes)) == len(nodes)


def test_what_is_known_depends_on_the_statistics():
    pairs, shared = ERGM(5, [Edges()], [0.3]), ERGM(5, [Edges(), GWESP(0.5)], [0.3, 0.1])
    assert [len(block) for block in pairs.blocks] == [10]
    np.testing.assert_allclose(pairs.log_partition(), 10 * np.logaddexp(0, 0.3), rtol=1e-6)
    assert shared.blocks is None
    assert shared.num_terms is None
    with pytest.raises(ebm.EnergyError, match="method='ais'"):
        shared.log_partition()
    with pytest.raises(ebm.EnergyError, match="'gibbs'"):
        ebm.sample(jax.random.key(0), ebm.EnergyDistribution(shared), "block_gibbs")


@pytest.mark.parametrize("is_directed", [False, True])
def test_networks_go_to_events_and_back(is_directed):
    dyads = Dyads(5, is_directed=is_directed)
    y = random_networks(dyads, 6).reshape(2, 3, 5, 5)
    event = dyads.from_adjacency(y)
    assert event.shape == (2, 3, 20 if is_directed else 10)
    assert jnp.issubdtype(event.dtype, jnp.integer)
    np.testing.assert_array_equal(dyads.to_adjacency(event), y)
    np.testing.assert_array_equal(jax.jit(dyads.from_adjacency)(y.astype(bool)), event)
    network = Network(event[1, 2], dyads)
    np.testing.assert_array_equal(network[:], y[1, 2])
    np.testing.assert_array_equal(network[jnp.asarray(3)], y[1, 2, 3])
    flipped = network.with_tie(1, 4, 1 - y[1, 2, 1, 4])[:]
    assert np.argwhere(flipped != y[1, 2]).tolist() == ([[1, 4]] if is_directed else [[1, 4], [4, 1]])


def test_the_order_of_the_ties_is_that_of_numpy():
    y = np.triu(RNG.integers(0, 2, (5, 5)), 1)
    np.testing.assert_array_equal(Dyads(5).from_adjacency(y + y.T), y[np.triu_indices(5, 1)])
    directed = RNG.integers(0, 2, (5, 5)) * (1 - np.eye(5, dtype=int))
    expected = directed[~np.eye(5, dtype=bool)]
    np.testing.assert_array_equal(Dyads(5, is_directed=True).from_adjacency(directed), expected)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Isolates(AbstractNetworkStatistic):
    """A statistic of one's own: the number of nodes without ties."""

    is_directed = False

    def value(self, network):
        return jnp.sum(jnp.prod(1 - network[:], axis=1))


def test_a_statistic_of_ones_own_needs_its_value_alone():
    energy = ERGM(4, [Edges(), Isolates()], [0.2, -0.5])
    y = Dyads(4).from_adjacency([[0, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(energy.values(y), [2, 1])
    np.testing.assert_allclose(energy.changes(y, 0), [1, -1])
    np.testing.assert_allclose(energy.changes(y, np.array([[2, 3]])), [[[1, -1], [1, 0]]])


def test_a_decay_may_be_a_parameter(x64):
    y = Dyads(6).from_adjacency(random_networks(Dyads(6), 5)[3])

    def energy(decay):
        return ERGM(6, [GWDegree(decay), GWESP(decay)], [0.3, -0.7])(y)

    slope = (energy(0.5 + 1e-5) - energy(0.5 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.jit(jax.grad(energy))(0.5), slope, rtol=1e-6)


def test_several_networks_are_rows():
    dyads, networks = Dyads(6), random_networks(Dyads(6), 5)
    energy = ERGM(dyads, [Edges(), NodeMatch(ATTRIBUTE)], [-0.4, 0.9])
    y = dyads.from_adjacency(networks)
    one_by_one = sum(-energy(row) - energy.log_partition() for row in y)
    np.testing.assert_allclose(surrogate(ebm.EnergyDistribution(energy), y, "exact"), one_by_one, rtol=1e-5)


def edited(**entries):
    y = np.zeros((3, 3))
    for place, value in entries.items():
        y[int(place[1]), int(place[2])] = value
    return y


BAD = {
    "one node": (lambda: Dyads(1), "num_nodes >= 2"),
    "not symmetric": (lambda: Dyads(3).from_adjacency(edited(_01=1)), r"Dyads\(3, is_directed=True\)"),
    "a loop": (lambda: Dyads(3).from_adjacency(edited(_22=1)), "Node 2 has a tie to itself"),
    "weights": (lambda: Dyads(3).from_adjacency(edited(_01=2, _10=2)), r"got 2.0 at \[0, 1\].*adjacency > 0"),
    "nan": (lambda: Dyads(3).from_adjacency(edited(_01=np.nan)), r"got nan at \[0, 1\].*nan_to_num"),
    "other nodes": (lambda: Dyads(4).from_adjacency(edited()), r"got shape \(3, 3\). Write Dyads\(3\)"),
    "no matrix": (lambda: Dyads(3).from_adjacency(np.zeros(3)), r"got shape \(3,\)"),
    "words": (lambda: Dyads(2).from_adjacency([["a", "b"], ["b", "a"]]), "dense array"),
    "ties": (lambda: Dyads(3).to_adjacency(np.zeros(4)), r"has 3 ties; got events of shape \(4,\)"),
    "no statistics": (lambda: ERGM(3, [], []), "a statistic or more"),
    "coefficients": (lambda: ERGM(3, [Edges(), GWESP(0.5)], [1.0]), r"\(Edges, GWESP\), shape \(2,\); got shape \(1,\)"),
    "one coefficient for all": (lambda: ERGM(3, [Edges(), GWESP(0.5)], 1.0), r"got shape \(\)"),
    "not finite": (lambda: ERGM(3, [Edges()], [np.inf]), "finite coefficients"),
    "mutual": (lambda: ERGM(3, [Mutual()], [1.0]), r"with directions.*Write Dyads\(3, is_directed=True\)"),
    "stars": (lambda: ERGM(Dyads(3, is_directed=True), [KStars(2)], [1.0]), "without directions.*np.maximum"),
    "k": (lambda: KStars(1), "k >= 2"),
    "decay": (lambda: GWESP(-0.1), "decay >= 0; got -0.1"),
    "decays": (lambda: GWDegree([0.1, 0.2]), "needs decay of shape"),
    "decay not finite": (lambda: GWDegree(np.nan), "finite decay"),
    "attributes": (
        lambda: ERGM(3, [NodeMatch(["a", "b"])], [1.0]),
        r"attribute of shape \(3,\) for 3 nodes; got shape \(2,\)",
    ),
    "no attribute": (lambda: NodeMatch([None, "a", "b"]), "node 0 has None"),
    "attributes not finite": (lambda: NodeMatch([1.0, np.nan, 2.0]), r"NaN or infinity at attribute\[1\]"),
    "covariates": (lambda: ERGM(3, [NodeCovariate(np.ones(4))], [1.0]), r"values of shape \(3,\) for 3 nodes"),
    "covariates not finite": (lambda: NodeCovariate([1.0, np.nan]), r"finite values; got NaN or infinity at values\[1\]"),
    "covariate of no vector": (lambda: NodeCovariate(np.ones((3, 1))), "one for each node"),
    "pairs": (lambda: ERGM(3, [EdgeCovariate(np.ones((2, 2)))], [1.0]), r"values of shape \(3, 3\)"),
    "pairs of no square": (lambda: EdgeCovariate(np.ones(3)), r"shape \(num_nodes, num_nodes\)"),
    "pairs not symmetric": (lambda: ERGM(3, [EdgeCovariate(np.tri(3))], [1.0]), r"0.5 \* \(values \+ values.T\)"),
    "a context": (lambda: ebm.EnergyDistribution(ERGM(3, [Edges()], [0.0]), context=1.0), "takes no context"),
}


def test_large_numbers_are_attributes_of_their_own():
    """2^24 and its successor are one number as 32-bit floats."""
    ties = jnp.ones(3, int)
    identifiers = np.array([2**24, 2**24 + 1, 2**24])
    assert ERGM(3, [NodeMatch(identifiers)], [1.0]).values(ties) == 1


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_what_to_write(case):
    build, words = BAD[case]
    with pytest.raises(ebm.EnergyError, match=words):
        build()


class Unregistered(Isolates):
    """A class of which JAX knows nothing."""


@pytest.mark.parametrize(
    ("statistics", "words"),
    [
        (Edges(), "a list of statistics"),
        ([Edges], "the class Edges"),
        ([None], "got NoneType"),
        ([Unregistered()], "Unregistered is none"),
    ],
)
def test_what_is_no_statistic_is_refused(statistics, words):
    with pytest.raises(TypeError, match=words):
        ERGM(3, statistics, [0.0])
