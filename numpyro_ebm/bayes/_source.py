"""Where the covariance of a score comes from: an option that methods share."""

import dataclasses
from typing import Any

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Matrix, PRNGKey
from numpyro_ebm.bayes._affine import godambe
from numpyro_ebm.bayes.calibration import AbstractCalibration, CalibrationProblem
from numpyro_ebm.bayes.simulated import Simulated


@dataclasses.dataclass(frozen=True)
class ScoreSource(AbstractCalibration):
    """A method with the option ``score_covariance``."""

    score_covariance: Any = "rows"

    def __post_init__(self):
        source = self.score_covariance
        if source not in ("rows", "simulated") and not isinstance(source, Simulated):
            raise EnergyError(
                f"{type(self).__name__} got score_covariance={source!r}. Write 'rows', 'simulated' or "
                "numpyro_ebm.bayes.Simulated('gibbs', num_steps=50)."
            )

    @property
    def source(self) -> Any:
        """The option as an object."""
        return Simulated() if self.score_covariance == "simulated" else self.score_covariance

    def sandwich_precision(self, rng_key: PRNGKey, problem: CalibrationProblem) -> Matrix:
        """Return the precision of the sandwich covariance of the loss, with that of the priors."""
        return godambe(problem.hessian, problem.score_covariance(rng_key, self.source)) + problem.prior_precision
