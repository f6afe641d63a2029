"""JAX's promotion modes: this library runs in the default ones, and the user's functions run in those that the user has set.

A user sets ``jax_numpy_rank_promotion="raise"`` or ``jax_numpy_dtype_promotion="strict"`` to find faults in the user's own
code. BlackJAX and NumPyro do not run under them.
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
    """Make a function run with JAX's default promotion of ranks and types, whatever modes are set around it."""

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
    """Restore the modes that were set when this library was called, around a call of the user's function."""
    modes = _users.get()
    if modes is None:
        yield
        return
    with _promotion(*modes):
        yield
