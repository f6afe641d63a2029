"""Step size of a negative phase: dual averaging on the mean acceptance of its chains, one step per update."""

from typing import Any

import jax.numpy as jnp
from blackjax.adaptation.step_size import DualAveragingAdaptationState, dual_averaging_adaptation

from numpyro_ebm._core.typing import Scalar
from numpyro_ebm.kernels._base import AbstractKernel
from numpyro_ebm.kernels.adaptation import averaged
from numpyro_ebm.kernels.chains import Pace


def mean_step(kernel: AbstractKernel, pace: Pace) -> Scalar:
    """Return the geometric mean of the chains' step sizes."""
    return kernel.step_size * jnp.exp(2 * kernel.step_exponent * jnp.mean(pace.log_factor))


def averaging_of(kernel: AbstractKernel) -> Any:
    """Return dual averaging that starts at the kernel's step size and shrinks towards it."""
    step_size = jnp.asarray(kernel.step_size, float)
    # BlackJAX shrinks towards ten times the initial step size, which suits warm-ups that start with a small one.
    return dual_averaging_adaptation(0.0)[0](step_size / 10)._replace(log_step_size=jnp.log(step_size))


def next_averaging(
    averaging: DualAveragingAdaptationState, kernel: AbstractKernel, acceptance_rate: Scalar
) -> DualAveragingAdaptationState:
    """Make one step of dual averaging towards the kernel's target acceptance."""
    acceptance_rate = jnp.nan_to_num(acceptance_rate)
    return averaged(averaging, kernel, acceptance_rate)
