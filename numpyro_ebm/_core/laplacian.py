"""Forward Laplacian (folx), and analysis of programs: whether folx applies, which derivatives vanish everywhere."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Primitive
from jaxtyping import Float

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.typing import Array, PyTree, Scalar

# folx recognises these by the name of their jitted function, which a user's function may share.
BY_NAME = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid, "softplus": jax.nn.softplus, "logaddexp": jnp.logaddexp}

SMALL = 32
"""Most inputs of a ``custom_jvp`` function whose full Hessian folx may compute; the Hessian's cost grows as their square."""

# Operations that act on each element separately, move elements or sum them.
LOCAL = {"add", "sub", "mul", "div", "neg", "exp", "log", "log1p", "tanh", "logistic", "sin", "cos", "sinh", "cosh", "sqrt"}
LOCAL |= {"abs", "integer_pow", "pow", "square", "reduce_sum", "reshape", "slice", "squeeze", "broadcast_in_dim"}
LOCAL |= {"convert_element_type", "copy"}


def gradient_and_laplacian(
    fn: Callable[[Float[Array, " d"]], Scalar], flat: Float[Array, " d"]
) -> tuple[Float[Array, " d"], Scalar]:
    """Compute gradient and Laplacian of a scalar function of ``(d,)`` in one forward pass (the package folx).

    If no matrix product mixes the coordinates, the intermediate Jacobians are stored as sparse.
    """
    result = _forward(fn, flat, 0.5) if _is_local(fn, flat) else None
    # If the indices of a sparse Jacobian came out of traced operations, folx cannot make it dense.
    if result is None or not is_concrete(result.jacobian.x0_idx):
        result = _forward(fn, flat, 0)
    return result.dense_jacobian.reshape(flat.shape), result.laplacian


def _forward(fn: Callable[[Float[Array, " d"]], Scalar], flat: Float[Array, " d"], sparsity: float) -> Any:
    from folx import forward_laplacian

    # folx needs both default modes; the function itself has just been traced in the user's modes.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        return forward_laplacian(fn, sparsity_threshold=sparsity)(flat)


def beyond_forward_laplacian(fn: Callable[..., Any], *args: Any) -> tuple[str, ...]:
    """Return the sorted names of the operations on the arguments for which folx has no rule."""
    closed = jax.make_jaxpr(fn)(*args)
    missing: set[str] = set()
    _walk(closed.jaxpr, [True] * len(closed.jaxpr.invars), missing)
    return tuple(sorted(missing))


def is_piecewise_linear(fn: Callable[[Float[Array, "*position"]], Scalar], point: Float[Array, "*position"]) -> bool:
    """Return whether the gradient depends on the point although the second derivative is 0 almost everywhere."""
    slope = jax.grad(fn)
    bend = jax.make_jaxpr(lambda x, v: jax.jvp(slope, (x,), (v,))[1])(point, point).jaxpr
    if any(_walk(bend, [False, True])):
        return False
    program = jax.make_jaxpr(slope)(point).jaxpr
    return any(_walk(program, [True] * len(program.invars), integers=True))


def is_flat(fn: Callable[..., Scalar], point: PyTree, *others: PyTree) -> bool:
    """Return whether a function depends on a point, and yet its gradient there is 0 by its structure.

    That is so where the point passes through comparisons, rounding or conversions to integers only.

    Args:
        fn: the function, which is traced and not evaluated.
        point: floating-point arrays, or their ``jax.ShapeDtypeStruct``.
        *others: further arguments.
    """
    are_zero: list[bool] = []  # no tangents, which would outlive their trace

    @jax.custom_jvp
    def probe(value):
        return value

    @partial(probe.defjvp, symbolic_zeros=True)
    def _(primals, tangents):
        are_zero.append(isinstance(tangents[0], SymbolicZero))
        return primals[0], jnp.zeros_like(primals[0])

    def push(point, others):
        return jax.jvp(lambda point: probe(fn(point, *others)), (point,), (point,))

    jax.eval_shape(push, point, others)
    if not all(are_zero):
        return False
    program = jax.make_jaxpr(fn)(point, *others).jaxpr
    marked = [True] * len(jax.tree.leaves(point)) + [False] * len(jax.tree.leaves(others))
    return any(_walk(program, marked, integers=True))


def _is_local(fn: Callable[[Float[Array, " d"]], Scalar], flat: Float[Array, " d"]) -> bool:
    """Return whether only local operations lie between a function's argument and its result."""
    jaxpr = jax.make_jaxpr(fn)(flat).jaxpr
    others: set[str] = set()
    _walk(jaxpr, [True], others, has_rule=lambda eqn: eqn.primitive.name in LOCAL)
    return not others


def count_operations(fn: Callable[..., Any], *args: Any) -> int:
    """Count a function's arithmetic operations: matrix products by their shapes, all others as one per output element."""
    return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def _count(jaxpr: Jaxpr) -> int:
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
    has_rule: Callable[[JaxprEqn], bool] | None = None,
) -> list[bool]:
    """Return which outputs depend on the marked inputs; add operations on the way without a rule to ``missing``.

    Args:
        jaxpr: a program.
        marked: one flag per input.
        missing: set that collects the names, or None.
        integers: whether dependence through integers and booleans counts, which has no derivative.
        has_rule: function that says whether an operation has a rule; None for folx's rules.
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


def _is_known(operation: str | Primitive) -> bool:
    from folx.wrapped_functions import is_registered

    return is_registered(operation)


def _has_rule(eqn: Any) -> bool:
    """Return whether folx has a rule for an operation; a jitted function must be the one that folx means by its name.

    For a function with its own derivative (``custom_jvp``) folx computes the full Hessian, which is cheap for few
    inputs. It fails if an argument is a literal.
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
