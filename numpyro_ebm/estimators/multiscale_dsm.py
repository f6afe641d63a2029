"""Denoising score matching over many noise levels at once."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from numpyro_ebm._core.concrete import eager, is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree, RowValues
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators._base import AbstractEstimator
from numpyro_ebm.estimators.parts.ladder import rungs_at, stratified, warn_of_scale
from numpyro_ebm.sampling.levels import check_level, score_at_level
from numpyro_ebm.sampling.noise import AbstractNoiseProcess, check_process, check_sigmas


@dataclasses.dataclass(frozen=True)
class MultiscaleDenoisingScoreMatching(AbstractEstimator):
    r"""Denoising score matching of a model conditioned on the noise level, over all levels at once.

    At each update each row draws a level (uniformly from the ladder, or at a time drawn uniformly from the process's range).
    With ``e ~ N(0, I)``, its loss is that of "dsm" at this level times ``sigma^2``, which puts all levels on one scale:

    .. math:: \tfrac{\sigma^2}{2} | s(\alpha x + \sigma e, \sigma) + e / \sigma |^2

    It costs one score per row. Levels are stratified over the rows (row ``i`` takes the quantile ``(perm_i + u) / n``), so
    that each row's level is still uniform while the loss of a batch varies less. Where the modes of the data lie apart, a
    score learned at one small level does not know their weights, since little noise falls between them. Large levels join
    the modes, and a sampler that goes down the ladder (`AnnealedLangevin`, `ReverseSDE`, `ProbabilityFlow`) keeps the
    weights.

    The model takes the level through its context: ``context=jnp.asarray(sigma_min)`` (one scalar per row), or a dict with an
    entry "sigma" beside covariates. The estimator replaces it row by row; everywhere else the declared level applies.

    On a support other than the real line the noise is added in unconstrained space, where large levels reach far: on the
    positive line the event at a position of 100 is ``e^100``, more than float32 holds. There a `VP` process, whose positions
    stay near 1, is the safe choice.

    Args:
        sigmas: the ladder, positive noise levels in any order, in data units (in unconstrained units where the support is
            not the real line); see `geometric_sigmas`.
        process: `VE` or `VP`, for a continuum of levels instead of a ladder.

    Raises:
        EnergyError: for neither or both of ``sigmas`` and ``process``, levels that are not positive, and a model whose
            context has no noise level.

    Warns:
        UserWarning: where the largest level is below the data's standard deviation (the modes are not joined); checked where
            the data are concrete, as in ``svi.init``.

    Example:
        ``estimate(model, "multiscale_dsm", sigmas=geometric_sigmas(10.0, 0.01, 10))``

    References:
        Song and Kingma, How to train your energy-based models (2021), section 4.3; Song and Ermon, Generative modeling by
        estimating gradients of the data distribution (2019); Song et al., Score-based generative modeling through stochastic
        differential equations (2021).
    """

    name = "multiscale_dsm"
    role = "objective"
    needs_energy = False
    sigmas: Any = None
    process: AbstractNoiseProcess | None = None

    def __post_init__(self):
        if (self.sigmas is None) == (self.process is None):
            came = "neither" if self.sigmas is None else "both"
            raise EnergyError(
                f"{type(self).__name__} needs either sigmas or a process; got {came}. "
                "Write estimate(model, 'multiscale_dsm', sigmas=geometric_sigmas(10.0, 0.01, 10)) or "
                "estimate(model, 'multiscale_dsm', process=VE(0.01, 10.0))."
            )
        if self.process is not None:
            check_process(type(self).__name__, self.process)
        else:
            check_sigmas(type(self).__name__, self.sigmas)

    def check(self, site: Site) -> None:
        """Refuse a model without a noise level; warn of levels too small to join the modes."""
        super().check(site)
        check_level(f"The estimator '{self.name}'", site.distribution)
        if site.num_rows > 1 and is_concrete(site.value, site.mask, self.sigmas, self.process):
            with eager():
                warn_of_scale(site, self._largest_level())

    def surrogate(self, rng_key: PRNGKey, site: Site, state: PyTree) -> tuple[RowValues, PyTree]:
        """Return minus the loss of each row."""
        key_level, key_noise = jax.random.split(rng_key)
        alpha, sigma = self.levels(stratified(key_level, site.num_rows))
        noise = jax.random.normal(key_noise, site.position.shape, site.position.dtype)
        alpha, sigma = alpha.astype(noise.dtype), sigma.astype(noise.dtype)
        wide = (-1,) + (1,) * (noise.ndim - 1)
        noisy = alpha.reshape(wide) * site.position + sigma.reshape(wide) * noise
        score = jax.vmap(score_at_level(site.distribution))(noisy, sigma, site.local)
        squares = (sigma.reshape(wide) * score + noise) ** 2
        return -0.5 * jnp.sum(squares.reshape(site.num_rows, -1), axis=1), state

    def levels(self, quantile: ArrayLike) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Return ``(alpha, sigma)`` at each quantile, in [0, 1), of the distribution that levels are drawn from."""
        quantile = jnp.asarray(quantile, float)
        if self.process is not None:
            t = self.process.t_min + (1 - self.process.t_min) * quantile
            return self.process.alpha(t), self.process.sigma(t)
        ladder = jnp.asarray(self.sigmas, float)
        return jnp.ones_like(quantile), ladder[rungs_at(quantile, ladder.size)]

    def _largest_level(self) -> Any:
        """Return the largest level in units of the data."""
        if self.process is None:
            return np.max(np.asarray(self.sigmas))
        return self.process.sigma(1.0) / self.process.alpha(1.0)
