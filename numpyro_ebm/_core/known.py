"""Values of arrays that are constants while a program is traced, and hashable pytrees of such arrays."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.typing import PyTree

MAX_DEPTH = 50
"""Operations that `known` follows back from an array; constants in a model are a few operations deep."""


def known(value: Any, depth: int = MAX_DEPTH) -> Any:
    """Return the value of an array, also under ``jit`` if it is computed from constants alone; None if it is unknown.

    Under ``jit`` the result of ``jnp.zeros(())`` is a tracer, as an argument is. JAX records the inputs of each tracer.
    """
    if is_concrete(value):
        return value
    lowered = value.full_lower() if hasattr(value, "full_lower") else value
    if lowered is not value:
        return known(lowered, depth)
    equation = getattr(value, "parent", None)
    if equation is None or depth == 0:
        return None
    inputs = []
    for each in equation.in_tracers:
        inputs.append(known(each, depth - 1))
        if inputs[-1] is None:
            return None
    with jax.ensure_compile_time_eval():
        outputs = equation.primitive.bind(*inputs, **equation.params)
    return outputs[equation.outvars.index(value.val)] if equation.primitive.multiple_results else outputs


class Frozen(NamedTuple):
    """A pytree of known arrays, compared by value.

    Attributes:
        treedef: structure of the pytree.
        leaves: a Python number for each scalar; dtype, shape and bytes for each array.
    """

    treedef: Any
    leaves: tuple[Any, ...]

    def thaw(self) -> Any:
        """Return the pytree, with Python numbers and NumPy arrays as leaves."""
        return jax.tree.unflatten(self.treedef, [_thawed(leaf) for leaf in self.leaves])


def freeze_tree(tree: PyTree) -> Frozen | None:
    """Return a pytree of known arrays as `Frozen`; None if a leaf is unknown."""
    leaves, treedef = jax.tree.flatten(tree)
    values = [known(leaf) for leaf in leaves]
    return None if any(value is None for value in values) else Frozen(treedef, tuple(map(_frozen, values)))


def _frozen(value: ArrayLike) -> Any:
    array = np.asarray(value)
    return array.item() if array.ndim == 0 else (array.dtype.str, array.shape, array.tobytes())


def _thawed(leaf: object) -> Any:
    if not isinstance(leaf, tuple):
        return leaf
    dtype, shape, data = leaf
    return np.frombuffer(data, dtype).reshape(shape)
