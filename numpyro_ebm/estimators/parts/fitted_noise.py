"""Noise fitted to the batch in unconstrained space: a Gaussian, or a mixture of Gaussian kernels centred on rows."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.spreads import spread
from numpyro_ebm._core.typing import Array, PRNGKey

MAX_KERNELS = 64
"""Largest number of kernels in a mixture: more follow the rows more closely, at a cost in proportion."""


class FittedNoise(NamedTuple):
    """Equal-weight mixtures of Gaussians with a common covariance, one mixture for each half of the batch.

    A row's mixture is fitted to the half that does not contain the row (even against odd rows). Given its noise, a row is
    therefore still a draw of the data's distribution, which the consistency of the contrastive estimators requires.

    Attributes:
        centres: ``(2, num_kernels, d)``.
        scale_tril: Cholesky factors of the covariances, ``(2, d, d)``.
        half: index of each row's mixture, ``(num_rows,)``.
    """

    centres: Float[Array, "2 kernels d"]
    scale_tril: Float[Array, "2 d d"]
    half: Int[Array, " rows"]

    def sample(self, rng_key: PRNGKey, num: int) -> Float[Array, "{num} {self.half.size} d"]:
        """Draw flat positions ``(num, num_rows, d)``, each from its row's mixture."""
        key_kernel, key_normal = jax.random.split(rng_key)
        shape = num, len(self.half)
        which = jax.random.randint(key_kernel, shape, 0, self.centres.shape[1])
        normal = jax.random.normal(key_normal, (*shape, self.centres.shape[2]), self.centres.dtype)
        first, second = jnp.einsum("hij,nrj->hnri", self.scale_tril, normal)
        return self.centres[self.half, which] + jnp.where(self.half[:, None] == 0, first, second)

    def log_prob(self, positions: Float[Array, "num {self.half.size} *position"]) -> Float[Array, "num {self.half.size}"]:
        """Return the log densities of positions ``(num, num_rows, ...)``, each under its row's mixture."""
        flat = positions.reshape(-1, self.centres.shape[2])
        both = jax.vmap(_log_mixture, in_axes=(0, 0, None))(self.centres, self.scale_tril, flat)
        first, second = both.reshape(2, *positions.shape[:2])
        return jnp.where(self.half == 0, first, second)


def fit_noise(
    rng_key: PRNGKey, positions: Float[Array, " rows *position"], mask: Bool[Array, " rows"] | None, kind: str
) -> FittedNoise:
    """Fit a "gaussian" (moments, shrunk towards the diagonal) or a "mixture" (kernels of Silverman's width) to a batch.

    Args:
        rng_key: random key, by which "mixture" chooses the rows of its kernels.
        positions: the rows in unconstrained space.
        mask: rows that take part, or None for all.
        kind: "gaussian" or "mixture".

    Raises:
        EnergyError: for a batch of one row.
    """
    num_rows = len(positions)
    if num_rows < 2:
        raise EnergyError(
            f"The {kind} noise is fitted to the batch, which has only one row. Give a larger batch, or write the noise as "
            "a distribution."
        )
    flat = jax.lax.stop_gradient(positions).reshape(num_rows, -1)
    half = jnp.arange(num_rows) % 2
    others = (True if mask is None else mask) & (half != jnp.arange(2)[:, None])
    mean, covariance = jax.vmap(_moments, in_axes=(None, 0))(flat, others)
    scale_tril = jnp.linalg.cholesky(covariance)
    if kind == "gaussian":
        return FittedNoise(mean[:, None], scale_tril, half)
    num, d = min(MAX_KERNELS, num_rows // 2), flat.shape[1]
    # Draw rows uniformly without replacement, those of the other half first.
    order = jnp.where(others, jax.random.uniform(rng_key, others.shape), -1.0)
    width = (4 / (d + 2) / num) ** (1 / (d + 4))
    return FittedNoise(flat[jax.lax.top_k(order, num)[1]], width * scale_tril, half)


def _moments(
    flat: Float[Array, "rows d"], takes_part: Bool[Array, " rows"]
) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
    weights, d = takes_part.astype(flat.dtype), flat.shape[1]
    num = jnp.maximum(jnp.sum(weights), 1.0)
    mean = weights @ flat / num
    deviation = flat - mean
    covariance = (weights[:, None] * deviation).T @ deviation / num
    variance = spread(flat, takes_part[:, None]) ** 2
    # With few rows the covariance is singular; a dimension without spread gets a variance of 1.
    shrinkage = (d + 1) / (num + d + 1)
    ridge = jnp.diag(jnp.where(variance > 0, shrinkage * variance, 1.0))
    return mean, (1 - shrinkage) * covariance + ridge


def _log_mixture(
    centres: Float[Array, "kernels d"], scale_tril: Float[Array, "d d"], flat: Float[Array, "points d"]
) -> Float[Array, " points"]:
    inverse = jax.scipy.linalg.solve_triangular(scale_tril, jnp.eye(len(scale_tril), dtype=flat.dtype), lower=True)
    points, kernels = ((p - centres.mean(axis=0)) @ inverse.T for p in (flat, centres))
    squares = jnp.sum(points**2, 1)[:, None] + jnp.sum(kernels**2, 1) - 2 * points @ kernels.T
    constant = 0.5 * flat.shape[1] * math.log(2 * math.pi) + jnp.sum(jnp.log(jnp.diag(scale_tril))) + math.log(len(centres))
    return jax.nn.logsumexp(-0.5 * squares, axis=1) - constant
