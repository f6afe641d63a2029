"""Checks that public functions make of their arguments: a random key, arrays, and a call outside of jit."""

import inspect
import numbers
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from numpyro.util import is_prng_key

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, PyTree


def check_key(owner: str, rng_key: Any) -> None:
    """Check for a single random key, and raise for a seed, None, an array of numbers or several keys.

    Raises:
        EnergyError: with the line to write.
    """
    is_raw = getattr(rng_key, "dtype", None) == np.uint32 and len(rng_key.shape) == 1  # a raw key of any of JAX's generators
    if is_prng_key(rng_key) or is_raw:
        return
    is_seed = isinstance(rng_key, numbers.Integral) and not isinstance(rng_key, bool)
    came = f"the seed {rng_key}" if is_seed else _described(rng_key)
    raise EnergyError(
        f"{owner} needs a random key as its first argument; got {came}. Write jax.random.key({rng_key if is_seed else 0})."
    )


def check_outside_jit(owner: str, *values: PyTree) -> None:
    """Check that all values are concrete, and raise inside ``jax.jit``, ``vmap`` or ``grad``.

    Raises:
        EnergyError: with what to do instead.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values)):
        raise EnergyError(
            f"{owner} needs concrete values, and there are none inside jax.jit, vmap or grad. Call it outside: it compiles "
            "its own computations. For many densities at once write one EnergyDistribution(..., context=..., "
            "batch_shape=...)."
        )


def as_arrays(owner: str, arguments: PyTree) -> PyTree:
    """Return a model's arguments with DataFrames, xarray arrays and lists of numbers converted to arrays.

    Everything with ``__array__`` is converted. All else is returned unchanged: numbers, strings, functions.

    Raises:
        EnergyError: for a table with columns that are not numeric, and for a masked array.
        TypeError: for a generator, which yields its rows only once.
    """
    return jax.tree.map(lambda leaf: _as_array(owner, leaf), arguments, is_leaf=_is_whole)


def _as_array(owner: str, leaf: object) -> Any:
    if isinstance(leaf, Iterator):
        raise TypeError(
            f"{owner} got a {_described(leaf)}, which yields its rows only once and has no length. Write "
            "np.concatenate(list(batches)) if all rows fit into memory, or train with fit(rng_key, svi, num_steps, "
            "batches=loader, data_size=num_rows)."
        )
    if isinstance(leaf, np.ma.MaskedArray):
        raise EnergyError(
            f"{owner} got a masked array, whose mask JAX ignores. Write x.filled(np.nan), and in the model "
            "numpyro.handlers.mask(mask=~jnp.isnan(x).any(-1))."
        )
    is_known = isinstance(leaf, jax.Array | np.ndarray | np.generic | numbers.Number)
    if is_known or inspect.isclass(leaf) or not (hasattr(leaf, "__array__") or isinstance(leaf, list)):
        return leaf
    array = np.asarray(leaf)
    if array.dtype.kind not in "biuf":
        raise EnergyError(
            f"{owner} needs real numbers; got a {_described(leaf)} with values of dtype {array.dtype}. Pass its numeric "
            "columns: x[['a', 'b']].to_numpy(dtype=float)."
        )
    return array


def as_numbers(owner: str, events: object) -> Array:
    """Return events as an array of real numbers or booleans.

    Raises:
        TypeError: for words, an array of objects, and complex numbers.
    """
    events = as_arrays(owner, events)
    for leaf in jax.tree.leaves(events):
        if isinstance(leaf, str | bytes) or (isinstance(leaf, np.ndarray) and leaf.dtype.kind in "USO"):
            first = leaf if isinstance(leaf, str | bytes) else leaf.ravel()[:1].tolist()
            raise TypeError(
                f"{owner} needs numbers; got {first!r}. Number the values: np.unique(x, return_inverse=True)[1] for one "
                "column of words, or x.astype(float) for numbers kept as objects."
            )
    value = jnp.asarray(events)
    if not (jnp.isrealobj(value) and (jnp.issubdtype(value.dtype, jnp.number) or value.dtype == bool)):
        raise TypeError(f"{owner} needs real numbers; got dtype {value.dtype}.")
    return value


def _is_whole(value: object) -> bool:
    """Return whether JAX must treat a value as one leaf."""
    return isinstance(value, Iterator) or _is_list_of_numbers(value)


def _is_list_of_numbers(value: object) -> bool:
    """Return whether a list is a written-out array: numbers, or such lists of equal length."""
    if not isinstance(value, list) or not value:
        return False
    if all(isinstance(each, list) for each in value):
        return len({len(each) for each in value}) == 1 and all(map(_is_list_of_numbers, value))
    return all(isinstance(each, numbers.Real | np.generic) for each in value)


def _described(value: Any) -> str:
    if value is None:
        return "None"
    name = "array" if isinstance(value, jax.Array | np.ndarray) else type(value).__name__
    return f"{name} of shape {tuple(value.shape)}" if hasattr(value, "shape") else name
