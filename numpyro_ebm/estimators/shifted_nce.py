"""Noise contrastive estimation with the model's own shifted density as noise."""

import dataclasses

from numpyro_ebm._core.options import check_count, check_positive
from numpyro_ebm._core.typing import PRNGKey, PyTree, RowValues
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators._base import AbstractEstimator
from numpyro_ebm.estimators.parts.moves import in_pairs, loss_of_moves
from numpyro_ebm.estimators.parts.projections import Projection, check_projection, directions


@dataclasses.dataclass(frozen=True)
class ShiftedNoiseContrastiveEstimation(AbstractEstimator):
    r"""NCE whose noise is the shifted model, ``p_n(x) = p(x - v)``: between "nce" and sliced score matching.

    The shifted data, ``y = x + v``, replace draws of the noise, which they are at the optimum. In unconstrained space
    (Jacobian included), with ``v = length * u`` and ``E[u u^T] = I``, the loss of a row is that of a classifier of data
    against noise,

    .. math:: \log\Big(1 + \frac{p(x - v)}{p(x)}\Big) + \log\Big(1 + \frac{p(x + v)}{p(x)}\Big)

    averaged over directions that each update draws anew. Log Z cancels, also that of each context. As the length vanishes,
    the loss is ``2 log 2 + length^2 / 2`` times that of "ssm" with the same directions, without a derivative in x. It costs
    ``1 + 2 M`` energies per row for ``M`` directions. With Gaussian directions it is "conditional_nce" with ``kappa = 2 M``
    draws.

    Args:
        length: size of the shift per dimension in data units (in unconstrained units where the support is not the real
            line): ``|v|`` is about ``length * sqrt(d)``.
        num_projections: directions per row.
        projection: "rademacher", "gaussian" or "sphere" (uniform on the sphere of radius sqrt(d)).

    Raises:
        EnergyError: for a length that is not positive, fewer than one direction or an unknown projection.

    Warns:
        UserWarning: where the shifts are so long that the loss no longer depends on the energy.

    Example:
        ``estimate(model, "shifted_nce", length=0.1, num_projections=2)``

    References:
        Gutmann and Hirayama, Bregman divergence as general framework to estimate unnormalized statistical models (2011);
        Song and Kingma, How to train your energy-based models (2021), section 5.1.
    """

    name = "shifted_nce"
    role = "objective"
    length: float = 0.1
    num_projections: int = 1
    projection: Projection = "rademacher"

    def __post_init__(self):
        check_positive(type(self).__name__, "length", self.length, scalar=True)
        check_count(type(self).__name__, "num_projections", self.num_projections)
        check_projection(self.projection)

    def surrogate(self, rng_key: PRNGKey, site: Site, state: PyTree) -> tuple[RowValues, PyTree]:
        """Return minus the loss of each row."""
        shifts = self.length * directions(rng_key, self.projection, self.num_projections, site.position)
        return -loss_of_moves(site, in_pairs(shifts, 2 * self.num_projections)), state
