"""Composite likelihoods of blocks: against enumeration, and their efficiency."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from helpers import surrogate
from numpyro.distributions import constraints

import numpyro_ebm as ebm
from numpyro_ebm.energies import BoltzmannMachine

GRID = np.arange(9).reshape(3, 3)
LEFT = np.r_[GRID[:, :-1].ravel(), GRID[:-1].ravel()]
RIGHT = np.r_[GRID[:, 1:].ravel(), GRID[1:].ravel()]
SPINS = np.array(list(itertools.product((-1, 1), repeat=9)))
ROWS_OF_LATTICE = GRID.tolist()


def ising(x, weights=None):
    """The 3 x 3 Ising model of coupling t."""
    t = numpyro.param("t", 0.0)
    energy = lambda s: -t * jnp.sum(s[LEFT] * s[RIGHT])  # noqa: E731
    with numpyro.plate("rows", len(x)), numpyro.handlers.scale(scale=1.0 if weights is None else weights):
        numpyro.sample("x", ebm.EnergyDistribution(energy, (9,), support=ebm.spins), obs=x)


def conditional(x, block, t):
    """log p(x_B | x_rest) of rows, by enumeration."""
    log_p = lambda s: t * np.sum(s[..., LEFT] * s[..., RIGHT], -1)  # noqa: E731
    total = []
    for values in itertools.product((-1, 1), repeat=len(block)):
        changed = x.copy()
        changed[:, block] = values
        total.append(log_p(changed))
    return log_p(x) - np.logaddexp.reduce(total, axis=0)


def value(x, t=0.4, **options):
    return surrogate(ebm.estimate(ising, "pseudolikelihood", **options), {"t": t}, x)


X = SPINS[np.random.default_rng(0).choice(512, 7)]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_consecutive_blocks_against_enumeration(size):
    blocks = [list(range(start, min(start + size, 9))) for start in range(0, 9, size)]
    np.testing.assert_allclose(value(X, block_size=size), sum(conditional(X, b, 0.4).sum() for b in blocks), rtol=1e-5)
    if size == 1:
        assert value(X, block_size=1) == value(X)
        np.testing.assert_allclose(value(X, blocks=[[i] for i in range(9)]), value(X), rtol=1e-5)


def test_blocks_of_several_sizes_that_overlap_and_leave_elements_out():
    blocks = [[0, 4, 8], [4, 1], [2, 7], [3]]
    expected = sum(conditional(X, b, 0.4).sum() for b in blocks)
    np.testing.assert_allclose(value(X, blocks=blocks), expected, rtol=1e-5)
    np.testing.assert_allclose(value(X, blocks=np.array([[0, 1], [2, 3]])), value(X, blocks=((0, 1), (2, 3))))


def test_one_block_of_all_elements_is_the_likelihood():
    exact = surrogate(ebm.estimate(ising, "exact"), {"t": 0.4}, X)
    np.testing.assert_allclose(value(X, block_size=9), exact, rtol=1e-6)


def test_categories_contexts_and_ready_made_energies():
    x = np.eye(3, dtype=int)[np.random.default_rng(0).choice(3, (5, 4))]
    fields = jnp.asarray(np.random.default_rng(1).normal(size=(5, 3)))

    def categories(x):
        with numpyro.plate("rows", 5):
            energy = lambda x, c: -jnp.sum(x @ c) - jnp.sum(x[1:] * x[:-1])  # noqa: E731
            d = ebm.EnergyDistribution(energy, (4, 3), support=ebm.one_hot, context=fields)
            numpyro.sample("x", d, obs=x)

    pairs = np.array([[0.0, 0.8, -0.4], [0.8, 0.0, 0.5], [-0.4, 0.5, 0.0]])

    def machine(x):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(BoltzmannMachine(jnp.asarray(pairs), jnp.ones(3))), obs=x)

    for model, rows, size in ((categories, x, 4), (machine, np.array([[0, 1, 1], [1, 0, 1]]), 3)):
        exact = surrogate(ebm.estimate(model, "exact"), {}, rows)
        np.testing.assert_allclose(
            surrogate(ebm.estimate(model, "pseudolikelihood", block_size=size), {}, rows), exact, rtol=1e-5
        )


@pytest.mark.usefixtures("x64")
def test_the_efficiency_of_blocks_lies_between():
    # Asymptotic variances by enumeration, 1 / information for the likelihood.
    t, pairs = 0.6, np.sum(SPINS[:, LEFT] * SPINS[:, RIGHT], axis=1)
    p = np.exp(t * pairs - np.logaddexp.reduce(t * pairs))
    information = p @ pairs**2 - (p @ pairs) ** 2

    def efficiency(**options):
        wrapped = ebm.estimate(ising, "pseudolikelihood", **options)

        def values(t):
            seeded = numpyro.handlers.substitute(wrapped, {"t": t})
            return numpyro.handlers.trace(seeded).get_trace(SPINS)["x"]["fn"].log_prob(SPINS)

        slopes = jax.jit(lambda t: jax.jvp(values, (t,), (1.0,))[1])
        np.testing.assert_allclose(p @ slopes(t), 0.0, atol=1e-10)
        bend = p @ (slopes(t + 1e-5) - slopes(t - 1e-5)) / 2e-5
        return bend**2 / (p @ slopes(t) ** 2) / information

    found = [efficiency(), efficiency(blocks=ROWS_OF_LATTICE), efficiency(block_size=9)]
    np.testing.assert_allclose(found, [0.570, 0.751, 1.0], atol=1e-3)


REFUSED = {
    "both": ({"block_size": 2, "blocks": [[0]]}, "not both"),
    "a size of zero": ({"block_size": 0}, "block_size >= 1"),
    "no blocks": ({"blocks": []}, "one element or more"),
    "an empty block": ({"blocks": [[0], []]}, "one element or more"),
    "a block that is none": ({"blocks": "all"}, r"blocks=\[\[0, 1, 2\]"),
    "a block of floats": ({"blocks": [[0.5]]}, "one element or more"),
    "an element twice": ({"blocks": [[0, 1, 0]]}, r"repeats an element: \[0, 1, 0\]"),
    "an element beyond the event": ({"blocks": [[0, 9]]}, "element 9; the event has the elements 0 to 8"),
    "too many states": ({"block_size": 9, "max_states": 100}, r"2\*\*9 states.*block_size=6.*max_states=512"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    options, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        value(X, **options)


def test_units_that_are_masked_take_no_part():
    def model(x, mask):
        with numpyro.plate("rows", len(x)), numpyro.handlers.mask(mask=mask):
            energy = lambda x: -0.3 * jnp.sum(x[1:] * x[:-1])  # noqa: E731
            numpyro.sample("x", ebm.EnergyDistribution(energy, (4,), support=constraints.boolean), obs=x)

    x, mask = np.random.default_rng(0).integers(0, 2, (6, 4)), np.array([1, 0, 1, 1, 0, 1], bool)
    blocks = ebm.estimate(model, "pseudolikelihood", block_size=2)
    whole = surrogate(blocks, {}, np.where(mask[:, None], x, 7), mask)
    np.testing.assert_allclose(whole, surrogate(blocks, {}, x[mask], np.ones(4, bool)), rtol=1e-5)
