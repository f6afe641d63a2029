"""A number for a traced program that is the same in every process, to recognise a computation that was stored."""

import hashlib
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from numpyro_ebm._core.keys import as_numbers
from numpyro_ebm._core.typing import PyTree

MOST_READ = 2**26
"""Bytes of an array of which a checksum reads all: a tenth of a second."""
ROWS_READ = 1000
"""Rows of a larger array that a checksum reads at the start, at the end and between."""
MOVES = ("reshard", "sharding_constraint")
"""Operations that move values and do not change them."""
PLACES = ("sharding", "mesh")
"""Parameters of operations that say where values lie, which is no part of what they are."""


def digest(jaxpr: Jaxpr, constants: Sequence[Any] = ()) -> str:
    """Return a hash of what a program computes.

    Each value has the hash of the operation that makes it and of its operands, and each constant that of its numbers, so
    that the order of operations that do not depend on each other, which may differ from process to process, does not count.

    Args:
        jaxpr: the program.
        constants: arrays for its first variables; the other variables count by their place.
    """
    # Jaxpr.replace of recent versions of JAX puts the constants in front of the arguments.
    variables = [*jaxpr.constvars, *jaxpr.invars]
    names: dict[Any, str] = {variable: f"{i} {variable.aval}" for i, variable in enumerate(variables)}
    for variable, value in zip(variables, constants, strict=False):
        names[variable] = f"{checksum([value])} {variable.aval}"
    effects = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in MOVES:
            names[equation.outvars[0]] = _of_operand(equation.invars[0], names)
            continue
        own = _of_equation(equation, [_of_operand(each, names) for each in equation.invars])
        names.update({variable: f"{own} {i}" for i, variable in enumerate(equation.outvars)})
        effects += [own] if equation.effects else []
    results = [_of_operand(each, names) for each in jaxpr.outvars]
    return _hash([*results, *sorted(effects)])


def checksum(arrays: Iterable[Any]) -> str:
    """Return a number that tells arrays apart.

    Of an array above `MOST_READ` bytes it reads the first and the last `ROWS_READ` rows, and as many at equal distances.
    """
    total = 0
    for each in arrays:
        numbers = as_numbers(each)
        is_large = len(np.shape(numbers)) > 0 and numbers.nbytes > MOST_READ
        read = _some_rows(numbers) if is_large else np.asarray(numbers)
        total = zlib.crc32(np.ascontiguousarray(read).tobytes(), total)
    return f"{total:08x}"


def checksum_of_tree(tree: PyTree) -> str:
    """Return a number that tells pytrees of arrays apart, by the names, types, shapes and values of their leaves."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    arrays = [(jax.tree_util.keystr(path), np.asarray(as_numbers(leaf))) for path, leaf in leaves]
    return _hash(f"{name} {each.dtype}{each.shape} {checksum([each])}" for name, each in arrays)


def without_addresses(text: str) -> str:
    """Return a text without the addresses of objects, which differ from process to process."""
    return re.sub(r" at 0x[0-9a-f]+|\bid=\d+", "", text)


def _some_rows(numbers: Any) -> np.ndarray:
    between = numbers[:: -(-len(numbers) // ROWS_READ)]
    return np.concatenate([numbers[:ROWS_READ], between, numbers[-ROWS_READ:]])


def _of_equation(equation: JaxprEqn, operands: list[str]) -> str:
    kept = {name: value for name, value in equation.params.items() if not any(word in name for word in PLACES)}
    params = [f"{name} {_of_value(value)}" for name, value in sorted(kept.items())]
    return _hash([equation.primitive.name, *params, *operands, *(str(each.aval) for each in equation.outvars)])


def _of_operand(operand: Any, names: Mapping[Any, str]) -> str:
    if not isinstance(operand, Literal):
        return names.get(operand, "dropped")
    aval: Any = operand.aval
    return f"{checksum([np.asarray(operand.val, aval.dtype)])} {aval}"


def _of_value(value: Any) -> str:
    """Return what an equation's parameter says, without what differs from process to process."""
    if isinstance(value, ClosedJaxpr):
        return digest(value.jaxpr, value.consts)
    if isinstance(value, Jaxpr):
        return digest(value)
    if isinstance(value, tuple | list):
        return _hash([_of_value(each) for each in value])
    if isinstance(value, Mapping):
        return _hash([f"{name} {_of_value(each)}" for name, each in sorted(value.items(), key=str)])
    if isinstance(value, jax.Array | np.ndarray):
        return f"{value.dtype}{value.shape} {checksum([value])}"
    if isinstance(value, set | frozenset):
        return _hash(sorted(map(_of_value, value)))
    is_named = callable(value) and hasattr(value, "__qualname__")
    return f"{value.__module__}.{value.__qualname__}" if is_named else without_addresses(repr(value))


def _hash(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
