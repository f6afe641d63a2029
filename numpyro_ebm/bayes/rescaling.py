"""A scale for each coordinate."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from numpyro_ebm._core.typing import PRNGKey
from numpyro_ebm.bayes._source import ScoreSource
from numpyro_ebm.bayes.calibration import Adjustment, CalibrationProblem


@dataclasses.dataclass(frozen=True)
class Rescaling(ScoreSource):
    r"""Coordinate rescaling: each (unconstrained) parameter is stretched around the mode to its sandwich standard deviation.

    .. math:: z_j \mapsto \hat z_j + \frac{\sigma_j}{s_j} (z_j - \hat z_j), \qquad
        s^2 = \operatorname{diag}\,(H + P)^{-1}, \quad \sigma^2 = \operatorname{diag}\,(H J^{-1} H + P)^{-1}

    with the matrices of `OpenFaced`. Correlations stay those of the generalised posterior, so that only ``d`` numbers have
    to be estimated. The idea of a map from the space of the pseudolikelihood to that of the posterior is that of the paper
    below; the scales are those of the sandwich, coordinate by coordinate.

    Args:
        score_covariance: as in `Sandwich`.

    Raises:
        EnergyError: for an unknown option.

    Example:
        ``calibrate(key, estimate(model, "pseudolikelihood"), x, method="rescaling").adjust(mcmc.get_samples())``

    References:
        Arena and Marsman, Bayesian inference for discrete Markov random fields through coordinate rescaling (2026).
    """

    name: ClassVar[str] = "rescaling"
    limits: ClassVar[str] = "Correlations between parameters stay those of the loss."

    def adjustment(self, rng_key: PRNGKey, problem: CalibrationProblem) -> Adjustment:
        """Return the map."""
        wanted = jnp.diag(jnp.linalg.inv(self.sandwich_precision(rng_key, problem)))
        return Adjustment(1.0, jnp.diag(jnp.sqrt(wanted / jnp.diag(jnp.linalg.inv(problem.precision)))))
