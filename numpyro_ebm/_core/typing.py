"""Names for the types that travel through the package."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax

Array: TypeAlias = jax.Array
PRNGKey: TypeAlias = jax.Array
PyTree: TypeAlias = Any
Position: TypeAlias = PyTree
"""A point in unconstrained space: an array, or a dict of arrays by site."""

EnergyFn: TypeAlias = Callable[..., Any]
"""``energy(event)`` or ``energy(event, context)``: one event to a scalar."""

LogDensityFn: TypeAlias = Callable[[Position, PyTree], Array]
"""``log_density(position, local)``: one point and what is its row's own (context, base)."""
