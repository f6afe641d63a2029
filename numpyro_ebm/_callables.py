"""Take a callable or a tree of arguments apart into arrays and structure, so that it crosses jit as a pytree."""

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import numpy as np


class Structure(NamedTuple):
    """What of it is not an array: its tree, its static leaves and whether it is a partial."""

    treedef: Any
    static: tuple[Hashable, ...]
    is_partial: bool


class _Dynamic(NamedTuple):
    """Stands in `Structure.static` where an array was."""


def dismantle(fn: Any) -> tuple[list[Any], Structure]:
    """Arrays and structure of a function, a ``functools.partial`` or a pytree (equinox, nnx, arguments).

    A plain function is structure alone: what it closes over stays in it.
    """
    is_partial = isinstance(fn, functools.partial)
    leaves, treedef = jax.tree.flatten((fn.func, fn.args, fn.keywords) if is_partial else fn)
    arrays = [leaf for leaf in leaves if _is_array(leaf)]
    static = tuple(_Dynamic() if _is_array(leaf) else leaf for leaf in leaves)
    return arrays, Structure(treedef, static, is_partial)


def assemble(arrays: list[Any], structure: Structure) -> Any:
    """What `dismantle` took apart, around new arrays."""
    supply = iter(arrays)
    leaves = [next(supply) if isinstance(leaf, _Dynamic) else leaf for leaf in structure.static]
    tree = jax.tree.unflatten(structure.treedef, leaves)
    if not structure.is_partial:
        return tree
    func, args, keywords = tree
    return functools.partial(func, *args, **keywords)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)
