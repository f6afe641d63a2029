"""Type aliases of the package.

Shapes are those of jaxtyping: ``Float[Array, "rows d"]`` is a floating-point array of two dimensions. A size that is named
twice in one signature is the same in both places; ``*event`` stands for any number of dimensions, ``{site.num_rows}`` for
the value of that expression. `tests/test_types.py` checks them while the public surface runs.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.typing
from jaxtyping import Float, Key, UInt32

Array: TypeAlias = jax.Array
ArrayLike: TypeAlias = jax.typing.ArrayLike | Sequence[Any]
"""A number, an array of JAX or NumPy, or a sequence of them."""
Scalar: TypeAlias = Float[Array, ""]
"""One number."""
Chains: TypeAlias = Float[Array, "*chains"]
"""A number, or one number per chain (and per draw)."""
RowValues: TypeAlias = Float[Array, " {site.num_rows}"]
"""One number per row of the argument ``site``."""
Flat: TypeAlias = Float[Array, " d"]
"""The unconstrained latents of a model, as one vector."""
Matrix: TypeAlias = Float[Array, "d d"]
"""A matrix over `Flat`, such as a covariance."""
PRNGKey: TypeAlias = Key[Array, ""] | UInt32[Array, "2"]
"""A random key: of ``jax.random.key``, or of ``jax.random.PRNGKey``."""
PRNGKeys: TypeAlias = Key[Array, " num"] | UInt32[Array, "num 2"]
"""Several random keys."""
PyTree: TypeAlias = Any
Position: TypeAlias = PyTree
"""A point in unconstrained space: an array, or a dict of arrays by site."""

EnergyFn: TypeAlias = Callable[..., Any]
"""``energy(event)`` or ``energy(event, context)``: maps one event to a scalar."""

ChainLogDensityFn: TypeAlias = Callable[[Position], Scalar]
"""``log_density(position)`` of one chain."""

LogDensityFn: TypeAlias = Callable[[Position, PyTree], Scalar]
"""``log_density(position, local)`` of one point, where ``local`` holds the row's own context and base."""
