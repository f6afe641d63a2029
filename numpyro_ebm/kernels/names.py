"""Table of the kernels, and look-up of a kernel by name."""

from collections.abc import Mapping
from typing import Any, cast

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.members import Members
from numpyro_ebm._core.registry import Registry
from numpyro_ebm.kernels._base import AbstractKernel
from numpyro_ebm.kernels._moves import MOVES
from numpyro_ebm.kernels.by_site import BySite, usual_kernels
from numpyro_ebm.kernels.tempering import ParallelTempering

KERNELS: Registry[AbstractKernel] = Registry(
    "kernel", AbstractKernel, {**MOVES.classes, ParallelTempering.name: ParallelTempering}
)


def available_kernels() -> tuple[str, ...]:
    """Return the names that ``kernel=`` accepts, sorted.

    Example:
        ``available_kernels()`` gives ``('adjusted_mclmc', 'barker', 'block_gibbs', 'dmala', 'dula', 'dynamic_hmc',
        'elliptical_slice', 'flips', 'ghmc', 'gibbs', 'gwg', 'hmc', 'langevin', 'lattice_walk', 'mala', 'mclmc', 'nuts',
        'parallel_tempering', 'swendsen_wang')``.
    """
    return KERNELS.names()


def resolve_kernel(
    kernel: str | AbstractKernel | Mapping[str, Any] | None,
    *,
    is_discrete: bool | None = False,
    is_endless: bool = False,
    otherwise: str = "",
) -> AbstractKernel:
    """Return a kernel, given its name, itself or a kernel for each site, after a check of the kind of support.

    With ``is_discrete=None`` the support is not yet known. ``kernel=None`` gives the default for the support: "nuts",
    "gibbs", or "lattice_walk" with ``is_endless``, for integers without a largest value. The message for a kernel that does
    not fit the support ends with ``otherwise``.

    Raises:
        EnergyError: for an unknown name, or a kernel that cannot sample this support.
        TypeError: for anything that is neither a name nor a kernel.
    """
    usual = ("lattice_walk" if is_endless else "gibbs") if is_discrete else "nuts"
    resolved = BySite(kernel) if isinstance(kernel, Mapping) else KERNELS.resolve(usual if kernel is None else kernel)
    if is_discrete is not None and resolved.is_discrete not in (is_discrete, None):
        kind = "discrete" if is_discrete else "continuous"
        fitting = [name for name, cls in KERNELS.classes.items() if cls.is_discrete is not (not is_discrete)]
        if resolved.name in fitting:  # a kernel over another one, which does not fit
            inner = cast(Any, resolved).kernel.name
            raise EnergyError(
                f"The kernel '{resolved.name}' moves chains by '{inner}', which cannot sample a {kind} support. "
                f"Write kernel=numpyro_ebm.{type(resolved).__name__}('{usual}')."
            )
        raise EnergyError(
            f"The kernel '{resolved.name}' cannot sample a {kind} support. Kernels that can: {', '.join(sorted(fitting))}."
            f"{otherwise}"
        )
    return resolved


def kernel_of(
    kernel: str | AbstractKernel | Mapping[str, Any] | None,
    distribution: Any,
    *,
    usual: str = "nuts",
    otherwise: str = "",
) -> AbstractKernel:
    """Return the kernel for a distribution, after a check of its kind of support.

    Args:
        kernel: a name, a kernel, or one for each member of a mixed event; None for the default of the support: ``usual``,
            "gibbs" where it is discrete, "lattice_walk" for integers without a largest value, and for a mixed event each of
            them on its members.
        distribution: the distribution to sample.
        usual: the name for continuous supports.
        otherwise: the end of the message for a kernel that does not fit the support.

    Raises:
        EnergyError: for an unknown name, a kernel that cannot sample this support, and one kernel for a mixed event.
        TypeError: for anything that is neither a name nor a kernel.
    """
    members: Members | None = distribution.members
    if members is None:
        kernel = usual if kernel is None and not distribution.is_discrete else kernel
        ends = {"is_discrete": distribution.is_discrete, "is_endless": not distribution.lists_values}
        return resolve_kernel(kernel, **ends, otherwise=otherwise)
    by_member = usual_kernels(members.kinds, usual, members.endless)
    resolved = resolve_kernel(by_member if kernel is None else kernel, is_discrete=None)
    if not isinstance(resolved, BySite):
        raise EnergyError(
            f"The event has the discrete members {members.discrete}, and the kernel '{resolved.name}' cannot move all its "
            f"members. Name a kernel for each of them: kernel={by_member}."
        )
    return resolved
