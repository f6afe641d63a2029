"""Noise contrastive estimation."""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from numpyro_ebm._errors import EnergyError, check_count, eager, is_concrete
from numpyro_ebm._events import check_same_support
from numpyro_ebm._typing import Array, PRNGKey
from numpyro_ebm.estimators._base import AbstractEstimator, Site
from numpyro_ebm.estimators._figures import mean_over_rows


@dataclasses.dataclass(frozen=True)
class NoiseContrastiveEstimation(AbstractEstimator):
    r"""Noise contrastive estimation (Gutmann and Hyvarinen): tell data from noise; log Z is learned as a parameter.

    With ``G(x) = log p(x) - log p_n(x) - log nu`` and ``log p = log base - E - c``, the loss of a row is

    .. math:: -\log \sigma(G(x)) - \sum_{j=1}^{\nu} \log \sigma(-G(y_j)), \qquad y_j \sim p_n

    with noise drawn afresh at each update. ``c`` is the ``numpyro.param`` named ``"<site>$log_normalizer"`` and
    converges to log Z. ``1 + nu`` energies per row, no derivative of the energy in x. With noise equal to the data the
    efficiency is ``nu / (1 + nu)``; noise far from the data learns nothing.

    Args:
        nu: noise draws per row.
        noise: a normalised NumPyro distribution of the energy's event shape and support; None for the energy's own base,
            or a standard normal in unconstrained space where it has none.

    Raises:
        EnergyError: for nu that is not a whole number above 0; for noise of another event shape, support, or with a
            batch shape; for noise of density zero at a datum (the row is named); for rows with a context of their own,
            whose log Z is not one number.

    Warns:
        UserWarning: where the noise does not overlap the data; checked where the data are concrete, as in ``svi.init``.

    Example:
        ``estimate(model, "nce", nu=5, noise=dist.Normal(0, 2).expand([11]).to_event(1))``

    References:
        Gutmann and Hyvarinen, Noise-contrastive estimation of unnormalized statistical models (2012).
    """

    name = "nce"
    role = "objective"
    nu: int = 1
    noise: Any = None

    def __post_init__(self):
        check_count("NoiseContrastiveEstimation", "nu", self.nu)
        if self.noise is not None and not isinstance(self.noise, dist.Distribution):
            raise TypeError(f"NCE needs noise as a numpyro distribution; got {type(self.noise).__name__}.")

    def check(self, site: Site) -> None:
        """Refuse noise that does not fit, and warn of noise that cannot teach."""
        super().check(site)
        self.refuse_local(site, "its log Z is one number per row, and one number is learned.")
        noise = self._noise(site)
        if noise.event_shape != site.distribution.event_shape or noise.batch_shape != ():
            raise EnergyError(
                f"The noise has event shape {noise.event_shape} and batch shape {noise.batch_shape}; the energy has event "
                f"shape {site.distribution.event_shape}. Write noise={type(noise).__name__}(...).to_event(1)."
            )
        check_same_support("noise", noise, site.distribution.support)
        if is_concrete(site.value, site.mask, noise):
            with eager():
                _check_overlap(noise, site)

    def surrogate(self, rng_key, site: Site, state):
        """Minus the classification loss, per row."""
        at_data, at_noise, inside = self._log_ratios(rng_key, site)
        at_data, at_noise = at_data - jnp.log(self.nu), at_noise - jnp.log(self.nu)
        return -jax.nn.softplus(-at_data) - jnp.sum(jnp.where(inside, jax.nn.softplus(at_noise), 0.0), axis=1), state

    def figures(self, rng_key, site: Site):
        r"""How well data and noise are told apart, both taken as equally frequent.

        With ``r = p / p_n`` the ``accuracy`` is that of guessing data where ``r > 1``, half over the rows and half over
        noise: 1/2 where nothing is told apart. The ``overlap`` is the mean of ``2 min(P, 1 - P)`` with ``P = r / (1 + r)``,
        which estimates :math:`\int \min(p, p_n)`: 1 for noise like the data, 0 where the classifier is saturated and nothing
        more is learned. Where the energy fits, ``accuracy = 1 - overlap / 2``.
        """
        at_data, at_noise, inside = self._log_ratios(rng_key, site)

        def balanced(data, noise):
            return 0.5 * (mean_over_rows(data, site.mask) + mean_over_rows(noise.reshape(-1), inside.reshape(-1)))

        return {
            "accuracy": balanced((1 + jnp.sign(at_data)) / 2, (1 - jnp.sign(at_noise)) / 2),
            "overlap": 2 * balanced(jax.nn.sigmoid(-jnp.abs(at_data)), jax.nn.sigmoid(-jnp.abs(at_noise))),
        }

    def _log_ratios(self, rng_key: PRNGKey, site: Site) -> tuple[Array, Array, Array]:
        """``log p - log p_n`` at the rows and at noise, and which noise draws lie inside the support.

        A draw rounded to the wall has no density there: a row stands in for it, to be left out, without a gradient.
        """
        noise = self._noise(site)
        log_normalizer: Any = numpyro.param(f"{site.name}$log_normalizer", jnp.zeros(()))

        def log_ratio(event):
            return site.distribution.log_density(event) - log_normalizer - noise.log_prob(event)

        def at_fake(fake, row):
            inside = jnp.all(jnp.isfinite(site.distribution.unconstrain(fake)))
            return log_ratio(jnp.where(inside, fake, row)), inside

        fakes = site.distribution.as_events(jax.lax.stop_gradient(noise.sample(rng_key, (site.num_rows, self.nu))))
        at_noise, inside = jax.vmap(jax.vmap(at_fake, in_axes=(0, None)))(fakes, site.value)
        return jax.vmap(log_ratio)(site.value), at_noise, inside

    def _noise(self, site: Site) -> Any:
        return self.noise if self.noise is not None else site.distribution.reference


def _check_overlap(noise: Any, site: Site) -> None:
    keep = np.ones(site.num_rows, bool) if site.mask is None else np.asarray(site.mask)
    at_data = np.asarray(noise.log_prob(site.value))
    outside = np.flatnonzero(keep & ~np.isfinite(at_data))
    if outside.size:
        raise EnergyError(
            f"The noise has log density {at_data[outside[0]]} at row {outside[0]}: its density has to be positive wherever "
            "the data are. Write wider noise, e.g. noise=numpyro.distributions.Normal(mean, 2 * sd)."
        )
    # Typical values of the noise's own log density; where every datum lies below them all, the classes separate.
    typical = np.asarray(noise.log_prob(noise.sample(jax.random.key(0), (1000,))))
    if keep.any() and at_data[keep].max() < typical.min():
        warnings.warn(
            f"At site '{site.name}': the noise does not overlap the data (largest noise log density at the data "
            f"{at_data[keep].max():.3g}, smallest of 1000 noise draws {typical.min():.3g}): NCE will not learn. Write noise "
            "around the data, e.g. numpyro.distributions.Normal(data.mean(0), data.std(0)).to_event(1).",
            stacklevel=2,
        )
