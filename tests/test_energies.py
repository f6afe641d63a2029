"""Ready-made energies: against enumeration, as parameters of models, and what is refused."""

import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from energy_cases import ENERGIES, MACHINE, PAIRS, RNG, WEIGHTS, log_weights, plainly, states_of, surrogate
from helpers import some_slow
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO

import numpyro_ebm as ebm
from numpyro_ebm.energies import RBM, BoltzmannMachine, GaussianRBM, Graph, Ising, Potts


@pytest.mark.parametrize("name", ENERGIES)
def test_log_partition_is_the_sum_over_all_states(name):
    energy = ENERGIES[name]
    d, _, states = states_of(energy)
    expected = np.logaddexp.reduce(log_weights(energy, states))
    if energy.num_terms is None:
        with pytest.raises(ValueError, match="is not known"):
            energy.log_partition()
    else:
        np.testing.assert_allclose(energy.log_partition(), expected, rtol=1e-5)
    np.testing.assert_allclose(ebm.log_partition(None, d, method="enumerate").value, expected, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name, energy in ENERGIES.items() if energy.has_conditionals])
def test_conditionals_are_those_of_the_enumeration(name):
    energy = ENERGIES[name]
    _, codes, states = states_of(energy)
    chosen = RNG.permutation(len(codes))[:20]
    table = {tuple(code): weight for code, weight in zip(codes.tolist(), log_weights(energy, states), strict=True)}
    some = np.array([[2, 0], [1, 2]])
    # All elements, elements that are known when the energy is traced, and one that is not.
    indices = (None, some, jnp.asarray(1))
    at = lambda index: jax.jit(jax.vmap(lambda x, i: energy.conditional_logits(x, index if i is None else i), (0, None)))  # noqa: E731
    x = jnp.asarray(states[chosen])
    every, given, one = (at(index)(x, index if isinstance(index, jax.Array) else None) for index in indices)
    np.testing.assert_allclose(given, every[:, some], atol=1e-5)
    np.testing.assert_allclose(one, every[:, 1], atol=1e-5)
    for code, logits in zip(codes[chosen], np.asarray(every), strict=True):
        for i, row in enumerate(logits):
            exact = np.array([table[(*code[:i], value, *code[i + 1 :])] for value in range(len(row))])
            np.testing.assert_allclose(row - row[0], exact - exact[0], atol=2e-5)


@pytest.mark.parametrize("name", [name for name, energy in ENERGIES.items() if energy.blocks is not None])
def test_elements_of_a_block_are_independent_given_the_rest(name):
    energy = ENERGIES[name]
    assert sorted(np.concatenate(energy.blocks).tolist()) == list(range(int(np.prod(energy.event_shape))))
    _, codes, states = states_of(energy)
    one, other = jnp.asarray(states[0]), jnp.asarray(states[-1])
    for block in energy.blocks:
        moved = one.reshape(-1).at[block].set(other.reshape(-1)[block]).reshape(one.shape)
        logits = jax.jit(jax.vmap(lambda x, block=block: energy.conditional_logits(x, block)))(jnp.stack([one, moved]))
        np.testing.assert_allclose(*logits, atol=1e-5)


def test_a_sweep_of_an_rbm_leaves_its_distribution_as_it_is():
    _, _, states = states_of(MACHINE)
    log_p = log_weights(MACHINE, states)
    p = np.exp(log_p - np.logaddexp.reduce(log_p))
    start = jnp.asarray(states[RNG.choice(len(states), 40_000, p=p)])
    moved = np.asarray(jax.jit(jax.vmap(MACHINE.sweep))(jax.random.split(jax.random.key(0), len(start)), start))
    assert (moved != start).any()
    shares = (moved[:, None] == states).all(-1).mean(0)
    np.testing.assert_array_less(abs(shares - p), 5 * np.sqrt(p * (1 - p) / len(start)))


def test_a_joint_rbm_sums_to_its_free_energy():
    hidden = np.array(list(itertools.product((0, 1), repeat=3)))
    for visible in itertools.product((0, 1), repeat=4):
        joint = [-float(MACHINE.joint()(jnp.asarray([*visible, *h]))) for h in hidden]
        np.testing.assert_allclose(-MACHINE(jnp.asarray(visible)), np.logaddexp.reduce(joint), rtol=1e-5)


class TestGaussianRBM:
    @pytest.mark.slow
    def test_the_exact_likelihood_and_chains_with_gradients_take_it(self):
        d, x = ebm.EnergyDistribution(self.ENERGY), jnp.asarray(RNG.normal(size=(6, 2)))
        expected = jnp.sum(d.log_prob(x)) - 6 * self.ENERGY.log_partition()
        np.testing.assert_allclose(surrogate(d, x, "exact"), expected, rtol=1e-5)
        np.testing.assert_allclose(surrogate(d, x, "cd"), surrogate(plainly(self.ENERGY), x, "cd"), rtol=1e-4, atol=1e-4)

    ENERGY = GaussianRBM(WEIGHTS[:2], [0.5, -1.0], RNG.normal(size=3), scale=[0.7, 1.5])

    def mixture(self):
        hidden = np.array(list(itertools.product((0, 1), repeat=3)))
        means = np.asarray(self.ENERGY.visible_biases) + hidden @ WEIGHTS[:2].T
        scale, biases = np.asarray(self.ENERGY.scale), np.asarray(self.ENERGY.visible_biases)
        logits = hidden @ np.asarray(self.ENERGY.hidden_biases) + 0.5 * ((means**2 - biases**2) / scale**2).sum(1)
        return means, scale, np.exp(logits - np.logaddexp.reduce(logits))

    def test_the_density_is_that_of_its_mixture(self):
        means, scale, weights = self.mixture()
        x = RNG.normal(size=(20, 2)) * 3
        normal = (np.exp(-0.5 * ((x[:, None] - means) / scale) ** 2) / scale / np.sqrt(2 * np.pi)).prod(-1)
        ours = -jax.vmap(self.ENERGY)(jnp.asarray(x)) - self.ENERGY.log_partition()
        np.testing.assert_allclose(ours, np.log(normal @ weights), rtol=1e-4, atol=1e-4)
        d = ebm.EnergyDistribution(self.ENERGY)
        np.testing.assert_allclose(ebm.log_partition(None, d, method="enumerate").value, self.ENERGY.log_partition())

    def test_a_sweep_leaves_the_mixture_as_it_is(self):
        means, scale, weights = self.mixture()
        start = means[RNG.choice(8, 40_000, p=weights)] + scale * RNG.normal(size=(40_000, 2))
        moved = jax.jit(jax.vmap(self.ENERGY.sweep))(jax.random.split(jax.random.key(0), 40_000), jnp.asarray(start))
        mean = weights @ means
        variance = weights @ means**2 + scale**2 - mean**2
        np.testing.assert_array_less(abs(np.asarray(moved).mean(0) - mean), 5 * np.sqrt(variance / 40_000))


@pytest.mark.slow
def test_the_lattice_has_its_known_log_partition_and_two_colours():
    energy = Ising(Graph.lattice(3, 3), 0.3, 0.1)
    np.testing.assert_allclose(energy.log_partition(), 6.9126820, rtol=1e-6)
    assert [len(block) for block in energy.blocks] == [5, 4]
    large = Graph.lattice(10, 10)
    assert len(large.blocks) == 2
    assert Ising(large, 0.3).num_terms < 2**18
    # Free spins, and a chain, at sizes beyond enumeration.
    np.testing.assert_allclose(Ising(large, 0.0, 0.2).log_partition(), 100 * np.log(2 * np.cosh(0.2)), rtol=1e-6)
    chain = Ising(Graph.lattice(200), 0.7)
    np.testing.assert_allclose(chain.log_partition(), np.log(2) + 199 * np.log(2 * np.cosh(0.7)), rtol=1e-5)


def test_bonds_are_the_same_distribution():
    for name in ("ising", "ising, boolean", "graph potts"):
        energy = ENERGIES[name]
        _, codes, states = states_of(energy)
        graph, strengths, fields = energy.bonds
        left, right = graph.edges.T
        ours = (codes[:, left] == codes[:, right]) @ strengths + np.take_along_axis(fields[None], codes[..., None], 2).sum(
            (1, 2)
        )
        difference = np.asarray(ours) - log_weights(energy, states)
        np.testing.assert_allclose(difference, difference[0], atol=1e-5)


def test_the_zero_sum_gauge_is_the_same_distribution():
    energy = ENERGIES["potts"]
    gauged = energy.zero_sum()
    _, _, states = states_of(energy)
    difference = log_weights(gauged, states) - log_weights(energy, states)
    np.testing.assert_allclose(difference, difference[0], atol=1e-5)
    np.testing.assert_allclose(gauged.couplings.sum(1), 0.0, atol=1e-5)
    np.testing.assert_allclose(gauged.fields.sum(1), 0.0, atol=1e-5)
    scores = energy.contact_scores()
    np.testing.assert_allclose(scores, gauged.contact_scores(), atol=1e-5)
    np.testing.assert_allclose(scores, scores.T, atol=1e-6)
    assert not np.allclose(scores, energy.contact_scores(skipped=(0,)))
    np.testing.assert_array_equal(energy.contact_scores(skipped=(-1,)), energy.contact_scores(skipped=(3,)))
    assert not np.allclose(scores, energy.contact_scores(skipped=(-1,)))


@pytest.mark.parametrize("estimator", ["exact", "pseudolikelihood", "ratio_matching", "mpf"])
@pytest.mark.parametrize("name", ["boltzmann machine", "ising, lattice", "potts", "potts, one-hot", "rbm"])
def test_estimators_agree_with_those_of_an_ordinary_function(name, estimator):
    energy = ENERGIES[name]
    d, _, states = states_of(energy)
    x = jnp.asarray(states[RNG.permutation(len(states))[:7]])
    plain = plainly(energy)
    assert d.known_energy is not None
    assert plain.known_energy is None
    np.testing.assert_allclose(surrogate(d, x, estimator), surrogate(plain, x, estimator), rtol=2e-5)


@pytest.mark.parametrize("kernel", some_slow(["gibbs"], ["random scan", "tempered"]))
@pytest.mark.parametrize("name", some_slow(["boltzmann machine, spins", "potts, one-hot"], ["potts", "rbm"]))
def test_gibbs_draws_by_conditionals_what_it_draws_by_energies(name, kernel):
    kernels = {
        "gibbs": ebm.Gibbs(),
        "random scan": ebm.Gibbs(scan="random", num_updates=3),
        "tempered": ebm.ParallelTempering("gibbs", temperatures=(1.0, 3.0)),
    }
    energy = ENERGIES[name]
    ours, theirs = (
        ebm.sample(jax.random.key(0), d, kernels[kernel], num_warmup=2, num_samples=30).samples["x"]
        for d in (ebm.EnergyDistribution(energy), plainly(energy))
    )
    np.testing.assert_array_equal(ours, theirs)
    assert len(np.unique(np.asarray(ours).reshape(-1, *energy.event_shape), axis=0)) > 5


@pytest.mark.slow
def test_chains_of_estimators_use_the_conditionals(monkeypatch):
    energy = ENERGIES["boltzmann machine"]
    x = jnp.asarray(states_of(energy)[2])
    before = surrogate(ebm.EnergyDistribution(energy), x, "cd")
    np.testing.assert_allclose(before, surrogate(plainly(energy), x, "cd"), rtol=1e-5)
    # With conditionals that always say 1, the chains end in the state of ones.
    monkeypatch.setattr(BoltzmannMachine, "local_fields", lambda self, event, index: jnp.full((), 1e6))
    ones = float(-jnp.sum(jax.vmap(energy)(x)) + len(x) * energy(jnp.ones(5, int)))
    np.testing.assert_allclose(surrogate(ebm.EnergyDistribution(energy), x, "cd"), ones, rtol=1e-4)


@pytest.mark.slow
def test_parameters_train_at_a_site():
    truth = BoltzmannMachine.from_pairs(jnp.array([1.0, -0.5, 0.7]), jnp.array([0.3, -0.2, 0.1]))
    _, _, states = states_of(truth)
    log_p = log_weights(truth, states)
    x = jnp.asarray(states[np.random.default_rng(1).choice(8, 20_000, p=np.exp(log_p - np.logaddexp.reduce(log_p)))])

    def model(x):
        pairs, biases = numpyro.param("pairs", jnp.zeros(3)), numpyro.param("biases", jnp.zeros(3))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(BoltzmannMachine.from_pairs(pairs, biases)), obs=x)

    found = {}
    for name in ("exact", "pseudolikelihood"):
        svi = SVI(ebm.estimate(model, name), ebm.empty_guide, optax.adam(0.1), Trace_ELBO())
        found[name] = svi.run(jax.random.key(0), 300, x, progress_bar=False).params
    fitted = BoltzmannMachine.from_pairs(found["exact"]["pairs"], found["exact"]["biases"])
    log_q = log_weights(fitted, states)
    q = np.exp(log_q - np.logaddexp.reduce(log_q))
    second = lambda w: np.einsum("n,ni,nj->ij", w, states, states)  # noqa: E731
    share = np.asarray((x[:, None] == states).all(-1).mean(0))
    np.testing.assert_allclose(second(q), second(share), atol=1e-3)  # maximum likelihood matches the moments
    np.testing.assert_allclose(found["exact"]["pairs"], [1.0, -0.5, 0.7], atol=0.2)
    np.testing.assert_allclose(found["pseudolikelihood"]["pairs"], found["exact"]["pairs"], atol=0.02)


def test_a_trained_matrix_counts_with_its_symmetric_part():
    matrix = jnp.asarray(RNG.normal(size=(5, 5)))
    gradient = jax.grad(lambda w: BoltzmannMachine(w)(jnp.ones(5)))(matrix)
    np.testing.assert_allclose(gradient, -0.5 * (1 - np.eye(5)), atol=1e-6)


def test_a_centred_machine_does_not_care_which_value_is_one():
    energy = RBM(WEIGHTS, 0.3, centered=True)
    flipped = RBM(-WEIGHTS, -0.3, centered=True)
    x = jnp.asarray([1, 0, 0, 1])
    np.testing.assert_allclose(energy(x), flipped(1 - x), rtol=1e-6)
    np.testing.assert_allclose(energy.visible_offsets, 0.5)
    np.testing.assert_allclose(BoltzmannMachine.from_pairs(PAIRS, centered=True, units="spins").offsets, 0.0)


def test_sampling_and_jit_keep_the_energy():
    d = ebm.EnergyDistribution(ENERGIES["ising, lattice"])
    assert d.event_shape == (3, 3)
    x = d.sample(jax.random.key(0), (4,))
    assert x.shape == (4, 3, 3)
    assert set(np.unique(x)) <= {-1, 1}
    np.testing.assert_allclose(jax.jit(lambda d, x: d.log_prob(x))(d, x), d.log_prob(x), rtol=1e-6)
    assert ebm.EnergyDistribution(ENERGIES["rbm"], support=constraints.boolean).known_energy is not None


BAD = {
    "asymmetric": (lambda: BoltzmannMachine([[0.0, 1.0], [0.0, 0.0]]), "from_pairs"),
    "a diagonal": (lambda: BoltzmannMachine([[1.0, 0.5], [0.5, 0.0]]), "no coupling to itself"),
    "not square": (lambda: BoltzmannMachine(jnp.zeros((2, 3))), "square"),
    "no number of pairs": (lambda: BoltzmannMachine.from_pairs(jnp.zeros(4)), r"shape \(3,\)"),
    "biases": (lambda: BoltzmannMachine.from_pairs(jnp.zeros(3), jnp.zeros(2)), "needs biases of shape"),
    "units": (lambda: BoltzmannMachine.from_pairs(jnp.zeros(3), units="spin"), "spins"),
    "both offsets": (lambda: BoltzmannMachine.from_pairs(jnp.zeros(3), offsets=0.1, centered=True), "Leave one out"),
    "edge outside": (lambda: Graph([(0, 3)], shape=3), "nodes of shape"),
    "loop": (lambda: Graph([(1, 1)], shape=3), "to itself"),
    "shape of a graph": (lambda: Graph([(0, 1)], shape=2.5), "whole number"),
    "no shape": (lambda: Graph.lattice(), "a node or more"),
    "edge twice": (lambda: Graph([(0, 1), (1, 0)], shape=3), "given 2 times"),
    "edges": (lambda: Graph([(0.5, 1.0)], shape=3), "whole numbers"),
    "colours": (lambda: Graph([(0, 1)], shape=2, colors=[1, 1]), "no colouring"),
    "couplings per edge": (lambda: Ising([(0, 1), (1, 2)], jnp.zeros(3)), "couplings of shape"),
    "couplings not finite": (lambda: Ising([(0, 1)], jnp.nan), "finite couplings"),
    "potts shape": (lambda: Potts(jnp.zeros((3, 4))), "L, q, L, q"),
    "potts asymmetric": (lambda: Potts(np.triu(np.ones((6, 6)), 3).reshape(2, 3, 2, 3)), "transpose"),
    "potts diagonal": (lambda: Potts(np.ones((2, 3, 2, 3))), "to itself"),
    "rbm": (lambda: RBM(jnp.zeros(4)), "visible units first"),
    "rbm biases": (lambda: RBM(jnp.zeros((4, 3)), jnp.zeros(3)), "needs visible_biases of shape"),
    "scale": (lambda: GaussianRBM(jnp.zeros((2, 2)), scale=-1.0), "scale > 0"),
    "event_shape": (lambda: ebm.EnergyDistribution(MACHINE, (3,)), "Leave event_shape out"),
    "a category to skip": (lambda: ENERGIES["potts"].contact_scores(skipped=(20,)), r"with 4, .*skipped=\(20,\)"),
    "potts of no sites": (lambda: Potts(jnp.zeros((0, 3, 0, 3))), "a site and a category or more"),
    "points without an integral": (
        lambda: surrogate(ebm.EnergyDistribution(MACHINE), [[0, 1, 1, 0]], ebm.Pseudolikelihood(num_points=65)),
        "num_points=65 is for integrals",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_what_to_write(case):
    build, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        build()


@pytest.mark.parametrize("kernel", ["gwg", "dula", "dmala"])
def test_kernels_with_gradients_refuse_energies_of_indices(kernel):
    for name in ("potts", "graph potts"):
        d = ebm.EnergyDistribution(ENERGIES[name])
        with pytest.raises(ValueError, match="uses its elements as indices"):
            ebm.sample(jax.random.key(0), d, kernel)
        with pytest.raises(ValueError, match="uses its elements as indices"):
            surrogate(d, jnp.zeros((2, *d.event_shape), int), ebm.ContrastiveDivergence(kernel=kernel))
    one_hot = ebm.EnergyDistribution(ENERGIES["potts, one-hot"])
    assert ebm.sample(jax.random.key(0), one_hot, kernel, num_warmup=2, num_samples=3).samples["x"].shape == (4, 3, 3, 4)


def test_an_energy_pickles():
    d = ebm.EnergyDistribution(ENERGIES["ising, lattice"])
    again, x = pickle.loads(pickle.dumps(d)), jnp.ones((3, 3), int)
    np.testing.assert_array_equal(again.log_prob(x), d.log_prob(x))
    assert again.known_energy.graph == d.known_energy.graph


def test_sums_beyond_32_bits_are_refused():
    for energy in (RBM(jnp.zeros((40, 31))), BoltzmannMachine(jnp.zeros((31, 31))), Ising(Graph.complete(31), 0.0)):
        with pytest.raises(ValueError, match=r"beyond 2\*\*30"):
            energy.log_partition()


def test_too_many_terms_are_refused():
    d = ebm.EnergyDistribution(BoltzmannMachine(jnp.zeros((30, 30))))
    with pytest.raises(ValueError, match="sum of 1073741824 terms"):
        ebm.log_partition(None, d, method="enumerate")
    with pytest.raises(ValueError, match="pseudolikelihood"):
        surrogate(d, jnp.zeros((2, 30), int), "exact")
