"""Sliced score matching."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from numpyro_ebm._errors import EnergyError, check_count, nearest
from numpyro_ebm.estimators._base import AbstractEstimator, Site

Projection = Literal["rademacher", "gaussian", "sphere"]


@dataclasses.dataclass(frozen=True)
class SlicedScoreMatching(AbstractEstimator):
    r"""Sliced score matching (Song et al.): the trace by random directions instead of all coordinates.

    Loss of a row, averaged over directions ``v`` with ``E[v v^T] = I``, drawn afresh at each update:

    .. math:: \tfrac12 (v^T s(x))^2 + v^T \nabla s(x) v
        \quad\text{or, variance-reduced,}\quad \tfrac12 |s(x)|^2 + v^T \nabla s(x) v

    One forward derivative of the score per direction and row. The variance-reduced form with Rademacher directions is
    maximum likelihood on an isotropic Gaussian.

    Args:
        num_projections: directions per row.
        projection: "rademacher", "gaussian" or "sphere" (uniform on the sphere of radius sqrt(d)).
        variance_reduced: whether the first term is exact.

    Raises:
        EnergyError: for fewer than one direction or an unknown law.

    Example:
        ``estimate(model, "ssm", num_projections=4, variance_reduced=True)``

    References:
        Song, Garg, Shi and Ermon, Sliced score matching (2019).
    """

    name = "ssm"
    role = "objective"
    needs_energy = False
    num_projections: int = 1
    projection: Projection = "rademacher"
    variance_reduced: bool = False

    def __post_init__(self):
        check_count("SlicedScoreMatching", "num_projections", self.num_projections)
        if self.projection not in get_args(Projection):
            raise EnergyError(
                f"Unknown projection '{self.projection}'. {nearest(str(self.projection), get_args(Projection))}"
            )

    def surrogate(self, rng_key, site: Site, state):
        """Minus the loss, per row."""

        def row_loss(key, position, local):
            score, push = jax.linearize(lambda z: site.score(z, local), position)
            directions = self.directions(key, position)
            curvature = jnp.mean(jax.vmap(lambda v: jnp.sum(v * push(v)))(directions))
            if self.variance_reduced:
                return 0.5 * jnp.sum(score**2) + curvature
            along = jax.vmap(lambda v: jnp.sum(v * score))(directions)
            return 0.5 * jnp.mean(along**2) + curvature

        keys = jax.random.split(rng_key, site.num_rows)
        return -jax.vmap(row_loss)(keys, site.position, site.local), state

    def directions(self, rng_key, position):
        """``(num_projections, *event)`` directions of identity second moment."""
        shape = (self.num_projections, *position.shape)
        if self.projection == "rademacher":
            return jax.random.rademacher(rng_key, shape, position.dtype)
        normal = jax.random.normal(rng_key, shape, position.dtype)
        if self.projection == "gaussian":
            return normal
        length = jnp.sqrt(jnp.sum(normal.reshape(self.num_projections, -1) ** 2, axis=1) / max(position.size, 1))
        return normal / length.reshape((-1,) + (1,) * position.ndim)
