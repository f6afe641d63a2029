"""A cache of compiled programs whose keys are the traced programs themselves.

A function reads its globals, attributes, lists and closures while it is traced. The traced program then holds all that it
computes: numbers as literals in its equations, arrays as its constants, which become arguments. So functions that compute
the same share compiled code, and no call uses outdated values, however they were changed.
"""

import functools
import os
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer, eval_jaxpr
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jax.typing import ArrayLike

from numpyro_ebm._core import autodiff
from numpyro_ebm._core.jax_modes import in_own_modes
from numpyro_ebm._core.typing import Array, PyTree

MOST_KEPT = 64
"""Most compiled programs in the cache, each of about 10 MB; the least recently used is dropped first."""
ARITHMETIC = frozenset(("add", "sub", "mul", "div"))
RULES = ("custom_jvp_call", "custom_vjp_call")
JAX_FOLDER = os.path.dirname(jax.__file__)


class _Same:
    """An object compared by identity, and kept alive so that its address is not reused."""

    def __init__(self, value: object):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class Code:
    """A traced program without its constants, compared by what it computes.

    Attributes:
        jaxpr: the equations, whose variables begin with the constants; ``replace`` of recent versions makes them arguments.
        in_avals: shapes and types of the flat arguments.
        in_tree: structure of the arguments.
        out_tree: structure of the result.
    """

    def __init__(self, jaxpr: Jaxpr, in_avals: tuple[Any, ...], in_tree: Hashable, out_tree: Hashable, rules: Hashable):
        self.jaxpr, self.in_avals, self.in_tree, self.out_tree = jaxpr, in_avals, in_tree, out_tree
        self._key = (_of_jaxpr(jaxpr), in_tree, out_tree, rules)
        self._hash = hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Code) and self._hash == other._hash and self._key == other._key)


@jax.tree_util.register_pytree_node_class
class Program:
    """A traced function of arrays: a pytree with the arrays it closes over as leaves and its code as structure."""

    def __init__(self, constants: list[Any], code: Code):
        self.constants, self.code = constants, code

    def __call__(self, *args: Any) -> Any:
        """Evaluate the program for arguments with the shapes and types that it was traced with.

        Raises:
            TypeError: for arguments of other shapes or types.
        """
        leaves, tree = jax.tree.flatten(args)
        avals = map(jax.typeof, leaves), self.code.in_avals
        came, wanted = ([(aval.shape, aval.dtype) for aval in each] for each in avals)
        if tree != self.code.in_tree or came != wanted:
            raise TypeError(f"A program traced for arguments {self.code.in_tree} of {wanted} got {tree} of {came}.")
        return jax.tree.unflatten(self.code.out_tree, eval_jaxpr(self.code.jaxpr, self.constants, *leaves))

    def tree_flatten(self) -> tuple[list[Any], Code]:
        """Return the arrays and the code."""
        return self.constants, self.code

    @classmethod
    def tree_unflatten(cls, code: Code, constants: Iterable[Any]) -> "Program":
        """Return the same program with other arrays."""
        return cls(list(constants), code)


@in_own_modes
def trace(function: Callable, *examples: PyTree, order: int = 0) -> Program:
    """Trace a function, with the current values of all that it reads.

    For functions under the user's own ``jax.jit``, and for loop bodies that are defined only once, JAX may return its own
    cached trace.

    Args:
        function: a function of arrays.
        *examples: arguments, or their ``jax.ShapeDtypeStruct``.
        order: number of derivatives of the program that will be taken. Derivative rules of a user's ``jax.custom_jvp`` or
            ``custom_vjp`` are compared up to this order.
    """
    # make_jaxpr caches by the function's identity, so a new function is passed each time.
    closed, shapes = jax.make_jaxpr(lambda *args: function(*args), return_shape=True)(*examples)
    jaxpr, numbers = _without_numbers(closed.jaxpr)
    constants = [*map(_snapshot, closed.consts), *numbers]
    in_tree, out_tree = jax.tree.structure(examples), jax.tree.structure(shapes)
    rules = None
    if any(_own_rules(jaxpr)):
        is_traced = any(isinstance(each, Tracer) for each in [*constants, *jax.tree.leaves(examples)])
        rules = _Same(object()) if is_traced else _derivatives(jaxpr, constants, order)
    return Program(constants, Code(jaxpr, tuple(closed.in_avals), in_tree, out_tree, rules))


def compiled(function: Callable, *args: Any) -> Any:
    """Evaluate ``function(*args)`` by a program that is compiled once for all functions that compute the same."""
    return call(trace(function, *args), *args)


def jit(function: Callable | None = None, *, static_argnames: tuple[str, ...] = ()) -> Callable:
    """Compile a function of programs like ``jax.jit``, and keep only the most recently used compilations.

    Args:
        function: the function to compile.
        static_argnames: names of static keyword arguments, which are part of the cache key.
    """
    if function is None:
        return functools.partial(jit, static_argnames=static_argnames)

    @functools.wraps(function)
    @in_own_modes
    def call(*args: Any, **kwargs: Any) -> Any:
        static = {name: kwargs.pop(name) for name in static_argnames if name in kwargs}
        leaves, tree = jax.tree.flatten((args, kwargs))
        key = (function, tree, tuple(static.items()))
        if key not in _kept:
            _kept[key] = jax.jit(functools.partial(_unflattened, function, tree, static))
            if len(_kept) > MOST_KEPT:
                _kept.popitem(last=False)
        _kept.move_to_end(key)
        return _kept[key](leaves)

    return call


_kept: OrderedDict[Hashable, Callable] = OrderedDict()


def _unflattened(function: Callable, tree: Hashable, static: dict[str, Any], leaves: list[Any]) -> Any:
    args, kwargs = jax.tree.unflatten(tree, leaves)
    return function(*args, **kwargs, **static)


@jit
def call(program: Program, *args: Any) -> Any:
    """Evaluate ``program(*args)``, compiled."""
    return program(*args)


def _snapshot(constant: ArrayLike) -> Array:
    """Return a constant as an immutable array; a NumPy array is copied, as it can change in place."""
    return constant if isinstance(constant, jax.Array) else jnp.array(np.asarray(constant))


def _without_numbers(jaxpr: Jaxpr) -> tuple[Jaxpr, list[np.ndarray]]:
    """Turn numbers in arithmetic operations into constants, so that programs that differ only in them are equal."""
    places: list[Any] = []
    numbers: list[np.ndarray] = []

    def place(eqn: JaxprEqn, operand: Any) -> Any:
        if eqn.primitive.name not in ARITHMETIC or not _is_float(operand):
            return operand
        places.append(Var(operand.aval))
        numbers.append(np.asarray(operand.val, operand.aval.dtype))
        return places[-1]

    eqns = [eqn.replace(invars=[place(eqn, operand) for operand in eqn.invars]) for eqn in jaxpr.eqns]
    return jaxpr.replace(eqns=eqns, constvars=[*jaxpr.constvars, *places]), numbers


def _is_float(operand: Var | Literal) -> bool:
    aval: Any = operand.aval
    return isinstance(operand, Literal) and jnp.issubdtype(aval.dtype, jnp.floating)


def _of_jaxpr(jaxpr: Jaxpr) -> Hashable:
    """Return a hashable description of a program, with its variables numbered in order."""
    numbers: dict[Any, int] = {}

    def new(variables: Sequence[Var]) -> Hashable:
        numbers.update((variable, len(numbers) + i) for i, variable in enumerate(variables))
        return tuple(variable.aval for variable in variables)

    def old(operands: Sequence[Var | Literal]) -> Hashable:
        return tuple(_of_literal(each) if isinstance(each, Literal) else numbers[each] for each in operands)

    start = new([*jaxpr.constvars, *jaxpr.invars]), len(jaxpr.constvars)
    eqns = tuple((eqn.primitive, old(eqn.invars), _of_params(eqn), new(eqn.outvars)) for eqn in jaxpr.eqns)
    return start, eqns, old(jaxpr.outvars)


def _of_params(eqn: JaxprEqn) -> Hashable:
    # Functions that hold a derivative rule are new objects in each trace; see `_derivatives`.
    kinds = (ClosedJaxpr, int) if eqn.primitive.name in RULES else object
    return tuple((name, _of_value(value)) for name, value in eqn.params.items() if isinstance(value, kinds))


def _of_value(value: Any) -> Hashable:
    """Return a hashable description of an equation's parameter; equal descriptions compute the same."""
    if isinstance(value, ClosedJaxpr):
        return _of_jaxpr(value.jaxpr), tuple(map(_of_constant, value.consts))
    if isinstance(value, Jaxpr):
        return _of_jaxpr(value)
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_of_value, value))
    if isinstance(value, dict):
        return type(value), tuple((key, _of_value(each)) for key, each in value.items())
    if isinstance(value, float | complex):
        return type(value), repr(value)  # tells 0.0 from -0.0, and equates NaN with NaN
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return _of_constant(value)
    if type(value).__name__ == "ClosedRule":  # of jax.custom_batching.custom_vmap
        return _of_value(value.rule)
    if isinstance(value, types.FunctionType) and value.__module__.startswith("jax."):
        # JAX creates such a function around the user's at each trace, e.g. for a callback.
        return value.__code__, tuple(_of_value(cell.cell_contents) for cell in value.__closure__ or ())
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return type(value), value


def _of_literal(literal: Literal) -> Hashable:
    return literal.aval, _of_constant(literal.val)


def _of_constant(value: object) -> Hashable:
    """Return a key for an array inside a program: its identity if it is immutable, else its bytes."""
    if isinstance(value, jax.Array):
        return _Same(value)
    array = np.asarray(value)
    return (array.shape, array.dtype, array.tobytes()) if array.dtype != object else _Same(value)


def _own_rules(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Yield the equations with derivative rules that are not JAX's own; the program does not contain such rules."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in RULES and not _is_known_rule(eqn):
            yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from _own_rules(value.jaxpr if isinstance(value, ClosedJaxpr) else value)


def _is_jaxpr(value: object) -> bool:
    return isinstance(value, ClosedJaxpr | Jaxpr)


def _is_known_rule(eqn: JaxprEqn) -> bool:
    """Return whether an equation is a ``custom_jvp`` function of JAX itself, such as ``jax.nn.relu``, or the guard on log Z.

    The guard's derivative is that of the function inside it, which is part of the program.
    """
    file = eqn.params["call_jaxpr"].jaxpr.debug_info.func_filename
    is_known = file is not None and (file.startswith(JAX_FOLDER) or file == autodiff.__file__)
    return eqn.primitive.name == "custom_jvp_call" and is_known


def _derivatives(jaxpr: Jaxpr, constants: list[Any], order: int) -> Hashable:
    """Return keys of the derivatives' programs, which contain the rules' computation; a unique key if tracing them fails."""

    def pull(constants: list[Any], floats: list[Array], rest: list[Array]) -> Any:
        evaluate = lambda floats: eval_jaxpr(jaxpr, constants, *_merged(jaxpr.invars, floats, rest))  # noqa: E731
        values, back = jax.vjp(evaluate, floats)
        return back(values)

    def pushed(function: Callable) -> Callable:
        return lambda constants, floats, rest: jax.jvp(lambda x: function(constants, x, rest), (floats,), (floats,))

    avals: list[Any] = [variable.aval for variable in jaxpr.invars]
    structs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    split = [s for s in structs if _is_inexact(s)], [s for s in structs if not _is_inexact(s)]
    function, found = pull, []
    for _ in range(order):
        try:
            closed = jax.make_jaxpr(function)(constants, *split)
        except Exception:
            return _Same(object())
        if any(isinstance(each, Tracer) for each in closed.consts):
            return _Same(object())
        found.append((_of_jaxpr(closed.jaxpr), tuple(map(_of_constant, closed.consts))))
        function = pushed(function)
    return tuple(found)


def _is_inexact(struct: Any) -> bool:
    return jnp.issubdtype(struct.dtype, jnp.inexact)


def _merged(variables: Sequence[Var], floats: Iterable[Array], rest: Iterable[Array]) -> list[Array]:
    floats, rest = iter(floats), iter(rest)
    return [next(floats) if _is_inexact(variable.aval) else next(rest) for variable in variables]
