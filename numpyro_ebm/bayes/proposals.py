"""Proposals of new parameters: random walks, differences between chains, and steps along a noisy gradient."""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.linalg import cholesky, solve_lower
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.records import rebuilt, record
from numpyro_ebm._core.typing import Array, Flat, Matrix, PRNGKey, Scalar

LARGEST_RATIO = 1e3
"""Largest step size that `CrankNicolson` uses. The share of the current parameters in a proposal is then 0.001."""


class AbstractProposal(abc.ABC):
    """A proposal for the unconstrained parameters, as one flat vector.

    During NumPyro's warm-up the step size adapts to ``target_acceptance`` by dual averaging.

    Attributes:
        step_size: factor of the proposal's lengths.
        inverse_mass_matrix: ``(d, d)``, an estimate of the covariance of the posterior; None for that of `ExchangeKernel`.
        target_acceptance: acceptance rate to which the step size adapts; None for a step size that does not adapt.
        uses_population: whether a proposal needs the parameters of other chains.
        num_gradient_draws: data sets that are drawn from the model for each gradient; 0 for a proposal without one.
    """

    name: ClassVar[str]
    uses_population: ClassVar[bool] = False
    adapts_mass_matrix: ClassVar[bool] = False
    target_acceptance: ClassVar[float | None] = None
    num_gradient_draws: int = 0
    step_size: Any
    inverse_mass_matrix: Any

    def __post_init__(self):
        if is_concrete(self.step_size) and not (np.isfinite(self.step_size) and self.step_size > 0):
            owner = type(self).__name__
            raise EnergyError(f"{owner} needs step_size > 0; got {self.step_size!r}. Write {owner}(step_size=1.0).")

    @property
    def parts(self) -> tuple[Any, ...]:
        """Nothing: a proposal does not consist of several."""
        return ()

    @abc.abstractmethod
    def propose(self, rng_key: PRNGKey, z: Flat, gradient: Flat, partners: Float[Array, "2 d"]) -> Flat:
        """Return new parameters.

        Args:
            rng_key: random key.
            z: the parameters.
            gradient: noisy gradient of the log posterior at ``z``; 0 for a proposal that does not use it.
            partners: parameters of two other chains; 0 for a proposal that does not use them.
        """

    def log_ratio(self, z: Flat, gradient: Flat, new: Flat, new_gradient: Flat) -> Scalar:
        """Return ``log q(z | new) - log q(new | z)``; 0 for a symmetric proposal."""
        return jnp.zeros((), float)

    def adapted(self, **settings: Any) -> Any:
        """Return the same proposal with adapted settings."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # pyright: ignore
        return rebuilt(type(self), own | settings)

    def settled(self, mode: Flat, covariance: Float[Array, "d d"]) -> Any:
        """Return the same proposal with what it lacks of a mode of the posterior and the covariance there."""
        return self if self.inverse_mass_matrix is not None else self.adapted(inverse_mass_matrix=covariance)

    def lower(self, position: Any) -> Any:
        """Return the position itself."""
        return position


@record()
class RandomWalk(AbstractProposal):
    r"""A Gaussian step with a multiple of the posterior's covariance as it is estimated beforehand.

    .. math:: \theta' = \theta + \varepsilon\, \tfrac{2.38}{\sqrt d}\, L \xi, \qquad
        L L^\top = \widehat{\mathrm{cov}}(\theta)

    Args:
        step_size: the factor ``epsilon``, which adapts to an acceptance rate of 0.25.
        inverse_mass_matrix: ``(d, d)``, the covariance, over the flat unconstrained parameters in the order of their names;
            None for the estimate that `ExchangeKernel` makes before the first transition.

    Raises:
        EnergyError: for a step size that is not positive.

    Example:
        ``ExchangeKernel(model, proposal=RandomWalk(step_size=0.5))``

    References:
        Roberts, Gelman and Gilks, Weak convergence and optimal scaling of random walk Metropolis algorithms (1997).
    """

    name: ClassVar[str] = "random_walk"
    target_acceptance: ClassVar[float | None] = 0.25
    step_size: Any = 1.0
    inverse_mass_matrix: Any = None

    def propose(self, rng_key: PRNGKey, z: Flat, gradient: Flat, partners: Float[Array, "2 d"]) -> Flat:
        """Add a Gaussian step."""
        length = self.step_size * 2.38 / np.sqrt(z.size)
        return z + length * (cholesky(self.inverse_mass_matrix) @ jax.random.normal(rng_key, z.shape, z.dtype))


@record()
class CrankNicolson(AbstractProposal):
    r"""A step between the current parameters and draws of a Student t approximation of the posterior.

    .. math:: \theta' = m + \sqrt{1 - \beta^2}\, (\theta - m) + \beta \sqrt{w}\, L \xi, \qquad
        \beta = \frac{\varepsilon}{\sqrt{1 + \varepsilon^2}}, \quad L L^\top = \widehat{\mathrm{cov}}(\theta), \quad
        w \sim \frac{\nu + |L^{-1} (\theta - m)|^2}{\chi^2_{\nu + d}}

    with a mode ``m`` and the covariance there. The proposal leaves the Student t distribution with ``nu`` degrees of
    freedom, location ``m`` and scale ``L L^T`` as it is, so that only the posterior's difference from it, and the noise of
    the auxiliary data, are rejected. A large ``epsilon`` gives nearly independent draws. Raise `ExchangeKernel`'s
    ``num_bridges`` for longer steps: they lower the noise.

    With tens of parameters it moves farther than a random walk. The factor ``w`` lets steps grow with the distance from the
    mode, so that tails beyond those of a Gaussian, and a covariance that is too small, are reached.

    Args:
        step_size: the ratio ``epsilon``, at most 1000; it adapts to an acceptance rate of 0.4, or to the longest steps where
            these are accepted more often.
        center: ``(d,)``, the mode ``m`` of the flat unconstrained parameters; None for that of `ExchangeKernel`.
        inverse_mass_matrix: as in `RandomWalk`.
        degrees_of_freedom: ``nu``; ``jnp.inf`` for a Gaussian, ``w = 1``.

    Raises:
        EnergyError: for a step size and degrees of freedom that are not positive.

    Example:
        ``ExchangeKernel(model, proposal="crank_nicolson", num_bridges=20)``

    References:
        Cotter, Roberts, Stuart and White, MCMC methods for functions (2013); Rudolf and Sprungk, On a generalization of the
        preconditioned Crank-Nicolson Metropolis algorithm (2018); Kamatani, Efficient strategy for the Markov chain Monte
        Carlo in high-dimension with heavy-tailed target probability distribution (2018), for the factor ``w``.
    """

    name: ClassVar[str] = "crank_nicolson"
    target_acceptance: ClassVar[float | None] = 0.4
    step_size: Any = 0.5
    center: Any = None
    inverse_mass_matrix: Any = None
    degrees_of_freedom: Any = 5.0

    def __post_init__(self):
        super().__post_init__()
        if is_concrete(self.degrees_of_freedom) and not self.degrees_of_freedom > 0:
            raise EnergyError(
                f"CrankNicolson needs degrees_of_freedom > 0; got {self.degrees_of_freedom!r}. Write "
                "CrankNicolson(degrees_of_freedom=5.0), or jnp.inf for Gaussian steps."
            )

    def settled(self, mode: Flat, covariance: Float[Array, "d d"]) -> Any:
        """Return the proposal with the mode and the covariance, where it has none of its own."""
        centered = self if self.center is not None else self.adapted(center=mode)
        return AbstractProposal.settled(centered, mode, covariance)

    def propose(self, rng_key: PRNGKey, z: Flat, gradient: Flat, partners: Float[Array, "2 d"]) -> Flat:
        """Shrink the distance from the mode, and add a Gaussian step of random scale."""
        key_noise, key_scale = jax.random.split(rng_key)
        factor = cholesky(self.inverse_mass_matrix)
        noise = factor @ jax.random.normal(key_noise, z.shape, z.dtype)
        # Independent draws of a good approximation are accepted more often than the target: the step size grows on and on.
        ratio = jnp.minimum(self.step_size, LARGEST_RATIO)
        step = ratio * jnp.sqrt(self._scale(key_scale, z, factor)) * noise
        return self.center + (z - self.center + step) / jnp.sqrt(1 + ratio**2)

    def log_ratio(self, z: Flat, gradient: Flat, new: Flat, new_gradient: Flat) -> Scalar:
        """Return the log ratio of the densities of the approximation."""
        factor, df = cholesky(self.inverse_mass_matrix), self._finite_df
        squares = _squared_norms(jnp.stack([new, z]) - self.center, factor)
        gaussian = 0.5 * (squares[0] - squares[1])
        student = 0.5 * (df + z.size) * (jnp.log1p(squares[0] / df) - jnp.log1p(squares[1] / df))
        return jnp.where(jnp.isinf(self.degrees_of_freedom), gaussian, student)

    @property
    def _finite_df(self) -> Any:
        return jnp.where(jnp.isinf(self.degrees_of_freedom), 1.0, self.degrees_of_freedom)

    def _scale(self, rng_key: PRNGKey, z: Flat, factor: Matrix) -> Scalar:
        """Draw ``w`` given the parameters and the factor ``L``."""
        squares, df = _squared_norms((z - self.center)[None], factor)[0], self._finite_df
        chi_squared = 2 * jax.random.gamma(rng_key, (df + z.size) / 2, dtype=z.dtype)
        return jnp.where(jnp.isinf(self.degrees_of_freedom), 1.0, (df + squares) / chi_squared)


@record()
class Differences(AbstractProposal):
    r"""A step along the difference of two other chains: adaptive direction sampling, which needs no tuning.

    .. math:: \theta_i' = \theta_i + \gamma (\theta_j - \theta_k) + \gamma \sigma |\theta_j - \theta_k| \xi, \qquad
        \gamma = \varepsilon\, 2.38 / \sqrt{2 d}

    where ``j`` and ``k`` are in the other half of the chains; the halves move in turn. It needs
    ``MCMC(..., chain_method="vectorized")`` with an even number of chains, better 16 or more, and four times as many as
    there are parameters: a half of few chains spans few directions.

    Args:
        step_size: the factor ``epsilon``, which does not adapt: the spread of the chains does.
        jitter: the standard deviation ``sigma``, coordinate by coordinate in units of the difference, so that chains leave
            the subspace that they span.

    Raises:
        EnergyError: for a step size that is not positive.

    Example:
        ``MCMC(ExchangeKernel(model, proposal="differences"), num_chains=16, chain_method="vectorized", ...)``

    References:
        Ter Braak, A Markov chain Monte Carlo version of the genetic algorithm differential evolution (2006); Caimo and
        Friel, Bayesian inference for exponential random graph models (2011).
    """

    name: ClassVar[str] = "differences"
    uses_population: ClassVar[bool] = True
    step_size: Any = 1.0
    jitter: Any = 0.05
    inverse_mass_matrix: Any = None

    def propose(self, rng_key: PRNGKey, z: Flat, gradient: Flat, partners: Float[Array, "2 d"]) -> Flat:
        """Add a multiple of the difference, and a small Gaussian step."""
        difference = partners[0] - partners[1]
        noise = jax.random.normal(rng_key, z.shape, z.dtype)
        return z + self.step_size * 2.38 / np.sqrt(2 * z.size) * (difference + self.jitter * jnp.abs(difference) * noise)


@record("num_gradient_draws")
class NoisyMALA(AbstractProposal):
    r"""A Langevin step along a gradient whose model term is a mean over data sets drawn from the model.

    .. math:: \theta' = \theta + \varepsilon M \hat g(\theta) + \sqrt{2\varepsilon}\, L\xi, \qquad
        \hat g(\theta) = \nabla \log \tilde\pi(\theta) - \tfrac1m \sum_{k=1}^m \nabla \log f(u_k; \theta)

    with ``M = L L^T`` the covariance estimated beforehand, ``tilde pi`` the posterior without log Z and ``u_k`` data
    sets drawn at ``theta``. The gradient is part of the chain's state and the proposal's density enters the acceptance, so
    the noise costs acceptance and no bias.

    Args:
        step_size: ``epsilon``, in BlackJAX's convention; it adapts to an acceptance rate of 0.4.
        num_gradient_draws: the data sets ``m`` for each gradient.
        inverse_mass_matrix: as in `RandomWalk`.

    Raises:
        EnergyError: for a step size that is not positive, and less than one draw.

    Example:
        ``ExchangeKernel(model, proposal=NoisyMALA(num_gradient_draws=4))``

    References:
        Alquier, Friel, Everitt and Boland, Noisy Monte Carlo: convergence of Markov chains with approximate transition
        kernels (2016).
    """

    name: ClassVar[str] = "noisy_mala"
    target_acceptance: ClassVar[float | None] = 0.4
    step_size: Any = 0.1
    num_gradient_draws: int = 1
    inverse_mass_matrix: Any = None

    def __post_init__(self):
        super().__post_init__()
        check_count("NoisyMALA", "num_gradient_draws", self.num_gradient_draws)

    def propose(self, rng_key: PRNGKey, z: Flat, gradient: Flat, partners: Float[Array, "2 d"]) -> Flat:
        """Step along the gradient, and add a Gaussian step."""
        noise = cholesky(self.inverse_mass_matrix) @ jax.random.normal(rng_key, z.shape, z.dtype)
        return self._mean(z, gradient) + jnp.sqrt(2 * self.step_size) * noise

    def log_ratio(self, z: Flat, gradient: Flat, new: Flat, new_gradient: Flat) -> Scalar:
        """Return the log ratio of the two Gaussian densities."""
        back, forth = z - self._mean(new, new_gradient), new - self._mean(z, gradient)
        squares = _squared_norms(jnp.stack([back, forth]), cholesky(self.inverse_mass_matrix))
        return (squares[1] - squares[0]) / (4 * self.step_size)

    def _mean(self, z: Flat, gradient: Flat) -> Flat:
        return z + self.step_size * self.inverse_mass_matrix @ gradient


def _squared_norms(moves: Float[Array, "num d"], factor: Matrix) -> Float[Array, " num"]:
    """Return the squared length of each move in standard deviations, given the lower factor of the covariance."""
    return jnp.sum(solve_lower(factor, moves.T) ** 2, axis=0)
