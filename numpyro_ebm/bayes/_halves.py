"""Moves of a population of chains, one half after the other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree


def by_halves(transition: Callable, state: Any) -> Any:
    """Move one half of the chains after the other, each along differences of two chains of the other half.

    The state holds one random key for all chains, as NumPyro gives it when a run goes on from the end of a warm-up.
    """
    num_chains = state.i.shape[0]
    half = num_chains // 2
    rng_key, key = jax.random.split(state.rng_key)
    state = state._replace(rng_key=jax.random.split(key, num_chains))
    first, second = jax.tree.map(lambda leaf: leaf[:half], state), jax.tree.map(lambda leaf: leaf[half:], state)
    first = _moved(transition, first, second)
    second = _moved(transition, second, first)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)._replace(rng_key=rng_key)


def _moved(transition: Callable, state: Any, others: Any) -> Any:
    flat = jax.vmap(lambda z: ravel_pytree(z)[0])(others.z)

    def move(state):
        rng_key, key = jax.random.split(state.rng_key)
        return transition(state._replace(rng_key=rng_key), flat[jax.random.choice(key, len(flat), (2,), replace=False)])

    return jax.vmap(move)(state)
