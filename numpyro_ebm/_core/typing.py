"""Type aliases of the package."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.typing

Array: TypeAlias = jax.Array
ArrayLike: TypeAlias = jax.typing.ArrayLike | Sequence[Any]
"""A number, an array of JAX or NumPy, or a sequence of them."""
PRNGKey: TypeAlias = jax.Array
PyTree: TypeAlias = Any
Position: TypeAlias = PyTree
"""A point in unconstrained space: an array, or a dict of arrays by site."""

EnergyFn: TypeAlias = Callable[..., Any]
"""``energy(event)`` or ``energy(event, context)``: maps one event to a scalar."""

LogDensityFn: TypeAlias = Callable[[Position, PyTree], Array]
"""``log_density(position, local)`` of one point, where ``local`` holds the row's own context and base."""
