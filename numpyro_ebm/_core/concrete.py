"""Whether values are concrete while a program is traced."""

import numbers
from contextlib import AbstractContextManager, nullcontext

import jax
import numpy as np
from jax.core import Tracer

from numpyro_ebm._core.typing import PyTree


def is_concrete(*values: PyTree) -> bool:
    """Return whether every leaf is a concrete value, not a tracer or a placeholder."""
    leaves = jax.tree.leaves(values)
    return all(isinstance(leaf, numbers.Number | np.ndarray | np.generic | jax.Array) for leaf in leaves) and not any(
        isinstance(leaf, Tracer) for leaf in leaves
    )


def eager(*values: PyTree) -> AbstractContextManager:
    """Under ``jit``, evaluate concrete values eagerly so that they can be checked."""
    return jax.ensure_compile_time_eval() if is_concrete(*values) else nullcontext()
