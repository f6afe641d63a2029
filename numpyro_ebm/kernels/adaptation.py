"""Warm-up of one chain, one step at a time, built from BlackJAX's components.

``blackjax.window_adaptation`` only runs as a whole and supports neither MALA nor a progress bar, so its schedule,
dual averaging and mass matrix adaptation are combined here. A test checks that the results are equal.
"""

import math
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from blackjax.adaptation.mass_matrix import mass_matrix_adaptation
from blackjax.adaptation.step_size import DualAveragingAdaptationState, dual_averaging_adaptation
from blackjax.adaptation.window_adaptation import build_schedule
from blackjax.util import pytree_size
from jaxtyping import Float, Int

from numpyro_ebm._core.typing import Array, Position, Scalar

FAST = 0
"""BlackJAX's number for a stage that adapts the step size only."""
SHORTEST, LONGEST = 1e-18, 1e18
"""Bounds of an adapted step size, which drifts if all proposals are accepted or none. Their squares are finite and not 0."""


@runtime_checkable
class Adaptable(Protocol):
    """What a warm-up adapts: a kernel, or the proposal of a kernel over parameters.

    Attributes:
        target_acceptance: acceptance rate to which the step size adapts; None for a step size that does not.
        adapts_mass_matrix: whether the mass matrix adapts.
    """

    target_acceptance: ClassVar[float | None]
    adapts_mass_matrix: ClassVar[bool]

    @property
    def parts(self) -> tuple[Any, ...]:
        """Kernels of which it consists, if there are several."""
        ...

    def adapted(self, **settings: Any) -> Any:
        """Return the same with adapted settings."""
        ...

    def lower(self, position: Any) -> Any:
        """Return the position whose covariance gives the mass matrix."""
        ...


@runtime_checkable
class Accepted(Protocol):
    """What a warm-up learns from a transition."""

    @property
    def acceptance_rate(self) -> Any:
        """Acceptance probability of the transition."""
        ...


class WarmupState(NamedTuple):
    """Dual averaging, mass matrix (each None if it does not adapt) and the kernel as adapted so far.

    For a kernel that consists of several, ``averaging`` holds the warm-up state of each.
    """

    averaging: Any
    metric: Any
    kernel: Any


def schedule(kernel: Adaptable, num_warmup: int) -> Int[np.ndarray, "{num_warmup} 2"]:
    """Return Stan's windows as ``(num_warmup, 2)`` integers: the stage (fast, slow) and whether a slow window ends.

    They are NumPy's, which no transformation traces, so that a kernel can keep them from one run to the next.
    """
    if num_warmup == 0 or not kernel.adapts_mass_matrix:
        return np.zeros((num_warmup, 2), np.int32)
    with jax.ensure_compile_time_eval():  # BlackJAX's are JAX's
        return np.asarray(build_schedule(num_warmup), np.int32)


def start(kernel: Any, position: Position) -> WarmupState:
    """Return the initial state of a warm-up, with the kernel's settings; ``position`` is what the kernel moves."""
    if kernel.parts:
        return _joined(kernel, [start(*pair) for pair in zip(kernel.parts, kernel.split(position), strict=True)])
    position = kernel.lower(position)
    dtype = jnp.result_type(*jax.tree.leaves(position))
    # The settings of a kernel on integers are numbers of their own types.
    own = dtype if jnp.issubdtype(dtype, jnp.floating) else None
    kernel = jax.tree.map(lambda setting: jnp.asarray(setting, own), kernel)
    if kernel.target_acceptance is None:
        return WarmupState(None, None, kernel)
    averaging = dual_averaging_adaptation(kernel.target_acceptance)[0](kernel.step_size)
    if not kernel.adapts_mass_matrix:
        return WarmupState(averaging, None, kernel)
    metric = _metric(kernel)[0](pytree_size(position), _initial_matrix(kernel))
    matrix = metric.inverse_mass_matrix
    return WarmupState(averaging, metric, kernel.adapted(inverse_mass_matrix=matrix))


def update(warmup: WarmupState, stage: Int[Array, "2"], position: Position, info: Accepted) -> WarmupState:
    """Update the warm-up with one transition; ``stage`` is a row of `schedule`."""
    if warmup.kernel.parts:
        whole: Any = info  # of several transitions
        each = zip(warmup.averaging, warmup.kernel.split(position), whole.parts, strict=True)
        return _joined(warmup.kernel, [update(own, stage, part, record) for own, part, record in each])
    if warmup.averaging is None:
        return warmup
    averaging = averaged(warmup.averaging, warmup.kernel, info.acceptance_rate)
    kernel = warmup.kernel.adapted(step_size=jnp.exp(averaging.log_step_size))
    if warmup.metric is None:
        return WarmupState(averaging, None, kernel)
    _, mm_update, mm_final = _metric(kernel)
    position = kernel.lower(position)
    metric = jax.lax.cond(stage[0] == FAST, lambda m: m, lambda m: mm_update(m, position), warmup.metric)

    def close_window(_):
        da_init, _, da_final = dual_averaging_adaptation(kernel.target_acceptance)
        closed, restarted = mm_final(metric), da_init(da_final(averaging))
        return restarted, closed, jnp.exp(restarted.log_step_size)

    averaging, metric, step_size = jax.lax.cond(
        stage[1] == 1, close_window, lambda _: (averaging, metric, kernel.step_size), None
    )
    matrix = metric.inverse_mass_matrix
    kernel = kernel.adapted(step_size=step_size, inverse_mass_matrix=matrix)
    return WarmupState(averaging, metric, kernel)


def averaged(averaging: DualAveragingAdaptationState, kernel: Any, acceptance_rate: Scalar) -> DualAveragingAdaptationState:
    """Make one step of dual averaging towards the kernel's target acceptance, within the bounds of a step size."""
    new = dual_averaging_adaptation(kernel.target_acceptance)[1](averaging, acceptance_rate)
    # The average over the steps, which starts at 0, then lies within the bounds too.
    return new._replace(log_step_size=jnp.clip(new.log_step_size, math.log(SHORTEST), math.log(LONGEST)))


def update_at(
    stages: Int[np.ndarray, "num_warmup 2"], i: Int[Array, ""], warmup: WarmupState, position: Position, info: Accepted
) -> WarmupState:
    """Apply `update` at transition ``i`` of the warm-up and finish at the last one; later transitions change nothing."""
    num_warmup = len(stages)

    def adapt(warmup):
        updated = update(warmup, jnp.asarray(stages)[i], position, info)
        finished = updated._replace(kernel=finish(updated))
        return jax.tree.map(lambda a, b: jnp.where(i + 1 == num_warmup, a, b), finished, updated)

    return jax.lax.cond(i < num_warmup, adapt, lambda warmup: warmup, warmup)


def finish(warmup: WarmupState) -> Any:
    """Return the adapted kernel, with the averaged step size and the last mass matrix."""
    if warmup.kernel.parts:
        return warmup.kernel.joined(tuple(finish(own) for own in warmup.averaging))
    if warmup.averaging is None:
        return warmup.kernel
    step_size = dual_averaging_adaptation(0.0)[2](warmup.averaging)
    return warmup.kernel.adapted(step_size=step_size)


def _joined(kernel: Any, parts: list[WarmupState]) -> WarmupState:
    """Return the warm-up state of a kernel that consists of several."""
    return WarmupState(tuple(parts), None, kernel.joined(tuple(own.kernel for own in parts)))


def _initial_matrix(kernel: Any) -> Float[Array, " d"] | Float[Array, "d d"] | None:
    return None if kernel.inverse_mass_matrix is None else jnp.asarray(kernel.inverse_mass_matrix)


def _metric(kernel: Any):
    matrix = kernel.inverse_mass_matrix
    return mass_matrix_adaptation(is_diagonal_matrix=matrix is None or jnp.ndim(matrix) == 1)
