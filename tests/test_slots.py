"""Which chains of a pool an update moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_ebm.estimators.parts.slots import draw_slots

SIZES = [(12, 4), (500, 100), (12, 8), (7, 3), (8, 8), (5, 1)]
NUM_DRAWS = 4000


def drawn(size, num):
    """Which slots each of many draws takes."""
    slots = jnp.arange(size)
    draw = lambda key: draw_slots(key, size, num).take(slots)  # noqa: E731
    index = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), NUM_DRAWS)))
    taken = np.zeros((NUM_DRAWS, size))
    np.add.at(taken, (np.arange(NUM_DRAWS)[:, None], index), 1)
    return taken


@pytest.mark.parametrize(("size", "num"), SIZES)
def test_each_slot_is_equally_likely_and_none_is_taken_twice(size, num):
    taken, rate = drawn(size, num), num / size
    assert taken.max() == 1
    assert (taken.sum(1) == num).all()
    np.testing.assert_allclose(taken.mean(0), rate, atol=5 * np.sqrt(rate * (1 - rate) / NUM_DRAWS))


@pytest.mark.parametrize(("size", "num"), [each for each in SIZES if each[0] > each[1]])
def test_no_two_chains_always_move_together(size, num):
    # Groups that always move together drift apart, since the gradient only sees their mean.
    taken = drawn(size, num)
    together = taken.T @ taken / NUM_DRAWS
    rate, error = num / size, 5 * 0.5 / np.sqrt(NUM_DRAWS)
    assert (together - np.diag(np.diag(together))).max() < rate - error
    if size % num == 0:  # one slot of each block: the choices are independent
        blocks = np.arange(size) // (size // num)
        np.testing.assert_allclose(together[blocks[:, None] != blocks], rate**2, atol=error)


@pytest.mark.parametrize(("size", "num"), SIZES)
@pytest.mark.parametrize("tail", [(), (2, 3)])
def test_chains_go_back_to_their_slots(size, num, tail):
    pool = np.random.default_rng(0).normal(size=(size, *tail)).astype(np.float32)
    for key in jax.random.split(jax.random.key(1), 5):
        slots = draw_slots(key, size, num)
        index = np.asarray(slots.take(jnp.arange(size)))
        taken = slots.take(jnp.asarray(pool))
        np.testing.assert_array_equal(taken, pool[index])
        after = np.asarray(slots.put(jnp.asarray(pool), taken + 1))
        expected = pool.copy()
        expected[index] += 1
        np.testing.assert_array_equal(after, expected)
