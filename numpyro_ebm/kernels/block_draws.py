"""Draws of a discrete event block by block, for one chain or for many that share an energy."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jaxtyping import Bool, Int, Shaped

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.discrete import numbers_of
from numpyro_ebm._core.typing import Array, ArrayLike, PRNGKey, PRNGKeys
from numpyro_ebm._core.uniforms import uniforms
from numpyro_ebm.kernels._base import not_finite
from numpyro_ebm.kernels.densities import Known
from numpyro_ebm.kernels.elements import choose, is_bad, take_values, without_bad

SMALL = 64
"""Numbers below it in size are stored in one byte; the difference of two of them fits as well."""


def draw_blocks(
    rng_key: PRNGKey, known: Known, values: Shaped[Array, "values ..."], event: Shaped[Array, "*event"]
) -> tuple[Shaped[Array, "*event"], Bool[Array, ""]]:
    """Draw an event block by block from the conditionals of its elements; also return whether any was not finite.

    Under ``vmap``, chains of one energy that has `AbstractEnergy.logits_of_many` are drawn together.

    Args:
        rng_key: random key.
        known: what is known of the log density, with blocks.
        values: the values of an element.
        event: the event before the draw.
    """
    numbers = numbers_of(known.energy.support)
    if numbers is None or not known.energy.has_logits_of_many:
        return _draw_one(rng_key, known, values, event)

    def draw_one(rng_key, energy, offsets, factor, event):
        return _draw_one(rng_key, Known(energy, factor, offsets), jnp.asarray(numbers), event)

    draw = custom_vmap(draw_one)

    @draw.def_vmap
    def draw_many(size, is_batched, rng_key, energy, offsets, factor, event):
        args = (rng_key, energy, offsets, factor, event)
        if any(jax.tree.leaves(is_batched[1:3])):  # each chain has an energy of its own
            axes = jax.tree.map(lambda batched: 0 if batched else None, tuple(is_batched))
            drawn = jax.vmap(draw_one, in_axes=axes, axis_size=size)(*args)
        else:
            rng_key, factor, event = (_on_each(size, args[k], is_batched[k]) for k in (0, 3, 4))
            drawn = _draw_many(rng_key, Known(energy, factor, offsets), numbers, event)
        return drawn, (True, True)

    return draw(rng_key, known.energy, known.offsets, jnp.asarray(known.factor, float), event)


def in_few_bytes(values: Shaped[ArrayLike, "values ..."]) -> Shaped[Array, "values ..."]:
    """Return values as integers of one byte if all are small, so that differences of two do not overflow."""
    if not is_concrete(values):
        return jnp.asarray(values)
    numbers = np.asarray(values)
    is_small = np.issubdtype(numbers.dtype, np.integer) and np.all(np.abs(numbers) < SMALL)
    return jnp.asarray(numbers, np.int8 if is_small else None)


def _draw_one(
    rng_key: PRNGKey, known: Known, values: Shaped[Array, "values ..."], event: Shaped[Array, "*event"]
) -> tuple[Shaped[Array, "*event"], Bool[Array, ""]]:
    energy: Any = known.energy
    held = known.held(event)
    values = values.astype(held.dtype)
    rows, was_bad, is_stuck = held.reshape(-1, *values.shape[1:]), jnp.zeros((), bool), jnp.zeros((), bool)
    for block, key in zip(energy.blocks, jax.random.split(rng_key, len(energy.blocks)), strict=True):
        logits, bad = without_bad(known.conditional_logits(rows.reshape(event.shape), block))
        chosen = take_values(values, choose(uniforms(key, np.shape(block), logits.dtype), logits))
        is_stuck |= jnp.any(jnp.all(logits == -jnp.inf, axis=-1))
        rows, was_bad = rows.at[block].set(chosen, unique_indices=True, indices_are_sorted=True), was_bad | bad
    # An element without a finite conditional cannot be drawn: the event stays as it was.
    rows = jnp.where(is_stuck, held, rows.reshape(event.shape))
    return rows.astype(event.dtype), was_bad


def _draw_many(
    rng_keys: PRNGKeys, known: Known, values: Int[np.ndarray, " values"], events: Shaped[Array, " num *event"]
) -> tuple[Shaped[Array, " num *event"], Bool[Array, " num"]]:
    """Do the same with the chains on the last axis, and the values in the fewest bytes that hold them."""
    energy: Any = known.energy
    each = in_few_bytes(values)
    start = events.reshape(len(events), -1).astype(each.dtype).T
    keys = jax.vmap(lambda key: jax.random.split(key, len(energy.blocks)))(rng_keys)
    elements = start
    for k, block in enumerate(energy.blocks):
        logits = known.factor * energy.logits_of_many(elements, block)
        if known.offsets is not None:
            logits = logits + known.offsets[block].T[..., None]
        drawn = jax.vmap(partial(uniforms, shape=block.shape, dtype=logits.dtype), out_axes=-1)(keys[:, k])
        chosen = take_values(each, choose(drawn, logits, axis=0))
        elements = elements.at[block].set(chosen, unique_indices=True, indices_are_sorted=True)
    is_stuck = _cannot_be_drawn(known)
    ended = jnp.where(is_stuck, start, elements)
    return ended.T.reshape(events.shape).astype(events.dtype), is_stuck


def _cannot_be_drawn(known: Known) -> Bool[Array, " num"]:
    """Return which chains have no finite conditionals, by the parameters: a look at each conditional would cost a sweep."""
    is_stuck = not_finite(known.energy) | ~jnp.isfinite(known.factor)
    if known.offsets is None:
        return is_stuck
    never = jnp.any(jnp.all(known.offsets == -jnp.inf, axis=-1))
    return is_stuck | never | jnp.any(is_bad(known.offsets))


def _on_each(size: int, value: Any, is_batched: bool) -> Any:  # noqa: FBT001
    """Return a value with an axis of chains."""
    return value if is_batched else jnp.broadcast_to(value, (size, *jnp.shape(value)))
