"""Control of derivatives: stop them silently (samplers), refuse them (the guard on log Z), reverse them (adversaries)."""

from collections.abc import Callable
from typing import Any

import jax
from jax.core import eval_jaxpr
from jax.custom_derivatives import SymbolicZero

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import PyTree


def freeze(fn: Callable, *example: PyTree) -> Callable:
    """Return the same function without derivatives in the values that it closes over.

    ``stop_gradient`` on the output would still push tangents through the whole sampler and fails on a
    ``while_loop``, so the gradient is stopped at the parameters, before the first step.

    Args:
        fn: a pure function that may close over traced parameters.
        *example: arguments (arrays or ``ShapeDtypeStruct``) with the shapes of the later calls.
    """
    converted, constants = jax.closure_convert(fn, *example)
    constants = jax.lax.stop_gradient(constants)
    return lambda *args: converted(*args, *constants)


def reverse_gradient(tree: PyTree) -> PyTree:
    """Return the same values with their derivatives multiplied by -1, so that a descending optimiser ascends in them.

    Args:
        tree: a pytree of arrays, such as the parameters of an adversary.

    References:
        Ganin et al., Domain-adversarial training of neural networks (2016).
    """
    return jax.tree.map(lambda leaf: 2 * jax.lax.stop_gradient(leaf) - leaf, tree)


def guard(fn: Callable, value: PyTree, message: str) -> PyTree:
    """Evaluate ``fn(value)`` and allow its derivatives in ``value`` only.

    A derivative in anything else that ``fn`` depends on (parameters, context, other sites) raises: these also change
    log Z, which the value does not contain. Higher derivatives in ``value`` are allowed.

    Raises:
        EnergyError: with ``message``, for a derivative in anything else.
    """
    # Everything that fn reads becomes an argument, so that the rule below closes over no value.
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
        # No guard from here on: a derivative in the value does not contain log Z, nor does any derivative of it.
        return jax.jvp(lambda v: converted(v, *constants), (value,), (tangent,))

    guarded.defjvp(jvp, symbolic_zeros=True)
    return guarded(value, constants)


def _is_symbolic(leaf: object) -> bool:
    return isinstance(leaf, SymbolicZero)


def _instantiate(leaf: Any) -> Any:
    return jax.numpy.zeros(leaf.shape, leaf.dtype) if _is_symbolic(leaf) else leaf
