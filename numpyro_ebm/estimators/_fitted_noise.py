"""Noise fitted to the batch: a Gaussian, or a mixture of kernels around rows, in unconstrained space."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from numpyro_ebm._errors import EnergyError
from numpyro_ebm._typing import Array, PRNGKey
from numpyro_ebm.estimators._base import Site

MAX_KERNELS = 64


class FittedNoise(NamedTuple):
    """Equal-weight mixtures of Gaussians of one covariance, one mixture for each half of the batch.

    A row's mixture is fitted to the half that the row is not in (even rows against odd ones): given its noise, a row is a
    draw of the data's distribution like any other, which is what the consistency of the contrastive estimators rests on.

    Attributes:
        centres: ``(2, num_kernels, d)``.
        scale_tril: Cholesky factors of the covariances, ``(2, d, d)``.
    """

    centres: Array
    scale_tril: Array

    def sample(self, rng_key: PRNGKey, site: Site, num: int) -> Array:
        """``(num, num_rows, *event_shape)``."""
        key_kernel, key_normal = jax.random.split(rng_key)
        which = jax.random.randint(key_kernel, (num, site.num_rows), 0, self.centres.shape[1])
        normal = jax.random.normal(key_normal, (num, site.num_rows, self.centres.shape[2]), self.centres.dtype)
        both = jnp.einsum("hij,nrj->hnri", self.scale_tril, normal)
        flat = self.centres[_half(site), which] + jnp.where(_half(site)[:, None] == 0, both[0], both[1])
        position = flat.reshape(num, *site.position.shape)
        return jax.vmap(jax.vmap(site.distribution.constrain))(position)

    def log_prob(self, events: Array, site: Site) -> Array:
        """Of events ``(num, num_rows, *event_shape)``, each under its row's mixture, in the support's own measure."""
        position = jax.vmap(jax.vmap(site.distribution.unconstrain))(events)
        flat = position.reshape(-1, self.centres.shape[2])
        both = jax.vmap(_log_mixture, in_axes=(0, 0, None))(self.centres, self.scale_tril, flat).reshape(
            2, *events.shape[:2]
        )
        volume = jax.vmap(jax.vmap(site.distribution.log_jacobian))(position)
        return jnp.where(_half(site) == 0, both[0], both[1]) - volume


def fit_noise(rng_key: PRNGKey, site: Site, kind: str) -> FittedNoise:
    """The "gaussian" (moments, shrunk towards the diagonal) or the "mixture" (kernels of Silverman's width) of a batch.

    Raises:
        EnergyError: for a batch of one row.
    """
    if site.num_rows < 2:
        raise EnergyError(
            f"noise='{kind}' is fitted to the batch, and this one has one row. Give a larger batch, or a noise distribution."
        )
    flat = jax.lax.stop_gradient(site.position).reshape(site.num_rows, -1)
    takes_part = jnp.ones(site.num_rows, bool) if site.mask is None else site.mask
    others = takes_part & (_half(site) != jnp.arange(2)[:, None])
    mean, covariance = jax.vmap(_moments, in_axes=(None, 0))(flat, others.astype(flat.dtype))
    if kind == "gaussian":
        return FittedNoise(mean[:, None], jnp.linalg.cholesky(covariance))
    num, d = min(MAX_KERNELS, site.num_rows // 2), flat.shape[1]
    # A uniform draw of rows without replacement, those of the other half first.
    order = jnp.where(others, jax.random.uniform(rng_key, others.shape), -1.0)
    centres = flat[jax.lax.top_k(order, num)[1]]
    width = (4 / (d + 2) / num) ** (1 / (d + 4))
    return FittedNoise(centres, width * jnp.linalg.cholesky(covariance))


def _half(site: Site) -> Array:
    """``(num_rows,)``, 0 or 1."""
    return jnp.arange(site.num_rows) % 2


def _moments(flat: Array, weights: Array) -> tuple[Array, Array]:
    num, d = jnp.maximum(jnp.sum(weights), 1.0), flat.shape[1]
    mean = weights @ flat / num
    deviation = flat - mean
    covariance = (weights[:, None] * deviation).T @ deviation / num
    variance = jnp.diag(covariance)
    # With few rows the covariance is singular; a dimension without spread gets that of a standard normal.
    shrinkage = (d + 1) / (num + d + 1)
    ridge = jnp.diag(jnp.where(variance > 0, shrinkage * variance, 1.0))
    return mean, (1 - shrinkage) * covariance + ridge


def _log_mixture(centres: Array, scale_tril: Array, flat: Array) -> Array:
    inverse = jax.scipy.linalg.solve_triangular(scale_tril, jnp.eye(len(scale_tril), dtype=flat.dtype), lower=True)
    points, kernels = ((p - centres.mean(axis=0)) @ inverse.T for p in (flat, centres))
    squares = jnp.sum(points**2, 1)[:, None] + jnp.sum(kernels**2, 1) - 2 * points @ kernels.T
    constant = 0.5 * flat.shape[1] * math.log(2 * math.pi) + jnp.sum(jnp.log(jnp.diag(scale_tril))) + math.log(len(centres))
    return jax.nn.logsumexp(-0.5 * squares, axis=1) - constant
