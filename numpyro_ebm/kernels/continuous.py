"""BlackJAX's gradient kernels behind one protocol."""

from typing import Any, ClassVar, NamedTuple

import blackjax
import jax
import jax.numpy as jnp

from numpyro_ebm._errors import check_count
from numpyro_ebm.kernels._base import AbstractKernel, info, kernel_class, mass_matrix


class LangevinState(NamedTuple):
    """The position is all that an unadjusted step needs."""

    position: Any


@kernel_class()
class Langevin(AbstractKernel):
    r"""Unadjusted Langevin: ``x + step_size * grad log p(x) + sqrt(2 * step_size) * noise``.

    BlackJAX's ``sgld`` with the full gradient. It never rejects, so its stationary law is off by an amount that
    shrinks with the step: on a Gaussian of variance ``v`` with the tutorial's ``epsilon = sqrt(2 * step_size)``, the
    precision it yields is ``(1 - sqrt(1 - 2 * step_size / v)) / step_size``. A chain can run to infinity.

    Args:
        step_size: coefficient of the gradient (positive).

    Example:
        ``estimate(model, "cd", kernel=Langevin(step_size=0.01))``

    References:
        Welling and Teh, Bayesian learning via stochastic gradient Langevin dynamics (2011).
    """

    name: ClassVar[str] = "langevin"
    step_power: ClassVar[float] = 2.0
    statistics: ClassVar[tuple[str, ...]] = ("is_divergent", "num_gradients")
    step_size: Any = 0.01

    def init(self, rng_key, position, log_density):
        """The position itself."""
        return LangevinState(position)

    def step(self, rng_key, state, log_density):
        """One Euler step."""
        algorithm = blackjax.sgld(lambda position, _: jax.grad(log_density)(position))
        position: Any = algorithm.step(rng_key, state.position, None, self.step_size)  # pyright: ignore[reportCallIssue]
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(position)]))
        return LangevinState(position), info(1.0, ~finite, 1, is_nonfinite=~finite)


@kernel_class()
class MALA(AbstractKernel):
    """Metropolis-adjusted Langevin: the Langevin proposal, accepted so that the law is exact.

    Args:
        step_size: as in `Langevin`; a warm-up adapts it to acceptance 0.574.

    References:
        Roberts and Tweedie, Exponential convergence of Langevin distributions (1996).
    """

    name: ClassVar[str] = "mala"
    step_power: ClassVar[float] = 2.0
    target_acceptance: ClassVar[float | None] = 0.574
    step_size: Any = 0.1

    def init(self, rng_key, position, log_density):
        """Score the position."""
        return blackjax.mala.init(position, log_density)

    def step(self, rng_key, state, log_density):
        """Propose and accept or reject."""
        details: Any
        state, details = blackjax.mala(log_density, self.step_size).step(rng_key, state)
        return state, info(details.acceptance_rate, is_divergent=False, num_gradients=1)


@kernel_class("num_integration_steps")
class HMC(AbstractKernel):
    """Hamiltonian Monte Carlo with a fixed number of leapfrog steps.

    Args:
        step_size: leapfrog step; a warm-up adapts it to acceptance 0.65.
        num_integration_steps: leapfrog steps per transition (gradient evaluations).
        inverse_mass_matrix: ``(d,)`` or ``(d, d)`` over the flattened position; None for the identity. A warm-up
            adapts the diagonal.

    References:
        Neal, MCMC using Hamiltonian dynamics (2011).
    """

    name: ClassVar[str] = "hmc"
    target_acceptance: ClassVar[float | None] = 0.65
    adapts_mass_matrix: ClassVar[bool] = True
    statistics: ClassVar[tuple[str, ...]] = ("acceptance_rate", "is_divergent", "num_gradients", "energy")
    step_size: Any = 0.1
    num_integration_steps: int = 10
    inverse_mass_matrix: Any = None

    def __post_init__(self):
        super().__post_init__()
        check_count("HMC", "num_integration_steps", self.num_integration_steps)

    def init(self, rng_key, position, log_density):
        """Score the position."""
        return blackjax.hmc.init(position, log_density)

    def step(self, rng_key, state, log_density):
        """One trajectory, accepted or rejected."""
        matrix = mass_matrix(self, state.position)
        algorithm = blackjax.hmc(log_density, self.step_size, matrix, self.num_integration_steps)
        details: Any
        state, details = algorithm.step(rng_key, state)
        return state, info(details.acceptance_rate, details.is_divergent, self.num_integration_steps, details.energy)


@kernel_class("max_num_doublings")
class NUTS(AbstractKernel):
    """The no-U-turn sampler: HMC that chooses the length of its trajectories.

    Args:
        step_size: leapfrog step; a warm-up adapts it to acceptance 0.8.
        max_num_doublings: the longest trajectory has ``2 ** max_num_doublings`` steps.
        inverse_mass_matrix: as in `HMC`.

    References:
        Hoffman and Gelman, The no-U-turn sampler (2014).
    """

    name: ClassVar[str] = "nuts"
    target_acceptance: ClassVar[float | None] = 0.8
    adapts_mass_matrix: ClassVar[bool] = True
    statistics: ClassVar[tuple[str, ...]] = (
        "acceptance_rate",
        "is_divergent",
        "num_gradients",
        "energy",
        "tree_depth",
    )
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
        details: Any
        state, details = algorithm.step(rng_key, state)
        return state, info(
            details.acceptance_rate,
            details.is_divergent,
            details.num_integration_steps,
            details.energy,
            details.num_trajectory_expansions,
        )
