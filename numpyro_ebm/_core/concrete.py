"""Which values are known while a program is traced."""

import numbers
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np
from jax.core import Tracer


def is_concrete(*values: Any) -> bool:
    """Whether every leaf is a value and not a tracer or a placeholder."""
    leaves = jax.tree.leaves(values)
    return all(isinstance(leaf, numbers.Number | np.ndarray | np.generic | jax.Array) for leaf in leaves) and not any(
        isinstance(leaf, Tracer) for leaf in leaves
    )


def eager(*values: Any) -> AbstractContextManager:
    """Inside ``jit``, compute with values that are known there at once, so that they can be checked."""
    return jax.ensure_compile_time_eval() if is_concrete(*values) else nullcontext()
