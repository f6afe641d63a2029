"""An affine map of draws to the sandwich covariance."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from numpyro_ebm._core.typing import PRNGKey
from numpyro_ebm.bayes._affine import transport
from numpyro_ebm.bayes._source import ScoreSource
from numpyro_ebm.bayes.calibration import Adjustment, CalibrationProblem


@dataclasses.dataclass(frozen=True)
class OpenFaced(ScoreSource):
    r"""The open-faced sandwich: draws are mapped around the mode, so that their covariance is that of the sandwich.

    .. math:: z \mapsto \hat z + A (z - \hat z), \qquad
        A (H + P)^{-1} A^\top = (H J^{-1} H + P)^{-1}

    with ``H`` the Hessian of the loss, ``J`` the covariance of its gradient and ``P`` the precision of the prior at the
    mode. ``A`` is symmetric, the map that moves draws least. The draws are those of weight 1.

    Args:
        score_covariance: as in `Sandwich`.

    Raises:
        EnergyError: for an unknown option.

    Example:
        ``calibrate(key, estimate(model, "pseudolikelihood"), x, method="open_faced").adjust(mcmc.get_samples())``

    References:
        Shaby, The open-faced sandwich adjustment for MCMC using estimating functions (2014).
    """

    name: ClassVar[str] = "open_faced"
    limits: ClassVar[str] = "The sandwich needs many more rows (or simulated data sets) than parameters."

    def adjustment(self, rng_key: PRNGKey, problem: CalibrationProblem) -> Adjustment:
        """Return the map."""
        wanted = self.sandwich_precision(rng_key, problem)
        return Adjustment(1.0, transport(jnp.linalg.inv(problem.precision), jnp.linalg.inv(wanted)))
