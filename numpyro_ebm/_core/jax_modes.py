"""JAX's promotion modes: this library runs in the default modes, a user's functions in the modes that the user has set.

Users set ``jax_numpy_rank_promotion="raise"`` or ``jax_numpy_dtype_promotion="strict"`` to find errors in their own code.
BlackJAX and NumPyro do not run in these modes.
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
def _promotion(rank: str, dtype: str) -> Iterator[None]:
    with jax.numpy_rank_promotion(rank), jax.numpy_dtype_promotion(dtype):
        yield


def in_own_modes(function: Callable[P, T]) -> Callable[P, T]:
    """Make a function run with JAX's default rank and dtype promotion, whatever modes are set by the caller."""

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
    """Restore, for a call of the user's function, the modes that were set when this library was called."""
    modes = _users.get()
    if modes is None:
        yield
        return
    with _promotion(*modes):
        yield
