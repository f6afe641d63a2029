"""Log Z by logistic regression: the constant that best separates draws of the target from draws of a known distribution."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from numpyro_ebm._core.typing import Array, Scalar
from numpyro_ebm.partition._base import Estimate

STEPS = 80
"""Halvings of the bracket: they bring its widest form, 1e5 nats, to below rounding."""
MARGIN = 40.0
"""Nats by which the bracket exceeds the log ratios: exp(-40) is below the rounding of double precision."""
WIDEST = 1e5
"""Widest extent of the bracket below the largest log ratio, in nats: draws outside the support do not widen it."""
SCORE, ROUNDING = 5.0, 1e-5
"""Standard errors that exclude chance (its probability is 6e-7), and a relative tolerance for rounding."""


def log_partition_by_contrast(
    rows: Float[Array, " rows"], others: Float[Array, " others"], inflation: Scalar | float = 1.0
) -> Estimate:
    r"""Fit one constant by logistic regression: the root ``c`` of ``sum_rows s(c - u_i) = sum_others s(u_j - c)``.

    ``u = log \tilde p - log q - log nu``, where ``nu`` is the number of others over that of rows and ``s`` the logistic
    function. The solution is the bridge sampling estimate with the optimal bridge (Bennett's acceptance ratio): no estimate
    from the two samples is more efficient.

    Args:
        rows: ``log \tilde p - log q`` at draws of the target.
        others: the same at draws of q.
        inflation: factor by which autocorrelation increases the variance of a mean over the rows.

    Returns:
        The constant, its sandwich standard error, and as ``ess`` four times the sum over both samples of the classifier's
        variances: all draws if the two distributions are equal, 0 if they do not overlap. ``are_draws`` says whether the
        rows can be draws of the target: then the classifier that multiplies the log ratio by 1 is the best one, and the
        derivative of the loss in that factor is 0 within 5 standard errors. For draws of another distribution that resembles
        the known one, the best factor is near 0.
    """
    log_nu = jnp.log(len(others) / len(rows))
    u, v = rows - log_nu, others - log_nu
    high = jnp.maximum(jnp.max(u), jnp.max(v))
    low = jnp.maximum(jnp.min(u), high - WIDEST) - MARGIN

    def halve(_, ends):
        low, high = ends
        middle = 0.5 * (low + high)
        excess = jnp.sum(jax.nn.sigmoid(v - middle)) - jnp.sum(jax.nn.sigmoid(middle - u))
        return jnp.where(excess > 0, middle, low), jnp.where(excess > 0, high, middle)

    low, high = jax.lax.fori_loop(0, STEPS, halve, (low, high + MARGIN))
    value = 0.5 * (low + high)
    from_rows, from_others = jax.nn.sigmoid(value - u), jax.nn.sigmoid(v - value)
    slope = jnp.sum(from_rows * (1 - from_rows)) + jnp.sum(from_others * (1 - from_others))
    variance = inflation * len(u) * jnp.var(from_rows) + len(v) * jnp.var(from_others)
    at_rows, at_others = u - value, v - value
    middle = (from_rows * (1 - from_rows)) @ at_rows + (from_others * (1 - from_others)) @ at_others
    middle = middle / jnp.maximum(slope, jnp.finfo(slope.dtype).tiny)
    in_rows, in_others = from_rows * (at_rows - middle), from_others * (at_others - middle)
    derivative = jnp.sum(in_rows) - jnp.sum(in_others)
    chance = jnp.maximum(inflation, 1.0) * len(u) * jnp.var(in_rows) + len(v) * jnp.var(in_others)
    are_draws = jnp.abs(derivative) <= SCORE * jnp.sqrt(chance) + ROUNDING * jnp.sum(jnp.abs(in_rows))
    ess = 4 * slope / jnp.maximum(inflation, 1.0)
    return Estimate(value, jnp.sqrt(variance) / slope, ess, are_draws=are_draws)
