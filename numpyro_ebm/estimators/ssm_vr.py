"""Sliced score matching with reduced variance."""

import dataclasses

from numpyro_ebm._core.options import check_count
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.projections import Projection, check_projection
from numpyro_ebm.estimators.parts.second_order import SecondOrderEstimator, probed_loss


@dataclasses.dataclass(frozen=True)
class VarianceReducedSlicedScoreMatching(SecondOrderEstimator):
    r"""Sliced score matching with reduced variance (Song et al.): random directions for the trace alone.

    Loss of a row, averaged over directions ``v`` with ``E[v v^T] = I``, drawn afresh at each update:

    .. math:: \tfrac12 |s(x)|^2 + v^T \nabla s(x) v

    One forward derivative of the score per direction and row. With Rademacher directions it is maximum likelihood on an
    isotropic Gaussian; for a full precision matrix ``M`` of them have an efficiency of 1 on the diagonal and
    ``1 / (1 + 1/M)`` off it.

    Args:
        num_projections: directions per row.
        projection: "rademacher", "gaussian" or "sphere" (uniform on the sphere of radius sqrt(d)).

    Raises:
        EnergyError: for fewer than one direction or an unknown law.

    Warns:
        UserWarning: for an energy that is linear piece by piece (ReLU), whose second derivatives are zero.

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

    def surrogate(self, rng_key, site: Site, state):
        """Minus the loss, per row."""
        return -probed_loss(rng_key, site, self.projection, self.num_projections), state
