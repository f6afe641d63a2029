"""Refuse inference that uses the value of a surrogate for more than it means, and warn where its scale is arbitrary."""

from collections.abc import Iterable, Mapping
from typing import Any

from numpyro_ebm._core import numpyro_stack
from numpyro_ebm._core.errors import EnergyError, warn_uncalibrated
from numpyro_ebm.distributions.rows import Plate, Unwrapped
from numpyro_ebm.estimators import AbstractEstimator
from numpyro_ebm.estimators.names import ESTIMATORS
from numpyro_ebm.estimators.parts.noise import NoiseEstimator


def check_not_latent(name: str, user: str) -> None:
    """Refuse a latent energy under NUTS or HMC.

    Raises:
        EnergyError: with what to write.
    """
    if user == numpyro_stack.SAMPLER:
        raise EnergyError(
            f"The energy site '{name}' is latent, and NUTS or HMC would target its estimator's surrogate, whose value "
            "is not its log density. Sample it from the model without estimate, with fixed parameters: "
            "BlackJAXKernel(model, params=params)."
        )


OTHER_KERNELS = (
    " For the posterior itself write MCMC(ExchangeKernel(model), ...) with the model without estimate, or "
    "numpyro_ebm.bayes.NoisyLangevinKernel(model), which takes Langevin steps along gradients of 'cd' or 'pcd'."
)


def check_value_means_something(estimator: AbstractEstimator, unwrapped: Unwrapped, user: str, *, is_weighted: bool) -> None:
    """Refuse inference that uses a meaningless surrogate value or Hessian; warn if a posterior's width is arbitrary.

    Args:
        estimator: the site's estimator.
        unwrapped: the site.
        user: what uses the value.
        is_weighted: whether a weight was given, which says what the scale of the loss is to be.

    Raises:
        EnergyError: with what to write.
    """
    why = None
    if estimator.role == "gradient":
        why = "only its gradient is meaningful, its value is not a log density"
    elif user not in numpyro_stack.LINEAR_IN_VALUE and estimator.draws_noise(unwrapped.distribution):
        why = (
            "it weights draws by the exponential of a noisy value"
            if user == "RenyiELBO"
            else "its noise is frozen there, so the target would depend on one draw of it"
        )
    if why is not None:
        # If the options decide, the class attribute is a property, which is true: some options have no noise.
        usable = [n for n, c in ESTIMATORS.classes.items() if c.is_deterministic and c.role == "objective"]
        raise EnergyError(
            f"The estimator '{estimator.name}' cannot be the target of {user}: {why}. Use SVI with AutoDelta or "
            f"AutoNormal and Trace_ELBO, or one of {usable} for a generalised posterior.{_own_way(estimator)}"
            f"{OTHER_KERNELS if user == numpyro_stack.SAMPLER else ''}"
        )
    if is_weighted or estimator.is_likelihood:
        return
    if user == numpyro_stack.SAMPLER or user in numpyro_stack.POSTERIOR_GUIDES:
        warn_uncalibrated(estimator.name, user)


def _own_way(estimator: AbstractEstimator) -> str:
    """Return how the estimator itself can be the target, if its options decide."""
    can_be_fixed = isinstance(estimator, NoiseEstimator) and estimator.role == "objective"
    return f" '{estimator.name}' is one of them with noise_seed=0." if can_be_fixed else ""


def check_not_subsampled(frames: Iterable[Any], plates: Mapping[str, Plate]) -> None:
    """Refuse a subsampled plate under NUTS or HMC.

    Raises:
        EnergyError: naming the plates.
    """
    subsampled = {name for name, plate in plates.items() if len(plate.indices) != plate.size}
    among = {frame.name for frame in frames} & subsampled
    if among:
        raise EnergyError(
            f"The plate {sorted(among)} subsamples, and NUTS or HMC would use one frozen subset of the data. Write the "
            "plate without subsample_size for MCMC, or use SVI."
        )
