"""Dependencies of arrays in a traced program, and of the weights of its unnormalised terms, read off the jaxpr.

Nothing is evaluated. `mark` tags arrays with an identity that compiles to nothing; `flows` reads the marks.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive
from jax.interpreters import ad, batching, mlir

from numpyro_ebm._core.typing import PyTree

SOURCE, EVENT, TERM, BASE = "source", "event", "term", "base"
"""Kinds of marks: a value that inference changes, an energy's event, its log density, a log density tilted by a factor."""

NONE: frozenset[Any] = frozenset()


class Flow(NamedTuple):
    """Dependencies of one array. If it contains unnormalised terms, it lacks a multiple of each one's log Z.

    Attributes:
        sources: labels of the marked sources that it depends on.
        outside: like ``sources``, but inside an energy without those that enter through the energy's own event.
        event: ``outside`` of that event, as pairs (label of the event, source): energies may be nested.
        has_term: whether it contains an unnormalised term.
        shifts: sources on which the missing log Z's depend.
        weights: sources on which their multiples depend.
    """

    sources: frozenset[Any] = NONE
    outside: frozenset[Any] = NONE
    event: frozenset[tuple[Any, Any]] = frozenset()
    has_term: bool = False
    shifts: frozenset[Any] = NONE
    weights: frozenset[Any] = NONE


CONSTANT = Flow()

mark_p = Primitive("numpyro_ebm_mark")
mark_p.def_impl(lambda x, **_: x)
mark_p.def_abstract_eval(lambda x, **_: x)
ad.primitive_jvps[mark_p] = lambda primals, tangents, **params: (mark_p.bind(*primals, **params), tangents[0])
batching.primitive_batchers[mark_p] = lambda args, dims, **params: (mark_p.bind(*args, **params), dims[0])
mlir.register_lowering(mark_p, lambda ctx, x, **_: [x])


def mark(tree: PyTree, kind: str, label: Hashable = "") -> PyTree:
    """Return the same arrays, marked for `flows`.

    Args:
        tree: a pytree of arrays.
        kind: `SOURCE`, `EVENT`, `TERM` or `BASE`.
        label: the name of a source in ``Flow``, or the label that an event and its term share.
    """
    return jax.tree.map(lambda leaf: mark_p.bind(jnp.asarray(leaf), kind=kind, label=label), tree)


def flows(jaxpr: ClosedJaxpr) -> list[Flow]:
    """Return the `Flow` of each output of a closed jaxpr."""
    return _walk(jaxpr.jaxpr, [CONSTANT] * len(jaxpr.jaxpr.invars))


def _walk(jaxpr: Jaxpr, inputs: Sequence[Flow]) -> list[Flow]:
    known: dict[Any, Flow] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom):
        return CONSTANT if isinstance(atom, Literal) else known.get(atom, CONSTANT)

    for eqn in jaxpr.eqns:
        known.update(zip(eqn.outvars, _apply(eqn, [read(atom) for atom in eqn.invars]), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(eqn: JaxprEqn, inputs: list[Flow]) -> list[Flow]:
    """Return the flow of each output of one equation."""
    name, inner = eqn.primitive.name, called(eqn)
    if name in _CONTROL:
        return _CONTROL[name](eqn, inputs)
    if inner is not None:
        return _walk(inner, inputs)
    if eqn.primitive is mark_p:
        return [_MARKS[eqn.params["kind"]](inputs[0], eqn.params["label"])]
    if all(flow is CONSTANT for flow in inputs):
        return [CONSTANT] * len(eqn.outvars)
    return [_combine(name, inputs)] * len(eqn.outvars)


def called(eqn: JaxprEqn) -> Jaxpr | None:
    """Return the jaxpr that an equation calls (jit, checkpoint, custom derivatives), or None."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = eqn.params.get(key)
        inner = getattr(inner, "jaxpr", inner)
        if inner is not None and len(inner.invars) == len(eqn.invars):
            return inner
    return None


def _join(first: Flow, second: Flow) -> Flow:
    if second is CONSTANT or first is second:
        return first
    if first is CONSTANT:
        return second
    return Flow(
        first.sources | second.sources,
        first.outside | second.outside,
        first.event | second.event,
        first.has_term or second.has_term,
        first.shifts | second.shifts,
        first.weights | second.weights,
    )


def _together(inputs: Sequence[Flow]) -> Flow:
    return reduce(_join, inputs, CONSTANT)


_LINEAR = frozenset(
    "add add_any sub neg reduce_sum cumsum broadcast_in_dim reshape squeeze expand_dims transpose convert_element_type "
    "concatenate slice pad copy copy_p rev reduce_precision stop_gradient real psum sharding_constraint "
    "optimization_barrier name".split()
)
"""Operations whose output is linear in terms, with constant coefficients."""

_CONDITIONS = {
    "select_n": slice(0, 1),
    "gather": slice(1, None),
    "dynamic_slice": slice(1, None),
    "dynamic_update_slice": slice(2, None),
    "scatter": slice(1, 2),
    "scatter-add": slice(1, 2),
}
"""Operations that select among operands, and the operands that determine the selection."""

_PRODUCTS = frozenset({"mul", "div", "dot_general"})


def _combine(name: str, inputs: list[Flow]) -> Flow:
    joined = _together(inputs)
    if not joined.has_term or name in _LINEAR:
        return joined
    if name in _CONDITIONS:
        return _weighted(joined, _together(inputs[_CONDITIONS[name]]))
    if name in _PRODUCTS and not (name == "div" and inputs[1].has_term):
        first, second = inputs
        beside = _join(second if first.has_term else CONSTANT, first if second.has_term else CONSTANT)
        return _weighted(joined, beside)
    return _weighted(joined, joined)


def _weighted(flow: Flow, by: Flow) -> Flow:
    return flow._replace(weights=flow.weights | by.sources) if flow.has_term else flow


def _under(condition: Flow, flow: Flow) -> Flow:
    """Return the flow of a value that is computed under a condition."""
    return _weighted(_join(flow, condition), condition)


def _source(flow: Flow, label: Hashable) -> Flow:
    return flow._replace(sources=flow.sources | {label}, outside=flow.outside | {label})


def _event(flow: Flow, label: Hashable) -> Flow:
    return flow._replace(outside=NONE, event=flow.event | {(label, source) for source in flow.outside})


def _term(flow: Flow, label: Hashable) -> Flow:
    # A term inside the energy is part of the energy, so no log Z of its own is missing.
    own = frozenset(source for name, source in flow.event if name == label)
    others = frozenset(pair for pair in flow.event if pair[0] != label)
    return Flow(flow.sources, flow.outside | own, others, has_term=True, shifts=flow.outside)


def _base(flow: Flow, label: Hashable) -> Flow:
    return flow._replace(has_term=True, shifts=flow.shifts | flow.outside)


_MARKS = {SOURCE: _source, EVENT: _event, TERM: _term, BASE: _base}


def _scan(eqn: JaxprEqn, inputs: list[Flow]) -> list[Flow]:
    body = eqn.params["jaxpr"].jaxpr
    # The parameters that hold these counts differ between JAX versions, so infer them from the dimensions: scanned inputs
    # lose one inside the body, stacked outputs gain one outside, and the carry keeps its own.
    num_scanned = sum(_ndim(outer) != _ndim(inner) for outer, inner in zip(eqn.invars, body.invars, strict=True))
    num_carry = sum(_ndim(outer) == _ndim(inner) for outer, inner in zip(eqn.outvars, body.outvars, strict=True))
    end = len(inputs) - num_scanned
    start = end - num_carry
    carry = _settle(lambda carry: _walk(body, [*inputs[:start], *carry, *inputs[end:]])[: len(carry)], inputs[start:end])
    return [*carry, *_walk(body, [*inputs[:start], *carry, *inputs[end:]])[len(carry) :]]


def _ndim(atom: Any) -> int:
    return len(atom.aval.shape)


def _while(eqn: JaxprEqn, inputs: list[Flow]) -> list[Flow]:
    num_cond, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    of_cond, of_body = inputs[:num_cond], inputs[num_cond : num_cond + num_body]

    def once(carry):
        (condition,) = _walk(eqn.params["cond_jaxpr"].jaxpr, [*of_cond, *carry])
        return [_under(condition, flow) for flow in _walk(eqn.params["body_jaxpr"].jaxpr, [*of_body, *carry])]

    return _settle(once, inputs[num_cond + num_body :])


def _cond(eqn: JaxprEqn, inputs: list[Flow]) -> list[Flow]:
    branches = [_walk(branch.jaxpr, inputs[1:]) for branch in eqn.params["branches"]]
    return [_under(inputs[0], _together(outs)) for outs in zip(*branches, strict=True)]


def _settle(once: Callable[[list[Flow]], list[Flow]], carry: list[Flow]) -> list[Flow]:
    """Iterate the flows of a loop's carry to their fixed point; the sets only grow, so the iteration ends."""
    while True:
        grown = [_join(old, new) for old, new in zip(carry, once(carry), strict=True)]
        if grown == carry:
            return carry
        carry = grown


_CONTROL = {"scan": _scan, "while": _while, "cond": _cond}
