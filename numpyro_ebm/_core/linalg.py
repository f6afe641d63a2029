"""Linear algebra of single matrices that stays so under ``vmap``.

On CPU, jaxlib 0.10 spreads a batch of LAPACK calls over its thread pool, and the caller, a thread of the pool itself, waits
for them. As many such batches at once as there are threads (two, on two cores) wait for each other forever. Chains under
``vmap`` therefore take their matrices one after another.
"""

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Float

from numpyro_ebm._core.typing import Array, Matrix


@sequential_vmap
def inverse(matrix: Matrix) -> Matrix:
    """Return the inverse of a matrix."""
    return jnp.linalg.inv(matrix)


@sequential_vmap
def cholesky(matrix: Matrix) -> Matrix:
    """Return the lower factor ``L`` of ``L L^T``."""
    return jnp.linalg.cholesky(matrix)


@sequential_vmap
def solve_lower(factor: Matrix, right: Float[Array, "d columns"]) -> Float[Array, "d columns"]:
    """Return ``L^-1 right`` for a lower triangular matrix."""
    return jax.scipy.linalg.solve_triangular(factor, right, lower=True)
