"""Kernels that follow Hamiltonian dynamics: HMC, DynamicHMC, GHMC and NUTS."""

import math
from typing import Any, ClassVar

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.mcmc.metrics import default_metric

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count, check_positive
from numpyro_ebm._core.records import record
from numpyro_ebm._core.typing import ChainLogDensityFn, Position, PRNGKey, PyTree
from numpyro_ebm.kernels._base import AbstractKernel, TransitionInfo, info, mass_matrix, not_finite, with_jit


class Trajectories(AbstractKernel):
    """Kernels that follow Hamiltonian dynamics by leapfrog steps, and accept or reject the end of a trajectory.

    0.65 is the acceptance at which HMC is most efficient in many dimensions (Beskos et al., Optimal tuning of the hybrid
    Monte Carlo algorithm, 2013).
    """

    target_acceptance: ClassVar[float | None] = 0.65
    adapts_mass_matrix: ClassVar[bool] = True
    statistics: ClassVar[tuple[str, ...]] = (*AbstractKernel.statistics, "energy")


@record("num_integration_steps", "jitter")
class HMC(Trajectories):
    """Hamiltonian Monte Carlo.

    On a Gaussian, trajectories of fixed length can resonate: near half a period, which a step size adapted to acceptance
    0.65 may well give, ``x`` moves to ``-x`` and the chain hardly explores the spread. So the number of leapfrog steps is
    drawn for each transition, uniformly from ``(1 - jitter) * num_integration_steps`` (rounded up, at least 1) to
    ``num_integration_steps``. It does not depend on the state, so the kernel stays exact.

    Args:
        step_size: leapfrog step, a length; a warm-up adapts it to acceptance 0.65.
        num_integration_steps: largest number of leapfrog steps per transition (one gradient evaluation each).
        inverse_mass_matrix: ``(d,)`` or ``(d, d)`` over the flattened position; None for the identity. A warm-up
            adapts the diagonal.
        jitter: fraction of ``num_integration_steps`` by which a trajectory may be shorter, from 0 (every trajectory has
            ``num_integration_steps`` steps, as in ``blackjax.hmc``) to 1 (one step or more).

    Raises:
        EnergyError: for a count below 1 or a jitter outside [0, 1].

    Example:
        ``sample(rng_key, distribution, HMC(step_size=0.2, num_integration_steps=8))``

    References:
        Neal, MCMC using Hamiltonian dynamics (2011), section 5.3.2 for the random length.
    """

    name: ClassVar[str] = "hmc"
    is_reversible: ClassVar[bool] = True
    step_size: Any = 0.1
    num_integration_steps: int = 10
    inverse_mass_matrix: Any = None
    jitter: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        check_count("HMC", "num_integration_steps", self.num_integration_steps)
        if not (is_concrete(self.jitter) and np.ndim(self.jitter) == 0 and 0 <= self.jitter <= 1):
            raise EnergyError(
                f"HMC needs 0 <= jitter <= 1; got {self.jitter!r}. Write jitter=0.5, or jitter=0.0 for trajectories that "
                "all have num_integration_steps steps."
            )

    def init(self, rng_key: PRNGKey, position: Position, log_density: ChainLogDensityFn) -> PyTree:
        """Evaluate the log density and its gradient at the position."""
        return blackjax.hmc.init(position, log_density)

    def step(self, rng_key: PRNGKey, state: PyTree, log_density: ChainLogDensityFn) -> tuple[PyTree, TransitionInfo]:
        """Make one trajectory, and accept or reject its end."""
        matrix = mass_matrix(self, state.position)
        algorithm = blackjax.hmc(log_density, self.step_size, matrix, self.draw_length(rng_key))
        state, details = algorithm.step(rng_key, state)
        return state, _trajectory_info(state, details)

    def draw_length(self, rng_key: PRNGKey) -> Any:
        """Return the number of leapfrog steps of the transition with this key."""
        most = self.num_integration_steps
        fewest = max(1, math.ceil((1 - self.jitter) * most))
        return most if fewest == most else jax.random.randint(jax.random.fold_in(rng_key, 1), (), fewest, most + 1)


@record("num_integration_steps")
class DynamicHMC(Trajectories):
    """HMC with a number of leapfrog steps that is drawn for each transition, uniformly from 1 to a maximum.

    BlackJAX's ``dynamic_hmc``; `HMC` with ``jitter=1.0`` has the same distribution of the number of steps. Chains that run
    together wait for the longest of their trajectories.

    Args:
        step_size: as in `HMC`.
        num_integration_steps: largest number of leapfrog steps; the mean is ``(num_integration_steps + 1) / 2``.
        inverse_mass_matrix: as in `HMC`.

    Example:
        ``sample(rng_key, distribution, "dynamic_hmc")``

    References:
        Neal, MCMC using Hamiltonian dynamics (2011), section 5.3.2; Bou-Rabee and Sanz-Serna, Randomized Hamiltonian
        Monte Carlo (2017).
    """

    name: ClassVar[str] = "dynamic_hmc"
    is_reversible: ClassVar[bool] = True
    step_size: Any = 0.1
    num_integration_steps: int = 10
    inverse_mass_matrix: Any = None

    def __post_init__(self):
        super().__post_init__()
        check_count("DynamicHMC", "num_integration_steps", self.num_integration_steps)

    def init(self, rng_key: PRNGKey, position: Position, log_density: ChainLogDensityFn) -> PyTree:
        """Evaluate the log density and its gradient; the key draws the numbers of steps."""
        return blackjax.dynamic_hmc.init(position, log_density, rng_key)

    def step(self, rng_key: PRNGKey, state: PyTree, log_density: ChainLogDensityFn) -> tuple[PyTree, TransitionInfo]:
        """Make one trajectory of random length, and accept or reject its end."""
        matrix = mass_matrix(self, state.position)
        algorithm = blackjax.dynamic_hmc(
            log_density, self.step_size, matrix, integration_steps_fn=uniform_steps(self.num_integration_steps)
        )
        state, details = algorithm.step(rng_key, state)
        return state, _trajectory_info(state, details)


@record()
class GHMC(Trajectories):
    r"""Generalized HMC: one leapfrog step per transition, with a momentum that persists across transitions.

    The momentum becomes ``sqrt(1 - alpha) * momentum + sqrt(alpha) * noise``; a rejection reverses it. The uniform number
    that decides on acceptance is not drawn but moves by ``delta`` (on a circle of length 2), so that rejections come in
    clusters and between them the chain moves in one direction for long. With one gradient per transition, the kernel suits
    many parallel chains and the negative phase. With ``alpha = 1`` it is MALA with step size ``step_size^2 / 2``.

    Args:
        step_size: leapfrog step, a length; a warm-up adapts it to acceptance 0.65.
        alpha: fraction of the momentum that is renewed, in (0, 1].
        delta: drift of the acceptance variable, in [0, 2).
        inverse_mass_matrix: as in `HMC`.

    Example:
        ``sample(rng_key, distribution, GHMC(alpha=0.1))``

    References:
        Horowitz, A generalized guided Monte Carlo algorithm (1991); Neal, Non-reversibly updating a uniform [0, 1] value
        for Metropolis accept/reject decisions (2020).
    """

    name: ClassVar[str] = "ghmc"
    step_size: Any = 0.1
    alpha: Any = 0.2
    delta: Any = 0.1
    inverse_mass_matrix: Any = None

    def __post_init__(self):
        super().__post_init__()
        check_positive("GHMC", "alpha", self.alpha)
        if is_concrete(self.alpha, self.delta) and not (self.alpha <= 1 and 0 <= self.delta < 2):
            raise EnergyError(
                f"GHMC needs 0 < alpha <= 1 and 0 <= delta < 2; got alpha={self.alpha!r}, delta={self.delta!r}. "
                "Write GHMC(alpha=0.2, delta=0.1)."
            )

    @with_jit
    def init(self, rng_key: PRNGKey, position: Position, log_density: ChainLogDensityFn) -> PyTree:
        """Evaluate the log density and its gradient, and draw a momentum from its distribution."""
        # BlackJAX draws the momentum with unit mass, whatever the mass matrix.
        momentum = default_metric(mass_matrix(self, position)).sample_momentum(rng_key, position)
        return blackjax.ghmc.init(position, log_density, jax.random.fold_in(rng_key, 1))._replace(momentum=momentum)

    @with_jit
    def step(self, rng_key: PRNGKey, state: PyTree, log_density: ChainLogDensityFn) -> tuple[PyTree, TransitionInfo]:
        """Renew part of the momentum, make one leapfrog step, and accept or reject it."""
        # BlackJAX reads a bare vector as the square root of an inverse mass; a metric is unambiguous.
        metric = default_metric(mass_matrix(self, state.position))
        algorithm = blackjax.ghmc(log_density, self.step_size, metric, self.alpha, self.delta)
        new: Any
        new, details = algorithm.step(rng_key, state)
        # After a rejection the variable has only drifted. BlackJAX makes it NaN if exp(-delta energy) overflows, and
        # would never accept again.
        drifted = (state.slice + 1 + self.delta) % 2 - 1
        new = new._replace(slice=jnp.where(jnp.isfinite(new.slice), new.slice, drifted))
        return new, _trajectory_info(new, details)


@record("max_num_doublings")
class NUTS(Trajectories):
    """The no-U-turn sampler: HMC that adapts the length of each trajectory.

    A trajectory ends where the log density is not finite, so ``is_nonfinite`` is determined at its two ends. If it is set,
    the transition is also divergent, and the draw is a point before that end.

    Args:
        step_size: leapfrog step, a length; a warm-up adapts it to acceptance 0.8.
        max_num_doublings: the longest trajectory has ``2 ** max_num_doublings`` steps.
        inverse_mass_matrix: as in `HMC`.

    Example:
        ``sample(rng_key, distribution, NUTS(max_num_doublings=6))``

    References:
        Hoffman and Gelman, The no-U-turn sampler (2014).
    """

    name: ClassVar[str] = "nuts"
    is_reversible: ClassVar[bool] = True
    target_acceptance: ClassVar[float | None] = 0.8
    statistics: ClassVar[tuple[str, ...]] = (*Trajectories.statistics, "tree_depth")
    step_size: Any = 0.1
    max_num_doublings: int = 10
    inverse_mass_matrix: Any = None

    def __post_init__(self):
        super().__post_init__()
        check_count("NUTS", "max_num_doublings", self.max_num_doublings)

    def init(self, rng_key: PRNGKey, position: Position, log_density: ChainLogDensityFn) -> PyTree:
        """Evaluate the log density and its gradient at the position."""
        return blackjax.nuts.init(position, log_density)

    def step(self, rng_key: PRNGKey, state: PyTree, log_density: ChainLogDensityFn) -> tuple[PyTree, TransitionInfo]:
        """Make one trajectory, and draw one of its points by weight."""
        matrix = mass_matrix(self, state.position)
        algorithm = blackjax.nuts(log_density, self.step_size, matrix, max_num_doublings=self.max_num_doublings)
        new: Any
        details: Any
        new, details = algorithm.step(rng_key, state)
        ends = (details.trajectory_leftmost_state, details.trajectory_rightmost_state)
        return new, info(
            details.acceptance_rate,
            details.is_divergent,
            details.num_integration_steps,
            details.energy,
            details.num_trajectory_expansions,
            not_finite(new.logdensity, *((end.logdensity, end.logdensity_grad) for end in ends)),
        )


def uniform_steps(maximum: int) -> Any:
    """Return BlackJAX's function for the number of integration steps: uniform on 1 to ``maximum``."""
    return lambda rng_key: jax.random.randint(rng_key, (), 1, maximum + 1)


def _trajectory_info(state: PyTree, details: PyTree) -> TransitionInfo:
    """Return the record of one trajectory, from the new state and BlackJAX's ``HMCInfo``."""
    end = details.proposal
    return info(
        details.acceptance_rate,
        details.is_divergent,
        details.num_integration_steps,
        details.energy,
        is_nonfinite=not_finite(details.energy, end.logdensity, end.logdensity_grad, state.logdensity),
    )
