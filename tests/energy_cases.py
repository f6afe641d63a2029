"""Ready-made energies of discrete events, and what tests compare them with."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import handlers
from numpyro.infer.util import log_density

import numpyro_ebm as ebm
from numpyro_ebm.energies import (
    ERGM,
    GWESP,
    RBM,
    Autologistic,
    BoltzmannMachine,
    DeepBoltzmannMachine,
    Dyads,
    Edges,
    Graph,
    GraphPotts,
    GWDegree,
    Ising,
    KStars,
    MixtureOfEnergies,
    Mutual,
    NodeMatch,
    PoissonGraphicalModel,
    Potts,
    ProductOfExperts,
    Tempered,
    Triangles,
)

RNG = np.random.default_rng(0)
PAIRS, BIASES = RNG.normal(size=10), RNG.normal(size=5)
WEIGHTS = RNG.normal(size=(4, 3))
TRIANGLE = Graph([(0, 1), (1, 2), (0, 2), (2, 3)], shape=5)
COUPLINGS = RNG.normal(size=(3, 4, 3, 4))
COUPLINGS = (COUPLINGS + COUPLINGS.transpose(2, 3, 0, 1)) * (1 - np.eye(3))[:, None, :, None]
MACHINE = RBM(WEIGHTS, RNG.normal(size=4), RNG.normal(size=3), visible_offsets=RNG.random(4), hidden_offsets=0.3)
ISING = Ising(TRIANGLE, RNG.normal(size=4), RNG.normal(size=5))
DEEP = DeepBoltzmannMachine(
    [RNG.normal(size=(3, 2)), RNG.normal(size=(2, 2)), RNG.normal(size=(2, 1))],
    [RNG.normal(size=3), RNG.normal(size=2), 0.3, 0.1],
    [RNG.random(3), 0.2, 0.0, 0.5],
)
COUNTS = PoissonGraphicalModel(TRIANGLE, [0.3, -0.5, 0.1, -0.2], RNG.normal(size=5), maximum=2)
AUTOLOGISTIC = Autologistic(TRIANGLE, RNG.normal(size=4), [1.0, -0.5], RNG.normal(size=5), centered=True)
COVARIATES = RNG.normal(size=(5, 2))
ENERGIES = {
    "boltzmann machine": BoltzmannMachine.from_pairs(PAIRS, BIASES),
    "boltzmann machine, offsets": BoltzmannMachine.from_pairs(PAIRS, BIASES, offsets=RNG.random(5)),
    "boltzmann machine, spins": BoltzmannMachine.from_pairs(PAIRS, BIASES, units="spins"),
    "ising": Ising(TRIANGLE, RNG.normal(size=4), BIASES),
    "ising, lattice": Ising(Graph.lattice(3, 3, periodic=True), RNG.normal(size=18), RNG.normal(size=(3, 3))),
    "ising, boolean": Ising(TRIANGLE, RNG.normal(size=4), BIASES, units="boolean"),
    "ising, no edges": Ising(Graph([], shape=3), [], [0.4, -1.0, 0.2], units="boolean"),
    "potts": Potts(COUPLINGS, RNG.normal(size=(3, 4))),
    "potts, one-hot": Potts(COUPLINGS, RNG.normal(size=(3, 4)), is_one_hot=True),
    "graph potts": GraphPotts(TRIANGLE, RNG.normal(size=4), 3, RNG.normal(size=(5, 3))),
    "graph potts, no edges": GraphPotts(Graph([], shape=3), [], 3, RNG.normal(size=(3, 3))),
    "rbm": MACHINE,
    "rbm, wide": RBM(WEIGHTS.T, RNG.normal(size=3), RNG.normal(size=4)),
    "joint rbm": MACHINE.joint(),
    "deep machine": DEEP,
    "deep machine, three layers": DeepBoltzmannMachine(
        [RNG.normal(size=(2, 3)), RNG.normal(size=(3, 2))], 0.2, centered=True
    ),
    "product": ProductOfExperts([ISING, Ising(Graph.lattice(5), 0.4, 0.1)]),
    "product of potts": ProductOfExperts([Potts(COUPLINGS), Potts(-0.5 * COUPLINGS, RNG.normal(size=(3, 4)))]),
    "mixture": MixtureOfEnergies([ISING, Ising(TRIANGLE, -0.5, 0.2)], [0.3, -0.2]),
    "mixture, one-hot": MixtureOfEnergies([Potts(COUPLINGS, is_one_hot=True), Potts(-COUPLINGS, 0.5, is_one_hot=True)]),
    "mixture of machines": MixtureOfEnergies([DEEP, BoltzmannMachine.from_pairs(RNG.normal(size=28))], [0.0, -1.0]),
    "mixture of counts": MixtureOfEnergies([COUNTS, PoissonGraphicalModel(TRIANGLE, 0.0, 0.5, maximum=2)], 0.7),
    "tempered ising": Tempered(ISING, 2.5),
    "tempered rbm": Tempered(MACHINE, 0.7),
    "tempered deep machine": Tempered(DEEP, 0.7),
    "tempered product": Tempered(Tempered(ProductOfExperts([ISING, ISING]), 2.0), 0.9),
    "counts": COUNTS,
    "counts, no edges": PoissonGraphicalModel(Graph([], shape=3), [], [0.3, -0.4, 0.0], maximum=3),
    "network": ERGM(4, [Edges(), GWESP(0.4), GWDegree(0.7)], [-0.5, 0.8, 0.3]),
    "network, nodes": ERGM(4, [Edges(), KStars(2), Triangles()], [0.5, -0.4, 0.9]),
    "network, mutual": ERGM(Dyads(3, is_directed=True), [Edges(), NodeMatch(list("aba")), Mutual()], [-1.0, 0.7, 1.5]),
    "autologistic": AUTOLOGISTIC.given(COVARIATES),
    "autologistic, spins": Autologistic(TRIANGLE, 0.4, [1.0, -0.5], units="spins", centered=True).given(COVARIATES),
}


def states_of(energy):
    """All events, and the index of the value of each element."""
    d = ebm.EnergyDistribution(energy)
    values, num = d.discrete_values, int(np.prod(energy.event_shape)) // (4 if d.discrete_values.ndim > 1 else 1)
    codes = np.array(list(itertools.product(range(len(values)), repeat=num)))
    return d, codes, values[codes].reshape(len(codes), *energy.event_shape)


def log_weights(energy, states):
    return -np.asarray(jax.vmap(energy)(jnp.asarray(states)), np.float64)


def surrogate(energy, x, name):
    def model():
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", energy, obs=x)

    return log_density(handlers.seed(ebm.estimate(model, name), 0), (), {}, {})[0]


def plainly(energy):
    return ebm.EnergyDistribution(lambda x: energy(x), energy.event_shape, support=energy.support)


def probabilities(energy, states):
    log_p = log_weights(energy, states)
    return np.exp(log_p - np.logaddexp.reduce(log_p))


def check_shares(drawn, states, p):
    """Shares of states among independent draws, within five standard errors."""
    shares = (np.asarray(drawn)[:, None] == states).reshape(len(drawn), len(states), -1).all(-1).mean(0)
    np.testing.assert_array_less(abs(shares - p), 5 * np.sqrt(p * (1 - p) / len(drawn)) + 1 / len(drawn))


def swept(energy, start, key=0):
    return jax.jit(jax.vmap(energy.sweep))(jax.random.split(jax.random.key(key), len(start)), jnp.asarray(start))
