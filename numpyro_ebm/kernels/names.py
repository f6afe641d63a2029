"""Table of the kernels, and look-up of a kernel by name."""

from collections.abc import Mapping
from typing import Any

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.registry import Registry
from numpyro_ebm.kernels._base import AbstractKernel
from numpyro_ebm.kernels._moves import MOVES
from numpyro_ebm.kernels.by_site import BySite
from numpyro_ebm.kernels.tempering import ParallelTempering

KERNELS: Registry[AbstractKernel] = Registry(
    "kernel", AbstractKernel, {**MOVES.classes, ParallelTempering.name: ParallelTempering}
)


def available_kernels() -> tuple[str, ...]:
    """Return the names that ``kernel=`` accepts, sorted.

    Example:
        ``available_kernels()`` gives ``('adjusted_mclmc', 'barker', 'block_gibbs', 'dmala', 'dula', 'dynamic_hmc',
        'elliptical_slice', 'flips', 'ghmc', 'gibbs', 'gwg', 'hmc', 'langevin', 'mala', 'mclmc', 'nuts',
        'parallel_tempering', 'swendsen_wang')``.
    """
    return KERNELS.names()


def resolve_kernel(
    kernel: str | AbstractKernel | Mapping[str, Any] | None, *, is_discrete: bool | None = False, otherwise: str = ""
) -> AbstractKernel:
    """Return a kernel, given its name, itself or a kernel for each site, after a check of the kind of support.

    With ``is_discrete=None`` the support is not yet known. ``kernel=None`` gives the default for the support: "nuts" or
    "gibbs". The message for a kernel that does not fit the support ends with ``otherwise``.

    Raises:
        EnergyError: for an unknown name, or a kernel that cannot sample this support.
        TypeError: for anything that is neither a name nor a kernel.
    """
    usual = "gibbs" if is_discrete else "nuts"
    resolved = BySite(kernel) if isinstance(kernel, Mapping) else KERNELS.resolve(usual if kernel is None else kernel)
    if is_discrete is not None and resolved.is_discrete not in (is_discrete, None):
        kind = "discrete" if is_discrete else "continuous"
        fitting = [name for name, cls in KERNELS.classes.items() if cls.is_discrete is not (not is_discrete)]
        raise EnergyError(
            f"The kernel '{resolved.name}' cannot sample a {kind} support. Kernels that can: {', '.join(sorted(fitting))}."
            f"{otherwise}"
        )
    return resolved
