"""One weight by the information that the sandwich leaves."""

import dataclasses
from typing import ClassVar, Literal, get_args

import jax.numpy as jnp

from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.typing import PRNGKey
from numpyro_ebm.bayes._affine import godambe
from numpyro_ebm.bayes._source import ScoreSource
from numpyro_ebm.bayes.calibration import Adjustment, CalibrationProblem

Matching = Literal["moment", "information"]


@dataclasses.dataclass(frozen=True)
class Sandwich(ScoreSource):
    r"""The weight under which the posterior is as wide as the sandwich covariance of the estimate.

    With ``H`` the Hessian of the loss, summed over rows, ``J`` the covariance of its gradient and ``P`` the precision of the
    prior at the mode, the weight is

    .. math:: w_\text{moment} = \frac{\operatorname{tr}((H + P)^{-1} H)}{\operatorname{tr}((H + P)^{-1} J)}, \qquad
        w_\text{information} = \frac{\operatorname{tr}(H J^{-1} H)}{\operatorname{tr}(H)}

    In one dimension both are :math:`H / J` under a flat prior, and the posterior's variance becomes :math:`J / H^2`. In
    several, "moment" (which is :math:`d / \operatorname{tr}(H^{-1} J)` under a flat prior) gives the weighted loss the mean
    that twice a log likelihood ratio has, and does not depend on the parameters' units. "information" is the trace of Lyddon
    et al., in which the parameters with most information count most: where ``H^{-1} J`` differs much between directions,
    as under a pseudolikelihood with strong couplings, it can be far from the weight that most parameters need.

    Args:
        score_covariance: "rows" for ``J`` from the variance between rows, "simulated" or a `Simulated` for data sets from
            the model.
        matching: "moment" or "information".

    Raises:
        EnergyError: for anything else, and where the weight is not a positive number.

    Example:
        ``calibrate(key, estimate(model, "sm"), x, method=ebm.bayes.Sandwich(matching="information"))``

    References:
        Lyddon, Holmes and Walker, General Bayesian updating and the loss-likelihood bootstrap (2019), for "information";
        Pauli, Racugno and Ventura, Bayesian composite marginal likelihoods (2011), for "moment".
    """

    name: ClassVar[str] = "sandwich"
    limits: ClassVar[str] = "One weight for all directions is right on average and not for each."
    matching: Matching = "moment"

    def __post_init__(self):
        super().__post_init__()
        if self.matching not in get_args(Matching):
            raise EnergyError(f"Unknown matching {self.matching!r}. {nearest(str(self.matching), get_args(Matching))}")

    def adjustment(self, rng_key: PRNGKey, problem: CalibrationProblem) -> Adjustment:
        """Return the weight."""
        hessian, covariance = problem.hessian, problem.score_covariance(rng_key, self.source)
        information, spread = godambe(hessian, covariance), jnp.linalg.inv(problem.precision)
        if self.matching == "information":
            weight = jnp.trace(information) / jnp.trace(hessian)
        else:
            weight = jnp.sum(spread * hessian) / jnp.sum(spread * covariance)
        precisions = weight * hessian + problem.prior_precision, information + problem.prior_precision
        variances, wanted = (jnp.diag(jnp.linalg.inv(each)) for each in precisions)
        ratios = jnp.sqrt(variances / wanted)
        return Adjustment(
            weight, notes=(f"Standard deviations are {ratios.min():.2f} to {ratios.max():.2f} times the sandwich's.",)
        )
