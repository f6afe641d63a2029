"""Ready-made energies: invariants of all of them, deep machines, compositions, and what is refused."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from energy_cases import (
    AUTOLOGISTIC,
    DEEP,
    ENERGIES,
    ISING,
    MACHINE,
    RNG,
    TRIANGLE,
    check_shares,
    log_weights,
    plainly,
    probabilities,
    states_of,
    surrogate,
    swept,
)
from helpers import some_slow
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO

import numpyro_ebm as ebm
from numpyro_ebm.energies import (
    RBM,
    Autologistic,
    BoltzmannMachine,
    DeepBoltzmannMachine,
    ExponentialGraphicalModel,
    GaussianGraphicalModel,
    GaussianRBM,
    Graph,
    Ising,
    MixtureOfEnergies,
    PoissonGraphicalModel,
    Potts,
    ProductOfExperts,
    Tempered,
)

GAUSSIAN = GaussianGraphicalModel([[2.0, 0.6, 0.0], [0.6, 1.0, -0.4], [0.0, -0.4, 1.5]], [0.5, -1.0, 0.2])
SUMMABLE = [name for name, energy in ENERGIES.items() if energy.num_terms is not None]
SCALED = [name for name, energy in ENERGIES.items() if energy.scaled(2.0) is not None]
QUICK = ["deep machine, three layers", "joint rbm", "mixture, one-hot", "tempered ising", "counts", "autologistic, spins"]
SWEPT = [name for name, energy in ENERGIES.items() if energy.has_sweep]


def some_quick(names):
    """Names of energies of which those outside `QUICK` are left to `make test-all`."""
    return some_slow([name for name in names if name in QUICK], [name for name in names if name not in QUICK])


class TestAll:
    @pytest.mark.parametrize("name", some_quick(SUMMABLE))
    def test_the_gradient_of_log_z_is_minus_the_mean_gradient_of_the_energy(self, name):
        energy = ENERGIES[name]
        _, _, states = states_of(energy)
        p = jnp.asarray(probabilities(energy, states), float)
        mean = lambda energy: p @ jax.vmap(energy)(jnp.asarray(states))  # noqa: E731
        ours, theirs = jax.jit(lambda energy: (jax.grad(lambda e: e.log_partition())(energy), jax.grad(mean)(energy)))(
            energy
        )
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(one, -other, atol=2e-4)

    @pytest.mark.parametrize("name", some_quick(SWEPT))
    def test_a_sweep_leaves_the_distribution_as_it_is(self, name):
        energy = ENERGIES[name]
        _, _, states = states_of(energy)
        p = probabilities(energy, states)
        start = states[RNG.choice(len(states), 20_000, p=p)]
        moved = swept(energy, start)
        assert moved.dtype == start.dtype or jnp.issubdtype(moved.dtype, jnp.integer)
        assert (np.asarray(moved) != start).any()
        check_shares(moved, states, p)

    @pytest.mark.parametrize("name", some_quick(ENERGIES))
    def test_an_energy_pickles_and_survives_vmap(self, name):
        energy = ENERGIES[name]
        _, _, states = states_of(energy)
        x = jnp.asarray(states[3])
        again = pickle.loads(pickle.dumps(energy))
        assert jax.tree.structure(again) == jax.tree.structure(energy)
        np.testing.assert_array_equal(again(x), energy(x))
        both = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), energy)
        halved = jax.tree.map(lambda leaf: 0.5 * leaf, energy)
        values = jax.jit(jax.vmap(lambda energy: energy(x)))(both)
        np.testing.assert_allclose(values, [energy(x), halved(x)], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("name", some_slow(["mixture"], ["deep machine", "counts", "product", "tempered ising"]))
    @pytest.mark.slow
    def test_a_distribution_draws_by_gibbs(self, name):
        energy = ENERGIES[name]
        _, _, states = states_of(energy)
        sampler = ebm.ChainSampler("gibbs", num_warmup=0, num_steps=60)
        draws = ebm.EnergyDistribution(energy, sampler=sampler).sample(jax.random.key(1), (4000,))
        check_shares(draws, states, probabilities(energy, states))

    @pytest.mark.parametrize("estimator", ["exact", "pseudolikelihood"])
    @pytest.mark.parametrize(
        "name", some_slow(["mixture, one-hot", "counts"], ["deep machine", "product of potts", "tempered rbm"])
    )
    def test_estimators_agree_with_those_of_an_ordinary_function(self, name, estimator):
        energy = ENERGIES[name]
        d, _, states = states_of(energy)
        x = jnp.asarray(states[RNG.permutation(len(states))[:7]])
        assert d.known_energy is not None
        np.testing.assert_allclose(surrogate(d, x, estimator), surrogate(plainly(energy), x, estimator), rtol=2e-5)

    @pytest.mark.parametrize("name", some_quick(SCALED))
    def test_a_scaled_energy_is_a_multiple(self, name):
        energy = ENERGIES[name]
        _, _, states = states_of(energy)
        np.testing.assert_allclose(
            log_weights(energy.scaled(0.3), states), 0.3 * log_weights(energy, states), rtol=1e-5, atol=1e-5
        )


class TestDeepBoltzmannMachine:
    def test_its_energy_is_the_sum_over_its_layers(self):
        x = np.array([1, 0, 1, 1, 0, 1, 1, 0])
        layers = [part - offset for part, offset in zip(DEEP.split(jnp.asarray(x)), DEEP.offsets, strict=True)]
        assert [len(layer) for layer in layers] == [3, 2, 2, 1]
        pairs = sum(layers[k] @ DEEP.weights[k] @ layers[k + 1] for k in range(3))
        alone = sum(layer @ bias for layer, bias in zip(layers, DEEP.biases, strict=True))
        np.testing.assert_allclose(DEEP(jnp.asarray(x)), -pairs - alone, rtol=1e-5)

    def test_its_blocks_are_every_other_layer(self):
        assert [block.tolist() for block in DEEP.blocks] == [[3, 4, 7], [0, 1, 2, 5, 6]]
        assert DEEP.num_terms == 2**3
        assert DeepBoltzmannMachine([jnp.zeros((2, 5)), jnp.zeros((5, 1))]).num_terms == 2**3

    def test_with_one_hidden_layer_it_is_the_joint_form_of_an_rbm(self):
        joint = MACHINE.joint()
        same = DeepBoltzmannMachine(joint.weights, joint.biases, joint.offsets)
        x = jnp.asarray(RNG.integers(0, 2, (10, 7)))
        np.testing.assert_allclose(jax.vmap(same)(x), jax.vmap(joint)(x), rtol=1e-6)
        np.testing.assert_allclose(same.log_partition(), MACHINE.log_partition(), rtol=1e-6)

    def test_a_centred_machine_does_not_care_which_value_is_one(self):
        weights = [RNG.normal(size=(3, 2)), RNG.normal(size=(2, 2))]
        x = jnp.asarray([1, 0, 0, 1, 0, 1, 1])
        biases = RNG.normal(size=7)
        parts = np.split(biases, [3, 5])
        energy = DeepBoltzmannMachine(weights, parts, centered=True)
        flipped = DeepBoltzmannMachine(weights, [-part for part in parts], centered=True)
        np.testing.assert_allclose(energy(x), flipped(1 - x), rtol=1e-5)

    def test_a_block_costs_the_weights_of_its_layers_alone(self):
        energy = DeepBoltzmannMachine([jnp.zeros((300, 200)), jnp.zeros((200, 100)), jnp.zeros((100, 50))])
        x, last = jnp.zeros(650, int), np.arange(600, 650)
        cost = lambda f, *args: jax.jit(f).lower(*args).compile().cost_analysis()["flops"]  # noqa: E731
        assert cost(energy.local_fields, x) > 2 * 85_000
        assert cost(lambda x: energy.local_fields(x, last), x) < 20_000


class TestCompositions:
    def test_a_product_has_the_blocks_that_all_experts_have(self):
        lattice = Ising(Graph.lattice(5), 0.4)
        product = ProductOfExperts([ISING, lattice])
        assert sorted(len(block) for block in product.blocks) == [1, 1, 1, 2]  # 1 and 3, 0 and 2 and 4 less the edge (0, 2)
        assert ProductOfExperts([lattice, BoltzmannMachine.from_pairs(jnp.zeros(10), units="spins")]).blocks is None

    def test_plain_functions_take_part_and_nothing_is_known_then(self):
        energy = ProductOfExperts([ISING, lambda s: 0.3 * jnp.sum(s[:-1] * s[1:])])
        d, _, states = states_of(energy)
        assert d.known_energy is None
        assert energy.blocks is None
        assert not energy.has_conditionals
        mixed = MixtureOfEnergies([ISING, lambda s: jnp.full(1, 0.2)], [0.0, 1.0])
        assert mixed.num_terms is None
        assert not mixed.has_sweep
        for each in (energy, mixed):
            expected = np.logaddexp.reduce(log_weights(each, states))
            found = ebm.log_partition(None, ebm.EnergyDistribution(each), method="enumerate").value
            np.testing.assert_allclose(found, expected, rtol=1e-5)
        want = -np.logaddexp(-ISING(states[5]), 1.0 - 0.2)
        np.testing.assert_allclose(mixed(jnp.asarray(states[5])), want, rtol=1e-5)
        assert d.sample(jax.random.key(0), (3,)).shape == (3, 5)

    def test_shares_of_a_mixture_are_its_terms_of_z(self):
        energy = ENERGIES["mixture"]
        _, _, states = states_of(energy)
        p = probabilities(energy, states)
        each = jax.vmap(energy.log_responsibilities)(jnp.asarray(states))
        np.testing.assert_allclose(jnp.exp(energy.log_shares()), p @ np.exp(each), rtol=1e-4)
        log_z = jnp.stack([part.log_partition() for part in energy.energies])
        even = MixtureOfEnergies(energy.energies, jnp.log(jnp.array([0.2, 0.8])) - log_z)
        np.testing.assert_allclose(jnp.exp(even.log_shares()), [0.2, 0.8], rtol=1e-5)
        np.testing.assert_allclose(even.log_partition(), 0.0, atol=1e-5)

    def test_continuous_energies_mix_and_heat(self):
        wide = Tempered(GAUSSIAN, 4.0)
        np.testing.assert_allclose(wide.log_partition(), GAUSSIAN.log_partition() + 1.5 * np.log(4.0), rtol=1e-5)
        mixture = MixtureOfEnergies([GAUSSIAN, wide])
        expected = np.logaddexp(GAUSSIAN.log_partition(), wide.log_partition())
        np.testing.assert_allclose(mixture.log_partition(), expected, rtol=1e-6)
        moved = swept(mixture, jnp.zeros((200, 3)))
        assert bool(jnp.isfinite(moved).all())
        assert not mixture.has_conditionals
        draws = ebm.sample(jax.random.key(0), ebm.EnergyDistribution(mixture), "mala", num_warmup=20, num_samples=5)
        assert draws.samples["x"].shape == (4, 5, 3)

    def test_tempered_bonds_are_those_of_the_scaled_couplings(self):
        np.testing.assert_allclose(ENERGIES["tempered ising"].bonds.strengths, 2 * ISING.couplings / 2.5, rtol=1e-6)
        assert ENERGIES["tempered rbm"].bonds is None

    def test_a_temperature_trains(self):
        _, _, states = states_of(ISING)
        p = probabilities(Tempered(ISING, 2.0), states)
        x = jnp.asarray(states[RNG.choice(len(states), 5000, p=p)])

        def model(x):
            temperature = numpyro.param("temperature", 1.0, constraint=constraints.positive)
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.EnergyDistribution(Tempered(ISING, temperature)), obs=x)

        svi = SVI(ebm.estimate(model, "exact"), ebm.empty_guide, optax.adam(0.05), Trace_ELBO())
        found = svi.run(jax.random.key(0), 200, x, progress_bar=False).params["temperature"]
        np.testing.assert_allclose(found, 2.0, atol=0.15)


BAD = {
    "deep: no list": (lambda: DeepBoltzmannMachine(jnp.zeros((3, 2))), "a list of weights"),
    "deep: weights do not fit": (lambda: DeepBoltzmannMachine([jnp.zeros((3, 2)), jnp.zeros((3, 2))]), "fit each other"),
    "deep: biases of all units": (
        lambda: DeepBoltzmannMachine([jnp.zeros((3, 2))], jnp.zeros(5)),
        "one for each of its 2 layers",
    ),
    "deep: too few biases": (lambda: DeepBoltzmannMachine([jnp.zeros((3, 2))], [0.0]), "got 1 of them"),
    "deep: a bias": (lambda: DeepBoltzmannMachine([jnp.zeros((3, 2))], [0.0, jnp.zeros(3)]), r"biases\[1\] of shape \(2,\)"),
    "deep: both offsets": (lambda: DeepBoltzmannMachine([jnp.zeros((3, 2))], offsets=0.1, centered=True), "Leave one out"),
    "product: functions alone": (lambda: ProductOfExperts([jnp.sum]), "ready-made"),
    "product: none": (lambda: ProductOfExperts([]), "ready-made"),
    "product: shapes": (lambda: ProductOfExperts([ISING, Ising([(0, 1)], 0.0)]), "events of shape"),
    "product: supports": (
        lambda: ProductOfExperts([ISING, Ising(TRIANGLE, 0.0, units="boolean")]),
        "energies on one support",
    ),
    "product: context": (lambda: ProductOfExperts([AUTOLOGISTIC]), "also takes a context"),
    "product: a vector": (lambda: ProductOfExperts([ISING, lambda s: 1.0 * s])(jnp.ones(5)), "must return a scalar"),
    "mixture: logits": (lambda: MixtureOfEnergies([ISING, ISING], jnp.zeros(3)), "needs logits of shape"),
    "mixture: log Z": (lambda: MixtureOfEnergies([ISING, Tempered(ISING, 2.0), lambda s: 0.0]).log_partition(), "not known"),
    "tempered: 0": (lambda: Tempered(ISING, 0.0), "temperature > 0"),
    "tempered: log Z": (lambda: Tempered(MACHINE, 2.0).log_partition(), "not known"),
    "gaussian: not square": (lambda: GaussianGraphicalModel(jnp.zeros((2, 3))), "square precision"),
    "gaussian: asymmetric": (lambda: GaussianGraphicalModel([[1.0, 0.5], [0.0, 1.0]]), "symmetric precision"),
    "gaussian: indefinite": (lambda: GaussianGraphicalModel([[1.0, 2.0], [2.0, 1.0]]), "eigenvalue is -1"),
    "gaussian: NaN": (lambda: GaussianGraphicalModel([[jnp.nan]]), "finite precision"),
    "gaussian: loc": (lambda: GaussianGraphicalModel(jnp.eye(2), jnp.zeros(3)), "needs loc of shape"),
    "poisson: attraction": (lambda: PoissonGraphicalModel([(0, 1)], 0.1), "maximum=100"),
    "poisson: maximum": (lambda: PoissonGraphicalModel([(0, 1)], 0.1, maximum=0), "whole number maximum"),
    "exponential: attraction": (lambda: ExponentialGraphicalModel([(0, 1)], -0.1), "couplings >= 0"),
    "exponential: rates": (lambda: ExponentialGraphicalModel([(0, 1)], 0.1, 0.0), "rates > 0"),
    "autologistic: coefficients": (lambda: Autologistic(TRIANGLE, 0.1, 1.0), "needs coefficients of shape"),
    "autologistic: covariates": (lambda: AUTOLOGISTIC.given(jnp.zeros((5, 3))), r"shape \(5, 2\)"),
    "autologistic: no covariates": (lambda: AUTOLOGISTIC(jnp.zeros(5)), "needs the covariates"),
    "autologistic: conditionals": (lambda: AUTOLOGISTIC.conditional_logits(jnp.zeros(5)), r"energy.given\(context\)"),
    "autologistic: log Z": (lambda: AUTOLOGISTIC.log_partition(), r"energy.given\(context\)"),
    "no context": (lambda: ebm.EnergyDistribution(AUTOLOGISTIC), "got no context"),
    "a context too many": (lambda: ebm.EnergyDistribution(ISING, context=jnp.zeros((3, 2))), "takes no context"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_what_to_write(case):
    build, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        build()


def test_parts_that_cannot_be_called_are_refused():
    for build in (lambda: ProductOfExperts([ISING, 3.0]), lambda: MixtureOfEnergies(ISING), lambda: Tempered(jnp.sum, 2.0)):
        with pytest.raises(TypeError, match="needs"):
            build()


def test_kernels_with_gradients_refuse_compositions_of_indices():
    potts = Potts(jnp.zeros((2, 3, 2, 3)))
    for energy in (ProductOfExperts([potts, potts]), MixtureOfEnergies([potts, potts]), Tempered(potts, 2.0)):
        with pytest.raises(ValueError, match="uses its elements as indices"):
            ebm.sample(jax.random.key(0), ebm.EnergyDistribution(energy), "gwg")
    assert Tempered(RBM(jnp.zeros((2, 2))), 2.0).is_differentiable
    assert Tempered(GaussianRBM(jnp.zeros((2, 2))), 2.0).num_terms is None
