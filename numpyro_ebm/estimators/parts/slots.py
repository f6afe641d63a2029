"""Which chains of a pool an update moves: taken from their slots, and put back."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Int, Shaped

from numpyro_ebm._core.typing import Array, PRNGKey


class Listed(NamedTuple):
    """The slots of these indices, each at most once."""

    index: Int[Array, " chains"]

    def take(self, leaf: Shaped[Array, "size ..."]) -> Shaped[Array, "chains ..."]:
        """Return the entries of these slots."""
        return leaf[self.index]

    def put(self, leaf: Shaped[Array, "size ..."], new: Shaped[Array, "chains ..."]) -> Shaped[Array, "size ..."]:
        """Return the pool with new entries in these slots."""
        return leaf.at[self.index].set(new, unique_indices=True)


class Spaced(NamedTuple):
    """Every ``step``-th slot from ``first`` on.

    If the pool is split over devices, each device takes its part from its own slots, and nothing is sent.
    """

    first: Int[Array, ""]
    step: int

    def take(self, leaf: Shaped[Array, "size ..."]) -> Shaped[Array, "chains ..."]:
        """Return the entries of these slots."""
        if self.step == 1:
            return leaf
        return jax.lax.dynamic_index_in_dim(self._columns(leaf), self.first, axis=1, keepdims=False)

    def put(self, leaf: Shaped[Array, "size ..."], new: Shaped[Array, "chains ..."]) -> Shaped[Array, "size ..."]:
        """Return the pool with new entries in these slots."""
        if self.step == 1:
            return new
        return jax.lax.dynamic_update_index_in_dim(self._columns(leaf), new, self.first, axis=1).reshape(leaf.shape)

    def _columns(self, leaf: Shaped[Array, "size ..."]) -> Shaped[Array, "chains step ..."]:
        return leaf.reshape(-1, self.step, *leaf.shape[1:])


Slots = Listed | Spaced


def draw_slots(rng_key: PRNGKey, size: int, num: int) -> Slots:
    """Draw ``num`` of ``size`` slots, all equally likely and none twice.

    They are evenly spaced where ``num`` divides ``size``, and otherwise in a row from a random one on: a permutation of the
    pool would cost more than the chains.
    """
    if size % num:
        return Listed((jax.random.randint(rng_key, (), 0, size) + jnp.arange(num)) % size)
    return Spaced(jax.random.randint(rng_key, (), 0, size // num), size // num)
