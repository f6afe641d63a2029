"""Where the path to log Z starts where no law is given: around the energy's mass, which a few chains find."""

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from numpyro_ebm._core.typing import Array, PRNGKey
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.partition._annealing import adapt, adaptation_of, default_kernel
from numpyro_ebm.partition._base import AbstractPartition, Densities
from numpyro_ebm.partition._proposal import Proposal

NUM_SCOUTS = 64
SCOUT_MOVES = 200
SHARES = (0.8, 0.1, 0.1)
WIDE_FACTOR = 3.0
FARTHEST = 1e12
SCORE, SHIFT, GROWTH = 5.0, 0.5, 1.0
CLIPPED, FEWEST = 3.0, 10


def fits_start(method: AbstractPartition, distribution: EventDistribution) -> bool:
    """Whether the method's start is to be fitted: none is given, neither as one nor as a base, and none covers all."""
    return method.fits_start and method.start_law is None and distribution.base is None and not distribution.is_discrete


def start_around(
    rng_key: PRNGKey, method: Any, densities: Densities, starts: Array, data: Array | None
) -> tuple[Densities, Array, Array]:
    """A start around the target of one row, draws of it, and whether there is one: chains that run away find none.

    Eight tenths of it are independent normals with the mean and standard deviation of ``data``, or of chains that started
    from the reference and moved under the target itself; one tenth of it has three times the deviation, and one tenth is the
    reference, so that it covers what the reference does.

    Args:
        rng_key: random key.
        method: whose start it is.
        densities: the row's, with the reference for a start.
        starts: ``(num_starts, ...)``, draws of the reference.
        data: ``(num, ...)`` positions to fit it to; None for chains.
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
    law = Proposal(mixture, starts.shape[1:], None)
    drawn = law.sample(key_draw, len(starts)).astype(starts.dtype)
    return Densities(densities.distribution, densities.local, law), drawn, jnp.all(is_near)


class _Target(Densities):
    """A path that is the target throughout."""

    def log_between(self, position: Array, beta: Any) -> Array:
        """Not by way of a start whose log density may be so far down there that rounding would decide."""
        return self.log_target(position)


def are_still(before: Array, after: Array, weights: Array) -> Array:
    """Whether a weighted population is where it was: no coordinate shifted by half its spread, or doubled its variance.

    Weighted draws of a density stay draws of it under transitions that leave it invariant. Those that drift, or spread, were
    none. A move counts where it is beyond chance too (5 standard errors), and none where fewer than 10 draws are effective.

    Args:
        before: ``(num, ...)``.
        after: the same chains some transitions later.
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


def _quantiles(flat: Array, weights: Array) -> Array:
    """The quantiles 0.16, 0.5 and 0.84 of each coordinate of a weighted population, ``(3, d)``."""
    order = jnp.argsort(flat, axis=0)
    shares, ordered = jnp.cumsum(weights[order], axis=0), jnp.take_along_axis(flat, order, axis=0)
    places = jnp.stack([jnp.argmax(shares >= q, axis=0) for q in (0.16, 0.5, 0.84)])
    return jnp.take_along_axis(ordered, places, axis=0)
