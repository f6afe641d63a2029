"""Compiled programs that are kept by what they compute: trace a function, then key by the program.

Whatever a function reads (globals, attributes, lists, closures) it reads while it is traced. What it computes is then in the
program alone: numbers as literals in its equations, arrays as its constants, which become arguments. So two functions share
compiled code where they compute the same, and none answers with old values, however the new ones were put there.
"""

import functools
import os
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer, eval_jaxpr
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

from numpyro_ebm._core import autodiff
from numpyro_ebm._core.modes import in_own_modes

MOST_KEPT = 64
"""Compiled programs that are kept, each of about 10 MB; the longest unused is the first to go."""
ARITHMETIC = frozenset(("add", "sub", "mul", "div"))
RULES = ("custom_jvp_call", "custom_vjp_call")
JAX_FOLDER = os.path.dirname(jax.__file__)


class _Same:
    """Stands for an object that is compared by identity, and keeps it, so that no other gets its address."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class Code:
    """A traced program without its constants, compared by what it computes.

    Attributes:
        jaxpr: the equations; the constants are its ``constvars``.
        in_avals: shapes and types of the flat arguments.
        in_tree: structure of the arguments.
        out_tree: structure of the result.
    """

    def __init__(self, jaxpr: Jaxpr, in_avals: tuple[Any, ...], in_tree: Any, out_tree: Any, rules: Hashable):
        self.jaxpr, self.in_avals, self.in_tree, self.out_tree = jaxpr, in_avals, in_tree, out_tree
        self._key = (_of_jaxpr(jaxpr), in_tree, out_tree, rules)
        self._hash = hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Code) and self._hash == other._hash and self._key == other._key)


@jax.tree_util.register_pytree_node_class
class Program:
    """A traced function of arrays: a pytree whose leaves are the arrays it closes over, its structure what it computes."""

    def __init__(self, constants: list[Any], code: Code):
        self.constants, self.code = constants, code

    def __call__(self, *args: Any) -> Any:
        """What the function gives for arguments of the shapes and types it was traced with.

        Raises:
            TypeError: for arguments of others.
        """
        leaves, tree = jax.tree.flatten(args)
        avals = map(jax.typeof, leaves), self.code.in_avals
        came, wanted = ([(aval.shape, aval.dtype) for aval in each] for each in avals)
        if tree != self.code.in_tree or came != wanted:
            raise TypeError(f"A program of arguments {self.code.in_tree} of {wanted} got {tree} of {came}.")
        return jax.tree.unflatten(self.code.out_tree, eval_jaxpr(self.code.jaxpr, self.constants, *leaves))

    def tree_flatten(self) -> tuple[list[Any], Code]:
        """The arrays, and what is computed from them."""
        return self.constants, self.code

    @classmethod
    def tree_unflatten(cls, code: Code, constants: Any) -> "Program":
        """The same program of other arrays."""
        return cls(list(constants), code)


@in_own_modes
def trace(function: Callable, *examples: Any, order: int = 0) -> Program:
    """The program that a function is now, in the place of it.

    A function under the user's own ``jax.jit``, or a loop's body that is defined once, is what JAX itself has kept of it.

    Args:
        function: a function of arrays.
        *examples: arguments, or their ``jax.ShapeDtypeStruct``.
        order: how many derivatives of the program will be taken. Those of a user's own ``jax.custom_jvp`` or ``custom_vjp``
            are then part of what it computes.
    """
    # make_jaxpr keeps what it traced by the function's identity: a new one each time is read each time.
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
    """``function(*args)`` by a program that is compiled once for all functions that compute the same."""
    return call(trace(function, *args), *args)


def jit(function: Callable | None = None, *, static_argnames: tuple[str, ...] = ()) -> Callable:
    """``jax.jit`` for functions of programs: of those that it compiled the longest unused are forgotten.

    Args:
        function: what to compile.
        static_argnames: keyword arguments that are part of the key.
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


def _unflattened(function: Callable, tree: Any, static: dict[str, Any], leaves: list[Any]) -> Any:
    args, kwargs = jax.tree.unflatten(tree, leaves)
    return function(*args, **kwargs, **static)


@jit
def call(program: Program, *args: Any) -> Any:
    """``program(*args)``, compiled."""
    return program(*args)


def _snapshot(constant: Any) -> Any:
    """A constant that does not change any more: a NumPy array may, in its place."""
    return constant if isinstance(constant, jax.Array) else jnp.array(np.asarray(constant))


def _without_numbers(jaxpr: Jaxpr) -> tuple[Jaxpr, list[np.ndarray]]:
    """The coefficients of sums and products as constants too, so that another number is not another program."""
    places: list[Any] = []
    numbers: list[np.ndarray] = []

    def place(eqn: Any, operand: Any) -> Any:
        if eqn.primitive.name not in ARITHMETIC or not _is_float(operand):
            return operand
        places.append(Var(operand.aval))
        numbers.append(np.asarray(operand.val, operand.aval.dtype))
        return places[-1]

    eqns = [eqn.replace(invars=[place(eqn, operand) for operand in eqn.invars]) for eqn in jaxpr.eqns]
    return jaxpr.replace(eqns=eqns, constvars=[*jaxpr.constvars, *places]), numbers


def _is_float(operand: Any) -> bool:
    aval: Any = operand.aval
    return isinstance(operand, Literal) and jnp.issubdtype(aval.dtype, jnp.floating)


def _of_jaxpr(jaxpr: Jaxpr) -> Hashable:
    """What a program computes, its variables numbered in their order."""
    numbers: dict[Any, int] = {}

    def new(variables: Any) -> Hashable:
        numbers.update((variable, len(numbers) + i) for i, variable in enumerate(variables))
        return tuple(variable.aval for variable in variables)

    def old(operands: Any) -> Hashable:
        return tuple(_of_literal(each) if isinstance(each, Literal) else numbers[each] for each in operands)

    start = new([*jaxpr.constvars, *jaxpr.invars]), len(jaxpr.constvars)
    eqns = tuple((eqn.primitive, old(eqn.invars), _of_params(eqn), new(eqn.outvars)) for eqn in jaxpr.eqns)
    return start, eqns, old(jaxpr.outvars)


def _of_params(eqn: Any) -> Hashable:
    # The functions that hold a derivative rule are made anew each time; see `_derivatives`.
    kinds = (ClosedJaxpr, int) if eqn.primitive.name in RULES else object
    return tuple((name, _of_value(value)) for name, value in eqn.params.items() if isinstance(value, kinds))


def _of_value(value: Any) -> Hashable:
    """What a parameter of an equation is, so that what is equal computes the same."""
    if isinstance(value, ClosedJaxpr):
        return _of_jaxpr(value.jaxpr), tuple(map(_of_constant, value.consts))
    if isinstance(value, Jaxpr):
        return _of_jaxpr(value)
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_of_value, value))
    if isinstance(value, dict):
        return type(value), tuple((key, _of_value(each)) for key, each in value.items())
    if isinstance(value, float | complex):
        return type(value), repr(value)  # where 0.0 is not -0.0, and NaN is NaN
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return _of_constant(value)
    if type(value).__name__ == "ClosedRule":  # of jax.custom_batching.custom_vmap
        return _of_value(value.rule)
    if isinstance(value, types.FunctionType) and value.__module__.startswith("jax."):
        # A function that JAX makes anew around a user's, as for a callback.
        return value.__code__, tuple(_of_value(cell.cell_contents) for cell in value.__closure__ or ())
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return type(value), value


def _of_literal(literal: Any) -> Hashable:
    return literal.aval, _of_constant(literal.val)


def _of_constant(value: Any) -> Hashable:
    """An array inside a program: by identity where it cannot change, by its bytes where it can."""
    if isinstance(value, jax.Array):
        return _Same(value)
    array = np.asarray(value)
    return (array.shape, array.dtype, array.tobytes()) if array.dtype != object else _Same(value)


def _own_rules(jaxpr: Jaxpr) -> Iterator[Any]:
    """Functions with derivative rules that are not JAX's own: nothing in the program says what those are."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in RULES and not _is_known_rule(eqn):
            yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from _own_rules(value.jaxpr if isinstance(value, ClosedJaxpr) else value)


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, ClosedJaxpr | Jaxpr)


def _is_known_rule(eqn: Any) -> bool:
    """Whether it is one of JAX's own functions, such as ``jax.nn.relu``, and of arrays alone; or the guard on log Z.

    The guard's derivative is that of the function inside it, which is part of the program.
    """
    file = eqn.params["call_jaxpr"].jaxpr.debug_info.func_filename
    is_known = file is not None and (file.startswith(JAX_FOLDER) or file == autodiff.__file__)
    return eqn.primitive.name == "custom_jvp_call" and is_known


def _derivatives(jaxpr: Jaxpr, constants: list[Any], order: int) -> Hashable:
    """The derivatives as programs, in which rules show what they compute; unlike any other where that cannot be told."""

    def pull(constants: Any, floats: Any, rest: Any) -> Any:
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


def _merged(variables: Any, floats: Any, rest: Any) -> list[Any]:
    floats, rest = iter(floats), iter(rest)
    return [next(floats) if _is_inexact(variable.aval) else next(rest) for variable in variables]
