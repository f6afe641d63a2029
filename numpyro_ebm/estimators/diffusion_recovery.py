"""Diffusion recovery likelihood."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, PyTree
from numpyro_ebm.distributions.energy import EnergyDistribution
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.ladder import rungs_at, stratified, warn_of_scale
from numpyro_ebm.estimators.parts.negative_phase import ChainEstimator
from numpyro_ebm.estimators.parts.starts import Start, over
from numpyro_ebm.sampling.levels import at_level, check_level
from numpyro_ebm.sampling.noise import check_sigmas

WRITE = "Write estimate(model, 'diffusion_recovery', sigmas=geometric_sigmas(10.0, 0.1, 8))."


class Pair(NamedTuple):
    """Each row at its level and, with more noise, at the next.

    Attributes:
        near: at the level, ``(num_rows, ...)``.
        noisier: at the next.
        gap: standard deviation of the noise between the two, ``(num_rows, 1, ...)``.
        unit: what lengths of the row's chain are measured in, ``(num_rows, ...)``.
        local: what each row's density at its level has of its own.
    """

    near: Array
    noisier: Array
    gap: Array
    unit: Array
    local: PyTree


@dataclasses.dataclass(frozen=True)
class DiffusionRecoveryLikelihood(ChainEstimator):
    r"""Diffusion recovery likelihood (Gao et al.): maximum likelihood of each noise level given the next, by short chains.

    For a model conditioned on the noise level. Each row draws a level ``k`` of the ladder ``sigma_1 < ... < sigma_K`` afresh
    at each update (stratified over the rows, as for "multiscale_dsm"), and noise for it and for the step to the next:

    .. math:: x_k = x + \sigma_k e, \quad x_{k+1} = x_k + \delta_k e', \quad \delta_k^2 = \sigma_{k+1}^2 - \sigma_k^2

    What is maximised is the likelihood of recovering the one from the other,

    .. math:: p(x_k | x_{k+1}) \propto p_k(x_k) \exp\Big(-\frac{|x_{k+1} - x_k|^2}{2 \delta_k^2}\Big)

    which is consistent for ``p_k``, the density of the data plus noise of ``sigma_k``. It is far easier to sample than
    ``p_k``: a bump around ``x_{k+1}``, where one chain per row begins. The gradient of the surrogate of a row is
    ``grad log p_k(x_k) - grad log p_k(x_k')``, with ``x_k'`` the chain's end, through which no gradient flows; the quadratic
    has no parameters. All in unconstrained space, Jacobian included; the value means nothing as an objective.

    The chains of level ``k`` measure lengths, per dimension, in the deviation that ``p(x_k | x_{k+1})`` would have for
    Gaussian data of the batch's variance ``v``: one step size then serves all levels.

    .. math:: \tau_k^2 = \big( \delta_k^{-2} + (\sigma_k^2 + v)^{-1} \big)^{-1}

    Within modes narrower than that the density may be steeper by ``(sigma_{k+1} / sigma_k)^2`` at most: where neighbours of
    the ladder are far apart, the steepest levels may stand still while the others move. Ratios up to 2 are safe.

    The largest level too is recovered from a larger one, the ladder's last ratio going on:
    ``sigma_{K+1} = sigma_K^2 / sigma_{K-1}``. Neither that one nor the data without noise has a density of its own; the
    model at ``sigma_1`` stands for the data, and carries that much noise.

    Where modes lie apart, the recovery at a small level does not know their weights, since little noise comes between them;
    at large levels they are joined, and `AnnealedLangevin` brings the weights down the ladder. Two modes at -2 and 2, of
    deviation .5, the left one with .21 of the data: an energy with a weight of its own at each of 8 levels from 4 to .2 came
    to .30 at the smallest level and .21 at the larger ones after 1000 updates, and annealed chains drew .22 (as they do from
    the true densities).

    State, in the mutable site ``"<site>$diffusion_recovery"``: ``health`` (lengths in units of ``tau_k``), ``num_updates``
    and ``averaging`` (see `pcd`).

    Args:
        num_steps: transitions per row and update, from ``x_{k+1}``; too few leave the negatives too near to it.
        kernel: a name or a kernel, whose step size, in units of ``tau_k``, the training starts from.
        adapt_step_size: this, ``step_size_schedule``, ``temperature``, ``energy_l2``, ``on_unhealthy`` and ``scale`` are
            those of `ContrastiveDivergence`.
        sigmas: the ladder, two or more different positive levels in any order, in data units (in unconstrained units where
            the support is not the real line); see `geometric_sigmas`. The closer they are, the shorter the chains may be.

    Raises:
        EnergyError: without levels, for fewer than two, levels that are not positive or not different, and a model whose
            context has no noise level; and as `ContrastiveDivergence`.

    Warns:
        UnhealthyChainsWarning: see ``on_unhealthy``.
        UserWarning: where the largest level is below the data's standard deviation (the modes are not joined); checked where
            the data are concrete, as in ``svi.init``.

    Example:
        ``estimate(model, "diffusion_recovery", sigmas=geometric_sigmas(10.0, 0.1, 8), num_steps=20)``

    References:
        Gao, Song, Poole, Wu and Kingma, Learning energy-based models by diffusion recovery likelihood (2021); there noise
        also shrinks the data, the ladder starts at the data and the last level is trained without recovery.
    """

    name = "diffusion_recovery"
    num_steps: int = 10
    sigmas: Any = None

    def __post_init__(self):
        super().__post_init__()
        owner = type(self).__name__
        if self.sigmas is None:
            raise EnergyError(f"{owner} needs levels. {WRITE}")
        check_sigmas(owner, self.sigmas)
        if np.size(self.sigmas) < 2 or (is_concrete(self.sigmas) and len(np.unique(self.sigmas)) < np.size(self.sigmas)):
            raise EnergyError(
                f"{owner} recovers each level from the next and needs two or more that differ; got {self.sigmas!r}. {WRITE}"
            )

    def check(self, site: Site) -> None:
        """Refuse a model without a noise level; warn of levels that do not reach from mode to mode."""
        super().check(site)
        check_level(f"The estimator '{self.name}'", site.distribution)
        if site.num_rows > 1 and is_concrete(site.value, site.mask, self.sigmas):
            warn_of_scale(site, np.max(np.asarray(self.sigmas)))

    def notes(self):
        """Short chains keep near to where they began."""
        return (*super().notes(), "chains begin at the noisier copy of each row: too few steps leave the energy too wide")

    def begin(self, rng_key, site: Site, state, kernel) -> Start:
        """At the noisier copies."""
        return Start(jax.vmap(kernel.lift)(jnp.zeros_like(site.position)), site.local)

    def fresh(self, rng_key, site: Site, num_chains):
        """There again."""
        return jnp.zeros_like(site.position), site.local

    def surrogate(self, rng_key, site: Site, state):
        """Log density of each row at its level minus that of what its chain recovered."""
        key_pair, key_start, key_chains = jax.random.split(rng_key, 3)
        pair = self.pair(key_pair, site)
        recovery = recovery_of(site, pair)
        kernel = self.tuned(recovery, state)
        start = self.begin(key_start, recovery, state, kernel)
        recovered, state = self.update(key_chains, recovery, state, kernel, start)
        negatives = pair.noisier + pair.unit * recovered
        ours = self._penalised(site, pair.near, pair.local, 1.0)
        return ours - self._penalised(site, negatives, pair.local, -1.0), state

    def pair(self, rng_key, site: Site) -> Pair:
        """A level for each row, and the row there and at the next."""
        key_level, key_near, key_noisier = jax.random.split(rng_key, 3)
        position = site.position
        ladder = jnp.sort(jnp.ravel(jnp.asarray(self.sigmas, position.dtype)))
        ladder = jnp.append(ladder, ladder[-1] ** 2 / ladder[-2])
        rungs = rungs_at(stratified(key_level, site.num_rows), ladder.size - 1)
        sigma, gap = (over(each, position) for each in (ladder[rungs], jnp.sqrt(ladder[1:] ** 2 - ladder[:-1] ** 2)[rungs]))
        near = position + sigma * jax.random.normal(key_near, position.shape, position.dtype)
        noisier = near + gap * jax.random.normal(key_noisier, position.shape, position.dtype)
        unit = 1 / jnp.sqrt(1 / gap**2 + 1 / (sigma**2 + site.spread**2))
        return Pair(near, noisier, gap, unit, at_level(site.local, ladder[rungs]))


def recovery_of(site: Site, pair: Pair) -> Site:
    """The rows as what is to be recovered: from the noisier copy, in their units, under their conditional density."""
    shape = site.position.shape[1:]

    def energy(event, own):
        return -site.log_density(own.noisier + own.unit * event, own.local)

    rows = (site.num_rows,)
    base = dist.Normal(jnp.zeros(shape, pair.near.dtype), pair.gap / pair.unit).to_event(len(shape))
    distribution = EnergyDistribution(energy, shape, context=pair, batch_shape=rows, base=base)
    value = (pair.near - pair.noisier) / pair.unit
    return dataclasses.replace(site, distribution=distribution, value=value, local=distribution.rows(value, rows).local)
