"""Second derivatives of a log density, a few directions at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from numpyro_ebm._typing import Array

DIRECTIONS_AT_ONCE = 64


def over_coordinates(push: Callable[[Array], Array], flat: Array, read: Callable[[Array, Array], Array]) -> Array:
    """``read(i, J e_i)`` for each coordinate ``i``, at most 64 at a time, so that a large Jacobian ``J`` is never built.

    Args:
        push: ``v -> J v``, as ``jax.linearize`` gives it.
        flat: the point, ``(d,)``.
        read: what to keep of a column, an array.

    Returns:
        What was kept, led by ``d``.
    """

    def column(i):
        return read(i, push(jnp.zeros_like(flat).at[i].set(1.0)))

    return jax.lax.map(column, jnp.arange(flat.size), batch_size=DIRECTIONS_AT_ONCE)
