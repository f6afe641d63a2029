"""What is known of arrays while a program is traced, and pytrees of known arrays as structure."""

from typing import Any, NamedTuple

import jax
import numpy as np

from numpyro_ebm._core.concrete import is_concrete

MAX_DEPTH = 50
"""Steps of computation that are followed back; numbers written in a model take few."""


def known(value: Any, depth: int = MAX_DEPTH) -> Any:
    """The value of an array, inside ``jit`` too where it is made of constants alone; None where it is not known.

    Under ``jit`` the result of ``jnp.zeros(())`` is a tracer as an argument is. JAX keeps what each was computed from.
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
    """A pytree of known arrays, to be compared by value.

    Attributes:
        treedef: its structure.
        leaves: a Python number for each scalar; dtype, shape and bytes for each array.
    """

    treedef: Any
    leaves: tuple[Any, ...]

    def thaw(self) -> Any:
        """The pytree, of Python numbers and NumPy arrays."""
        return jax.tree.unflatten(self.treedef, [_thawed(leaf) for leaf in self.leaves])


def freeze_tree(tree: Any) -> Frozen | None:
    """A pytree as structure; None where a leaf is not known."""
    leaves, treedef = jax.tree.flatten(tree)
    values = [known(leaf) for leaf in leaves]
    return None if any(value is None for value in values) else Frozen(treedef, tuple(map(_frozen, values)))


def _frozen(value: Any) -> Any:
    array = np.asarray(value)
    return array.item() if array.ndim == 0 else (array.dtype.str, array.shape, array.tobytes())


def _thawed(leaf: Any) -> Any:
    if not isinstance(leaf, tuple):
        return leaf
    dtype, shape, data = leaf
    return np.frombuffer(data, dtype).reshape(shape)
