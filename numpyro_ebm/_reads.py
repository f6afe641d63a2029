"""What a function reads beside its arguments, as a key: compiled code that is kept holds those values fixed."""

import contextlib
import functools
import hashlib
import types
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

DEPTH = 8
LARGEST = 2**22  # bytes of a NumPy array that are looked at
LIBRARIES = frozenset("jax jaxlib numpy scipy numpyro numpyro_ebm flax equinox optax blackjax builtins functools".split())


class _Same:
    """Stands for an object that is compared by identity."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def reads(*functions: Any) -> Hashable:
    """Code, globals, closures and attributes that functions depend on, their helpers' included.

    Two calls give the same where the functions would compute the same. Libraries are not looked into, nor what a function
    reaches by names made at run time. Numbers in a list are left out: a list that a function appends to is a record.
    """
    seen: dict[int, Any] = {}  # holds what it has seen, whose ids would be given anew
    return tuple(_key(function, seen, DEPTH) for function in functions)


def _key(value: Any, seen: dict[int, Any], depth: int) -> Hashable:
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic):
        return type(value).__name__, repr(value)
    if isinstance(value, types.CodeType):
        return value
    if isinstance(value, Tracer) or depth == 0 or id(value) in seen:
        return None
    if isinstance(value, np.ndarray):
        return _of_array(value)
    seen[id(value)] = value
    parts = tuple((name, _key(each, seen, depth - 1)) for name, each in _parts(value))
    return parts if parts or isinstance(value, tuple | list | Mapping) else _Same(value)


def _of_array(value: np.ndarray) -> Hashable:
    if value.dtype == object or value.nbytes > LARGEST:
        return _Same(value)
    return value.shape, str(value.dtype), hashlib.blake2b(np.ascontiguousarray(value).tobytes()).digest()


def _parts(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, jax.Array | types.ModuleType | type):
        return ()
    if isinstance(value, types.FunctionType):
        return _unwrapped(value) if _is_library(value) else _of_function(value)
    if isinstance(value, types.MethodType):
        return [("self", value.__self__), ("function", value.__func__)]
    if isinstance(value, Mapping):
        return [(str(name), each) for name, each in value.items()]
    if isinstance(value, tuple | list):
        numbers = (bool, int, float, complex) if isinstance(value, list) else ()
        return [(i, each) for i, each in enumerate(value) if not isinstance(each, numbers)]
    call = [("call", type(value).__call__)] if callable(value) and not _is_library(type(value)) else []
    slots = [name for each in type(value).__mro__ for name in getattr(each, "__slots__", ())]
    attributes = getattr(value, "__dict__", {}) | {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return [*call, *_unwrapped(value), *((str(name), each) for name, each in attributes.items())]


def _unwrapped(value: Any) -> list[tuple[Any, Any]]:
    """The user's function inside a library's object: of ``jax.jit`` and of ``functools.partial``."""
    if isinstance(value, functools.partial):
        return [("partial", (value.func, value.args, value.keywords))]
    return [("wrapped", value.__wrapped__)] if hasattr(value, "__wrapped__") else []


def _of_function(function: types.FunctionType) -> Iterator[tuple[Any, Any]]:
    yield "code", function.__code__
    yield "defaults", (function.__defaults__, function.__kwdefaults__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not assigned yet
            yield name, cell.cell_contents
    names = _names(function.__code__)
    for name in names:
        value = function.__globals__.get(name)
        if isinstance(value, types.ModuleType | type) and not _is_library(value):
            yield from ((f"{name}.{each}", vars(value)[each]) for each in names if each in vars(value))
        elif name in function.__globals__:
            yield name, value


def _names(code: types.CodeType) -> tuple[str, ...]:
    inner = [each for const in code.co_consts if isinstance(const, types.CodeType) for each in _names(const)]
    return tuple(dict.fromkeys((*code.co_names, *inner)))


def _is_library(value: Any) -> bool:
    """Whether a module, a class or a function is of one of the libraries."""
    name = value.__name__ if isinstance(value, types.ModuleType) else value.__module__
    return name.partition(".")[0] in LIBRARIES
