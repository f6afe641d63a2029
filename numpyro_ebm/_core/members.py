"""Blocks laid end to end in one vector, and the named members of an event that has discrete and continuous ones."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Shaped

from numpyro_ebm._core.typing import Array

Shape = tuple[int, ...]


def cut(vector: Shaped[Array, "*batch d"], shapes: Sequence[Shape]) -> list[Array]:
    """Split a vector, or a batch of vectors, into blocks, each in its own shape."""
    sizes = [math.prod(shape) for shape in shapes]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    lead = vector.shape[:-1]
    return [
        vector[..., start : start + size].reshape(lead + shape)
        for start, size, shape in zip(starts, sizes, shapes, strict=True)
    ]


def lay_end_to_end(blocks: Sequence[Array], shapes: Sequence[Shape]) -> Shaped[Array, "*batch d"]:
    """Concatenate blocks to a vector; the inverse of `cut`."""
    flat = [b.reshape((*b.shape[: b.ndim - len(s)], math.prod(s))) for b, s in zip(blocks, shapes, strict=True)]
    return jnp.concatenate(flat, axis=-1)


@dataclasses.dataclass(frozen=True)
class Members:
    """The members of a mixed event, as a vector of floating-point numbers holds them.

    Attributes:
        names: names of the members.
        shapes: shape of each member: of its unconstrained position for a continuous member, of its event for a discrete one.
        are_discrete: whether each member is discrete.
        endless: names of the discrete members without a largest value.
    """

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    are_discrete: tuple[bool, ...]
    endless: tuple[str, ...] = ()

    @property
    def kinds(self) -> dict[str, bool]:
        """Whether each member is discrete, by name."""
        return dict(zip(self.names, self.are_discrete, strict=True))

    @property
    def discrete(self) -> list[str]:
        """Names of the discrete members."""
        return [name for name, is_discrete in self.kinds.items() if is_discrete]

    @property
    def is_continuous(self) -> Bool[np.ndarray, " d"]:
        """Whether each number of the vector belongs to a continuous member."""
        sizes = [math.prod(shape) for shape in self.shapes]
        return np.repeat(~np.array(self.are_discrete, bool), sizes)

    def split(self, vector: Shaped[Array, "*batch d"]) -> dict[str, Array]:
        """Return the members by name, the discrete ones as integers."""
        blocks = zip(self.names, cut(vector, self.shapes), self.are_discrete, strict=True)
        return {name: jnp.asarray(block, int) if is_discrete else block for name, block, is_discrete in blocks}

    def join(self, members: Mapping[str, Array]) -> Shaped[Array, "*batch d"]:
        """Lay members by name end to end; the inverse of `split`."""
        return lay_end_to_end([jnp.asarray(members[name], float) for name in self.names], self.shapes)
