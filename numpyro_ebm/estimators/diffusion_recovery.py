"""Diffusion recovery likelihood."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Float

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree, RowValues
from numpyro_ebm.distributions.energy import EnergyDistribution
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.ladder import rungs_at, stratified, warn_of_scale
from numpyro_ebm.estimators.parts.negative_phase import ChainEstimator
from numpyro_ebm.estimators.parts.starts import Start, over
from numpyro_ebm.sampling.levels import at_level, check_level
from numpyro_ebm.sampling.noise import check_sigmas

WRITE = "Write estimate(model, 'diffusion_recovery', sigmas=geometric_sigmas(10.0, 0.1, 8))."


class Pair(NamedTuple):
    """Each row at its noise level and, with more noise, at the next level.

    Attributes:
        near: rows at their level, ``(num_rows, ...)``.
        noisier: rows at the next level.
        gap: standard deviation of the noise between the two, ``(num_rows, 1, ...)``.
        unit: unit of length of each row's chain, ``(num_rows, ...)``.
        local: context and base of each row's density at its level.
    """

    near: Float[Array, " rows *position"]
    noisier: Float[Array, " rows *position"]
    gap: Float[Array, "rows ..."]
    unit: Float[Array, " rows *position"]
    local: PyTree


@dataclasses.dataclass(frozen=True)
class DiffusionRecoveryLikelihood(ChainEstimator):
    r"""Diffusion recovery likelihood (Gao et al.): maximum likelihood of each noise level given the next, by short chains.

    The model is conditioned on the noise level. At each update, each row draws a level ``k`` of the ladder
    ``sigma_1 < ... < sigma_K`` (stratified over the rows, as for "multiscale_dsm"), and noise for this level and for the
    step to the next:

    .. math:: x_k = x + \sigma_k e, \quad x_{k+1} = x_k + \delta_k e', \quad \delta_k^2 = \sigma_{k+1}^2 - \sigma_k^2

    The estimator maximises the likelihood of recovering ``x_k`` from ``x_{k+1}``,

    .. math:: p(x_k | x_{k+1}) \propto p_k(x_k) \exp\Big(-\frac{|x_{k+1} - x_k|^2}{2 \delta_k^2}\Big)

    which is consistent for ``p_k``, the density of the data plus noise of standard deviation ``sigma_k``. The conditional is
    far easier to sample than ``p_k``: it is concentrated around ``x_{k+1}``, where one chain per row starts. The gradient of
    the surrogate of a row is ``grad log p_k(x_k) - grad log p_k(x_k')``, where ``x_k'`` is the chain's end, through which no
    gradient flows; the quadratic term has no parameters. Everything is in unconstrained space, Jacobian included. The value
    is not an objective.

    The unit of length of the chains at level ``k`` is, per dimension, the standard deviation that ``p(x_k | x_{k+1})`` would
    have for Gaussian data of the batch's variance ``v``, so that one step size serves all levels:

    .. math:: \tau_k^2 = \big( \delta_k^{-2} + (\sigma_k^2 + v)^{-1} \big)^{-1}

    Within modes narrower than ``tau_k`` the density may be steeper by a factor of at most ``(sigma_{k+1} / sigma_k)^2``.
    Where neighbouring levels are far apart, chains at the steepest levels may not move while the others do. Ratios up to 2
    are safe.

    The largest level is recovered from one more level, ``sigma_{K+1} = sigma_K^2 / sigma_{K-1}``, which continues the
    ladder's last ratio. The model has no density at that level or for the data without noise; its density at ``sigma_1``
    stands for the data and includes that much noise.

    Where modes are far apart, the recovery at a small level does not determine their weights, because its noise does not
    connect them. Large levels connect them, and `AnnealedLangevin` carries the weights down the ladder. For example, take
    two modes at -2 and 2 of standard deviation .5, with .21 of the data in the left one. An energy with a separate weight at
    each of 8 levels from 4 to .2 learned .30 at the smallest level and .21 at the larger ones after 1000 updates, and
    annealed chains drew .22 (as they do from the true densities).

    State, in the mutable site ``"<site>$diffusion_recovery"``: `ChainState` without a ``pool``, with the lengths of its
    ``health`` in units of ``tau_k``.

    Args:
        num_steps: transitions per row and update, from ``x_{k+1}``; too few leave the negatives too close to it.
        kernel: a name or a kernel; training starts from its step size, in units of ``tau_k``; None for "mala".
        adapt_step_size: as for `ContrastiveDivergence`, like ``step_size_schedule``, ``temperature``, ``energy_l2``,
            ``on_unhealthy`` and ``scale``.
        sigmas: the ladder, two or more distinct positive levels in any order, in data units (in unconstrained units where
            the support is not the real line); see `geometric_sigmas`. The closer the levels, the shorter the chains may be.

    Raises:
        EnergyError: for fewer than two levels, levels that are not positive or not distinct, a model whose context has no
            noise level, and as for `ContrastiveDivergence`.

    Warns:
        UnhealthyChainsWarning: see ``on_unhealthy``.
        UserWarning: where the largest level is below the data's standard deviation (it does not connect modes); checked
            where the data are concrete, as in ``svi.init``.

    Example:
        ``estimate(model, "diffusion_recovery", sigmas=geometric_sigmas(10.0, 0.1, 8), num_steps=20)``

    References:
        Gao, Song, Poole, Wu and Kingma, Learning energy-based models by diffusion recovery likelihood (2021). In the
        paper noise also shrinks the data, the ladder starts at the data and the last level is trained without recovery.
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
                f"{owner} recovers each level from the next and needs two or more distinct levels; got {self.sigmas!r}. "
                f"{WRITE}"
            )

    def check(self, site: Site) -> None:
        """Raise for a model without a noise level, and warn where the largest level is too small to connect modes."""
        super().check(site)
        check_level(f"The estimator '{self.name}'", site.distribution)
        if site.num_rows > 1 and is_concrete(site.value, site.mask, self.sigmas):
            warn_of_scale(site, np.max(np.asarray(self.sigmas)))

    def notes(self):
        """Add that short chains stay near their starts."""
        return (*super().notes(), "chains start at the noisier copy of each row: too few steps leave the energy too wide")

    def begin(self, rng_key, site: Site, state, kernel) -> Start:
        """Start chains at the noisier copies, the origin of the recovery's coordinates."""
        return Start(kernel.lift_all(jnp.zeros_like(site.position)), site.local)

    def fresh(self, rng_key, site: Site, num_chains):
        """Return the noisier copies."""
        return jnp.zeros_like(site.position), site.local

    def surrogate(self, rng_key: PRNGKey, site: Site, state: PyTree) -> tuple[RowValues, PyTree]:
        """Return the log density of each row at its level minus that of the row that its chain recovered."""
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
        """Draw a level for each row, and return the row at this level and at the next."""
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
    """Return the site of the rows to recover: relative to the noisier copy, in units of `Pair.unit`, given that copy."""
    shape = site.position.shape[1:]

    def energy(event, own):
        return -site.log_density(own.noisier + own.unit * event, own.local)

    rows = (site.num_rows,)
    base = dist.Normal(jnp.zeros(shape, pair.near.dtype), pair.gap / pair.unit).to_event(len(shape))
    distribution = EnergyDistribution(energy, shape, context=pair, batch_shape=rows, base=base)
    value = (pair.near - pair.noisier) / pair.unit
    return dataclasses.replace(site, distribution=distribution, value=value, local=distribution.rows(value, rows).local)
