"""Noise processes, which carry data to noise, and ladders of noise levels."""

import abc
import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.typing import ArrayLike
from jaxtyping import Float

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count, check_positive
from numpyro_ebm._core.typing import Array, Scalar

AtTimes: TypeAlias = Float[Array, "*times"]
"""A number, or one number per time."""


def geometric_sigmas(sigma_max: float, sigma_min: float, num: int) -> Float[Array, " {num}"]:
    """Return a ladder of noise levels in geometric progression, the largest first.

    Song and Ermon (2020) recommend a largest level of the order of the largest distance between two data points, and a ratio
    at which neighbouring levels overlap: about ``1 + 1 / sqrt(2 d)`` in ``d`` dimensions, or more if fewer levels have to
    suffice.

    Args:
        sigma_max: the largest level (a standard deviation).
        sigma_min: the smallest level.
        num: number of levels.

    Raises:
        EnergyError: for levels that are not positive or not in this order, and for ``num`` below 1, or equal to 1 with two
            different levels.

    Example:
        >>> [round(float(s), 6) for s in geometric_sigmas(1.0, 0.01, 3)]
        [1.0, 0.1, 0.01]

    References:
        Song and Ermon, Generative modeling by estimating gradients of the data distribution (2019); Improved techniques for
        training score-based generative models (2020).
    """
    check_positive("geometric_sigmas", "sigma_max", sigma_max)
    check_positive("geometric_sigmas", "sigma_min", sigma_min)
    check_count("geometric_sigmas", "num", num)
    if sigma_max < sigma_min or (num == 1 and sigma_max != sigma_min):
        raise EnergyError(
            f"geometric_sigmas needs sigma_max >= sigma_min, and num > 1 if they differ; got {sigma_max}, {sigma_min} and "
            f"num={num}. Write geometric_sigmas(10.0, 0.01, 10)."
        )
    return jnp.geomspace(sigma_max, sigma_min, num, dtype=float)


class AbstractNoiseProcess(abc.ABC):
    r"""A diffusion ``dx = f(x, t) dt + g(t) dw`` that carries data to noise as ``t`` goes to 1.

    Given the data, its distribution is that of ``x_t = alpha(t) x_0 + sigma(t) e`` with ``e ~ N(0, I)``; ``sigma`` grows
    with ``t``, and a model is conditioned on it. Time runs from ``t_min``, where there already is a little noise, to 1.

    Attributes:
        t_min: the smallest time.
    """

    t_min: Any

    @abc.abstractmethod
    def alpha(self, t: ArrayLike) -> AtTimes:
        """Return the factor of the data at ``t``."""

    @abc.abstractmethod
    def sigma(self, t: ArrayLike) -> AtTimes:
        """Return the standard deviation of the noise at ``t``."""

    @abc.abstractmethod
    def drift(self, x: Float[Array, "*position"], t: ArrayLike) -> Float[Array, "*position"]:
        """Return the drift ``f(x, t)``."""

    @abc.abstractmethod
    def diffusion(self, t: ArrayLike) -> AtTimes:
        """Return the diffusion coefficient ``g(t)``."""

    @abc.abstractmethod
    def transition(self, t: AtTimes | float, later: AtTimes | float) -> tuple[AtTimes, AtTimes]:
        """Return ``(a, v)`` with ``x_later | x_t ~ N(a x_t, v I)``."""

    @abc.abstractmethod
    def prior(self, event_shape: tuple[int, ...] = ()) -> dist.Distribution:
        """Return the distribution of the noise at ``t = 1``, as if nothing of the data were left there."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VE(AbstractNoiseProcess):
    r"""Variance-exploding process, the limit of a geometric ladder: the data stay, and the noise grows geometrically.

    .. math:: \alpha = 1, \quad \sigma(t) = \sigma_{min} (\sigma_{max} / \sigma_{min})^t, \quad
        f = 0, \quad g^2 = 2 \sigma^2 \log(\sigma_{max} / \sigma_{min})

    Time starts at 0, where the noise is ``sigma_min``. The prior is ``N(0, sigma_max^2)``. It ignores the mean and variance
    of the data, so ``sigma_max`` has to be large compared with them.

    Args:
        sigma_min: the smallest noise level, in units of the data (in unconstrained space).
        sigma_max: the largest noise level.

    Raises:
        EnergyError: for levels that are not positive or not in this order.

    Example:
        ``estimate(model, "multiscale_dsm", process=VE(0.01, 10.0))``

    References:
        Song et al., Score-based generative modeling through stochastic differential equations (2021).
    """

    sigma_min: Any
    sigma_max: Any

    def __post_init__(self):
        for name in ("sigma_min", "sigma_max"):
            check_positive("VE", name, getattr(self, name))
        if is_concrete(self.sigma_min, self.sigma_max) and self.sigma_max <= self.sigma_min:
            raise EnergyError(
                f"VE needs sigma_min < sigma_max; got {self.sigma_min} and {self.sigma_max}. Write VE(0.01, 10.0)."
            )

    @property
    def t_min(self) -> float:
        """The smallest time, 0."""
        return 0.0

    def alpha(self, t):
        """Return 1, the factor of the data."""
        return jnp.ones_like(jnp.asarray(t, float))

    def sigma(self, t):
        """Return ``sigma_min (sigma_max / sigma_min)^t``."""
        return self.sigma_min * jnp.exp(self._log_ratio * jnp.asarray(t, float))

    def drift(self, x, t):
        """Return 0, the drift."""
        return jnp.zeros_like(x)

    def diffusion(self, t):
        """Return ``sigma sqrt(2 log(sigma_max / sigma_min))``."""
        return self.sigma(t) * jnp.sqrt(2 * self._log_ratio)

    def transition(self, t, later):
        """Return ``(1, sigma(later)^2 - sigma(t)^2)``."""
        return self.alpha(t), self.sigma(t) ** 2 * jnp.expm1(2 * self._log_ratio * (later - t))

    def prior(self, event_shape=()):
        """Return ``N(0, sigma_max^2)``."""
        return _normal(self.sigma_max, event_shape)

    @property
    def _log_ratio(self) -> Scalar:
        return jnp.log(jnp.asarray(self.sigma_max / self.sigma_min, float))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VP(AbstractNoiseProcess):
    r"""Variance-preserving process, the limit of DDPM: the data shrink as the noise grows. Data of unit variance keep it.

    .. math:: \beta(t) = \beta_{min} + t (\beta_{max} - \beta_{min}), \quad f = -\tfrac12 \beta x, \quad g^2 = \beta, \quad
        \log \alpha = -\tfrac12 \int_0^t \beta, \quad \sigma^2 = 1 - \alpha^2

    The prior is ``N(0, 1)``. At ``t_min`` the data have noise of ``sigma / alpha`` in their own units, 0.01 by default.

    Args:
        beta_min: rate at time 0.
        beta_max: rate at time 1.
        t_min: the smallest time; at 0 there is no noise, and no score.

    Raises:
        EnergyError: for rates that are not positive, and a ``t_min`` outside (0, 1).

    Example:
        ``estimate(model, "multiscale_dsm", process=VP())``

    References:
        Ho, Jain and Abbeel, Denoising diffusion probabilistic models (2020); Song et al., Score-based generative modeling
        through stochastic differential equations (2021).
    """

    beta_min: Any = 0.1
    beta_max: Any = 20.0
    t_min: Any = 1e-3

    def __post_init__(self):
        for name in ("beta_min", "beta_max", "t_min"):
            check_positive("VP", name, getattr(self, name))
        if is_concrete(self.t_min) and self.t_min >= 1:
            raise EnergyError(f"VP needs 0 < t_min < 1; got t_min={self.t_min}. Write VP(t_min=1e-3).")

    def alpha(self, t):
        """Return ``exp(-int beta / 2)``."""
        return jnp.exp(self._log_alpha(t))

    def sigma(self, t):
        """Return ``sqrt(1 - alpha^2)``."""
        return jnp.sqrt(-jnp.expm1(2 * self._log_alpha(t)))

    def drift(self, x, t):
        """Return ``-beta x / 2``."""
        return -0.5 * self._beta(t) * x

    def diffusion(self, t):
        """Return ``sqrt(beta)``."""
        return jnp.sqrt(self._beta(t))

    def transition(self, t, later):
        """Return ``(alpha(later) / alpha(t), 1 - (alpha(later) / alpha(t))^2)``."""
        log_a = self._log_alpha(later) - self._log_alpha(t)
        return jnp.exp(log_a), -jnp.expm1(2 * log_a)

    def prior(self, event_shape=()):
        """Return ``N(0, 1)``."""
        return _normal(1.0, event_shape)

    def _beta(self, t: ArrayLike) -> AtTimes:
        return self.beta_min + jnp.asarray(t, float) * (self.beta_max - self.beta_min)

    def _log_alpha(self, t: ArrayLike) -> AtTimes:
        t = jnp.asarray(t, float)
        return -0.5 * t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))


def check_process(owner: str, process: object) -> None:
    """Refuse an object that is not a noise process.

    Raises:
        TypeError: with the type that came.
    """
    # JAX also rebuilds a pytree around placeholders of type object.
    if not isinstance(process, AbstractNoiseProcess) and type(process) is not object:
        raise TypeError(f"{owner} needs a noise process, e.g. VE(0.01, 10.0) or VP(); got {type(process).__name__}.")


def check_sigmas(owner: str, sigmas: object) -> None:
    """Refuse levels that are not a list of positive numbers.

    Raises:
        EnergyError: with the value that came.
    """
    if not isinstance(sigmas, str) and not is_concrete(sigmas):
        return
    ladder = np.asarray(sigmas)
    is_list = ladder.ndim == 1 and ladder.size and np.issubdtype(ladder.dtype, np.number)
    if not (is_list and np.all(np.isfinite(ladder)) and np.all(ladder > 0)):
        raise EnergyError(
            f"{owner} needs sigmas as a list of noise levels, each positive and finite; got {sigmas!r}. "
            f"Write {owner}(sigmas=geometric_sigmas(10.0, 0.01, 10))."
        )


def _normal(scale: ArrayLike, event_shape: tuple[int, ...]) -> dist.Distribution:
    return dist.Normal(jnp.zeros(event_shape), scale).to_event(len(event_shape))
