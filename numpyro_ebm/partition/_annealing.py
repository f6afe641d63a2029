"""Chains along the geometric path between a start and a target, in either direction."""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, Position, PRNGKey, Scalar
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.kernels import AbstractKernel, DynamicHMC, chains
from numpyro_ebm.kernels.densities import keep
from numpyro_ebm.kernels.names import kernel_of, resolve_kernel
from numpyro_ebm.partition._base import Densities

PILOT_LEVELS = 100
"""Levels of the pilot run: more resolve the path better, at a cost in proportion."""
PILOT_MOVES = 3
"""Transitions per level of the pilot run; with 32 chains it costs a tenth of the default run."""
FIRST_MOVES = 30
"""Transitions of the pilot run at beta 0, where the step size is not adapted yet."""
EVEN_SHARE = 0.1
"""Share of the levels that is even in beta, for parts of the path where the pilot run finds no spread."""
SETTLING_MOVES = 20
"""Repeats of the last level, to see whether chains stay there: 2 % of the default number of levels."""

Positions: TypeAlias = Shaped[Array, " chains *position"]
"""Positions of the target, one per chain."""
Adapted: TypeAlias = tuple[Float[Array, "..."] | None, Float[Array, " d"] | None]
"""Logs of the step size and of the inverse mass matrix; None for what does not adapt."""


class Levels(NamedTuple):
    """The intermediate densities, and the kernel's settings at each of them.

    Attributes:
        betas: ``(num_levels + 1,)``, from 0 to 1.
        step_sizes: ``(num_levels + 1,)``; None for a kernel whose step size does not adapt.
        inverse_masses: ``(num_levels + 1, d)``, variances of the coordinates; None for a kernel without a mass matrix, or
            with one of its own.
    """

    betas: Float[Array, "*levels"]
    step_sizes: Float[Array, "*levels"] | None
    inverse_masses: Float[Array, "*levels d"] | None


class Annealed(NamedTuple):
    """Chains that went from one end of the path to the other.

    Attributes:
        log_weights: ``(num_chains,)``; the mean of their exponentials estimates the ratio of the normalisers, last over
            first.
        path: ``(1, num_levels + 1)``, the log of that mean at each level; a row for each device that shares the chains.
        positions: ``(num_chains, ...)``, where the chains ended.
        settled: where they are after further transitions at the last level.
    """

    log_weights: Float[Array, " chains"]
    path: Float[Array, "devices levels"]
    positions: Positions
    settled: Positions


def default_kernel(kernel: str | AbstractKernel | None, distribution: EventDistribution) -> AbstractKernel:
    """Return the given kernel, or one that suits the support, with the settings that it takes from the distribution.

    Raises:
        EnergyError: for a kernel that cannot move on the support.
    """
    if kernel is None and distribution.is_continuous:
        kernel = DynamicHMC(num_integration_steps=5)  # pyright: ignore[reportCallIssue]
    resolved = kernel_of(kernel, distribution, usual="mala")
    if distribution.is_mixed and resolved.adapts_mass_matrix:
        raise EnergyError(
            "log Z of an event with discrete members adapts one step size and no mass matrix. Write kernels without one, "
            "such as kernel={'x': 'mala', 's': 'gibbs'}."
        )
    return resolved.bind(distribution)


def exact_kernel(owner: str, kernel: str | AbstractKernel) -> AbstractKernel:
    """Return the kernel, which has to leave every density on the path invariant.

    Raises:
        EnergyError: for an unknown kernel, and for one that never rejects.
    """
    resolved = resolve_kernel(kernel, is_discrete=None)
    if not resolved.is_exact:
        exact = "'gibbs', 'flips' or 'dmala'" if resolved.is_discrete else "'mala', 'hmc' or 'nuts'"
        raise EnergyError(
            f"{owner} needs a kernel that leaves each level invariant, but '{resolved.name}' never rejects: its bias would "
            f"enter log Z. Write kernel={exact}."
        )
    return resolved


def anneal(
    rng_key: PRNGKey,
    kernel: AbstractKernel,
    densities: Densities,
    starts: Positions,
    levels: Levels,
    num_steps: int,
    axis_name: str | None = None,
) -> Annealed:
    """Weight and move chains through the levels: forward, or backward if the levels are reversed.

    Args:
        rng_key: random key.
        kernel: a kernel that leaves each density invariant.
        densities: the two ends of the path.
        starts: ``(num_chains, ...)``, draws of the density at the first level.
        levels: from 0 to 1 or from 1 to 0.
        num_steps: transitions at each level.
        axis_name: as in `chains.advance`.
    """
    ratios = jax.vmap(densities.log_ratio)
    # Repeat the last level without weights, to see whether chains stay where they ended.
    levels = jax.tree.map(lambda leaf: jnp.concatenate([leaf, jnp.repeat(leaf[-1:], SETTLING_MOVES, axis=0)]), levels)
    num_levels = len(levels.betas) - 1 - SETTLING_MOVES

    def level(carry, inputs):
        positions, log_weights, ends = carry
        key, i, before, tuning = inputs
        gains = (tuning.betas - before) * ratios(jax.vmap(kernel.lower)(positions))
        log_weights += jnp.where(i < num_levels, gains, 0.0)
        positions = move(key, tuned(kernel, tuning), densities, positions, tuning.betas, num_steps, axis_name).positions
        ends = jnp.where(i < num_levels, jax.vmap(kernel.lower)(positions), ends)
        return (positions, log_weights, ends), log_mean(log_weights)

    num = len(levels.betas) - 1
    inputs = jax.random.split(rng_key, num), jnp.arange(num), levels.betas[:-1], jax.tree.map(lambda x: x[1:], levels)
    lifted = kernel.lift_all(starts)
    first = lifted, jnp.zeros(len(starts), float), jax.vmap(kernel.lower)(lifted)
    (positions, log_weights, ends), path = jax.lax.scan(level, first, inputs)
    path = jnp.concatenate([jnp.zeros(1), path[:num_levels]])
    return Annealed(log_weights, path[None], ends, jax.vmap(kernel.lower)(positions))


def reverse(levels: Levels) -> Levels:
    """Return the same levels from the last to the first."""
    return jax.tree.map(lambda leaf: leaf[::-1], levels)


def pilot(rng_key: PRNGKey, kernel: AbstractKernel, densities: Densities, starts: Positions, levels: Any) -> Levels:
    """Return levels between which the log weights gain equal standard deviations, and step sizes that suit them.

    A few chains go along the path once, while their step size follows the acceptance, and are discarded. The levels are thus
    fixed before the chains that count start, which keeps their weights unbiased.

    Args:
        rng_key: random key.
        kernel: the kernel; its ``target_acceptance``, if it has one, is the target of the step size.
        densities: the two ends of the path.
        starts: ``(num_chains, ...)``, draws of the start.
        levels: the number of levels, or their betas, which are kept.
    """
    betas = (jnp.arange(PILOT_LEVELS + 1) / PILOT_LEVELS) ** 3
    ratios = jax.vmap(densities.log_ratio)

    def level(carry, inputs):
        key, beta, num_moves = inputs
        carry = adapt(key, kernel, densities, carry, beta, num_moves)
        values = ratios(jax.vmap(kernel.lower)(carry[0]))
        return carry, (_spread(values), carry[1])

    key_first, key_rest = jax.random.split(rng_key)
    carry, first = level(adaptation_of(kernel, starts), (key_first, betas[0], FIRST_MOVES))
    keys = jax.random.split(key_rest, PILOT_LEVELS)
    _, rest = jax.lax.scan(lambda c, i: level(c, (*i, PILOT_MOVES)), carry, (keys, betas[1:]))
    spreads, logs = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, rest)
    chosen = _place(betas, spreads, levels) if jnp.ndim(levels) == 0 else jnp.asarray(levels, float)
    between = jax.vmap(lambda values: jnp.interp(chosen, betas, values), in_axes=-1, out_axes=-1)
    step_sizes, inverse_masses = (
        None if each is None else jnp.exp(between(each.reshape(len(betas), -1)).reshape(-1, *each.shape[1:]))
        for each in logs
    )
    return Levels(chosen, step_sizes, inverse_masses)


def adaptation_of(kernel: AbstractKernel, starts: Positions) -> tuple[Position, Adapted]:
    """Return chains that start to adapt: positions as the kernel moves them, and logs of step size and inverse mass matrix.

    None stands for what does not adapt. The matrix is diagonal, with the variances of the population of chains.
    """
    log_step = None if kernel.target_acceptance is None else jnp.log(jnp.asarray(kernel.step_size, float))
    own_mass = getattr(kernel, "inverse_mass_matrix", None)
    log_mass = _log_variances(starts) if kernel.adapts_mass_matrix and own_mass is None else None
    return kernel.lift_all(starts), (log_step, log_mass)


def adapt(
    rng_key: PRNGKey,
    kernel: AbstractKernel,
    densities: Densities,
    carry: tuple[Position, Adapted],
    beta: Any,
    num_moves: int,
) -> tuple[Position, Adapted]:
    """Run transitions of `adaptation_of` chains at one level, while the step size follows their mean acceptance.

    The variances of the population are the inverse mass matrix of the next transition. Along a coordinate in which the
    target is much wider than the chains, they grow by a factor at each transition, so no length has to be known beforehand.
    """

    def one(carry, key):
        positions, (log_step, log_mass) = carry
        settings = Levels(beta, *(None if each is None else jnp.exp(each) for each in (log_step, log_mass)))
        positions, health, *_ = move(key, tuned(kernel, settings), densities, positions, beta, 1)
        if log_step is not None:
            log_step += health.acceptance_rate - jnp.asarray(kernel.target_acceptance)
        if log_mass is not None:
            log_mass = _log_variances(jax.vmap(kernel.lower)(positions))
        return (positions, (log_step, log_mass)), None

    return jax.lax.scan(one, carry, jax.random.split(rng_key, num_moves))[0]


def tuned(kernel: AbstractKernel, settings: Levels) -> AbstractKernel:
    """Return the kernel with the settings of one level."""
    given = {"step_size": settings.step_sizes, "inverse_mass_matrix": settings.inverse_masses}
    given = {name: value for name, value in given.items() if value is not None}
    return kernel.adapted(**given) if given else kernel


def move(
    rng_key: PRNGKey,
    kernel: AbstractKernel,
    densities: Densities,
    positions: Position,
    beta: Scalar | float,
    num_steps: int,
    axis_name: str | None = None,
) -> chains.Advanced:
    """Run transitions at one level."""
    log_density = keep(lambda position, _: densities.log_between(position, beta), densities.known_between(beta))
    return chains.advance(rng_key, kernel, log_density, positions, num_steps=num_steps, axis_name=axis_name)


def _log_variances(positions: Positions) -> Float[Array, " d"]:
    """Return log variances of the coordinates of ``(num, ...)`` positions, robust to outliers; 0 without spread."""
    spread = jax.vmap(_spread, in_axes=1)(positions.reshape(len(positions), -1).astype(float))
    return 2 * jnp.log(jnp.where(spread > 0, spread, 1.0))


def _place(betas: Float[Array, " points"], spreads: Float[Array, " points"], num_levels: int) -> Float[Array, " levels"]:
    """Return betas with equal gains of the integral of the spread, except for a tenth that is even in beta itself."""
    gains = jnp.diff(betas) * (spreads[1:] + spreads[:-1]) / 2
    total = jnp.sum(gains)
    shares = jnp.where(total > 0, gains / jnp.where(total > 0, total, 1.0), jnp.diff(betas))
    reached = jnp.cumsum((1 - EVEN_SHARE) * shares + EVEN_SHARE * jnp.diff(betas))
    reached = jnp.concatenate([jnp.zeros(1), reached / reached[-1]])
    return jnp.interp(jnp.linspace(0.0, 1.0, num_levels + 1), reached, betas).at[-1].set(1.0)


def _spread(values: Float[Array, " chains"]) -> Scalar:
    """Return a standard deviation of log ratios that is robust to outliers; 0 if most positions have no density."""
    low, high = jnp.quantile(values, jnp.array([0.16, 0.84]))
    spread = 0.5 * (high - low)
    return jnp.where(spread < 1e15, spread, 0.0)


def log_mean(logs: Float[Array, "num ..."]) -> Float[Array, "..."]:
    """Return the log of the mean of exponentials, over the first axis."""
    return jax.nn.logsumexp(logs, axis=0) - jnp.log(len(logs))
