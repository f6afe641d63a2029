"""Derivatives cut silently (no gradient through samplers), cut with an error (the guard), and turned round (adversaries)."""

from collections.abc import Callable
from typing import Any

import jax
from jax.core import eval_jaxpr
from jax.custom_derivatives import SymbolicZero

from numpyro_ebm._core.errors import EnergyError


def freeze(fn: Callable, *example: Any) -> Callable:
    """The same function with every value in its closure cut off from differentiation.

    ``stop_gradient`` on the output would still push tangents through a whole sampler first, and fails
    on a ``while_loop``; here the parameters themselves are cut, before the first step.

    Args:
        fn: a pure function that may close over traced parameters.
        *example: arguments (arrays or ``ShapeDtypeStruct``) of the shapes it will be called with.
    """
    converted, constants = jax.closure_convert(fn, *example)
    constants = jax.lax.stop_gradient(constants)
    return lambda *args: converted(*args, *constants)


def reverse_gradient(tree: Any) -> Any:
    """The same values, their derivatives times -1: one optimiser that descends in all the rest ascends in these.

    Args:
        tree: a pytree of arrays, such as an adversary's parameters.

    References:
        Ganin et al., Domain-adversarial training of neural networks (2016).
    """
    return jax.tree.map(lambda leaf: 2 * jax.lax.stop_gradient(leaf) - leaf, tree)


def guard(fn: Callable, value: Any, message: str) -> Any:
    """Evaluate ``fn(value)``; differentiate it in ``value`` only.

    A derivative in anything else that ``fn`` depends on (parameters, context, other sites) raises: those
    move log Z as well, which is not part of the value. Second derivatives in ``value`` pass.

    Raises:
        EnergyError: with ``message``, when something else is differentiated.
    """
    # All that fn reads becomes an argument, so that the rule below holds no value of its own.
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(value)
    constants, tree = list(closed.consts), jax.tree.structure(shape)

    def converted(value, *constants):
        return jax.tree.unflatten(tree, eval_jaxpr(closed.jaxpr, constants, *jax.tree.leaves(value)))

    @jax.custom_jvp
    def guarded(value, constants):
        return converted(value, *constants)

    def jvp(primals, tangents):
        value, constants = primals
        if any(not isinstance(t, SymbolicZero) for t in jax.tree.leaves(tangents[1])):
            raise EnergyError(message)
        tangent = jax.tree.map(_instantiate, tangents[0], is_leaf=_is_symbolic)
        # Unguarded from here on: a derivative in x is free of log Z, and so is any derivative of it.
        return jax.jvp(lambda v: converted(v, *constants), (value,), (tangent,))

    guarded.defjvp(jvp, symbolic_zeros=True)
    return guarded(value, constants)


def _is_symbolic(leaf: Any) -> bool:
    return isinstance(leaf, SymbolicZero)


def _instantiate(leaf: Any) -> Any:
    return jax.numpy.zeros(leaf.shape, leaf.dtype) if _is_symbolic(leaf) else leaf
