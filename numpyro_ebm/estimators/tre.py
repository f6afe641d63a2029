"""Telescoping density ratio estimation over noise levels."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree, RowValues
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators._base import AbstractEstimator
from numpyro_ebm.estimators.parts.fitted_noise import fit_noise
from numpyro_ebm.estimators.parts.normalizer import LogNormalizer, check_normalizer, learned_normalizer
from numpyro_ebm.estimators.parts.saturation import warn_where_saturated
from numpyro_ebm.sampling.levels import ENTRY, at_level, check_level
from numpyro_ebm.sampling.noise import check_sigmas


@dataclasses.dataclass(frozen=True)
class TelescopingRatioEstimation(AbstractEstimator):
    r"""Telescoping ratio estimation (Rhodes et al.): a chain of bridges from the data to noise, with a classifier for each.

    It is for data that are far from any noise, where the classifier of "nce" saturates. Waymarks are the rows plus noise of
    growing levels, ``x_k = x + sigma_k e`` for ``k = 1..K`` (one ``e`` per row for all levels, drawn anew at each update).
    The last waymark ``x_{K+1}`` is a draw of a Gaussian ``q`` fitted to the ``x_K`` of the other half of the batch. A model
    conditioned on the noise level gives the density at each waymark, ``log p_k = log base - E(., sigma_k) - c_k``, and
    ``p_{K+1} = q``. With ``G_k = log p_k - log p_{k+1}``, the loss of a row is the sum of the bridges' logistic losses

    .. math:: \sum_{k=1}^{K} -\log \sigma(G_k(x_k)) - \log \sigma(-G_k(x_{k+1}))

    The log ratio of a bridge is a difference of two energies of one model, where the paper has a network head per bridge.
    The model at ``sigma_1`` is therefore a normalised density of the data plus that much noise, with no product of ratios to
    form. All is in unconstrained space, Jacobian included; the cost is about ``3 K`` energies per row.

    The ``numpyro.param`` ``"<site>$log_normalizer"``, of shape ``(K,)``, converges to log Z at the levels, smallest first.

    Args:
        sigmas: the ladder, positive noise levels in any order, as for "multiscale_dsm"; neighbouring levels must overlap.
        log_normalizer: as for "nce": "learned", "fixed", or None for "learned" and an error where rows have covariates or a
            base of their own.

    Raises:
        EnergyError: for missing levels, levels that are not positive, a model whose context has no noise level, a batch of
            one row, and rows with covariates or a base of their own without a choice of ``log_normalizer``.

    Warns:
        UserWarning: where nothing is learned from a bridge, since its ends do not overlap.

    Example:
        ``estimate(model, "tre", sigmas=geometric_sigmas(10.0, 0.01, 12))``

    References:
        Rhodes, Xu and Gutmann, Telescoping density-ratio estimation (2020).
    """

    name = "tre"
    role = "objective"
    sigmas: Any = None
    log_normalizer: LogNormalizer | None = None

    def __post_init__(self):
        if self.sigmas is None:
            raise EnergyError(
                f"{type(self).__name__} needs levels. Write estimate(model, 'tre', sigmas=geometric_sigmas(10.0, 0.01, 12))."
            )
        check_sigmas(type(self).__name__, self.sigmas)
        check_normalizer(type(self).__name__, self.log_normalizer, takes_prior=False)

    def check(self, site: Site) -> None:
        """Refuse a model without a noise level."""
        super().check(site)
        check_level(f"The estimator '{self.name}'", site.distribution)

    def surrogate(self, rng_key: PRNGKey, site: Site, state: PyTree) -> tuple[RowValues, PyTree]:
        """Return minus the loss of each row."""
        key_noise, key_end = jax.random.split(rng_key)
        sigmas = jnp.sort(jnp.ravel(jnp.asarray(self.sigmas, site.position.dtype)))
        noise = jax.random.normal(key_noise, site.position.shape, site.position.dtype)
        waymarks = site.position + sigmas.reshape((-1,) + (1,) * noise.ndim) * noise
        end = fit_noise(key_end, waymarks[-1], site.mask, "gaussian")
        last = end.sample(key_end, 1).reshape(1, *noise.shape)

        def log_density(sigma, positions):
            return jax.vmap(lambda z, local: site.log_density(z, at_level(local, sigma)))(positions, site.local)

        # Each waymark needs the densities of its own level, of the level before and of the level after.
        points = jnp.concatenate([waymarks, waymarks[1:], last, waymarks[:-1]])
        values = jax.vmap(log_density)(jnp.concatenate([sigmas, sigmas, sigmas[1:]]), points)
        own, before, after = jnp.split(values, [len(sigmas), 2 * len(sigmas)])
        near = own - jnp.concatenate([after, end.log_prob(waymarks[-1:])])
        far = before - jnp.concatenate([own[1:], end.log_prob(last)])
        log_z = learned_normalizer(site, self._choice(site), _to_the_end(near), _to_the_end(far))
        step = (log_z - jnp.append(log_z[1:], 0.0))[:, None]
        near, far = near - step, far - step
        _warn_of_gaps(site, near, far)
        return -jnp.sum(jax.nn.softplus(-near) + jax.nn.softplus(far), axis=0), state

    def _choice(self, site: Site) -> LogNormalizer | None:
        """Return the choice of normaliser; a row's own level does not make log Z differ, since it is replaced."""
        context, base_parameters = site.local
        only_level = not isinstance(context, Mapping) or set(context) == {ENTRY}
        return "learned" if self.log_normalizer is None and only_level and base_parameters is None else self.log_normalizer


def _to_the_end(ratios: Float[Array, "levels rows"]) -> Float[Array, "levels rows"]:
    """Sum the log ratios from each level to the last."""
    return jnp.cumsum(ratios[::-1], axis=0)[::-1]


def _warn_of_gaps(
    site: Site, near: Float[Array, "levels {site.num_rows}"], far: Float[Array, "levels {site.num_rows}"]
) -> None:
    slopes = jax.nn.sigmoid(-near) + jax.nn.sigmoid(far)
    weakest = slopes[jnp.argmin(jnp.mean(slopes, axis=1))]
    warn_where_saturated(site, weakest, "the ends of a bridge do not overlap", "Give more levels, or a larger last one.")
