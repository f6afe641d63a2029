"""Sliced score matching with reduced variance."""

import dataclasses

from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import PRNGKey, PyTree, RowValues
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.projections import Projection, check_projection
from numpyro_ebm.estimators.parts.second_order import SecondOrderEstimator, probed_loss


@dataclasses.dataclass(frozen=True)
class VarianceReducedSlicedScoreMatching(SecondOrderEstimator):
    r"""Sliced score matching with reduced variance (Song et al.): random directions for the trace only.

    The loss of a row, averaged over directions ``v`` with ``E[v v^T] = I`` that each update draws anew, is

    .. math:: \tfrac12 |s(x)|^2 + v^T \nabla s(x) v

    It costs one forward derivative of the score per direction and row. With Rademacher directions it is maximum likelihood
    on an isotropic Gaussian; for a full precision matrix, ``M`` of them have an efficiency of 1 on the diagonal and
    ``1 / (1 + 1/M)`` off it.

    Args:
        num_projections: directions per row.
        projection: "rademacher", "gaussian" or "sphere" (uniform on the sphere of radius sqrt(d)).

    Raises:
        EnergyError: for fewer than one direction or an unknown projection.

    Warns:
        UserWarning: for a piecewise linear energy (ReLU), whose second derivatives are zero.

    Example:
        ``estimate(model, "ssm_vr", num_projections=4)``

    References:
        Song, Garg, Shi and Ermon, Sliced score matching (2019), section 3.1.
    """

    name = "ssm_vr"
    num_projections: int = 1
    projection: Projection = "rademacher"

    def __post_init__(self):
        check_count("VarianceReducedSlicedScoreMatching", "num_projections", self.num_projections)
        check_projection(self.projection)

    def surrogate(self, rng_key: PRNGKey, site: Site, state: PyTree) -> tuple[RowValues, PyTree]:
        """Return minus the loss of each row."""
        return -probed_loss(rng_key, site, self.projection, self.num_projections), state
