"""Where chains start: a place where the density and its gradient are finite, looked for before chains move."""

from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from numpyro_ebm._core.callbacks import Told, call_where_any
from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, LogDensityFn, Position, PRNGKey, PyTree

NUM_TRIES = 100
NARROWEST, WIDEST = 0.1, 1000.0
NO_START = (
    "A chain starts where the log density or its gradient is not finite. Look at the energy there, or give the "
    "EnergyDistribution a base that covers where it is finite."
)


def initial_is_finite(log_density: Callable, position: Position) -> Array:
    """Whether the log density and, of a continuous position, its gradient are finite."""
    if all(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in jax.tree.leaves(position)):
        return jnp.isfinite(log_density(position))
    value, grad = jax.value_and_grad(log_density)(position)
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((value, grad))]).all()


def are_finite(log_density: LogDensityFn, positions: Array, local: PyTree) -> Array:
    """`initial_is_finite` of each chain, ``(num_chains,)``."""
    return jax.vmap(lambda x, row: initial_is_finite(lambda z: log_density(z, row), x))(positions, local)


def find_starts(
    rng_key: PRNGKey, distribution: Any, log_density: LogDensityFn, sample_shape: tuple[int, ...], local: PyTree
) -> tuple[Array, Array]:
    """Draws of the reference, each drawn anew until the density and its gradient are finite there, 100 times at most.

    Each further try spreads wider around the reference, in unconstrained space, up to a thousand times a standard normal.
    On a discrete support more and more elements of it take one value, the same for all of them.

    Args:
        rng_key: random key.
        distribution: whose reference it is.
        log_density: ``log_density(position, local)`` of one chain.
        sample_shape: shape of the chains, without the distribution's batch.
        local: what each chain's log density has of its own, leaves ``(num_chains, ...)``.

    Returns:
        Positions ``(num_chains, ...)``, and which of them are finite.
    """

    def draw(key):
        events = distribution.reference_sample(key, sample_shape).reshape((-1, *distribution.event_shape))
        return jax.vmap(distribution.unconstrain)(events)

    def go_on(carry):
        _, finite, i, _ = carry
        return (i < NUM_TRIES) & ~jnp.all(finite)

    def retry(carry):
        # What is looked at comes from the loop's carry, as chains have it. Fused with the draw itself it would be rounded
        # otherwise: x - x is not 0 then, and a gradient that is NaN on a diagonal comes out finite.
        positions, _, i, key = carry
        finite = are_finite(log_density, positions, local)
        key, key_draw, key_spread = jax.random.split(key, 3)
        tried = _spread(key_spread, distribution, draw(key_draw), (i + 1) / NUM_TRIES)
        wide = (...,) + (None,) * (positions.ndim - 1)
        return jnp.where(finite[wide], positions, tried), finite, i + 1, key

    first = draw(rng_key)
    carry = first, jnp.zeros(len(first), bool), jnp.zeros((), jnp.int32), jax.random.fold_in(rng_key, 1)
    positions, finite, _, _ = jax.lax.while_loop(go_on, retry, carry)
    return positions, finite


def _spread(rng_key: PRNGKey, distribution: Any, drawn: Array, share: Array) -> Array:
    """Draws of the reference, farther from it the larger the share of the tries that there were."""
    if not distribution.is_discrete:
        scale = NARROWEST * (WIDEST / NARROWEST) ** share
        return drawn + scale.astype(drawn.dtype) * jax.random.normal(rng_key, drawn.shape, drawn.dtype)
    key_value, key_which = jax.random.split(rng_key)
    # One of the values that the draws have, for each chain its own.
    flat = drawn.reshape(len(drawn), -1)
    column = jax.random.randint(key_value, (len(flat), 1), 0, flat.shape[1])
    value = jnp.take_along_axis(flat, column, axis=1)
    return jnp.where(jax.random.uniform(key_which, flat.shape) < share, value, flat).reshape(drawn.shape)


def check_starts(finite: Array) -> None:
    """Refuse chains that start without a density; from inside a compiled program where need be.

    Raises:
        EnergyError: out of a compiled program it arrives as ``jax.errors.JaxRuntimeError``.
    """
    if not is_concrete(finite):
        call_where_any(Told(_refuse), jnp.any(~finite)[None], ())
    elif not bool(jnp.all(finite)):
        _refuse()


def _refuse(*_: Any) -> NoReturn:
    raise EnergyError(NO_START)
