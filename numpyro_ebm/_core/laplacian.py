"""Second derivatives of a function by its program: the forward Laplacian, whether it applies, whether there are any."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.typing import Array

# folx knows these by the name of their jitted function, which a user's own may share.
BY_NAME = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid, "softplus": jax.nn.softplus, "logaddexp": jnp.logaddexp}

SMALL = 32

# Operations that act on each element by itself, move elements or add them up.
LOCAL = {"add", "sub", "mul", "div", "neg", "exp", "log", "log1p", "tanh", "logistic", "sin", "cos", "sinh", "cosh", "sqrt"}
LOCAL |= {"abs", "integer_pow", "pow", "square", "reduce_sum", "reshape", "slice", "squeeze", "broadcast_in_dim"}
LOCAL |= {"convert_element_type", "copy"}


def gradient_and_laplacian(fn: Callable[[Array], Array], flat: Array) -> tuple[Array, Array]:
    """Gradient and Laplacian of a scalar function of ``(d,)``, in one pass forward (the package folx).

    Where no product of matrices mixes the coordinates, what is 0 in the Jacobians on the way is left out of them.
    """
    result = _forward(fn, flat, 0.5) if _is_local(fn, flat) else None
    # Where operations of jax.numpy made the places of its entries, folx cannot lay a sparse Jacobian out.
    if result is None or not is_concrete(result.jacobian.x0_idx):
        result = _forward(fn, flat, 0)
    return result.dense_jacobian.reshape(flat.shape), result.laplacian


def _forward(fn: Callable[[Array], Array], flat: Array, sparsity: float) -> Any:
    from folx import forward_laplacian

    # Its own arithmetic needs both; that of the function has just been traced without.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        return forward_laplacian(fn, sparsity_threshold=sparsity)(flat)


def beyond_forward_laplacian(fn: Callable[..., Any], *args: Any) -> tuple[str, ...]:
    """Names of the operations on the arguments for which folx has no rule of its own, sorted."""
    closed = jax.make_jaxpr(fn)(*args)
    missing: set[str] = set()
    _walk(closed.jaxpr, [True] * len(closed.jaxpr.invars), missing)
    return tuple(sorted(missing))


def is_piecewise_linear(fn: Callable[[Array], Array], point: Array) -> bool:
    """Whether a function's gradient changes with the point, and yet its second derivative is zero almost everywhere."""
    slope = jax.grad(fn)
    bend = jax.make_jaxpr(lambda x, v: jax.jvp(slope, (x,), (v,))[1])(point, point).jaxpr
    if any(_walk(bend, [False, True])):
        return False
    program = jax.make_jaxpr(slope)(point).jaxpr
    return any(_walk(program, [True] * len(program.invars), integers=True))


def _is_local(fn: Callable[[Array], Array], flat: Array) -> bool:
    """Whether a program has local operations only between its argument and its result."""
    jaxpr = jax.make_jaxpr(fn)(flat).jaxpr
    others: set[str] = set()
    _walk(jaxpr, [True], others, has_rule=lambda eqn: eqn.primitive.name in LOCAL)
    return not others


def count_operations(fn: Callable[..., Any], *args: Any) -> int:
    """Arithmetic operations of a function's program: of a product by its shapes, of all else one per element."""
    return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def _count(jaxpr: Any) -> int:
    return sum(_count_one(eqn) for eqn in jaxpr.eqns)


def _count_one(eqn: Any) -> int:
    leaves = jax.tree.leaves(tuple(eqn.params.values()), is_leaf=lambda each: hasattr(each, "eqns"))
    inner = [getattr(each, "jaxpr", each) for each in leaves if hasattr(each, "eqns")]
    if inner:
        repeats = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        return repeats * sum(map(_count, inner))
    size = max((math.prod(var.aval.shape) for var in eqn.outvars), default=0)
    if eqn.primitive.name != "dot_general":
        return size
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2 * size * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)


def _walk(
    jaxpr: Any,
    marked: Sequence[bool],
    missing: set[str] | None = None,
    *,
    integers: bool = False,
    has_rule: Callable[[Any], bool] | None = None,
) -> list[bool]:
    """Which outputs depend on the marked inputs; names of operations on the way that have no rule go to ``missing``.

    Args:
        jaxpr: a program.
        marked: one flag for each input.
        missing: collects names, or None.
        has_rule: whether an operation has one; None for folx's.
        integers: whether what goes through integers and booleans counts as dependence; it has no derivative.
    """
    depends = dict(zip(jaxpr.invars, marked, strict=True))
    has_rule = _has_rule if has_rule is None else has_rule

    def is_marked(atom):
        return not isinstance(atom, Literal) and depends.get(atom, False)

    for eqn in jaxpr.eqns:
        inputs = [is_marked(atom) for atom in eqn.invars]
        if not any(inputs):
            continue
        inner = eqn.params["jaxpr"].jaxpr if eqn.primitive.name in ("jit", "pjit") else None
        if inner is not None and not (missing is not None and _is_known(str(eqn.params["name"]))):
            outputs = _walk(inner, inputs, missing, integers=integers, has_rule=has_rule)
        else:
            if missing is not None and not has_rule(eqn):
                missing.add(str(eqn.params.get("name", eqn.primitive.name)))
            outputs = [True] * len(eqn.outvars)
        for var, flag in zip(eqn.outvars, outputs, strict=True):
            depends[var] = flag and (integers or jnp.issubdtype(var.aval.dtype, jnp.inexact))
    return [is_marked(atom) for atom in jaxpr.outvars]


def _is_known(operation: Any) -> bool:
    from folx.wrapped_functions import is_registered

    return is_registered(operation)


def _has_rule(eqn: Any) -> bool:
    """Whether folx treats an operation itself; a jitted function that it knows by name has to be the one it means.

    Of a function with a derivative of its own (``custom_jvp``) it takes the full Hessian, which is no loss for a small one;
    it cannot if an argument is a literal.
    """
    if eqn.primitive.name == "custom_jvp_call":
        has_literal = any(isinstance(atom, Literal) for atom in eqn.invars)
        return not has_literal and sum(math.prod(v.aval.shape) for v in eqn.invars) <= SMALL
    if eqn.primitive.name not in ("jit", "pjit"):
        has_derivative = any(jnp.issubdtype(var.aval.dtype, jnp.inexact) for var in eqn.outvars)
        return _is_known(eqn.primitive) or not has_derivative
    meant = BY_NAME.get(eqn.params["name"])
    if meant is None:
        return False
    try:
        known = jax.make_jaxpr(meant)(*(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars))
    except TypeError:
        return False
    return str(known.jaxpr.eqns[0].params.get("jaxpr")) == str(eqn.params["jaxpr"])
