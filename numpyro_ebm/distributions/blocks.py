"""Events concatenated in one vector: their support, its transform, and the product of their distributions."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Shaped
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform

from numpyro_ebm._core.typing import Array, PRNGKey, PyTree

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


def is_real(constraint: constraints.Constraint | None) -> bool:
    """Return whether a constraint allows every real number."""
    while isinstance(constraint, constraints.independent):  # pyright: ignore[reportArgumentType]
        constraint = constraint.base_constraint  # pyright: ignore[reportAttributeAccessIssue]
    return type(constraint) is type(constraints.real)


def joint_support(names: Sequence[str], supports: Sequence[Any], shapes: Sequence[Shape]) -> Any:
    """Return the constraint of concatenated events."""
    if all(is_real(support) for support in supports):
        return constraints.real_vector
    return Blocks(tuple(names), tuple(supports), tuple(shapes))


class Blocks(constraints.Constraint):
    """Constraint of a vector made of blocks, each with its own constraint.

    Args:
        names: names of the blocks, for messages.
        parts: the constraint of each block.
        shapes: the shape of each block.
    """

    event_dim = 1

    def __init__(self, names: tuple[str, ...], parts: tuple[Any, ...], shapes: tuple[Shape, ...]):
        self.names, self.parts, self.shapes = names, parts, shapes

    @property
    def is_discrete(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether any block is discrete."""
        return any(part.is_discrete for part in self.parts)

    def __call__(self, x: ArrayLike) -> Bool[Array, "*batch"]:
        """Return, for each vector, whether every block satisfies its constraint."""
        x = jnp.asarray(x)
        checks = [_reduce(jnp.all, part(block), x.ndim - 1) for part, block in self._blocks(x)]
        return jnp.stack(checks).all(axis=0)

    def feasible_like(self, prototype: ArrayLike) -> Shaped[Array, "*batch d"]:
        """Return a vector that satisfies every constraint."""
        prototype = jnp.asarray(prototype)
        blocks = [
            jnp.broadcast_to(part.feasible_like(block), block.shape).astype(prototype.dtype)
            for part, block in self._blocks(prototype)
        ]
        return lay_end_to_end(blocks, self.shapes)

    def eq(self, other: object, static: bool = False) -> Any:  # noqa: FBT001, FBT002 (NumPyro's signature)
        """Return whether another constraint has the same blocks."""
        if not isinstance(other, Blocks) or self.shapes != other.shapes:
            return False
        return all(a.eq(b, static=static) for a, b in zip(self.parts, other.parts, strict=True))

    def tree_flatten(self) -> Any:
        """Flatten, with the bounds of the constraints as data."""
        return (self.parts,), (("parts",), {"names": self.names, "shapes": self.shapes})

    def __repr__(self) -> str:
        return f"({', '.join(f'{name}: {part}' for name, part in zip(self.names, self.parts, strict=True))})"

    def _blocks(self, x: Shaped[Array, "*batch d"]) -> Any:
        return zip(self.parts, cut(x, self.shapes), strict=True)


class BlocksTransform(Transform):
    """Transform from real vectors to `Blocks`, block by block."""

    def __init__(self, support: Blocks):
        self.support = support

    @property
    def domain(self) -> Any:
        """All real vectors."""
        return constraints.real_vector

    @property
    def codomain(self) -> Any:
        """The constraint of the blocks."""
        return self.support

    def __call__(self, x: Shaped[Array, "*batch source"]) -> Shaped[Array, "*batch d"]:
        """Map a real vector to the support."""
        blocks = [transform(block) for transform, block in zip(self._parts, cut(x, self._sources), strict=True)]
        return lay_end_to_end(blocks, self.support.shapes)

    def log_abs_det_jacobian(
        self, x: Shaped[Array, "*batch source"], y: Shaped[Array, "*batch d"], intermediates: PyTree | None = None
    ) -> Any:
        """Return the log Jacobian determinant, summed over the blocks."""
        blocks = zip(self._parts, cut(x, self._sources), cut(y, self.support.shapes), strict=True)
        return sum(_reduce(jnp.sum, t.log_abs_det_jacobian(xs, ys), jnp.ndim(x) - 1) for t, xs, ys in blocks)

    def forward_shape(self, shape: Shape) -> Shape:
        """Return the shape of the constrained vector."""
        return (*shape[:-1], sum(math.prod(block) for block in self.support.shapes))

    def inverse_shape(self, shape: Shape) -> Shape:
        """Return the shape of the unconstrained vector."""
        return (*shape[:-1], sum(math.prod(block) for block in self._sources))

    def eq(self, other: object, static: bool = False) -> Any:  # noqa: FBT001, FBT002 (NumPyro's signature)
        """Return whether another transform has the same blocks."""
        return isinstance(other, BlocksTransform) and self.support.eq(other.support, static=static)

    def tree_flatten(self) -> Any:
        """Flatten, with the support as the only data."""
        return (self.support,), (("support",), {})

    def _inverse(self, y: Shaped[Array, "*batch d"]) -> Shaped[Array, "*batch source"]:
        blocks = [t._inverse(block) for t, block in zip(self._parts, cut(y, self.support.shapes), strict=True)]
        return lay_end_to_end(blocks, self._sources)

    @property
    def _parts(self) -> list[Any]:
        return [dist.biject_to(part) for part in self.support.parts]

    @property
    def _sources(self) -> list[Shape]:
        """Shapes of the unconstrained blocks."""
        pairs = zip(self._parts, self.support.shapes, strict=True)
        return [tuple(transform.inverse_shape(shape)) for transform, shape in pairs]


@dist.biject_to.register(Blocks)
def _biject_to_blocks(constraint: Blocks) -> BlocksTransform:
    return BlocksTransform(constraint)


class Product(dist.Distribution):
    """Distribution of independent events, concatenated in one vector.

    Args:
        names: names of the events.
        parts: distributions of the events, with batch shapes that broadcast.
    """

    arg_constraints = {}
    pytree_data_fields = ("parts",)
    pytree_aux_fields = ("names", "shapes")

    def __init__(self, names: Sequence[str], parts: Sequence[dist.Distribution]):
        self.names, self.parts = tuple(names), tuple(parts)
        self.shapes = tuple(tuple(part.event_shape) for part in parts)
        batch_shape = jnp.broadcast_shapes(*(part.batch_shape for part in parts))
        super().__init__(batch_shape, (sum(map(math.prod, self.shapes)),))

    @property
    def support(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The joint support of the events."""
        return joint_support(self.names, [part.support for part in self.parts], self.shapes)

    def sample(self, key: PRNGKey | None, sample_shape: Shape = ()) -> Float[Array, "*batch d"]:
        """Draw each event and concatenate the draws."""
        keys = jax.random.split(key, len(self.parts))  # pyright: ignore[reportArgumentType]
        draws = [
            jnp.asarray(part.expand(self.batch_shape).sample(k, sample_shape), float)
            for k, part in zip(keys, self.parts, strict=True)
        ]
        return lay_end_to_end(draws, self.shapes)

    def log_prob(self, value: ArrayLike, intermediates: list[Any] | None = None) -> Any:
        """Return the log probability, summed over the events."""
        blocks = zip(self.parts, cut(jnp.asarray(value), self.shapes), strict=True)
        return sum(part.log_prob(block) for part, block in blocks)


def _reduce(fold: Callable[..., Array], x: ArrayLike, num_batch: int) -> Shaped[Array, "*batch"]:
    """Reduce with ``fold`` over all but the first ``num_batch`` dimensions."""
    x = jnp.asarray(x)
    return fold(x.reshape((*x.shape[:num_batch], -1)), axis=-1)
