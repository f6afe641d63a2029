"""The table of kernels, and a kernel from its name."""

from typing import Any

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.registry import Registry
from numpyro_ebm.kernels._base import AbstractKernel
from numpyro_ebm.kernels._moves import MOVES
from numpyro_ebm.kernels.tempering import ParallelTempering

KERNELS: Registry[AbstractKernel] = Registry(
    "kernel", AbstractKernel, {**MOVES.classes, ParallelTempering.name: ParallelTempering}
)


def available_kernels() -> tuple[str, ...]:
    """The names that ``kernel=`` takes, sorted.

    Example:
        ``available_kernels()`` gives ``('adjusted_mclmc', 'barker', 'dynamic_hmc', 'elliptical_slice', 'ghmc', 'gibbs',
        'hmc', 'langevin', 'mala', 'mclmc', 'nuts', 'parallel_tempering')``.
    """
    return KERNELS.names()


def resolve_kernel(kernel: Any, *, is_discrete: bool | None = False, otherwise: str = "") -> AbstractKernel:
    """A kernel from its name or itself, checked against the kind of support it has to move on (None: not known yet).

    None is the usual kernel of that kind: "nuts", or "gibbs". The message of a kernel of the other ends in ``otherwise``.

    Raises:
        EnergyError: for an unknown name, or for a kernel that cannot move on this support.
        TypeError: for something that is neither a name nor a kernel.
    """
    usual = "gibbs" if is_discrete else "nuts"
    resolved = KERNELS.resolve(usual if kernel is None else kernel)
    if is_discrete is not None and resolved.is_discrete != is_discrete:
        kind = "discrete" if is_discrete else "continuous"
        fitting = [name for name, cls in KERNELS.classes.items() if cls.is_discrete != (not is_discrete)]
        raise EnergyError(
            f"The kernel '{resolved.name}' cannot sample a {kind} support. Kernels that can: {', '.join(sorted(fitting))}."
            f"{otherwise}"
        )
    return resolved
