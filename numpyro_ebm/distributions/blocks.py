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
from numpyro.distributions.transforms import IdentityTransform, Transform

from numpyro_ebm._core.discrete import is_endless
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.members import Members, Shape, cut, lay_end_to_end
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree


def elementary(constraint: constraints.Constraint | None) -> Any:
    """Return the constraint of one element."""
    while isinstance(constraint, constraints.independent):  # pyright: ignore[reportArgumentType]
        constraint = constraint.base_constraint  # pyright: ignore[reportAttributeAccessIssue]
    return constraint


def is_real(constraint: constraints.Constraint | None) -> bool:
    """Return whether a constraint allows every real number."""
    return type(elementary(constraint)) is type(constraints.real)


def joint_support(names: Sequence[str], supports: Sequence[Any], shapes: Sequence[Shape]) -> Any:
    """Return the constraint of concatenated events: that of their elements where they share one, else `Blocks`."""
    if all(is_real(support) for support in supports):
        return constraints.real_vector
    first, *others = (elementary(support) for support in supports)
    if first.is_discrete and first.event_dim == 0 and not any(jnp.ndim(bound) for bound in jax.tree.leaves(first)):
        if all(first.eq(other, static=True) for other in others):
            return constraints.independent(first, 1)
    return Blocks(tuple(names), tuple(supports), tuple(shapes))


class Blocks(constraints.Constraint):
    r"""Support of an event that has several members with supports of their own: a vector that holds them end to end.

    The members of an event may be continuous and discrete. The event is a vector of floating-point numbers then, which also
    hold the values of the discrete members. In unconstrained space the continuous members have their own coordinates,
    Jacobian included, and the discrete ones keep their values. The density is that with respect to Lebesgue measure on the
    continuous members and the counting measure on the discrete ones.

    Args:
        names: names of the members, which `BySite` takes.
        parts: the constraint of each member, of its elements or of the whole member.
        shapes: the shape of each member.

    Raises:
        EnergyError: (a ValueError) for different numbers of names, parts and shapes, a repeated name, and a part with more
            dimensions than its shape.

    Example:
        ::

            support = Blocks(("x", "s"), (constraints.real, constraints.boolean), ((2,), (3,)))
            EnergyDistribution(lambda event: 0.5 * jnp.sum(event[:2] ** 2) - event[0] * event[2], (5,), support=support)
    """

    event_dim = 1

    def __init__(self, names: Sequence[str], parts: Sequence[Any], shapes: Sequence[Shape]):
        self.names, self.parts = tuple(names), tuple(parts)
        self.shapes = tuple(tuple(shape) for shape in shapes)
        write = "Write Blocks(('x', 's'), (constraints.real, constraints.boolean), ((2,), (3,)))."
        if not len(self.names) == len(self.parts) == len(self.shapes) == len(set(self.names)) > 0:
            raise EnergyError(
                f"Blocks needs one name, one constraint and one shape for each member, and names that differ; got "
                f"{names!r}, {parts!r} and {shapes!r}. {write}"
            )
        for name, part, shape in zip(self.names, self.parts, self.shapes, strict=True):
            if part.event_dim > len(shape):
                raise EnergyError(
                    f"The member '{name}' has the shape {shape}, and its constraint {part} is one of {part.event_dim} "
                    f"dimensions. {write}"
                )

    @property
    def is_discrete(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether any block is discrete, so that NumPyro moves no continuous kernel over the whole vector."""
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


def cut_events(vector: Shaped[Array, "*batch d"], support: Any, shapes: Sequence[Shape]) -> list[Array]:
    """Return the events in a vector, given their joint support: the discrete events of a mixed one as integers."""
    blocks = cut(vector, shapes)
    if not isinstance(support, Blocks):
        return blocks
    return [jnp.asarray(b, int) if part.is_discrete else b for b, part in zip(blocks, support.parts, strict=True)]


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
        return [IdentityTransform() if part.is_discrete else dist.biject_to(part) for part in self.support.parts]

    @property
    def _sources(self) -> list[Shape]:
        """Shapes of the unconstrained blocks."""
        pairs = zip(self._parts, self.support.shapes, strict=True)
        return [tuple(transform.inverse_shape(shape)) for transform, shape in pairs]


def members_of(support: constraints.Constraint | None) -> Members | None:
    """Return the members of a mixed event, as positions hold them; None for other supports."""
    if not (isinstance(support, Blocks) and support.is_discrete):
        return None
    are_discrete = tuple(bool(part.is_discrete) for part in support.parts)
    endless = tuple(n for n, part in zip(support.names, support.parts, strict=True) if is_endless(elementary(part)))
    return Members(support.names, tuple(BlocksTransform(support)._sources), are_discrete, endless)


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
        return sum(part.log_prob(block) for part, block in zip(self.parts, self.cut(jnp.asarray(value)), strict=True))

    def cut(self, value: Shaped[Array, "*batch d"]) -> list[Array]:
        """Return the events."""
        return cut_events(value, self.support, self.shapes)


def _reduce(fold: Callable[..., Array], x: ArrayLike, num_batch: int) -> Shaped[Array, "*batch"]:
    """Reduce with ``fold`` over all but the first ``num_batch`` dimensions."""
    x = jnp.asarray(x)
    return fold(x.reshape((*x.shape[:num_batch], -1)), axis=-1)
