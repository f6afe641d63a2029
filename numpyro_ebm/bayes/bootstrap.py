"""One weight from the spread of the estimates of bootstrap data sets."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.programs import compiled
from numpyro_ebm._core.typing import PRNGKey
from numpyro_ebm.bayes._loss import Rows
from numpyro_ebm.bayes._modes import find_mode, is_definite
from numpyro_ebm.bayes._resampling import resampled
from numpyro_ebm.bayes.calibration import AbstractCalibration, Adjustment, CalibrationProblem
from numpyro_ebm.bayes.simulated import Simulated


@dataclasses.dataclass(frozen=True)
class Bootstrap(AbstractCalibration):
    r"""The weight under which the posterior's scores fit the estimates of bootstrap data sets.

    With :math:`\theta_b` the minimisers of the loss ``L`` of ``B`` data sets, the weight minimises the Fisher divergence of
    the generalised posterior from them, which is quadratic in the weight:

    .. math:: w = \frac{\sum_b \nabla L(\theta_b)^\top \nabla \log \pi(\theta_b) + \operatorname{tr} \nabla^2 L(\theta_b)}
        {\sum_b |\nabla L(\theta_b)|^2}

    with ``L`` of the data themselves and ``pi`` the prior, all in unconstrained latents. For many rows it tends to
    :math:`\operatorname{tr} H / \operatorname{tr} J`.

    Args:
        data_sets: how many data sets ``B`` of rows drawn with replacement, or a `Simulated` for ``num_sets`` data sets from
            the model. Each takes a minimisation.

    Raises:
        EnergyError: for less than two data sets, a single row without a `Simulated`, and a loss without a minimum of its
            own.

    Example:
        ``calibrate(key, estimate(model, "discrete_fisher"), x, method=ebm.bayes.Bootstrap(100))``

    References:
        Matsubara, Knoblauch, Briol and Oates, Generalized Bayesian inference for discrete intractable likelihood (2022).
    """

    name: ClassVar[str] = "bootstrap"
    limits: ClassVar[str] = "One weight for all directions is right on average and not for each."
    data_sets: int | Simulated = 100

    def __post_init__(self):
        if not isinstance(self.data_sets, Simulated):
            check_count("Bootstrap", "data_sets", self.data_sets, 2)

    def adjustment(self, rng_key: PRNGKey, problem: CalibrationProblem) -> Adjustment:
        """Return the weight."""
        problem.check_noise_varies("The bootstrap")
        if not is_definite(problem.hessian):
            raise EnergyError(
                "The loss has no minimum without the prior, so that bootstrap data sets have no estimates. Write "
                "method='sandwich'."
            )
        key_at, key_sets = jax.random.split(rng_key)
        loss, draw = problem.loss, self._draw(key_at, problem)
        num_sets = self.data_sets.num_sets if isinstance(self.data_sets, Simulated) else self.data_sets

        def estimate(key):
            rows = draw(key)
            return find_mode(lambda z: -loss.total(z, rows), problem.mode)

        def terms(z):
            slope, curvature = jax.grad(loss.total)(z), jnp.trace(jax.hessian(loss.total)(z))
            return slope @ jax.grad(loss.log_rest)(z) + curvature, slope @ slope

        above, below = compiled(
            lambda keys: jax.lax.map(lambda key: terms(estimate(key)), keys), jax.random.split(key_sets, num_sets)
        )
        return Adjustment(jnp.sum(above) / jnp.sum(below))

    def _draw(self, rng_key: PRNGKey, problem: CalibrationProblem) -> Callable[[PRNGKey], Rows]:
        if isinstance(self.data_sets, Simulated):
            return self.data_sets.at(rng_key, problem.loss, problem.mode)
        return resampled(problem.loss.masks)
