"""Modes of smooth log densities of a few parameters."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool

from numpyro_ebm._core.typing import Array, Flat, Matrix, Scalar

MOST_STEPS = 200
"""Most Newton steps."""
DAMPINGS = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
"""What is added to the sizes of the curvatures, in units of the largest; the greatest makes a short gradient step."""
NEAR = 1e-3
"""Largest squared distance from a mode, in standard deviations of the posterior per latent, that counts as none."""


def find_mode(log_density: Callable[[Flat], Scalar], start: Flat) -> Flat:
    """Climb to a mode by damped Newton steps, until no damping leads further up.

    Curvatures count by their size, so that a step leads up where the log density is not concave, too.
    """

    def step(carry):
        i, z, value, _ = carry
        curvatures, vectors = jnp.linalg.eigh(jax.hessian(log_density)(z))
        sizes = jnp.abs(curvatures)
        damped = sizes + jnp.array(DAMPINGS)[:, None] * jnp.max(sizes)
        slopes = vectors.T @ jax.grad(log_density)(z)
        tried = z + (slopes / jnp.where(damped > 0, damped, jnp.inf)) @ vectors.T
        values = jax.vmap(log_density)(tried)
        values = jnp.where(jnp.isnan(values), -jnp.inf, values)
        best = jnp.argmax(values)
        is_higher = values[best] > value
        return i + 1, jnp.where(is_higher, tried[best], z), jnp.where(is_higher, values[best], value), is_higher

    def goes_on(carry):
        return carry[3] & (carry[0] < MOST_STEPS)

    return jax.lax.while_loop(goes_on, step, (0, start, log_density(start), True))[1]


def is_mode(log_density: Callable[[Flat], Scalar], at: Flat, precision: Matrix) -> Bool[Array, ""]:
    """Return whether a point is a mode at which the precision, minus the Hessian, is positive definite."""
    gradient = jax.grad(log_density)(at)
    return is_definite(precision) & (gradient @ jnp.linalg.solve(precision, gradient) < NEAR * at.size)


def is_definite(matrix: Matrix) -> Bool[Array, ""]:
    """Return whether a symmetric matrix is positive definite beyond rounding, whatever the units of its coordinates."""
    scale = jnp.sqrt(jnp.abs(jnp.diag(matrix)))
    lowest = jnp.linalg.eigvalsh(matrix / jnp.outer(scale, scale))[0]
    return jnp.all(jnp.diag(matrix) > 0) & (lowest > len(matrix) * jnp.finfo(matrix.dtype).eps)
