"""Take a callable or a tree of arguments apart into arrays and structure, so that it crosses jit as a pytree."""

import dataclasses
import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

from numpyro_ebm._errors import EnergyError


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
