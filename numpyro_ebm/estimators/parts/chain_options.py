"""Checks of the step size and scale options of a negative phase against its kernel."""

from collections.abc import Callable
from typing import Any, Literal, get_args

from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.options import check_positive
from numpyro_ebm.kernels import AbstractKernel

Scale = Literal["auto", "data"]


def check_scale_option(owner: str, kernel: AbstractKernel, scale: Any) -> None:
    """Check that scales are known, positive, and given for a kernel with a step size.

    Raises:
        EnergyError: with what to write.
    """
    if isinstance(scale, str):
        if scale not in get_args(Scale):
            raise EnergyError(f"Unknown scale='{scale}'. {nearest(scale, get_args(Scale))} Or write numbers, or None.")
    else:
        check_positive(owner, "scale", scale)
    is_scaled = not isinstance(scale, str) or scale == "data"
    if (kernel.step_size is None or kernel.is_discrete) and scale is not None and is_scaled:
        raise EnergyError(
            f"The kernel '{kernel.name}' has no step size that scale={scale!r} could apply to. Leave scale out."
        )


def check_step_size(
    owner: str, kernel: AbstractKernel, *, adapt_step_size: bool | None, schedule: Callable[..., Any] | None
) -> None:
    """Check that the step size adapts or has a schedule, not both, and that the kernel can adapt it.

    Raises:
        EnergyError: with what to write.
    """
    if schedule is not None and (adapt_step_size or not callable(schedule)):
        raise EnergyError(
            f"{owner} takes a step_size_schedule (a function of the number of updates) instead of adaptation. Write "
            "step_size_schedule=optax.exponential_decay(0.1, 1000, 0.5) without adapt_step_size=True."
        )
    if adapt_step_size and kernel.target_acceptance is None:
        raise EnergyError(
            f"The kernel '{kernel.name}' never rejects, so its step size cannot adapt to an acceptance. Write "
            "adapt_step_size=False, a step_size_schedule, or a kernel such as 'mala'."
        )


def check_by_member(kernel: Any, *, adapt_step_size: bool | None, schedule: Callable[..., Any] | None, scale: Any) -> None:
    """Check the options of kernels by member of a mixed event: one step size at most follows the updates, without scales.

    Raises:
        EnergyError: with what to write.
    """
    stepped = [own for own in kernel.kernels if own.step_size is not None]
    if len(stepped) > 1 and (adapt_step_size is not False or schedule is not None):
        raise EnergyError(
            f"An estimator follows one step size, and the kernels {[own.name for own in stepped]} have one each. Write one "
            "kernel for all continuous members, kernel={'x': 'mala', 'y': 'mala', 's': 'gibbs'}, or adapt_step_size=False "
            "for fixed step sizes."
        )
    if not stepped and schedule is not None:
        raise EnergyError("No kernel of a member has a step size that step_size_schedule could apply to. Leave it out.")
    if scale is not None and scale != "auto":
        raise EnergyError(
            f"The discrete members of a mixed event have no scale; got scale={scale!r}. Leave scale out, and standardise "
            "the continuous members, or write a kernel with an inverse_mass_matrix for them, such as 'hmc'."
        )
