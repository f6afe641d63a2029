"""Ends of the intervals of an event's coordinates, and weights that vanish at these ends."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Bool, Float
from numpyro.distributions import constraints

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.members import lay_end_to_end
from numpyro_ebm._core.typing import Array
from numpyro_ebm.distributions.blocks import Blocks, is_real


class Ends(NamedTuple):
    """The interval of each coordinate of an event; an end is infinite where the coordinate is unbounded.

    Attributes:
        low: lower ends, of the event's shape.
        high: upper ends, of the event's shape.
    """

    low: Float[Array, "*event"]
    high: Float[Array, "*event"]

    @property
    def is_bounded(self) -> Bool[Array, "*event"]:
        """Which coordinates have at least one finite end."""
        return jnp.isfinite(self.low) | jnp.isfinite(self.high)


def ends_of(support: constraints.Constraint, shape: tuple[int, ...]) -> Ends:
    """Return the ends of a support that is a product of intervals, half lines and lines.

    Raises:
        EnergyError: for any other support.
    """
    if isinstance(support, constraints.independent):  # pyright: ignore[reportArgumentType]
        return ends_of(support.base_constraint, shape)  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(support, Blocks):
        parts = [ends_of(part, block) for part, block in zip(support.parts, support.shapes, strict=True)]
        return Ends(*(lay_end_to_end(side, support.shapes) for side in zip(*parts, strict=True)))
    has_ends = hasattr(support, "lower_bound") or hasattr(support, "upper_bound")
    if support.is_discrete or support.event_dim or not (has_ends or is_real(support)):
        raise EnergyError(
            f"The estimator 'generalized_sm' works on lines, half lines and intervals; the support {support} is none of "
            "these. Write estimate(model, 'sm'), which works in unconstrained coordinates."
        )
    low, high = getattr(support, "lower_bound", -jnp.inf), getattr(support, "upper_bound", jnp.inf)
    return Ends(*(jnp.broadcast_to(jnp.asarray(end, float), shape) for end in (low, high)))


def square(x: Float[Array, "*batch"], ends: Ends) -> Float[Array, "*batch"]:
    """Return the product of the squared distances to the finite ends of each coordinate; 1 if it has none."""
    below, above = _distances(x, ends)
    below, above = (jnp.where(jnp.isfinite(d), d, 1.0) for d in (below, above))
    return (below * above) ** 2


def distance(x: Float[Array, "*batch"], ends: Ends) -> Float[Array, "*batch"]:
    """Return the distance of each coordinate to its nearest end; infinite if it has none."""
    return jnp.minimum(*_distances(x, ends))


def _distances(x: Float[Array, "*batch"], ends: Ends) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    # Replace infinite ends first, so that no derivative passes through them.
    low, high = (jnp.where(jnp.isfinite(end), end, 0.0).astype(x.dtype) for end in ends)
    return jnp.where(jnp.isfinite(ends.low), x - low, jnp.inf), jnp.where(jnp.isfinite(ends.high), high - x, jnp.inf)
