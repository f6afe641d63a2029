"""Random keys among other arrays: which they are, and their numbers."""

from typing import Any

import jax
import jax.numpy as jnp


def is_key(leaf: Any) -> bool:
    """Return whether a value is an array of random keys (`jax.random.key`), which are no numbers."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def as_numbers(leaf: Any) -> Any:
    """Return random keys as their numbers, and any other value unchanged."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def from_numbers(numbers: Any, like: Any) -> Any:
    """Return numbers as random keys of the kind of ``like``, if that is one, else unchanged."""
    return jax.random.wrap_key_data(numbers, impl=jax.random.key_impl(like)) if is_key(like) else numbers
