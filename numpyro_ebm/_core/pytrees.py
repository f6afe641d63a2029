"""Take a callable or a tree of arguments apart into arrays and structure, so that it crosses jit as a pytree."""

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

from numpyro_ebm._core.errors import EnergyError

BY_VALUE = ("cloudpickle", "copy", "dill")
"""What carries a function by its code."""


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


def check_pickles(owner: str, functions: Iterable[Any]) -> None:
    """Refuse to pickle functions that have no name to be found by, unless something pickles or copies them by value.

    Raises:
        TypeError: with what to write.
    """
    nameless = [each for each in functions if isinstance(each, types.FunctionType) and not _is_found_by_name(each)]
    if nameless and not _is_by_value():
        raise TypeError(
            f"The {owner} holds the function {nameless[0].__qualname__}, which pickle finds by no name. Write "
            "cloudpickle.dumps(...), or define the function by def at the top of a module."
        )


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
    """A function whose own arrays come with each row's context.

    Attributes:
        structure: of the function.
        has_context: whether it takes a context beside them.
    """

    structure: Structure
    has_context: bool

    def __call__(self, event: Any, own: Any) -> Any:
        """The function of one event, given ``(arrays, context)``."""
        arrays, context = own
        function = assemble(arrays, self.structure)
        return function(event, context) if self.has_context else function(event)


@dataclasses.dataclass(frozen=True, eq=False)
class Replayed:
    """A function as it was traced, with what it had closed over as its first argument.

    Attributes:
        jaxpr: its program.
        types: of its other arguments, flat.
        treedef: of its result.
    """

    jaxpr: Jaxpr
    types: tuple[Any, ...]
    treedef: Any

    def __call__(self, consts: list[Any], *args: Any) -> Any:
        """The result.

        Raises:
            EnergyError: for arguments of another kind than those it was traced for.
        """
        leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(args)]
        for leaf, dtype in zip(leaves, self.types, strict=True):
            if not jnp.can_cast(leaf.dtype, dtype, "same_kind"):
                raise EnergyError(
                    f"A function that closes over values of scan or vmap was traced for {dtype} and got {leaf.dtype}. Hand "
                    "those values over: EnergyDistribution(..., context=values)."
                )
        cast = [leaf.astype(dtype) for leaf, dtype in zip(leaves, self.types, strict=True)]
        return jax.tree.unflatten(self.treedef, jaxpr_as_fun(ClosedJaxpr(self.jaxpr, consts))(*cast))


def hoist(arrays: list[Any], structure: Structure, *example: Any) -> tuple[list[Any], Structure]:
    """A function taken apart, with the values being traced that it closes over among its arrays.

    They would not outlive ``scan`` or ``vmap`` in a closure. A function that closes over none is returned as it is.

    Args:
        arrays: of the function.
        structure: of the function.
        *example: what it is called with, or ``ShapeDtypeStruct`` of it.
    """
    call = lambda arrays, *args: assemble(arrays, structure)(*args)  # noqa: E731
    closed, shape = jax.make_jaxpr(call, return_shape=True)(arrays, *example)
    if not any(isinstance(const, Tracer) for const in closed.consts):
        return arrays, structure
    types = tuple(var.aval.dtype for var in closed.jaxpr.invars)
    replayed = Replayed(closed.jaxpr, types, jax.tree.structure(shape))
    return dismantle(functools.partial(replayed, list(closed.consts), arrays))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)
