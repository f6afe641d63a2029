"""Conversion between draws and rows in unconstrained space, and starts of chains."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Shaped
from numpyro.distributions import Distribution

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, LogDensityFn, PRNGKey, PyTree
from numpyro_ebm.kernels.starts import are_finite, find_starts

Shape = tuple[int, ...]


def rows_local(distribution: Any, shape: Shape) -> PyTree:
    """Return what belongs to each single row (context, base), for rows of this shape."""
    return distribution.rows(jnp.zeros(distribution.event_shape), shape).local


def normal_rows(rng_key: PRNGKey, distribution: Any, shape: Shape) -> Float[Array, " rows *position"]:
    """Draw standard normal positions, one per row of this shape."""
    return jax.random.normal(rng_key, (math.prod(shape), *distribution.unconstrained_shape), float)


def to_positions(distribution: Any, events: Array) -> Shaped[Array, " rows *position"]:
    """Convert events of any leading shape to one unconstrained position per row."""
    return jax.vmap(distribution.unconstrain)(events.reshape((-1, *distribution.event_shape)))


def to_draws(distribution: Any, positions: Shaped[Array, " rows *position"], shape: Shape) -> Array:
    """Convert positions to events, of shape ``shape + event_shape``."""
    return jax.vmap(distribution.constrain)(positions).reshape(shape + distribution.event_shape)


def check_start(owner: str, start: object) -> None:
    """Check that a start is a sampler.

    Raises:
        TypeError: with what was given.
    """
    # A pytree is also rebuilt around placeholders.
    if start is not None and type(start) is not object and not callable(start):
        raise TypeError(
            f"{owner} needs start as a sampler, start(rng_key, distribution, sample_shape); got {type(start).__name__}."
        )


def draw_start(start: Callable[..., Array] | None, rng_key: PRNGKey, distribution: Any, sample_shape: Shape) -> Array | None:
    """Draw events to start from, ``sample_shape + batch_shape + event_shape``; None without a sampler.

    Raises:
        EnergyError: for a sampler that returns another shape.
    """
    if start is None:
        return None
    events = distribution.as_events(start(rng_key, distribution, sample_shape))
    wanted = distribution.shape(sample_shape)
    if events.shape != wanted:
        raise EnergyError(f"The start returned draws of shape {events.shape}; the chains need {wanted}, one draw per chain.")
    return events


def starts_of(
    rng_key: PRNGKey,
    distribution: Distribution,
    log_density: LogDensityFn,
    starts: Array | None,
    sample_shape: Shape,
    local: PyTree,
) -> tuple[Shaped[Array, " chains *position"], Bool[Array, " chains"]]:
    """Return starts in unconstrained space (the given events, or a search from the reference) and which are finite."""
    if starts is None:
        return find_starts(rng_key, distribution, log_density, sample_shape, local)
    positions = to_positions(distribution, starts)
    return positions, are_finite(distribution, log_density, positions, local)
