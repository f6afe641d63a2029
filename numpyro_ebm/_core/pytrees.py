"""Split a callable or a tree of arguments into arrays and structure, so that it can pass through jit as a pytree."""

import dataclasses
import functools
import inspect
import sys
import types
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun
from jaxtyping import Shaped

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, PyTree

BY_VALUE = ("cloudpickle", "copy", "dill")
"""Packages that copy or pickle a function by its code."""


class Structure(NamedTuple):
    """The non-array part of a callable: its tree, its static leaves and whether it is a ``functools.partial``."""

    treedef: Any
    static: tuple[Hashable, ...]
    is_partial: bool


class _Dynamic(NamedTuple):
    """Placeholder for an array in `Structure.static`."""


def dismantle(fn: PyTree) -> tuple[list[Any], Structure]:
    """Split a function, a ``functools.partial`` or a pytree (equinox, nnx, arguments) into arrays and structure.

    A plain function is structure only; arrays that it closes over stay inside.
    """
    is_partial = isinstance(fn, functools.partial)
    leaves, treedef = jax.tree.flatten((fn.func, fn.args, fn.keywords) if is_partial else fn)
    arrays = [leaf for leaf in leaves if _is_array(leaf)]
    static = tuple(_Dynamic() if _is_array(leaf) else leaf for leaf in leaves)
    return arrays, Structure(treedef, static, is_partial)


def assemble(arrays: list[Any], structure: Structure) -> Any:
    """Rebuild what `dismantle` split, with new arrays."""
    supply = iter(arrays)
    leaves = [next(supply) if isinstance(leaf, _Dynamic) else leaf for leaf in structure.static]
    tree = jax.tree.unflatten(structure.treedef, leaves)
    if not structure.is_partial:
        return tree
    func, args, keywords = tree
    return functools.partial(func, *args, **keywords)


def check_pickles(owner: str, functions: Iterable[Any]) -> None:
    """Check that pickle can find the functions by name, unless they are being pickled or copied by value.

    Raises:
        TypeError: with what to write.
    """
    bare = [_inside_partial(each) for each in functions]
    nameless = [each for each in bare if isinstance(each, types.FunctionType) and not _is_found_by_name(each)]
    if nameless and not _is_by_value():
        raise TypeError(
            f"The {owner} holds the function {nameless[0].__qualname__}, which pickle cannot find by name. Write "
            "cloudpickle.dumps(...), or define the function with def at the top level of a module."
        )


def _inside_partial(function: Any) -> Any:
    return _inside_partial(function.func) if isinstance(function, functools.partial) else function


def _is_found_by_name(function: types.FunctionType) -> bool:
    found: Any = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is function


def _is_by_value() -> bool:
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] in BY_VALUE:
            return True
        frame = frame.f_back
    return False


@dataclasses.dataclass(frozen=True)
class FunctionOfRow:
    """A function whose arrays are passed together with each row's context.

    Attributes:
        structure: structure of the function.
        has_context: whether the function takes a context.
    """

    structure: Structure
    has_context: bool

    def __call__(self, event: Shaped[Array, "*event"], own: tuple[list[Any], PyTree]) -> Any:
        """Evaluate the function of one event, given ``(arrays, context)``."""
        arrays, context = own
        function = assemble(arrays, self.structure)
        return function(event, context) if self.has_context else function(event)


@dataclasses.dataclass(frozen=True, eq=False)
class Replayed:
    """A traced function that takes the values it closed over as its first argument.

    Attributes:
        jaxpr: program of the function.
        types: dtypes of its other arguments, flat.
        treedef: structure of its result.
    """

    jaxpr: Jaxpr
    types: tuple[Any, ...]
    treedef: Any

    def __call__(self, consts: list[Any], *args: Any) -> Any:
        """Evaluate the function.

        Raises:
            EnergyError: for arguments whose dtypes cannot be cast to those of the trace within the same kind.
        """
        leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(args)]
        for leaf, dtype in zip(leaves, self.types, strict=True):
            if not jnp.can_cast(leaf.dtype, dtype, "same_kind"):
                raise EnergyError(
                    f"A function that closes over values of scan or vmap was traced for {dtype} and got {leaf.dtype}. Pass "
                    "those values as the context: EnergyDistribution(..., context=values)."
                )
        cast = [leaf.astype(dtype) for leaf, dtype in zip(leaves, self.types, strict=True)]
        return jax.tree.unflatten(self.treedef, jaxpr_as_fun(ClosedJaxpr(self.jaxpr, consts))(*cast))


def hoist(arrays: list[Any], structure: Structure, *example: PyTree) -> tuple[list[Any], Structure]:
    """Move the traced values that a function closes over to its arrays.

    In a closure they would not outlive ``scan`` or ``vmap``. A function that closes over none is returned unchanged.

    Args:
        arrays: arrays of the function, from `dismantle`.
        structure: structure of the function, from `dismantle`.
        *example: arguments of a call, or their ``ShapeDtypeStruct``.
    """
    call = lambda arrays, *args: assemble(arrays, structure)(*args)  # noqa: E731
    closed, shape = jax.make_jaxpr(call, return_shape=True)(arrays, *example)
    if not any(isinstance(const, Tracer) for const in closed.consts):
        return arrays, structure
    types = tuple(var.aval.dtype for var in closed.jaxpr.invars)
    replayed = Replayed(closed.jaxpr, types, jax.tree.structure(shape))
    return dismantle(functools.partial(replayed, list(closed.consts), arrays))


def _is_array(leaf: object) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)
