"""Standard deviations that are exactly 0 for constant data in spite of rounding."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Shaped

from numpyro_ebm._core.typing import Array

ROUNDING = 8.0
"""Units in the last place by which equal numbers may differ after rounding; a larger value sets more small spreads to 0."""


def spread(
    values: Shaped[np.ndarray | Array, "num ..."],
    where: Bool[np.ndarray | Array, "num ..."] | None = None,
    eps: float | None = None,
) -> Any:
    """Compute the standard deviation over the first axis, exactly 0 where it is no larger than rounding of the values.

    The mean of equal numbers is off by some units in the last place (600 rows of 0.48 in float32 have a standard deviation
    of 3e-7), so the values are first centred at one of them.

    Args:
        values: ``(num, ...)``, a NumPy or JAX array; the result is of the same kind.
        where: which values count, ``(num, ...)``, where other dimensions than the first may be 1; None for all.
        eps: spacing near 1 of the values' original float type, if they have been converted; None for their current type.

    Returns:
        Array of shape ``values.shape[1:]``; also 0 where no value counts or some value is not finite.
    """
    xp: Any = np if isinstance(values, np.ndarray) else jnp
    eps = eps_of(values) if eps is None else eps
    values = values if xp.issubdtype(values.dtype, xp.floating) else values.astype(float)
    if len(values) == 0:
        return xp.zeros(values.shape[1:], values.dtype)
    if where is None:  # not all True: XLA would find the first of so many constants at compile time, which takes seconds
        counts, num, first = True, len(values), values[:1]
    else:
        counts, num = where, xp.maximum(xp.sum(where, axis=0, keepdims=True), 1).astype(values.dtype)
        in_bounds: Any = {} if xp is np else {"mode": "clip"}  # JAX's default mode would insert NaN
        first = xp.take_along_axis(values, xp.argmax(where, axis=0, keepdims=True), 0, **in_bounds)
    centred = xp.where(counts, values, first) - first
    deviation = xp.where(counts, centred - xp.sum(centred, axis=0, keepdims=True) / num, 0.0)
    result = xp.sqrt(xp.sum(deviation**2, axis=0, keepdims=True) / num)[0]
    size = xp.max(xp.where(counts, xp.abs(values), 0.0), axis=0)
    return xp.where(result > ROUNDING * eps * size, result, 0.0)


def eps_of(values: np.ndarray | Array) -> float:
    """Return the spacing near 1 of the values' float type; 0 for integers."""
    return float(jnp.finfo(values.dtype).eps) if jnp.issubdtype(values.dtype, jnp.floating) else 0.0


def or_one(scale: np.ndarray | np.generic | Array) -> Any:
    """Return a scale that can be divided by: 1 where it is 0."""
    if isinstance(scale, np.ndarray | np.generic):
        return np.where(np.asarray(scale, float) > 0, scale, 1.0)
    return jnp.where(scale > 0, scale, 1.0)
