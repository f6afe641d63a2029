"""Chains along the geometric path between a start and a target, in either direction."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_ebm import chains
from numpyro_ebm._errors import EnergyError
from numpyro_ebm._typing import Array, PRNGKey
from numpyro_ebm.kernels import AbstractKernel, DynamicHMC, Gibbs, resolve_kernel
from numpyro_ebm.partition._base import Densities

PILOT_LEVELS = 100
PILOT_MOVES = 3
FIRST_MOVES = 30
EVEN_SHARE = 0.1


class Levels(NamedTuple):
    """Where the intermediate densities are, and how the kernel moves at each.

    Attributes:
        betas: ``(num_levels + 1,)``, from 0 to 1.
        step_sizes: ``(num_levels + 1,)``; None for a kernel whose step does not adapt.
    """

    betas: Array
    step_sizes: Array | None


class Annealed(NamedTuple):
    """Chains that went from one end of the path to the other.

    Attributes:
        log_weights: ``(num_chains,)``; the mean of their exponentials is the ratio of the normalisers, end over beginning.
        path: ``(num_levels + 1,)``, the log of that mean at each level on the way.
    """

    log_weights: Array
    path: Array


def default_kernel(kernel: Any, distribution: Any) -> AbstractKernel:
    """The kernel given, or one that suits the support; with the settings that it takes from the distribution.

    Raises:
        EnergyError: for a kernel that cannot move on the support.
    """
    if kernel is None:
        kernel = Gibbs() if distribution.is_discrete else DynamicHMC(num_integration_steps=5)  # pyright: ignore[reportCallIssue]
    return resolve_kernel(kernel, is_discrete=distribution.is_discrete).bind(distribution)


def exact_kernel(owner: str, kernel: Any) -> AbstractKernel:
    """The kernel, which has to leave every density on the path invariant.

    Raises:
        EnergyError: for an unknown one, and for one that never rejects.
    """
    resolved = resolve_kernel(kernel, is_discrete=None)
    if not resolved.is_exact:
        raise EnergyError(
            f"{owner} needs a kernel that leaves each level invariant, and '{resolved.name}' never rejects: its bias would "
            "be in log Z. Write kernel='mala', 'hmc' or 'nuts'."
        )
    return resolved


def anneal(
    rng_key: PRNGKey, kernel: AbstractKernel, densities: Densities, starts: Array, levels: Levels, num_steps: int
) -> Annealed:
    """Weigh and move chains through the levels, forward or, with the levels turned round, backward.

    Args:
        rng_key: random key.
        kernel: leaves each density invariant.
        densities: the path's two ends.
        starts: ``(num_chains, ...)``, draws of the density at the first level.
        levels: from 0 to 1 or from 1 to 0.
        num_steps: transitions at each level.
    """
    ratios = jax.vmap(densities.log_ratio)

    def level(carry, inputs):
        positions, log_weights = carry
        key, before, after, step_size = inputs
        log_weights += (after - before) * ratios(jax.vmap(kernel.lower)(positions))
        positions, _ = _move(key, kernel, densities, positions, after, step_size, num_steps)
        return (positions, log_weights), _log_mean(log_weights)

    inputs = jax.random.split(rng_key, len(levels.betas) - 1), levels.betas[:-1], levels.betas[1:]
    step_sizes = None if levels.step_sizes is None else levels.step_sizes[1:]
    first = jax.vmap(kernel.lift)(starts), jnp.zeros(len(starts), float)
    (_, log_weights), path = jax.lax.scan(level, first, (*inputs, step_sizes))
    return Annealed(log_weights, jnp.concatenate([jnp.zeros(1), path]))


def reverse(levels: Levels) -> Levels:
    """The same levels from the last to the first."""
    return jax.tree.map(lambda leaf: leaf[::-1], levels)


def pilot(rng_key: PRNGKey, kernel: AbstractKernel, densities: Densities, starts: Array, levels: Any) -> Levels:
    """Levels where the log weights gain the same standard deviation from each to the next, and step sizes that suit them.

    A few chains go along the path once, their step size following the acceptance. They are thrown away: what is chosen here
    is fixed before the chains that count begin, which keeps their weights unbiased.

    Args:
        rng_key: random key.
        kernel: the kernel; its ``target_acceptance``, where it has one, is aimed at.
        densities: the path's two ends.
        starts: ``(num_chains, ...)``, draws of the start.
        levels: how many, or their betas, which are kept.
    """
    betas = (jnp.arange(PILOT_LEVELS + 1) / PILOT_LEVELS) ** 3
    ratios = jax.vmap(densities.log_ratio)

    def level(carry, inputs):
        positions, log_step = carry
        key, beta, num_moves = inputs

        def move(carry, key):
            positions, log_step = carry
            step_size = None if log_step is None else jnp.exp(log_step)
            positions, health = _move(key, kernel, densities, positions, beta, step_size, 1)
            if log_step is not None:
                log_step += health.acceptance_rate - target
            return (positions, log_step), None

        (positions, log_step), _ = jax.lax.scan(move, (positions, log_step), jax.random.split(key, num_moves))
        values = ratios(jax.vmap(kernel.lower)(positions))
        return (positions, log_step), (_spread(values), log_step)

    target: Any = kernel.target_acceptance
    adapts = target is not None
    log_step = jnp.log(jnp.asarray(kernel.step_size, float)) if adapts else None
    key_first, key_rest = jax.random.split(rng_key)
    carry, first = level((jax.vmap(kernel.lift)(starts), log_step), (key_first, betas[0], FIRST_MOVES))
    keys = jax.random.split(key_rest, PILOT_LEVELS)
    _, rest = jax.lax.scan(lambda c, i: level(c, (*i, PILOT_MOVES)), carry, (keys, betas[1:]))
    spreads, log_steps = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, rest)
    chosen = _place(betas, spreads, levels) if jnp.ndim(levels) == 0 else jnp.asarray(levels, float)
    return Levels(chosen, jnp.exp(jnp.interp(chosen, betas, log_steps)) if adapts else None)


def _move(rng_key, kernel, densities, positions, beta, step_size, num_steps):
    tuned = kernel if step_size is None else kernel.adapted(step_size=step_size)
    log_density = lambda position, _: densities.log_between(position, beta)  # noqa: E731
    return chains.advance(rng_key, tuned, log_density, positions, num_steps=num_steps)


def _place(betas: Array, spreads: Array, num_levels: int) -> Array:
    """Betas whose steps gain even parts of the integral of the spread, and a tenth of them even in beta itself."""
    gains = jnp.diff(betas) * (spreads[1:] + spreads[:-1]) / 2
    total = jnp.sum(gains)
    shares = jnp.where(total > 0, gains / jnp.where(total > 0, total, 1.0), jnp.diff(betas))
    reached = jnp.cumsum((1 - EVEN_SHARE) * shares + EVEN_SHARE * jnp.diff(betas))
    reached = jnp.concatenate([jnp.zeros(1), reached / reached[-1]])
    return jnp.interp(jnp.linspace(0.0, 1.0, num_levels + 1), reached, betas).at[-1].set(1.0)


def _spread(values: Array) -> Array:
    """Standard deviation of log ratios, robust to a few that are far off; where most are of nothing, 0."""
    low, high = jnp.quantile(values, jnp.array([0.16, 0.84]))
    spread = 0.5 * (high - low)
    return jnp.where(spread < 1e15, spread, 0.0)


def _log_mean(log_weights: Array) -> Array:
    return jax.nn.logsumexp(log_weights) - jnp.log(len(log_weights))
