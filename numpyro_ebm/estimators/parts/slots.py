"""Which chains of a pool an update moves: taken from their slots, and put back."""

import math
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


class Windows(NamedTuple):
    """Slots of each block of the pool, the same number from each.

    If the pool is split over devices at the ends of blocks, each device takes its part from its own slots, and nothing is
    sent.
    """

    index: Int[Array, "blocks width"]  # places within each block

    def take(self, leaf: Shaped[Array, "size ..."]) -> Shaped[Array, "chains ..."]:
        """Return the entries of these slots."""
        if self.index.size == len(leaf):
            return leaf
        taken = jax.vmap(lambda block, index: block[index])(self._split(leaf), self.index)
        return taken.reshape(-1, *leaf.shape[1:])

    def put(self, leaf: Shaped[Array, "size ..."], new: Shaped[Array, "chains ..."]) -> Shaped[Array, "size ..."]:
        """Return the pool with new entries in these slots."""
        if self.index.size == len(leaf):
            return new
        put = jax.vmap(lambda block, index, new: block.at[index].set(new, unique_indices=True))
        return put(self._split(leaf), self.index, self._split(new)).reshape(leaf.shape)

    def _split(self, leaf: Shaped[Array, "size ..."]) -> Shaped[Array, "blocks part ..."]:
        return leaf.reshape(len(self.index), -1, *leaf.shape[1:])


Slots = Listed | Windows


def draw_slots(rng_key: PRNGKey, size: int, num: int) -> Slots:
    """Draw ``num`` of ``size`` slots, all equally likely and none twice.

    The pool is cut into blocks, as many as the greatest common divisor of both numbers. Each block gives a run of slots from
    a random one on, independently of the others. Fixed groups of slots would drift apart, since the gradient only sees their
    mean. A permutation of the pool would cost more than the chains.
    """
    blocks = math.gcd(size, num)
    first = jax.random.randint(rng_key, (blocks, 1), 0, size // blocks)
    return Windows((first + jnp.arange(num // blocks)) % (size // blocks))
