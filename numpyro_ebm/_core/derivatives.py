"""Second and higher derivatives of a log density, a few directions at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from numpyro_ebm._core.typing import Array, Scalar

DIRECTIONS_AT_ONCE = 64
"""Directions that are differentiated together; more need more memory, fewer take more sequential steps."""


def over_coordinates(
    push: Callable[[Float[Array, " d"]], Float[Array, " m"]],
    flat: Float[Array, " d"],
    read: Callable[[Int[Array, ""], Float[Array, " m"]], Float[Array, "..."]],
) -> Float[Array, "d ..."]:
    """Evaluate ``read(i, J e_i)`` for each coordinate ``i``, at most 64 at a time, so that a large ``J`` is never built.

    Args:
        push: ``v -> J v`` for the Jacobian ``J``, as returned by ``jax.linearize``.
        flat: the point, ``(d,)``.
        read: function of ``i`` and column ``i`` that returns the array to keep.

    Returns:
        The kept arrays, stacked along a first axis of length ``d``.
    """

    def column(i):
        return read(i, push(unit(flat, i)))

    return jax.lax.map(column, jnp.arange(flat.size), batch_size=DIRECTIONS_AT_ONCE)


def unit(flat: Float[Array, " d"], i: Int[Array, ""]) -> Float[Array, " d"]:
    """Return the unit vector of coordinate ``i``."""
    return jnp.zeros_like(flat).at[i].set(1.0)


def along(
    function: Callable[[Float[Array, " d"]], Float[Array, "..."]], direction: Float[Array, " d"]
) -> Callable[[Float[Array, " d"]], Float[Array, "..."]]:
    """Return the derivative of a function in one direction, as a function of the point."""
    return lambda x: jax.jvp(function, (x,), (direction,))[1]


def laplacian_of_curvature(score: Callable[[Float[Array, " d"]], Float[Array, " d"]], flat: Float[Array, " d"]) -> Scalar:
    """Compute the Laplacian of ``(Laplacian q) / q = tr grad s + |s|^2`` for a density ``q`` with score ``s``.

    The ``d^2`` directional derivatives are computed at most 64 at a time.

    Args:
        score: the score as a function of a point ``(d,)``; it need not be a gradient.
        flat: the point, ``(d,)``.
    """
    value = score(flat)

    def of_square(i):
        direction = unit(flat, i)
        first = along(score, direction)
        return 2 * (jnp.sum(first(flat) ** 2) + jnp.sum(value * along(first, direction)(flat)))

    def of_trace(pair):
        i, j = jnp.divmod(pair, flat.size)
        own = along(lambda x: score(x)[i], unit(flat, i))
        return along(along(own, unit(flat, j)), unit(flat, j))(flat)

    squares = jax.lax.map(of_square, jnp.arange(flat.size), batch_size=DIRECTIONS_AT_ONCE)
    traces = jax.lax.map(of_trace, jnp.arange(flat.size**2), batch_size=DIRECTIONS_AT_ONCE)
    return jnp.sum(squares) + jnp.sum(traces)
