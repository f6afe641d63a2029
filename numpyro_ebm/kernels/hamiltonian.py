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
from numpyro_ebm._core.typing import PRNGKey
from numpyro_ebm.kernels._base import AbstractKernel, TransitionInfo, info, kernel_class, mass_matrix, not_finite, with_jit

STATISTICS = (*AbstractKernel.statistics, "energy")


@kernel_class("num_integration_steps", "jitter")
class HMC(AbstractKernel):
    """Hamiltonian Monte Carlo.

    On a Gaussian a trajectory of fixed length can resonate: near half a period, where the step adapted to acceptance 0.65
    may well land, ``x`` goes to ``-x`` and the spread is hardly explored. So the number of leapfrog steps is drawn anew for
    each transition, uniformly from ``(1 - jitter) * num_integration_steps`` (rounded up, at least 1) to
    ``num_integration_steps``. It does not depend on the state, so the law stays exact.

    Args:
        step_size: leapfrog step, a length; a warm-up adapts it to acceptance 0.65.
        num_integration_steps: the largest number of leapfrog steps per transition (one gradient evaluation each).
        inverse_mass_matrix: ``(d,)`` or ``(d, d)`` over the flattened position; None for the identity. A warm-up
            adapts the diagonal.
        jitter: the share of ``num_integration_steps`` by which a trajectory may be shorter, from 0 (every trajectory has
            ``num_integration_steps`` steps, as in ``blackjax.hmc``) to 1 (from one step on).

    Raises:
        EnergyError: for a count below 1 and a jitter outside [0, 1].

    Example:
        ``sample(rng_key, distribution, HMC(step_size=0.2, num_integration_steps=8))``

    References:
        Neal, MCMC using Hamiltonian dynamics (2011), section 5.3.2 for the random length.
    """

    name: ClassVar[str] = "hmc"
    target_acceptance: ClassVar[float | None] = 0.65
    adapts_mass_matrix: ClassVar[bool] = True
    statistics: ClassVar[tuple[str, ...]] = STATISTICS
    step_size: Any = 0.1
    num_integration_steps: int = 10
    inverse_mass_matrix: Any = None
    jitter: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        check_count("HMC", "num_integration_steps", self.num_integration_steps)
        if not (is_concrete(self.jitter) and np.ndim(self.jitter) == 0 and 0 <= self.jitter <= 1):
            raise EnergyError(
                f"HMC needs 0 <= jitter <= 1; got {self.jitter!r}. Write jitter=0.5, or jitter=0.0 for trajectories of "
                "num_integration_steps steps each."
            )

    def init(self, rng_key, position, log_density):
        """Score the position."""
        return blackjax.hmc.init(position, log_density)

    def step(self, rng_key, state, log_density):
        """One trajectory, accepted or rejected."""
        matrix = mass_matrix(self, state.position)
        algorithm = blackjax.hmc(log_density, self.step_size, matrix, self.draw_length(rng_key))
        state, details = algorithm.step(rng_key, state)
        return state, _trajectory_info(state, details)

    def draw_length(self, rng_key: PRNGKey) -> Any:
        """The number of leapfrog steps of the transition that this key makes."""
        most = self.num_integration_steps
        fewest = max(1, math.ceil((1 - self.jitter) * most))
        return most if fewest == most else jax.random.randint(jax.random.fold_in(rng_key, 1), (), fewest, most + 1)


@kernel_class("num_integration_steps")
class DynamicHMC(AbstractKernel):
    """HMC whose number of leapfrog steps is drawn anew for each transition, uniformly from 1 to a maximum.

    BlackJAX's ``dynamic_hmc``; `HMC` with ``jitter=1.0`` has the same law. Chains that run together wait for the longest of
    their trajectories.

    Args:
        step_size: as in `HMC`.
        num_integration_steps: the largest number of leapfrog steps; the mean is ``(num_integration_steps + 1) / 2``.
        inverse_mass_matrix: as in `HMC`.

    Example:
        ``sample(rng_key, distribution, "dynamic_hmc")``

    References:
        Neal, MCMC using Hamiltonian dynamics (2011), section 5.3.2; Bou-Rabee and Sanz-Serna, Randomized Hamiltonian
        Monte Carlo (2017).
    """

    name: ClassVar[str] = "dynamic_hmc"
    target_acceptance: ClassVar[float | None] = 0.65
    adapts_mass_matrix: ClassVar[bool] = True
    statistics: ClassVar[tuple[str, ...]] = STATISTICS
    step_size: Any = 0.1
    num_integration_steps: int = 10
    inverse_mass_matrix: Any = None

    def __post_init__(self):
        super().__post_init__()
        check_count("DynamicHMC", "num_integration_steps", self.num_integration_steps)

    def init(self, rng_key, position, log_density):
        """Score the position; the key draws the numbers of steps."""
        return blackjax.dynamic_hmc.init(position, log_density, rng_key)

    def step(self, rng_key, state, log_density):
        """One trajectory of random length, accepted or rejected."""
        matrix = mass_matrix(self, state.position)
        algorithm = blackjax.dynamic_hmc(
            log_density, self.step_size, matrix, integration_steps_fn=uniform_steps(self.num_integration_steps)
        )
        state, details = algorithm.step(rng_key, state)
        return state, _trajectory_info(state, details)


@kernel_class()
class GHMC(AbstractKernel):
    r"""Generalized HMC: one leapfrog step at a time, with a momentum that is kept from one to the next.

    The momentum becomes ``sqrt(1 - alpha) * momentum + sqrt(alpha) * noise``; a rejection turns it round. The uniform
    number that decides on acceptance is not drawn but moves by ``delta`` (on a circle of length 2), so that rejections
    come in clusters and leave long stretches where the chain moves one way. At one gradient per transition it suits many
    chains at once and the negative phase of an estimator. With ``alpha = 1`` it is MALA with steps of ``step_size^2 / 2``.

    Args:
        step_size: leapfrog step, a length; a warm-up adapts it to acceptance 0.65.
        alpha: how much of the momentum is renewed, in (0, 1].
        delta: drift of the acceptance variable, in [0, 2).
        inverse_mass_matrix: as in `HMC`.

    Example:
        ``sample(rng_key, distribution, GHMC(alpha=0.1))``

    References:
        Horowitz, A generalized guided Monte Carlo algorithm (1991); Neal, Non-reversibly updating a uniform [0, 1] value
        for Metropolis accept/reject decisions (2020).
    """

    name: ClassVar[str] = "ghmc"
    target_acceptance: ClassVar[float | None] = 0.65
    adapts_mass_matrix: ClassVar[bool] = True
    statistics: ClassVar[tuple[str, ...]] = STATISTICS
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
    def init(self, rng_key, position, log_density):
        """Score the position and draw a momentum from its own law."""
        # BlackJAX draws it with unit mass, whatever the mass matrix.
        momentum = default_metric(mass_matrix(self, position)).sample_momentum(rng_key, position)
        return blackjax.ghmc.init(position, log_density, jax.random.fold_in(rng_key, 1))._replace(momentum=momentum)

    @with_jit
    def step(self, rng_key, state, log_density):
        """Renew part of the momentum, make one leapfrog step, accept or reject it."""
        matrix = mass_matrix(self, state.position)
        # A vector is taken for an inverse scale, a matrix for an inverse mass.
        scale = jnp.sqrt(matrix) if matrix.ndim == 1 else matrix
        algorithm = blackjax.ghmc(log_density, self.step_size, scale, self.alpha, self.delta)
        new: Any
        new, details = algorithm.step(rng_key, state)
        # A rejection leaves the variable where its drift has put it; BlackJAX makes it NaN where exp(-delta energy)
        # overflows, and would never accept again.
        drifted = (state.slice + 1 + self.delta) % 2 - 1
        new = new._replace(slice=jnp.where(jnp.isfinite(new.slice), new.slice, drifted))
        return new, _trajectory_info(new, details)


@kernel_class("max_num_doublings")
class NUTS(AbstractKernel):
    """The no-U-turn sampler: HMC that chooses the length of its trajectories.

    A trajectory ends where the log density is not finite, so ``is_nonfinite`` looks at its two ends; where it is set the
    transition is divergent too, and the draw is a point before the end.

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
    target_acceptance: ClassVar[float | None] = 0.8
    adapts_mass_matrix: ClassVar[bool] = True
    statistics: ClassVar[tuple[str, ...]] = (*STATISTICS, "tree_depth")
    step_size: Any = 0.1
    max_num_doublings: int = 10
    inverse_mass_matrix: Any = None

    def __post_init__(self):
        super().__post_init__()
        check_count("NUTS", "max_num_doublings", self.max_num_doublings)

    def init(self, rng_key, position, log_density):
        """Score the position."""
        return blackjax.nuts.init(position, log_density)

    def step(self, rng_key, state, log_density):
        """One trajectory, sampled from by its weights."""
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
    """What BlackJAX asks for the number of integration steps: uniform on 1 to ``maximum``."""
    return lambda rng_key: jax.random.randint(rng_key, (), 1, maximum + 1)


def _trajectory_info(state: Any, details: Any) -> TransitionInfo:
    """The record of one trajectory, from the new state and BlackJAX's ``HMCInfo``."""
    end = details.proposal
    return info(
        details.acceptance_rate,
        details.is_divergent,
        details.num_integration_steps,
        details.energy,
        is_nonfinite=not_finite(details.energy, end.logdensity, end.logdensity_grad, state.logdensity),
    )
