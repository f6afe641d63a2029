"""An affine map of draws to the mode and the curvature of the posterior of the likelihood."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.programs import compiled
from numpyro_ebm._core.typing import Array, Flat, PRNGKey
from numpyro_ebm.bayes._affine import transport
from numpyro_ebm.bayes._modes import is_definite
from numpyro_ebm.bayes._settling import settle
from numpyro_ebm.bayes.calibration import AbstractCalibration, Adjustment, CalibrationProblem
from numpyro_ebm.bayes.simulated import Simulated, covariance_over_sets


@dataclasses.dataclass(frozen=True)
class Curvature(AbstractCalibration):
    r"""Mode and curvature adjustment: draws go to the mode and the curvature of the likelihood's own posterior.

    .. math:: z \mapsto z^* + A (z - \hat z), \qquad A (H + P)^{-1} A^\top = (I(z^*) + P(z^*))^{-1}

    where ``z*`` is the mode of the posterior under the energy itself and ``I`` the information of the data, the variance
    of the energy's gradient in the parameters under the model. Both come from data sets drawn from the model: stochastic
    Newton steps lead from the mode of the generalised posterior to ``z*``, and one more step with all the data sets ends
    there. (The paper takes the gradient at the mode from Monte Carlo, too, and the curvature of an exponential family, which
    is this variance.) The energy is taken to hold; the other methods calibrate a wrong one as well.

    Args:
        data_sets: how data are drawn.
        num_newton_steps: Newton steps, with two data sets each.

    Raises:
        EnergyError: for no step, a posterior without curvature, and latents of the estimator's own (the log normaliser).
        TypeError: for data sets that are no `Simulated`.

    Example:
        ``calibrate(key, estimate(model, "pseudolikelihood"), x, method=ebm.bayes.Curvature(ebm.bayes.Simulated("gibbs")))``

    References:
        Bouranis, Friel and Maire, Efficient Bayesian inference for exponential random graph models by correcting the
        pseudo-posterior distribution (2017).
    """

    name: ClassVar[str] = "curvature"
    limits: ClassVar[str] = "The energy has to hold, and the simulated data sets have to be draws of it."
    data_sets: Simulated = Simulated()
    num_newton_steps: int = 200

    def __post_init__(self):
        check_count("Curvature", "num_newton_steps", self.num_newton_steps)
        if not isinstance(self.data_sets, Simulated):
            raise TypeError(f"Curvature needs numpyro_ebm.bayes.Simulated(...); got {type(self.data_sets).__name__}.")

    def adjustment(self, rng_key: PRNGKey, problem: CalibrationProblem) -> Adjustment:
        """Return the map."""
        if problem.loss.own:
            raise EnergyError(
                f"The latents {list(problem.loss.own)} belong to the estimator, and the posterior of the likelihood, whose "
                "curvature is to be matched, does not have them. Write method='open_faced'."
            )
        keys, loss, surface = jax.random.split(rng_key, 3), problem.loss, problem.loss.surface()
        drawers = self.data_sets.auxiliaries("calibrate", loss)

        def newton(key, z):
            averaging = {name: each.averaging() for name, each in drawers.items()}
            return settle(key, surface, drawers, averaging, z, self.num_newton_steps).z

        near = compiled(newton, keys[0], problem.mode)
        draw = self.data_sets.at(keys[1], loss, near)

        def step(key, z):
            score = lambda key: _scores(problem, z, draw(key))  # noqa: E731
            mean, information = covariance_over_sets(score, key, self.data_sets.num_sets)
            precision = information - jax.hessian(loss.log_rest)(z)
            gradient = jax.grad(surface.log_joint)(z) - mean
            return z + jnp.linalg.solve(precision, gradient), precision

        target, precision = compiled(step, keys[2], near)
        if not is_definite(precision):
            raise EnergyError(
                "The posterior has no curvature in some direction of the parameters, so that there is nothing to match. "
                "Write a prior that holds them, or more data sets: Curvature(Simulated(num_sets=2000))."
            )
        return Adjustment(1.0, transport(jnp.linalg.inv(problem.precision), jnp.linalg.inv(precision)), target)


def _scores(problem: CalibrationProblem, z: Flat, rows: Any) -> Float[Array, "rows d"]:
    """Return the gradient of the unnormalised log density of each row."""
    data = {name: rows(name, site).position for name, site in problem.loss.energies(z).sites.items()}
    return jax.jacfwd(lambda z: problem.loss.surface().by_row(z, data))(z)
