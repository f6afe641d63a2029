"""Kernels that make one gradient-based step per transition: Langevin, MALA and Barker."""

import functools
from typing import Any, ClassVar, NamedTuple

import blackjax
import jax
import jax.numpy as jnp
from blackjax.mcmc.diffusions import overdamped_langevin
from blackjax.mcmc.mala import MALAState
from blackjax.mcmc.proposal import compute_asymmetric_acceptance_ratio, static_binomial_sampling
from jaxtyping import Shaped

from numpyro_ebm._core.records import record
from numpyro_ebm._core.typing import Array, ChainLogDensityFn, Position, PRNGKey, PyTree, Scalar
from numpyro_ebm.kernels._base import AbstractKernel, TransitionInfo, info, mass_matrix, not_finite, with_jit


class LangevinState(NamedTuple):
    """The position, which is all that an unadjusted step needs."""

    position: Any


@record()
class Langevin(AbstractKernel):
    r"""Unadjusted Langevin: ``x + step_size * grad log p(x) + sqrt(2 * step_size) * noise``.

    BlackJAX's ``sgld`` with the full gradient. It never rejects, so its stationary distribution has a bias that shrinks
    with the step: on a Gaussian of variance ``v`` with the tutorial's ``epsilon = sqrt(2 * step_size)``, the resulting
    precision is ``(1 - sqrt(1 - 2 * step_size / v)) / step_size``. A chain can diverge to infinity. As the log density is
    not evaluated at the new position, ``is_nonfinite`` refers to the log density at the old one and to the new position.

    Args:
        step_size: coefficient of the gradient (positive), a squared length.

    Example:
        ``estimate(model, "cd", kernel=Langevin(step_size=0.01))``

    References:
        Welling and Teh, Bayesian learning via stochastic gradient Langevin dynamics (2011).
    """

    name: ClassVar[str] = "langevin"
    is_exact: ClassVar[bool] = False
    needs_density: ClassVar[bool] = False
    step_exponent: ClassVar[float] = 1.0
    statistics: ClassVar[tuple[str, ...]] = ("is_divergent", "num_gradients", "is_nonfinite")
    step_size: Any = 0.01

    def init(self, rng_key: PRNGKey, position: Position, log_density: ChainLogDensityFn) -> PyTree:
        """Return the position as the state."""
        return LangevinState(position)

    @with_jit
    def step(self, rng_key: PRNGKey, state: PyTree, log_density: ChainLogDensityFn) -> tuple[PyTree, TransitionInfo]:
        """Make one Euler step."""
        value, grad = jax.value_and_grad(log_density)(state.position)
        algorithm = blackjax.sgld(lambda *_: grad)
        position: Any = algorithm.step(rng_key, state.position, None, self.step_size)  # pyright: ignore[reportCallIssue]
        return LangevinState(position), info(1.0, not_finite(position), 1, is_nonfinite=not_finite(value, grad, position))


@record()
class MALA(AbstractKernel):
    """Metropolis-adjusted Langevin: the Langevin proposal with an exact accept-reject step.

    BlackJAX's ``mala``, assembled from its components because its own record does not contain the proposal.

    Args:
        step_size: as in `Langevin`; a warm-up adapts it to acceptance 0.574.

    Example:
        ``estimate(model, "pcd", kernel=MALA(step_size=0.05))``

    References:
        Roberts and Tweedie, Exponential convergence of Langevin distributions (1996); Roberts and Rosenthal, Optimal
        scaling of discrete approximations to Langevin diffusions (1998), for 0.574.
    """

    name: ClassVar[str] = "mala"
    is_reversible: ClassVar[bool] = True
    target_acceptance: ClassVar[float | None] = 0.574
    step_exponent: ClassVar[float] = 1.0
    step_size: Any = 0.1

    def init(self, rng_key: PRNGKey, position: Position, log_density: ChainLogDensityFn) -> PyTree:
        """Evaluate the log density and its gradient at the position."""
        return blackjax.mala.init(position, log_density)

    @with_jit
    def step(self, rng_key: PRNGKey, state: PyTree, log_density: ChainLogDensityFn) -> tuple[PyTree, TransitionInfo]:
        """Make a proposal, and accept or reject it."""
        key_proposal, key_accept = jax.random.split(rng_key)
        propose = overdamped_langevin(jax.value_and_grad(log_density))
        proposal = MALAState(*propose(key_proposal, state, self.step_size))
        log_ratio = compute_asymmetric_acceptance_ratio(_transition_energy)(state, proposal, step_size=self.step_size)
        state, (_, acceptance_rate, _) = static_binomial_sampling(key_accept, log_ratio, state, proposal)
        return state, info(
            acceptance_rate, is_divergent=False, num_gradients=1, is_nonfinite=not_finite(proposal, state.logdensity)
        )


def _transition_energy(start: MALAState, end: MALAState, step_size: float | Shaped[Array, ""]) -> Scalar:
    """Return minus the log of the density at the end times the proposal density from there back to the start."""
    back = jax.tree.map(lambda x, y, grad: x - y - step_size * grad, start.position, end.position, end.logdensity_grad)
    squares = jax.tree.map(lambda move: jnp.sum(move * move), back)
    return -end.logdensity + 0.25 * (1.0 / step_size) * jax.tree.reduce(jnp.add, squares)


@record()
class Barker(AbstractKernel):
    r"""Barker's proposal: Gaussian noise with signs biased along the gradient, and an exact accept-reject step.

    Each coordinate moves by ``b_i z_i`` with ``z ~ N(0, step_size^2)`` and ``b_i = 1`` with probability
    ``1 / (1 + exp(-z_i * grad_i))``, else -1. However steep the density, a move is no longer than its noise, so the kernel
    is slower than MALA on easy targets, and far less sensitive to the step size and to light tails. With an inverse mass
    matrix ``C`` the same move is made in the coordinates ``C^{-1/2} x``.

    Args:
        step_size: standard deviation of the noise, a length; a warm-up adapts it to acceptance 0.4.
        inverse_mass_matrix: ``(d,)`` or ``(d, d)`` over the flattened position, the covariance of the noise divided by
            ``step_size^2``; None for the identity. A warm-up adapts the diagonal.

    Example:
        ``sample(rng_key, distribution, Barker(step_size=0.5))``

    References:
        Livingstone and Zanella, The Barker proposal: combining robustness and efficiency in gradient-based MCMC (2022).
    """

    name: ClassVar[str] = "barker"
    is_reversible: ClassVar[bool] = True
    target_acceptance: ClassVar[float | None] = 0.4
    adapts_mass_matrix: ClassVar[bool] = True
    step_size: Any = 0.5
    inverse_mass_matrix: Any = None

    def init(self, rng_key: PRNGKey, position: Position, log_density: ChainLogDensityFn) -> PyTree:
        """Evaluate the log density and its gradient at the position."""
        return blackjax.barker.init(position, log_density)

    def step(self, rng_key: PRNGKey, state: PyTree, log_density: ChainLogDensityFn) -> tuple[PyTree, TransitionInfo]:
        """Make a proposal, and accept or reject it."""
        matrix = mass_matrix(self, state.position)
        if barker_takes_mass_matrix():
            matrix = 1 / matrix if matrix.ndim == 1 else jnp.linalg.inv(matrix)
        new: Any
        details: Any
        new, details = blackjax.barker(log_density, self.step_size, matrix).step(rng_key, state)
        return new, info(
            # If the proposal's log density is NaN, so is BlackJAX's acceptance rate.
            jnp.nan_to_num(details.acceptance_rate, nan=0.0),
            is_divergent=False,
            num_gradients=1,
            is_nonfinite=not_finite(details.proposal, new.logdensity),
        )


@functools.cache
def barker_takes_mass_matrix() -> bool:
    """Return whether the noise of BlackJAX's Barker kernel has the inverse of its ``inverse_mass_matrix`` as covariance.

    It has in BlackJAX 1.7. The kernel is run once on a flat density, so that a version that corrects this is used correctly.
    """

    def length(variance: float) -> Scalar:
        algorithm: Any = blackjax.barker(lambda x: jnp.zeros(()), 1.0, jnp.full(1, variance))
        return jnp.abs(algorithm.step(jax.random.key(0), algorithm.init(jnp.zeros(1)))[0].position[0])

    with jax.ensure_compile_time_eval(), jax.disable_jit(disable=False):
        return bool(length(4.0) < length(1.0))
