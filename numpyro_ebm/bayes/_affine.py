"""Affine maps between Gaussians."""

import jax.numpy as jnp

from numpyro_ebm._core.typing import Matrix


def root(matrix: Matrix) -> Matrix:
    """Return the symmetric root of a positive definite matrix."""
    values, vectors = jnp.linalg.eigh(matrix)
    return (vectors * jnp.sqrt(jnp.maximum(values, 0.0))) @ vectors.T


def transport(old: Matrix, new: Matrix) -> Matrix:
    """Return the matrix that takes draws of one covariance to another and moves them least (optimal transport).

    Unlike a quotient of Cholesky factors it does not depend on the order of the coordinates.
    """
    half = root(old)
    inverse = jnp.linalg.inv(half)
    return inverse @ root(half @ new @ half) @ inverse


def godambe(hessian: Matrix, score_covariance: Matrix) -> Matrix:
    """Return the Godambe information ``H J^-1 H``, with the pseudo-inverse where the score has no variance."""
    scale = jnp.sqrt(jnp.maximum(jnp.diag(score_covariance), jnp.finfo(hessian.dtype).tiny))
    inverse = jnp.linalg.pinv(score_covariance / jnp.outer(scale, scale), hermitian=True)
    scaled = hessian / scale[:, None]
    return scaled.T @ inverse @ scaled
