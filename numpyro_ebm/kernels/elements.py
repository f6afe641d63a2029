"""The elements of a discrete position, and the values that they take."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, Position, PyTree, Scalar
from numpyro_ebm.kernels._base import AbstractKernel


@dataclasses.dataclass(frozen=True)
class Elements:
    """The elements of a position, numbered through all of its arrays.

    An element takes one of a few values. The values ``(num_values, ...)`` are numbers, as for binary units, or vectors, as
    for one-hot categories. An element's code is the index of its value.

    Attributes:
        values: for each array, the values of its elements, ``(num_values, ...)``.
        shapes: shapes of the arrays.
        structure: structure of the position.
    """

    values: list[Array]
    shapes: list[tuple[int, ...]]
    structure: Any

    @classmethod
    def of(cls, values: PyTree, position: Position) -> "Elements":
        """Return the elements of a position; one array of values serves for all arrays of the position.

        Raises:
            EnergyError: without values.
        """
        if values is None:
            raise EnergyError("A discrete kernel needs the values that an element takes. Write values=jnp.arange(2).")
        leaves, structure = jax.tree.flatten(position)
        each = [jnp.asarray(leaf) for leaf in jax.tree.leaves(values)]
        return cls(each * len(leaves) if len(each) == 1 else each, [leaf.shape for leaf in leaves], structure)

    @property
    def sizes(self) -> list[int]:
        """Number of elements of each array."""
        each = zip(self.shapes, self.values, strict=True)
        return [math.prod(shape[: len(shape) - values.ndim + 1]) for shape, values in each]

    @property
    def num_values_each(self) -> Int[Array, " elements"]:
        """Number of values of each element."""
        return jnp.concatenate([jnp.full(n, len(v), jnp.int32) for n, v in zip(self.sizes, self.values, strict=True)])

    @property
    def num_values(self) -> int:
        """Largest number of values of an element."""
        return max(len(values) for values in self.values)

    def codes(self, position: Position) -> Int[Array, " elements"]:
        """Return the code of each element."""
        rows = zip(self._rows(position), self.values, strict=True)
        return jnp.concatenate([jnp.argmax(_all(own[:, None] == values), axis=1) for own, values in rows]).astype(jnp.int32)

    def position(self, codes: Int[Array, " elements"], like: Position) -> Position:
        """Return the position with these codes, in the dtypes of another position."""
        parts = jnp.split(codes, np.cumsum(self.sizes)[:-1])
        dtypes = [leaf.dtype for leaf in jax.tree.leaves(like)]
        each = zip(parts, self.values, self.shapes, dtypes, strict=True)
        return self.structure.unflatten([values[part].reshape(shape).astype(dtype) for part, values, shape, dtype in each])

    def changes(self, position: Position, gradient: Position) -> Float[Array, "elements values"]:
        """Return the first-order change of the log density when an element takes a value: ``gradient * (value - own)``.

        It is 0 at the element's own value, and -inf where an element has fewer values than others.
        """
        each = zip(self._rows(gradient), self._moves(position), strict=True)
        return self._padded([jnp.sum((slope[:, None] * move).reshape(*move.shape[:2], -1), axis=-1) for slope, move in each])

    def squared_moves(self, position: Position) -> Float[Array, "elements values"]:
        """Return the squared distance of each value from an element's own; inf where an element has fewer values.

        The unit is the smallest squared distance between two values, so that it does not depend on how values are coded.
        """
        each = zip(self._moves(position), self.values, strict=True)
        return -self._padded([-_squares(move) / _smallest_square(values) for move, values in each])

    def _rows(self, position: Position) -> list[Array]:
        """Return the elements of each array, ``(num_elements, ...)``."""
        each = zip(jax.tree.leaves(position), self.sizes, self.values, strict=True)
        return [leaf.reshape(size, *values.shape[1:]) for leaf, size, values in each]

    def _moves(self, position: Position) -> list[Array]:
        return [values - own[:, None] for own, values in zip(self._rows(position), self.values, strict=True)]

    def _padded(self, rows: list[Array]) -> Array:
        most = self.num_values
        pad = [jnp.pad(each, ((0, 0), (0, most - each.shape[1])), constant_values=-jnp.inf) for each in rows]
        return jnp.concatenate(pad)


def choose(uniform: Float[Array, "..."], logits: Float[Array, "..."], axis: int = -1) -> Int[Array, "..."]:
    """Return the index of a value drawn with these log probabilities (up to a constant), by the inverse of their sums.

    An index whose logit is -inf is not drawn; where all are, the result is of no use.

    Args:
        uniform: numbers in [0, 1), one per draw.
        logits: finite or -inf.
        axis: the axis of the values.
    """
    if logits.shape[axis] == 2:  # the same index, without sums along an axis
        one, other = (jax.lax.index_in_dim(logits, k, axis, keepdims=False) for k in range(2))
        return (uniform >= jax.nn.sigmoid(one - other)).astype(int)
    sums = jnp.cumsum(jnp.exp(logits - jnp.max(logits, axis=axis, keepdims=True)), axis=axis)
    total = jax.lax.index_in_dim(sums, -1, axis)
    return jnp.argmax(sums > jnp.expand_dims(uniform, axis) * total, axis=axis)


def take_values(values: Shaped[Array, "values ..."], index: Int[Array, "..."]) -> Shaped[Array, "..."]:
    """Return the values at indices; of two numbers by a choice, which is faster than a look-up."""
    return jnp.where(index == 1, values[1], values[0]) if values.shape == (2,) else values[index]


class DiscreteState(NamedTuple):
    """The state of a kernel without gradients: the position and its log density."""

    position: Any
    logdensity: Any


class BlockState(NamedTuple):
    """The state of a kernel that evaluates no energy: the position alone."""

    position: Any


class DiscreteKernel(AbstractKernel):
    """A kernel on discrete supports; its field ``values`` holds the values of the elements.

    Attributes:
        values: ``(num_values, ...)``, in increasing order if they are numbers, or a pytree of such arrays by site; None for
            those of the support to sample.
    """

    is_discrete: ClassVar[bool] = True
    takes_gradients: ClassVar[bool] = False
    values: Any

    def __post_init__(self):
        super().__post_init__()
        if self.values is None or isinstance(self.values, Mapping) or not is_concrete(self.values):
            return
        owner, values = type(self).__name__, np.asarray(self.values)
        if values.ndim < 1 or len(values) < 2 or not _increase(values.astype(float)):
            raise EnergyError(
                f"{owner} needs the values of an element in increasing order, two or more, or vectors that differ; got "
                f"{self.values!r}. Write {owner}(values=jnp.arange(5)), or {owner}() for the values of the support."
            )
        object.__setattr__(self, "values", values)  # the entries of a list would be leaves of their own

    def bind(self, distribution: Any) -> Any:
        """Return the kernel with the values of the support to sample, by site for the latents of a model.

        Raises:
            EnergyError: if the kernel's own values, where they are known, are not those of a bounded support.
        """
        super().bind(distribution)
        if self.values is not None:
            self._check_values(distribution)
            return self
        return self.adapted(values=jax.tree.map(jnp.asarray, distribution.discrete_values))

    def _check_values(self, distribution: Any) -> None:
        try:
            theirs = jax.tree.leaves(distribution.discrete_values)
        except EnergyError:  # the support has no bounds, and the kernel's values truncate it
            return
        ours = jax.tree.leaves(self.values)
        pairs = list(zip(ours * len(theirs) if len(ours) == 1 else ours, theirs, strict=False))
        if is_concrete(*ours) and not all(np.array_equal(own, other) for own, other in pairs):
            owner, (given, needed) = type(self).__name__, ([np.asarray(x).tolist() for x in each] for each in (ours, theirs))
            raise EnergyError(
                f"{owner} has the values {given}, and the elements of the support take {needed}: chains would leave states "
                f"out. Write {owner}() for the values of the support."
            )


def _increase(values: Float[np.ndarray, "values ..."]) -> bool:
    """Return whether numbers increase; vectors have no order, and need only differ."""
    if values.ndim == 1:
        return bool(np.all(np.diff(values) > 0))
    return len(np.unique(values.reshape(len(values), -1), axis=0)) == len(values)


def is_bad(log_density: Float[Array, "..."]) -> Bool[Array, "..."]:
    """Return whether a log density is NaN or plus infinity, which no kernel may move to."""
    return jnp.isnan(log_density) | (log_density == jnp.inf)


def without_bad(logits: Float[Array, "..."]) -> tuple[Float[Array, "..."], Bool[Array, ""]]:
    """Return log probabilities with -inf for NaN and plus infinity, and whether there were any."""
    bad = is_bad(logits)
    return jnp.where(bad, -jnp.inf, logits), jnp.any(bad)


def log_ratio(new: Scalar, old: Scalar) -> Scalar:
    """Return the log ratio of two densities: -inf for a bad new one, 0 between two that are 0."""
    ratio = jnp.where((new == -jnp.inf) & (old == -jnp.inf), 0.0, new - old)
    return jnp.where(is_bad(new), -jnp.inf, jnp.where(jnp.isnan(ratio), jnp.inf, ratio))


def _squares(moves: Shaped[Array, "elements values ..."]) -> Float[Array, "elements values"]:
    """Return the squared lengths of moves that are numbers or vectors."""
    return jnp.sum(jnp.square(moves.astype(float)).reshape(*moves.shape[:2], -1), axis=-1)


def _smallest_square(values: Shaped[Array, "values ..."]) -> Scalar:
    """Return the smallest squared distance between two values."""
    squares = _squares(values[:, None] - values)
    return jnp.min(jnp.where(jnp.eye(len(values), dtype=bool), jnp.inf, squares))


def _all(flags: Array) -> Array:
    """Return whether all flags of a value hold, ``(elements, values)``."""
    return jnp.all(flags.reshape(*flags.shape[:2], -1), axis=-1)
