"""Denoising score matching."""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm._errors import EnergyError, check_positive, is_concrete
from numpyro_ebm.estimators._base import AbstractEstimator, Site
from numpyro_ebm.estimators._figures import smoothing_figures

SMOOTHING_BOUNDS = (0.05, 1.0)


@dataclasses.dataclass(frozen=True)
class DenoisingScoreMatching(AbstractEstimator):
    r"""Denoising score matching (Vincent): match the score of the data plus noise of scale sigma.

    Loss of a row, with ``e ~ N(0, I)`` drawn afresh at each update:

    .. math:: \tfrac12 | s(x + \sigma e) + e / \sigma |^2

    One gradient of the energy per row. It fits the smoothed density: on a Gaussian of variance ``v`` the optimum is
    ``1 / (v + sigma^2)``. The variance of the loss grows as ``sigma^-4``.

    Args:
        sigma: noise scale in data units (in unconstrained units where the support is not the real line), a scalar or
            one value per dimension; required.

    Raises:
        EnergyError: for sigma missing, not positive or NaN, or of a shape that does not fit the event.

    Warns:
        UserWarning: where sigma is below 0.05 or above 1 of the data's standard deviation in some dimension (noisy
            training, or a density smoothed away); checked where the data are concrete, as in ``svi.init``.

    Example:
        ``estimate(model, "dsm", sigma=0.1)``

    References:
        Vincent, A connection between score matching and denoising autoencoders (2011).
    """

    name = "dsm"
    role = "objective"
    needs_energy = False
    sigma: Any = None

    def __post_init__(self):
        if self.sigma is None:
            raise EnergyError("DenoisingScoreMatching needs sigma. Write estimate(model, 'dsm', sigma=0.1).")
        check_positive("DenoisingScoreMatching", "sigma", self.sigma)

    def check(self, site: Site) -> None:
        """Refuse a sigma that does not fit the event; warn where it is far from the data's own scale."""
        super().check(site)
        shape = site.distribution.unconstrained_shape
        try:
            fits = np.broadcast_shapes(np.shape(self.sigma), shape) == shape
        except ValueError:
            fits = False
        if not fits:
            raise EnergyError(
                f"sigma has shape {np.shape(self.sigma)}, the event has {shape}. Write one number, or one per dimension."
            )
        if site.num_rows > 1 and is_concrete(site.value, site.mask, self.sigma):
            self._warn_of_scale(site)

    def surrogate(self, rng_key, site: Site, state):
        """Minus the loss, per row."""
        sigma = jnp.asarray(self.sigma, site.position.dtype)
        noise = jax.random.normal(rng_key, site.position.shape, site.position.dtype)
        score = jax.vmap(site.score)(site.position + sigma * noise, site.local)
        squares = (score + noise / sigma) ** 2
        return -0.5 * jnp.sum(squares.reshape(site.num_rows, -1), axis=1), state

    def _warn_of_scale(self, site: Site) -> None:
        position = np.asarray(site.position)
        position = position if site.mask is None else position[np.asarray(site.mask)]
        spread = position.std(axis=0) if len(position) else np.zeros(())
        if not np.all(spread > 0):
            return
        ratio = np.broadcast_to(np.asarray(self.sigma) / spread, spread.shape)
        low, high = SMOOTHING_BOUNDS
        if ratio.min() < low or ratio.max() > high:
            warnings.warn(
                f"At site '{site.name}': sigma is {ratio.min():.3g} to {ratio.max():.3g} of the data's standard deviation; "
                f"below {low} the loss is very noisy, above {high} the density is smoothed away.",
                stacklevel=2,
            )

    def figures(self, rng_key, site: Site):
        """The noise beside the data's own spread."""
        return smoothing_figures(self.sigma, site)
