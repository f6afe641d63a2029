"""The two ingredients of a sandwich covariance: slopes of the losses of rows, and curvature of their sum."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float

from numpyro_ebm._core.typing import Array, Scalar

COLUMNS_AT_ONCE = 32
"""Columns of the second derivatives that are computed together; more need more memory."""


def slopes_and_curvature(
    losses: Callable[[Float[Array, " d"]], Float[Array, " rows"]],
    penalty: Callable[[Float[Array, " d"]], Scalar],
    at: Float[Array, " d"],
) -> tuple[Float[Array, "d rows"], Float[Array, "d d"]]:
    """Return the slope of each row's loss, and the Hessian of the sum of all losses and the penalty.

    Args:
        losses: the losses of rows, as a function of the flat parameters.
        penalty: a term that belongs to no row, such as minus a log prior.
        at: the parameters.
    """

    def rows_and_gradient(flat):
        rows, pull = jax.vjp(losses, flat)
        return rows, pull(jnp.ones_like(rows))[0] + jax.grad(penalty)(flat)

    push = jax.linearize(rows_and_gradient, at)[1]
    return jax.lax.map(push, jnp.eye(at.size, dtype=at.dtype), batch_size=COLUMNS_AT_ONCE)
