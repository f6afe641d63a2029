"""What every front door asks of what it is given: a random key, arrays, and a place outside of jit."""

import inspect
import numbers
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from numpyro.util import is_prng_key

from numpyro_ebm._core.errors import EnergyError


def check_key(owner: str, rng_key: Any) -> None:
    """Refuse what is no single random key: a seed, None, an array of numbers, several keys.

    Raises:
        EnergyError: with the line to write.
    """
    is_raw = getattr(rng_key, "dtype", None) == np.uint32 and len(rng_key.shape) == 1  # of any of JAX's generators
    if is_prng_key(rng_key) or is_raw:
        return
    is_seed = isinstance(rng_key, numbers.Integral) and not isinstance(rng_key, bool)
    came = f"the seed {rng_key}" if is_seed else _described(rng_key)
    raise EnergyError(
        f"{owner} needs a random key as its first argument; got {came}. Write jax.random.key({rng_key if is_seed else 0})."
    )


def check_outside_jit(owner: str, *values: Any) -> None:
    """Refuse values of which only the shape is known.

    Raises:
        EnergyError: saying what to do instead.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values)):
        raise EnergyError(
            f"{owner} looks at what it is given and what it finds, and cannot do so inside jax.jit, vmap or grad. Call it "
            "outside: it compiles itself; for many densities at once write one EnergyDistribution(..., context=..., "
            "batch_shape=...)."
        )


def as_arrays(owner: str, arguments: Any) -> Any:
    """Arguments of a model with arrays in the place of what holds one: DataFrames, xarray arrays, lists of numbers.

    Whatever has ``__array__`` counts. Everything else stays as it is, numbers, strings and functions among them.

    Raises:
        EnergyError: for a table with columns that are no numbers, and for a masked array.
        TypeError: for a generator, which gives its rows once only.
    """
    return jax.tree.map(lambda leaf: _as_array(owner, leaf), arguments, is_leaf=_is_whole)


def _as_array(owner: str, leaf: Any) -> Any:
    if isinstance(leaf, Iterator):
        raise TypeError(
            f"{owner} got a {_described(leaf)}, which gives its rows once and has no length. Write np.concatenate(list("
            "batches)) for rows that fit into memory, and numpyro.plate('rows', len(x), subsample_size=256) in the model "
            "for minibatches of them. For batches from the host write update = jax.jit(svi.update), and for each batch "
            "state, loss = update(state, batch), with numpyro.plate('rows', num_rows, subsample_size=len(batch))."
        )
    if isinstance(leaf, np.ma.MaskedArray):
        raise EnergyError(
            f"{owner} got a masked array, whose mask JAX leaves out. Write x.filled(np.nan), and in the model "
            "numpyro.handlers.mask(mask=~jnp.isnan(x).any(-1))."
        )
    is_known = isinstance(leaf, jax.Array | np.ndarray | np.generic | numbers.Number)
    if is_known or inspect.isclass(leaf) or not (hasattr(leaf, "__array__") or isinstance(leaf, list)):
        return leaf
    array = np.asarray(leaf)
    if array.dtype.kind not in "biuf":
        raise EnergyError(
            f"{owner} got a {_described(leaf)} with values of dtype {array.dtype}, and needs real numbers. Pass the columns "
            "that are numbers: x[['a', 'b']].to_numpy(dtype=float)."
        )
    return array


def _is_whole(value: Any) -> bool:
    """Whether JAX is not to look inside."""
    return isinstance(value, Iterator) or _is_list_of_numbers(value)


def _is_list_of_numbers(value: Any) -> bool:
    """Whether a list is an array written out: numbers, or such lists of one length."""
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
