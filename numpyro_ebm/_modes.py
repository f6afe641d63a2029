"""JAX's modes of promotion: this library and BlackJAX run in the default ones, functions of the user's in the user's.

``jax_numpy_rank_promotion="raise"`` and ``jax_numpy_dtype_promotion="strict"`` find faults in the code of whoever sets them.
BlackJAX and NumPyro do not run under them.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import jax

P = ParamSpec("P")
T = TypeVar("T")

DEFAULTS = ("allow", "standard")

_users: ContextVar[tuple[Any, Any] | None] = ContextVar("users", default=None)


@contextmanager
def _promotion(rank: Any, dtype: Any) -> Iterator[None]:
    with jax.numpy_rank_promotion(rank), jax.numpy_dtype_promotion(dtype):
        yield


def in_own_modes(function: Callable[P, T]) -> Callable[P, T]:
    """The same function, in which arrays of different ranks and types meet as in JAX by default."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        modes: Any = jax.config.jax_numpy_rank_promotion, jax.config.jax_numpy_dtype_promotion  # pyright: ignore
        if modes == DEFAULTS:
            return function(*args, **kwargs)
        token = _users.set(modes)
        try:
            with _promotion(*DEFAULTS):
                return function(*args, **kwargs)
        finally:
            _users.reset(token)

    return call


@contextmanager
def in_users_modes() -> Iterator[None]:
    """Around what the user wrote: the modes that were set when this library was called."""
    modes = _users.get()
    if modes is None:
        yield
        return
    with _promotion(*modes):
        yield
