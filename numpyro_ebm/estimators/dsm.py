"""Denoising score matching."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.typing import ArrayLike
from jaxtyping import Float

from numpyro_ebm._core.concrete import eager, is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count, check_positive, is_positive_definite
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree, RowValues, Scalar
from numpyro_ebm.distributions.blocks import is_real
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators._base import AbstractEstimator

SMOOTHING_BOUNDS = (0.05, 1.0)
"""Ratios of noise to data sd without a warning: the loss has sd 161 at 0.02 (test_dsm.py), the variance doubles at 1."""
SMALL_NOISE = 0.1
"""Ratio below which "auto" uses the control variate: a higher bound costs gradients, a lower one leaves the loss noisy."""
WAYS = "sigma=0.1, covariance_matrix=0.01 * jnp.eye(d), or noise=dist.Laplace(0, 0.1).expand([d]).to_event(1)"


@dataclasses.dataclass(frozen=True)
class DenoisingScoreMatching(AbstractEstimator):
    r"""Denoising score matching (Vincent): match the score of the data plus noise of density ``q``.

    The loss of a row, averaged over ``num_draws`` fresh noise draws ``e ~ q`` at each update, is

    .. math:: \tfrac12 | s(x + e) - \nabla \log q(e) |^2,
        \qquad \nabla \log q(e) = -e / \sigma^2 \text{ for } q = N(0, \sigma^2 I)

    It takes one gradient of the energy per draw and fits the smoothed density: for a Gaussian of covariance ``S`` and noise
    of covariance ``C`` the optimal precision is ``(S + C)^{-1}``. With little noise, terms that do not depend on the energy
    dominate the loss, and its variance grows as ``sigma^-4``. The control variate (Wang et al.) removes them:

    .. math:: s(x) \cdot \nabla \log q(e) \;-\; \tfrac12 \big( |\nabla \log q(e)|^2 - E |\nabla \log q|^2 \big)

    has mean zero and is added (the second term only for Gaussian noise, where its mean is known). The variance then stays
    bounded as the noise vanishes, and the loss tends to that of score matching, at one more gradient per row.

    Args:
        sigma: standard deviation of Gaussian noise in data units (in unconstrained units where the support is not the real
            line), a scalar or one value per dimension.
        covariance_matrix: covariance of Gaussian noise, for events of shape ``(d,)``; in place of sigma.
        noise: any NumPyro distribution of one event on the real line, with a differentiable density; in place of sigma.
        num_draws: noise draws per row, whose losses are averaged.
        control_variate: True, False, or "auto", which uses it where the noise is below 0.1 of the data's standard deviation
            in some dimension of the batch.

    Raises:
        EnergyError: for noise that is missing or given twice, not positive or NaN, or of a shape that does not fit the
            event; for counts below 1.

    Warns:
        UserWarning: where the noise is below 0.05 or above 1 of the data's standard deviation in some dimension (noisy
            training, or a density smoothed away); checked where the data are concrete, as in ``svi.init``.

    Example:
        ``estimate(model, "dsm", sigma=0.1)``

    References:
        Vincent, A connection between score matching and denoising autoencoders (2011); Wang, Cheng, Li, Zhu and Zhang, A
        Wasserstein minimum velocity approach to learning unnormalized models (2020).
    """

    name = "dsm"
    role = "objective"
    needs_energy = False
    sigma: Any = None
    covariance_matrix: Any = None
    noise: dist.Distribution | None = None
    num_draws: int = 1
    control_variate: Any = "auto"

    def __post_init__(self):
        given = [n for n in ("sigma", "covariance_matrix", "noise") if getattr(self, n) is not None]
        if len(given) != 1:
            raise EnergyError(
                f"DenoisingScoreMatching needs exactly one of sigma, covariance_matrix and noise; got {given or 'none'}. "
                f"Write estimate(model, 'dsm', ...) with {WAYS}."
            )
        check_positive("DenoisingScoreMatching", "sigma", self.sigma)
        check_count("DenoisingScoreMatching", "num_draws", self.num_draws)
        if self.control_variate not in (True, False, "auto"):
            raise EnergyError(f"control_variate is True, False or 'auto'; got {self.control_variate!r}.")
        if self.noise is not None and not isinstance(self.noise, dist.Distribution):
            raise TypeError(f"noise needs a numpyro distribution; got {type(self.noise).__name__}.")
        if is_concrete(self.covariance_matrix):
            _check_covariance(self.covariance_matrix)

    def check(self, site: Site) -> None:
        """Raise where the noise does not fit the event, and warn where its scale is far from that of the data."""
        super().check(site)
        self._check_fits(site.distribution.unconstrained_shape)
        if site.num_rows > 1 and is_concrete(site.value, site.mask, self.sigma, self.covariance_matrix, self.noise):
            self._warn_of_scale(site)

    def surrogate(self, rng_key: PRNGKey, site: Site, state: PyTree) -> tuple[RowValues, PyTree]:
        """Return minus the loss, per row."""
        noise = self.noise_of(site)
        draws = noise.sample(rng_key, (self.num_draws, site.num_rows)).astype(site.position.dtype)  # pyright: ignore
        pull = jax.vmap(jax.vmap(jax.grad(lambda e: jnp.sum(noise.log_prob(e)))))(draws)
        score = site.over_draws(site.score, site.position[None] + draws)

        def plain():
            return 0.5 * _square(pull)

        def controlled():
            left = 0.5 * (_square(pull) if self.noise is not None else _information(noise))
            return _dot(pull, jax.vmap(site.score)(site.position, site.local)[None]) + left

        rest = _choose(self._is_controlled(site), controlled, plain)
        return -jnp.mean(0.5 * _square(score) - _dot(score, pull) + rest, axis=0), state

    def noise_of(self, site: Site) -> dist.Distribution:
        """Return the distribution of the noise of one event, in unconstrained space."""
        shape, dtype = site.distribution.unconstrained_shape, site.position.dtype
        if self.noise is not None:
            return self.noise
        if self.covariance_matrix is not None:
            return dist.MultivariateNormal(jnp.zeros(shape, dtype), jnp.asarray(self.covariance_matrix, dtype))
        scale = jnp.broadcast_to(jnp.asarray(self.sigma, dtype), shape)
        return dist.Normal(jnp.zeros(shape, dtype), scale).to_event(len(shape))

    def smoothing(self, site: Site) -> Float[Array, "*position"]:
        """Return the noise's standard deviation over that of the rows, per dimension; infinite where all rows are equal."""
        return jnp.sqrt(jnp.asarray(self.noise_of(site).variance)) / site.spread

    def _is_controlled(self, site: Site) -> Any:
        if self.control_variate != "auto":
            return self.control_variate
        with eager(site.position, site.mask, self.sigma, self.covariance_matrix, self.noise):
            return jnp.min(self.smoothing(site), initial=jnp.inf) < SMALL_NOISE

    def _check_fits(self, shape: tuple[int, ...]) -> None:
        if self.sigma is not None:
            try:
                fits = np.broadcast_shapes(np.shape(self.sigma), shape) == shape
            except ValueError:
                fits = False
            if not fits:
                raise EnergyError(
                    f"sigma has shape {np.shape(self.sigma)}, the event has {shape}. Write one number, or one per dimension."
                )
        if self.covariance_matrix is not None and (len(shape) != 1 or np.shape(self.covariance_matrix) != 2 * shape):
            raise EnergyError(
                f"covariance_matrix has shape {np.shape(self.covariance_matrix)}, the event has {shape}: an event of shape "
                "(d,) needs (d, d). For events of another shape write sigma, or noise."
            )
        if self.noise is not None:
            _check_noise(self.noise, shape)

    def _warn_of_scale(self, site: Site) -> None:
        with eager():
            ratio = np.asarray(self.smoothing(site))
        low, high = SMOOTHING_BOUNDS
        if ratio.size and np.all(np.isfinite(ratio)) and (ratio.min() < low or ratio.max() > high):
            kind = "sigma" if self.sigma is not None else "the noise"
            warnings.warn(
                f"At site '{site.name}': {kind} is {ratio.min():.3g} to {ratio.max():.3g} of the data's standard deviation; "
                f"below {low} the loss is very noisy, above {high} the density is smoothed away.",
                stacklevel=2,
            )

    def figures(self, rng_key: PRNGKey, site: Site) -> dict[str, Scalar]:
        """Return the smallest and the largest `smoothing` over the dimensions."""
        ratio = self.smoothing(site)
        return {"smoothing_min": jnp.min(ratio), "smoothing_max": jnp.max(ratio)}


def _choose(
    flag: ArrayLike, yes: Callable[[], Float[Array, "draws rows"]], no: Callable[[], Float[Array, "draws rows"]]
) -> Float[Array, "draws rows"]:
    """Run one of two computations; the other never runs, whether the flag is concrete or traced."""
    if is_concrete(flag) or isinstance(flag, bool):
        return yes() if flag else no()
    # Without the checkpoint, the branch not taken would write zeros for the values that the other saves for its gradient.
    return jax.lax.cond(flag, jax.checkpoint(yes), no)


def _dot(a: Float[Array, "draws rows *position"], b: Float[Array, "#draws rows *position"]) -> Float[Array, "draws rows"]:
    """Return inner products of events whose leading axes are draws and rows."""
    return jnp.sum((a * b).reshape((*a.shape[:2], -1)), axis=-1)


def _square(a: Float[Array, "draws rows *position"]) -> Float[Array, "draws rows"]:
    return _dot(a, a)


def _information(noise: dist.Distribution) -> Scalar:
    """Return ``E |grad log q|^2`` of a Gaussian, the trace of its precision."""
    if isinstance(noise, dist.MultivariateNormal):
        precision: Any = noise.precision_matrix
        return jnp.trace(precision)
    return jnp.sum(1 / noise.variance)


def _check_covariance(matrix: ArrayLike | None) -> None:
    if matrix is not None and not is_positive_definite(np.asarray(matrix, float)):
        raise EnergyError(
            f"covariance_matrix needs a symmetric positive definite matrix; got shape {np.shape(matrix)}. Write "
            "covariance_matrix=0.01 * jnp.eye(d)."
        )


def _check_noise(noise: dist.Distribution, shape: tuple[int, ...]) -> None:
    fits = noise.event_shape == shape and noise.batch_shape == ()
    support: Any = noise.support
    if not fits or support.is_discrete or not is_real(support):
        raise EnergyError(
            f"noise needs a distribution of one event on the real line, event_shape={shape} and batch_shape=(); got "
            f"{type(noise).__name__} with event_shape={noise.event_shape}, batch_shape={noise.batch_shape} and support "
            f"{support}. Write noise=numpyro.distributions.Laplace(0, 0.1).expand({list(shape)}).to_event({len(shape)})."
        )
