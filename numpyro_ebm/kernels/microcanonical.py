"""Kernels with dynamics of constant speed: MCLMC and AdjustedMCLMC."""

from typing import Any, ClassVar

import blackjax
import jax.numpy as jnp
from blackjax.util import pytree_size

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count, check_positive
from numpyro_ebm._core.records import record
from numpyro_ebm._core.typing import ChainLogDensityFn, Position, PRNGKey, PyTree
from numpyro_ebm.kernels._base import AbstractKernel, TransitionInfo, info, mass_matrix, not_finite
from numpyro_ebm.kernels.hamiltonian import uniform_steps

GRADIENTS_PER_STEP = 2
"""Gradient evaluations per step of McLachlan's integrator, which BlackJAX uses for these kernels."""


@record()
class MCLMC(AbstractKernel):
    r"""Unadjusted microcanonical Langevin Monte Carlo: a particle moves at speed 1, and the gradient only steers it.

    The gradient turns the direction of motion and noise perturbs it, so that the positions of the exact dynamics follow
    ``exp(log_density)``. Nothing is rejected: **the draws have a bias from the step size**, which falls fast with it, and
    no warm-up adapts the step size. It is among the cheapest kernels for large smooth targets; `AdjustedMCLMC` is exact. A
    move to a point where the log density is not finite is undone.

    Args:
        step_size: length of a step (positive). A quarter of ``sqrt(d)`` times the scale of the target is a first choice.
        L: path length over which the direction decorrelates (positive); None for ``sqrt(d)``.
        inverse_mass_matrix: ``(d,)`` over the flattened position, variances; None for ones.

    Raises:
        EnergyError: for a position of one coordinate (its direction cannot turn), at the start of a chain.

    Example:
        ``sample(rng_key, distribution, MCLMC(step_size=0.5), num_warmup=0)``

    References:
        Robnik, De Luca, Silverstein and Seljak, Microcanonical Hamiltonian Monte Carlo (2023); Robnik and Seljak,
        Fluctuation without dissipation: microcanonical Langevin Monte Carlo (2024).
    """

    name: ClassVar[str] = "mclmc"
    is_exact: ClassVar[bool] = False
    takes_dense_matrix: ClassVar[bool] = False
    statistics: ClassVar[tuple[str, ...]] = ("is_divergent", "num_gradients", "is_nonfinite")
    step_size: Any = 0.1
    L: Any = None
    inverse_mass_matrix: Any = None

    def __post_init__(self):
        super().__post_init__()
        check_positive("MCLMC", "L", self.L)

    def init(self, rng_key: PRNGKey, position: Position, log_density: ChainLogDensityFn) -> PyTree:
        """Evaluate the log density and its gradient, and draw a direction."""
        check_dimension(self, position)
        return blackjax.mclmc.init(position, log_density, rng_key)

    def step(self, rng_key: PRNGKey, state: PyTree, log_density: ChainLogDensityFn) -> tuple[PyTree, TransitionInfo]:
        """Make one step of the dynamics."""
        matrix = mass_matrix(self, state.position)
        length = jnp.sqrt(pytree_size(state.position)) if self.L is None else self.L
        details: Any
        algorithm = blackjax.mclmc(log_density, length, self.step_size, inverse_mass_matrix=matrix)
        state, details = algorithm.step(rng_key, state)
        return state, info(1.0, ~details.nonans, GRADIENTS_PER_STEP, is_nonfinite=~details.nonans)


@record("num_integration_steps")
class AdjustedMCLMC(AbstractKernel):
    """Microcanonical HMC: a trajectory of `MCLMC` without noise, from a new direction, with an exact accept-reject step.

    As in `DynamicHMC`, the number of steps is drawn for each transition, uniformly from 1 to a maximum (BlackJAX's
    ``adjusted_mclmc_dynamic``).

    Args:
        step_size: length of a step; a warm-up adapts it to acceptance 0.65, for which BlackJAX's tuning is calibrated.
        num_integration_steps: largest number of steps, of two gradients each. The default 3 gives the mean of 2 that
            BlackJAX's tuning recommends.
        inverse_mass_matrix: ``(d,)`` over the flattened position, variances; None for ones. A warm-up adapts it.

    Raises:
        EnergyError: for a position of one coordinate (its direction cannot turn), at the start of a chain.

    Example:
        ``sample(rng_key, distribution, "adjusted_mclmc")``

    References:
        Robnik, Cohn-Gordon and Seljak, Metropolis adjusted microcanonical Hamiltonian Monte Carlo (2025).
    """

    name: ClassVar[str] = "adjusted_mclmc"
    target_acceptance: ClassVar[float | None] = 0.65
    adapts_mass_matrix: ClassVar[bool] = True
    takes_dense_matrix: ClassVar[bool] = False
    step_size: Any = 0.1
    num_integration_steps: int = 3
    inverse_mass_matrix: Any = None

    def __post_init__(self):
        super().__post_init__()
        check_count("AdjustedMCLMC", "num_integration_steps", self.num_integration_steps)

    def init(self, rng_key: PRNGKey, position: Position, log_density: ChainLogDensityFn) -> PyTree:
        """Evaluate the log density and its gradient; the key draws the numbers of steps."""
        check_dimension(self, position)
        return blackjax.adjusted_mclmc_dynamic.init(position, log_density, rng_key)

    def step(self, rng_key: PRNGKey, state: PyTree, log_density: ChainLogDensityFn) -> tuple[PyTree, TransitionInfo]:
        """Make one trajectory of random length, and accept or reject its end."""
        algorithm = blackjax.adjusted_mclmc_dynamic(
            log_density,
            self.step_size,
            inverse_mass_matrix=mass_matrix(self, state.position),
            integration_steps_fn=uniform_steps(self.num_integration_steps),
        )
        new: Any
        details: Any
        new, details = algorithm.step(rng_key, state)
        return new, info(
            details.acceptance_rate,
            details.is_divergent,
            GRADIENTS_PER_STEP * details.num_integration_steps,
            is_nonfinite=not_finite(details.proposal, new.logdensity),
        )


def check_dimension(kernel: AbstractKernel, position: Position) -> None:
    """Check that a position has at least two coordinates.

    Raises:
        EnergyError: with kernels that work in one dimension.
    """
    if pytree_size(position) < 2:
        raise EnergyError(
            f"{type(kernel).__name__} needs a position of two coordinates or more, since it moves by turning; got one. "
            "Write kernel='nuts' or kernel='mala'."
        )
