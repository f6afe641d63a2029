"""The start of the path to log Z if none is given: around the energy's mass, which a few chains find."""

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Bool, Float

from numpyro_ebm._core.typing import Array, PRNGKey, Scalar
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.partition._annealing import adapt, adaptation_of, default_kernel
from numpyro_ebm.partition._base import AbstractPartition, Densities
from numpyro_ebm.partition._proposal import Proposal

NUM_SCOUTS = 64
"""Chains that look for the mass of the target."""
SCOUT_MOVES = 200
"""Transitions of each of these chains: together they cost about a tenth of a default run of "ais"."""
SHARES = (0.8, 0.1, 0.1)
"""Shares of the fitted normals, of wider ones and of the reference, whose tails keep the weights bounded."""
WIDE_FACTOR = 3.0
"""Standard deviation of the wider normals, in units of the fitted ones."""
FARTHEST = 1e12
"""Chains beyond this have run away, as under an energy without a finite integral: no start is fitted to them."""
SCORE, SHIFT, GROWTH = 5.0, 0.5, 1.0
"""`are_still`: standard errors that exclude chance (6e-7), and the least shift and growth, in units of the spread."""
CLIPPED, FEWEST = 3.0, 10
"""`are_still`: positions are clipped at 3 spreads, for outliers; with fewer than 10 effective draws no move counts."""


def fits_start(method: AbstractPartition, distribution: EventDistribution) -> bool:
    """Return whether the method's start is to be fitted: no start and no base is given, and the support is not discrete."""
    has_start = method.start_distribution is not None or distribution.base is not None or not distribution.is_continuous
    return method.fits_start and not has_start


def start_around(
    rng_key: PRNGKey,
    method: AbstractPartition,
    densities: Densities,
    starts: Float[Array, " starts *position"],
    data: Float[Array, " rows *position"] | None,
) -> tuple[Densities, Float[Array, " starts *position"], Bool[Array, ""]]:
    """Return a start around the target of one row, draws of it, and whether the chains found one instead of running away.

    Eight tenths of the start are independent normals with the mean and standard deviation of ``data``, or of chains that
    start from the reference and move under the target itself. One tenth has three times the standard deviation, and one
    tenth is the reference, so that the start covers what the reference covers.

    Args:
        rng_key: random key.
        method: the method that needs the start.
        densities: the row's densities, with the reference as start.
        starts: ``(num_starts, ...)``, draws of the reference.
        data: ``(num, ...)`` positions to which the start is fitted; None for chains.
    """
    key_scout, key_draw = jax.random.split(rng_key)
    if data is None:
        kernel = default_kernel(getattr(method, "kernel", None), densities.distribution)
        target = _Target(densities.distribution, densities.local)
        carry = adapt(key_scout, kernel, target, adaptation_of(kernel, starts[:NUM_SCOUTS]), 1.0, SCOUT_MOVES)
        found = jax.vmap(kernel.lower)(carry[0])
    else:
        found = data
    flat = found.reshape(len(found), -1).astype(float)
    mean, deviation = jnp.mean(flat, axis=0), jnp.std(flat, axis=0)
    is_near = (jnp.abs(mean) < FARTHEST) & (deviation < FARTHEST)
    deviation = jnp.where(is_near & (deviation > 0), deviation, 1.0)
    mean, one = jnp.where(is_near, mean, 0.0), jnp.ones_like(mean)
    normal = dist.Normal(jnp.stack([mean, mean, 0 * mean]), jnp.stack([deviation, WIDE_FACTOR * deviation, one])).to_event(1)
    mixture = dist.MixtureSameFamily(dist.Categorical(jnp.asarray(SHARES)), normal, validate_args=False)
    proposal = Proposal(mixture, starts.shape[1:], None)
    drawn = proposal.sample(key_draw, len(starts)).astype(starts.dtype)
    return Densities(densities.distribution, densities.local, proposal), drawn, jnp.all(is_near)


class _Target(Densities):
    """A path that is the target throughout."""

    def log_between(self, position: Float[Array, "*position"], beta: Scalar | float) -> Scalar:
        """Return the target's log density; far from the start, adding the start's would lose it in rounding."""
        return self.log_target(position)


def are_still(
    before: Float[Array, " chains *position"], after: Float[Array, " chains *position"], weights: Float[Array, " chains"]
) -> Bool[Array, ""]:
    """Return whether a weighted population stays in place: no coordinate shifts by half its spread or doubles its variance.

    Weighted draws of a density remain draws of it under transitions that leave it invariant; a population that drifts or
    spreads did not consist of such draws. A move counts only beyond chance (5 standard errors), and never with fewer than 10
    effective draws.

    Args:
        before: ``(num, ...)``.
        after: the same chains after further transitions.
        weights: ``(num,)``, of any scale.
    """
    weights = weights / jnp.sum(weights)
    first, second = (each.reshape(len(each), -1).astype(float) for each in (before, after))
    low, middle, high = _quantiles(first, weights)
    spread = jnp.where(high > low, (high - low) / 2, jnp.finfo(first.dtype).tiny)
    old, new = (jnp.clip((each - middle) / spread, -CLIPPED, CLIPPED) for each in (first, second))

    def moved(change, least):
        mean = weights @ change
        error = jnp.sqrt(weights**2 @ (change - mean) ** 2)
        return (jnp.abs(mean) > least) & (jnp.abs(mean) > SCORE * error)

    has_moved = moved(new - old, SHIFT) | moved(new**2 - old**2, GROWTH)
    return ~jnp.any(has_moved) | (1 / jnp.sum(weights**2) < FEWEST)


def _quantiles(flat: Float[Array, "chains d"], weights: Float[Array, " chains"]) -> Float[Array, "3 d"]:
    """Return the quantiles 0.16, 0.5 and 0.84 of each coordinate of a weighted population, ``(3, d)``."""
    order = jnp.argsort(flat, axis=0)
    shares, ordered = jnp.cumsum(weights[order], axis=0), jnp.take_along_axis(flat, order, axis=0)
    places = jnp.stack([jnp.argmax(shares >= q, axis=0) for q in (0.16, 0.5, 0.84)])
    return jnp.take_along_axis(ordered, places, axis=0)
