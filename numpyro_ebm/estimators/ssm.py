"""Sliced score matching."""

import dataclasses

import jax
import jax.numpy as jnp

from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import PRNGKey, PyTree, RowValues
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.projections import Projection, check_projection, directions, inner, score_and_curvatures
from numpyro_ebm.estimators.parts.second_order import SecondOrderEstimator


@dataclasses.dataclass(frozen=True)
class SlicedScoreMatching(SecondOrderEstimator):
    r"""Sliced score matching (Song et al.): the trace by random directions instead of all coordinates.

    The loss of a row, averaged over directions ``v`` with ``E[v v^T] = I`` that each update draws anew, is

    .. math:: \tfrac12 (v^T s(x))^2 + v^T \nabla s(x) v

    It costs one forward derivative of the score per direction and row. On a Gaussian of scalar precision in ``d``
    dimensions, ``M`` Rademacher directions have ``1 / (1 + (d - 1) / M)`` of the efficiency of maximum likelihood. "ssm_vr",
    whose first term is exact, costs the same and is nearly always better.

    Args:
        num_projections: directions per row.
        projection: "rademacher", "gaussian" or "sphere" (uniform on the sphere of radius sqrt(d)).

    Raises:
        EnergyError: for fewer than one direction or an unknown projection.

    Warns:
        UserWarning: for a piecewise linear energy (ReLU), whose second derivatives are zero.

    Example:
        ``estimate(model, "ssm", num_projections=4)``

    References:
        Song, Garg, Shi and Ermon, Sliced score matching (2019).
    """

    name = "ssm"
    num_projections: int = 1
    projection: Projection = "rademacher"

    def __post_init__(self):
        check_count("SlicedScoreMatching", "num_projections", self.num_projections)
        check_projection(self.projection)

    def surrogate(self, rng_key: PRNGKey, site: Site, state: PyTree) -> tuple[RowValues, PyTree]:
        """Return minus the loss of each row."""
        projections = directions(rng_key, self.projection, self.num_projections, site.position)
        score, curvatures = score_and_curvatures(site, projections)
        along = jax.vmap(lambda v: inner(v, score))(projections)
        return -jnp.mean(0.5 * along**2 + curvatures, axis=0), state
