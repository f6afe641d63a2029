"""`calibrate`: the width of a generalised posterior."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.inputs import as_arrays, check_key, check_outside_jit
from numpyro_ebm._core.jax_modes import in_own_modes
from numpyro_ebm._core.programs import compiled
from numpyro_ebm._core.typing import Array, Flat, Matrix, PRNGKey, PyTree
from numpyro_ebm.bayes._loss import Loss, make_loss
from numpyro_ebm.bayes._modes import find_mode, is_mode
from numpyro_ebm.bayes.calibration import AbstractCalibration, Adjustment, CalibrationProblem
from numpyro_ebm.bayes.names import CALIBRATIONS
from numpyro_ebm.handlers import estimate, estimated_in

SKEWED = 0.5
"""Skewness from which a marginal is called skewed."""
Method = str | AbstractCalibration | Callable[[PRNGKey, CalibrationProblem], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Result of `calibrate`.

    Attributes:
        method: name of the method, or of the function.
        weight: the number for ``estimate(..., weight=...)``: 1 for methods that map draws.
        mode: mode of the generalised posterior under the weight, constrained, by site.
        hessian: ``(d, d)``, Hessian of the loss at the mode under weight 1, in flat unconstrained latents sorted by name.
        prior_precision: ``(d, d)``, minus the Hessian of the log density of priors and other likelihoods there.
        skewness: skewness of the marginals of the unconstrained latents under the weight, by site, to first order in the
            third derivatives at the mode.
        notes: when the calibration is known to fail, and whether the posterior is such a case.
    """

    method: str
    weight: float
    mode: dict[str, Array]
    hessian: Float[np.ndarray, "d d"]
    prior_precision: Float[np.ndarray, "d d"]
    skewness: dict[str, Array]
    notes: tuple[str, ...]
    _adjustment: Adjustment = dataclasses.field(repr=False)
    _problem: CalibrationProblem = dataclasses.field(repr=False)

    def adjust(self, samples: Mapping[str, Any]) -> dict[str, Any]:
        """Return calibrated draws, given draws of the posterior under the weight.

        Deterministic sites are computed again. Draws of a method without a map are returned as they are.

        Args:
            samples: draws of all latent sites, constrained, with any leading dimensions, such as ``mcmc.get_samples()``.

        Raises:
            EnergyError: for latent sites without draws.
        """
        matrix, target = self._adjustment.matrix, self._adjustment.target
        missing = [name for name in self.mode if name not in samples]
        if missing:
            raise EnergyError(f"adjust needs draws of all latent sites, and there are none of {missing}.")
        if matrix is None and target is None:
            return dict(samples)
        loss, center = self._problem.loss, self._problem.mode
        first, at = next(iter(self.mode.items()))
        leading = np.shape(samples[first])[: np.ndim(samples[first]) - np.ndim(at)]
        flat = {name: jnp.reshape(samples[name], (-1, *np.shape(value))) for name, value in self.mode.items()}

        def mapped(flat):
            off = loss.unconstrain(flat) - center
            return loss.constrain((center if target is None else target) + (off if matrix is None else off @ matrix.T))

        return {name: value.reshape(*leading, *value.shape[1:]) for name, value in compiled(mapped, flat).items()}

    def __str__(self) -> str:
        """Return the method, the weight and the notes."""
        return "\n".join((f"Calibration by '{self.method}': weight {self.weight:.4g}.", *self.notes))


@in_own_modes
def calibrate(
    rng_key: PRNGKey,
    model: estimate,
    *args: Any,
    method: Method = "sandwich",
    params: PyTree | None = None,
    **kwargs: Any,
) -> Calibration:
    r"""Find the width of the generalised posterior ``prior x exp(-loss)`` of an estimated model.

    The scale of a loss is arbitrary, and pseudolikelihoods count dependent terms as independent, so that a posterior under
    them has the wrong width (too narrow, for pseudolikelihoods). A method finds a weight of the loss, or a map of draws:

    * "sandwich": the weight under which the posterior is as wide as the sandwich covariance (`bayes.Sandwich`).
    * "bootstrap": the weight that fits the spread of bootstrap estimates (`bayes.Bootstrap`).
    * "open_faced": a map of draws to the sandwich covariance (`bayes.OpenFaced`).
    * "rescaling": a scale for each coordinate, to the sandwich's standard deviations (`bayes.Rescaling`).
    * "curvature": a map of draws to mode and curvature of the likelihood's posterior, by simulation (`bayes.Curvature`).

    All use the two derivatives of the loss at the mode, in unconstrained latents, so a posterior that is not near a Gaussian
    there stays wrong: ``skewness`` and ``notes`` of the result say how far it is. For one dependent observation, such as a
    lattice, the variance of the score comes from data sets drawn from the model: ``method=bayes.Sandwich("simulated")``.

    Args:
        rng_key: random key, of simulated and resampled data.
        model: the model as `estimate` returned it, without a weight, with fixed objectives: those that NUTS takes.
        *args: arguments of the model.
        method: a name, an object of ``numpyro_ebm.bayes`` with options, or a function ``(rng_key, problem)`` of a
            `bayes.CalibrationProblem` that returns a positive weight or a `bayes.Adjustment`.
        params: values of the model's ``numpyro.param`` sites, which stay fixed.
        **kwargs: keyword arguments of the model.

    Raises:
        EnergyError: (a ValueError) for an unknown method; estimators that NUTS does not take; a weight or a scale at an
            energy; discrete latents and latent energies; parameters without values; a posterior without a mode; a weight
            that is not positive; and what the method refuses.
        TypeError: for a model that does not come from `estimate`, and something that is no method.

    Example:
        >>> found = calibrate(key, estimate(model, "sm"), x)  # doctest: +SKIP
        >>> mcmc = MCMC(NUTS(estimate(model, "sm", weight=found.weight)), num_warmup=500, num_samples=1000)  # doctest: +SKIP
        >>> mcmc.run(key, x); draws = found.adjust(mcmc.get_samples())  # doctest: +SKIP

    References:
        See the methods. Pauli, Racugno and Ventura, Bayesian composite marginal likelihoods (2011), and Ribatet, Cooley and
        Davison, Bayesian inference from composite likelihoods (2012), for the adjustments of composite likelihoods.
    """
    check_key("calibrate", rng_key)
    args, kwargs = as_arrays("calibrate", (args, kwargs))
    check_outside_jit("calibrate", rng_key, args, kwargs)
    key_init, key_method = jax.random.split(rng_key)
    loss = make_loss("calibrate", key_init, _checked(model), params, args, kwargs)
    problem = _near_mode(loss)
    method = CALIBRATIONS.resolve(method) if isinstance(method, str) or not callable(method) else method
    is_own = isinstance(method, AbstractCalibration)
    found = method.adjustment(key_method, problem) if is_own else method(key_method, problem)
    adjustment = found if isinstance(found, Adjustment) else Adjustment(found)
    name = method.name if is_own else getattr(method, "__name__", type(method).__name__)
    return _result(name, method.limits if is_own else None, problem, adjustment)


def _near_mode(loss: Loss) -> CalibrationProblem:
    """Return the problem at the mode under weight 1."""

    def climb(start):
        mode = find_mode(loss.log_density, start)
        hessian, prior_precision = loss.precision(mode)
        return mode, hessian, prior_precision, is_mode(loss.log_density, mode, hessian + prior_precision)

    mode, hessian, prior_precision, is_found = compiled(climb, loss.start)
    if not is_found:
        raise EnergyError(
            "The generalised posterior has no mode with curvature in all directions of the latents "
            f"{sorted(loss.posterior.position)}: some may not be identified, or the energy may have flat directions, like "
            "the weights of a network. Write priors that hold them."
        )
    return CalibrationProblem(loss, mode, hessian, prior_precision)


def _result(name: str, limits: str | None, problem: CalibrationProblem, adjustment: Adjustment) -> Calibration:
    weight = np.asarray(adjustment.weight, float)
    if weight.shape or not (np.isfinite(weight) and weight > 0):
        raise EnergyError(
            f"The method '{name}' gave the weight {adjustment.weight!r}, and a positive number is needed. The loss may have "
            "no curvature, or its score no variance."
        )
    loss = problem.loss
    mode = problem.mode if weight == 1 else problem.mode_under(float(weight))
    constrained = {site: value[0] for site, value in loss.constrain(mode[None]).items() if site in loss.posterior.position}
    skewness = loss.unflatten(compiled(lambda z, weight: _skewness(loss, z, weight), mode, float(weight)))
    notes = (*([] if limits is None else [limits]), *adjustment.notes, _note_on(skewness))
    return Calibration(
        name,
        float(weight),
        constrained,
        np.asarray(problem.hessian),
        np.asarray(problem.prior_precision),
        skewness,
        notes,
        adjustment,
        problem,
    )


def _skewness(loss: Loss, z: Flat, weight: Any) -> Flat:
    """Return the skewness of each marginal to first order: the third derivative along its regression line, at unit scale."""
    log_density = lambda z: loss.log_density(z, weight)  # noqa: E731
    covariance: Matrix = jnp.linalg.inv(-jax.hessian(log_density)(z))

    def third(direction):
        along = log_density
        for _ in range(3):
            along = lambda z, inner=along: jax.jvp(inner, (z,), (direction,))[1]  # noqa: E731
        return along(z)

    return jax.vmap(third)(covariance / jnp.sqrt(jnp.diag(covariance))[:, None])


def _note_on(skewness: Mapping[str, Array]) -> str:
    largest = {name: float(jnp.max(jnp.abs(value))) for name, value in skewness.items()}
    worst = max(largest, key=lambda name: largest[name])
    if not largest[worst] > SKEWED:
        return f"Marginals are close to symmetric: the largest skewness is {largest[worst]:.2f}, of '{worst}'."
    skewed = [name for name, value in largest.items() if value > SKEWED]
    return (
        f"The posterior of {skewed} is skewed (up to {largest[worst]:.2f}, of '{worst}', unconstrained): mode and curvature "
        "do not describe it, and calibration is known to fail there. Check with ExchangeKernel, or with other data."
    )


def _checked(model: object) -> estimate:
    estimated = estimated_in(model)
    if estimated is None:
        raise TypeError(f"calibrate needs the model as estimate returned it; got {type(model).__name__}.")
    if estimated.weight is not None:
        raise EnergyError(
            f"calibrate finds the weight, and the model has one already: {estimated.weight!r}. Write estimate(model, ...) "
            "without weight."
        )
    return estimated
