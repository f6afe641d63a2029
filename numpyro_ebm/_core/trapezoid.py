"""The trapezoidal rule on a grid in one to three dimensions, with what lies beyond its edges."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import Array, Scalar

MOST_DIMENSIONS = 3
"""Coordinates of the largest grid."""
AT_ONCE = 2**14
"""Points evaluated at once: more run faster and need more memory."""
MARGIN = 0.05
"""Share of the box over which the decay towards an edge is measured."""
NOTHING = -36.0
"""Log of a marginal density at an edge below which the tail is lost in rounding: exp(-36) is that of double precision."""


class Integral(NamedTuple):
    """An integral over all space, from a grid.

    Attributes:
        log_grid: logarithm of the sum over the grid.
        log_value: the same with exponential tails beyond the edges, whose share has no derivative.
        error: bound on the error of ``log_value``, in nats.
    """

    log_grid: Scalar
    log_value: Scalar
    error: Scalar


def check_edges(owner: str, low: Any, high: Any, num_points: int | None) -> None:
    """Check that the edges of a box are in order where they are known, and that a number of points is odd.

    Raises:
        EnergyError: with what to write.
    """
    edges = [edge for edge in (low, high) if edge is not None]
    if not all(isinstance(edge, jax.Array) or np.asarray(edge).dtype.kind in "iuf" for edge in edges):
        raise EnergyError(f"{owner} needs numbers low and high; got low={low!r}, high={high!r}. Write low=-10.0, high=10.0.")
    if len(edges) == 2 and is_concrete(*edges) and not np.all(np.asarray(low) < np.asarray(high)):
        raise EnergyError(f"{owner} needs low < high; got low={low!r}, high={high!r}. Write low=-10.0, high=10.0.")
    if num_points is not None:
        check_count(owner, "num_points", num_points, 5)
        if num_points % 2 == 0:
            raise EnergyError(f"{owner} needs an odd number of points. Write num_points={num_points + 1}.")


def check_edge_shapes(owner: str, low: Any, high: Any, size: int) -> None:
    """Check that the edges are one number or one per coordinate, and raise otherwise.

    Raises:
        EnergyError: with the shape.
    """
    for name, edge in (("low", low), ("high", high)):
        if edge is not None and jnp.shape(edge) not in ((), (size,)):
            raise EnergyError(f"{owner} needs {name} as one number or {size}; got shape {jnp.shape(edge)}.")


def log_integral(
    log_density: Callable[[Float[Array, "*position"]], Scalar],
    shape: tuple[int, ...],
    low: Float[Array, " d"],
    high: Float[Array, " d"],
    num: int,
) -> Integral:
    """Return the log of the integral of ``exp(log_density)``, as `numpyro_ebm.partition.grid.Grid` describes it.

    The backward pass evaluates each block of points again instead of keeping it.

    Args:
        log_density: function of one position.
        shape: shape of a position.
        low: lower edge of each coordinate.
        high: upper edge of each coordinate.
        num: points per dimension, an odd number.
    """
    size, step = len(low), (high - low) / (num - 1)
    places = num ** np.arange(size)
    inside = max(1, round(MARGIN * (num - 1)))
    # For each coordinate: both edges, and the places from which the decay towards them is measured.
    slices = np.array([0, inside, num - 1 - inside, num - 1])

    def point(index):
        which = index // places % num
        log_p = log_density((low + which.astype(low.dtype) * step).reshape(shape))
        halves = (which == 0) | (which == num - 1)
        log_weight = jnp.sum(jnp.log(step)) - jnp.sum(halves, dtype=float) * math.log(2)
        log_slice = log_p + log_weight - jnp.log(step) + jnp.where(halves, math.log(2), 0.0)
        in_slice = jnp.where(which[:, None] == slices, log_slice[:, None], -jnp.inf)
        is_even = jnp.all(which % 2 == 0)
        coarse = jnp.where(is_even, log_p + log_weight + size * math.log(2), -jnp.inf)
        # A block may hold none of these points, and the derivative of the log of an empty sum is NaN.
        return log_p + log_weight, *jax.lax.stop_gradient((coarse, in_slice))

    def of_block(first):
        index = first + jnp.arange(min(AT_ONCE, num**size))
        parts = jax.vmap(point)(index)
        parts = jax.tree.map(lambda part: jnp.where(_wide(index < num**size, part), part, -jnp.inf), parts)
        return jax.tree.map(lambda part: jax.nn.logsumexp(part, axis=0), parts)

    def add(carry, first):
        return jax.tree.map(jnp.logaddexp, carry, jax.checkpoint(of_block)(first)), None

    nothing = tuple(jnp.full(s, -jnp.inf, float) for s in ((), (), (size, len(slices))))
    (fine, coarse, marginals), _ = jax.lax.scan(add, nothing, jnp.arange(0, num**size, AT_ONCE))
    frozen = jax.lax.stop_gradient(fine)
    exponential, power = _beyond(marginals - frozen, inside * step, (high - low) / 2)
    value = fine + jnp.log1p(jnp.where(jnp.isfinite(exponential), exponential, 0.0))
    return Integral(fine, value, jnp.abs(frozen - coarse) + power)


def _beyond(
    marginals: Float[Array, "d 4"], lengths: Float[Array, " d"], half_widths: Float[Array, " d"]
) -> tuple[Scalar, Scalar]:
    """Return the mass beyond the edges, as a share of the integral, for exponential tails and for power laws.

    Args:
        marginals: log of each coordinate's normalised marginal density at the lower edge, inside it, inside the upper edge
            and at the upper edge, ``(size, 4)``.
        lengths: distances from an edge to the place inside it, ``(size,)``.
        half_widths: half widths of the box, ``(size,)``.
    """
    at_edge, inside = marginals[:, ::3], marginals[:, 1:3]
    is_nothing = at_edge < NOTHING
    rate = jnp.where(is_nothing, jnp.inf, (inside - at_edge) / lengths[:, None])
    density = jnp.where(is_nothing, 0.0, jnp.exp(at_edge))
    exponent = rate * half_widths[:, None]
    decays = exponent > 1
    exponential = jnp.where(decays, density / jnp.where(decays, rate, 1.0), jnp.inf)
    power = jnp.where(decays, density * half_widths[:, None] / jnp.where(decays, exponent - 1, 1.0), jnp.inf)
    return jnp.sum(exponential), jnp.sum(power)


def _wide(flags: Bool[Array, " points"], like: Float[Array, "points ..."]) -> Bool[Array, "points ..."]:
    return flags.reshape(flags.shape + (1,) * (like.ndim - 1))
