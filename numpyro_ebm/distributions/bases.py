"""Split a batched base distribution into one distribution per row."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Shaped
from numpyro.distributions import Distribution, ExpandedDistribution, transforms

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, PyTree, Scalar
from numpyro_ebm._core.wrappers import strip
from numpyro_ebm.distributions.blocks import Product

RowLogProb: TypeAlias = Callable[[Shaped[Array, "*event"], PyTree], Scalar]
"""``log_prob(event, local)`` of one row, where ``local`` holds the parameters of the row's own base."""

OTHER_FORMS = {
    "scale_tril": ("covariance_matrix", "precision_matrix", "rate_matrix", "scale_matrix"),
    "correlation_cholesky": ("correlation_matrix",),
    "correlation": ("weighted_correlation",),
    "component_distributions": ("support",),
}
"""For arguments that a class accepts in several forms: the form that it stores, and the forms that it does not."""
KEPT_AS = {"base_distribution": "base_dist", "mask": "_mask"}
"""Arguments that a class stores under another name."""
ELEMENTWISE = transforms.AffineTransform | transforms.PowerTransform
"""Transforms whose parameters act elementwise, so that each row can have its own; others are refused."""


def split_rows(base: Distribution, batch_shape: tuple[int, ...]) -> tuple[RowLogProb, PyTree]:
    """Return ``log_prob`` of one row under its own base, and the base parameters of each row.

    A distribution is determined by the arguments of its constructor, which NumPyro stores as attributes of the same names.
    Array arguments are split by row, distributions among the arguments are split recursively, and each row rebuilds its
    own distribution.

    Args:
        base: a normalised distribution whose batch shape broadcasts to ``batch_shape``.
        batch_shape: shape of the rows.

    Returns:
        ``log_prob(event, local)``, and ``local`` with leaves ``batch_shape + ...`` (None if the rows share one base).

    Raises:
        EnergyError: if the base has a batch shape and its arguments cannot be split by row.
    """
    inner, reinterpreted = strip(base)
    if isinstance(inner, Product):
        return _split_product(inner, batch_shape)
    own = inner.batch_shape[: len(inner.batch_shape) - reinterpreted]
    if all(size == 1 for size in own):
        return lambda event, _: jnp.sum(inner.log_prob(event)), None
    local, build = _take_apart(inner, batch_shape + base.event_shape[:reinterpreted])
    return lambda event, own: jnp.sum(build(own).log_prob(event)), local


def _split_product(product: Product, batch_shape: tuple[int, ...]) -> tuple[RowLogProb, PyTree]:
    rows = [split_rows(part, batch_shape) for part in product.parts]
    local = tuple(own for _, own in rows)

    def log_prob(event, local):
        pieces = product.cut(event)
        return jnp.sum(jnp.stack([part(x, own) for (part, _), x, own in zip(rows, pieces, local, strict=True)]))

    if all(own is None for own in local):
        return (lambda event, _: log_prob(event, local)), None
    return log_prob, local


def _take_apart(whole: Distribution, shape: tuple[int, ...]) -> tuple[PyTree, Callable[[PyTree], Distribution]]:
    """Return a distribution's arrays, broadcast to a batch shape, and a function that rebuilds it from them."""
    while isinstance(whole, ExpandedDistribution):  # its arrays are broadcast below
        whole = whole.base_dist
    local, builds, fixed = {}, {}, {}
    for name, value in _arguments(whole).items():
        if isinstance(value, Distribution):
            own = value.batch_shape[len(whole.batch_shape) :]
            local[name], builds[name] = _take_apart(value, shape + own)
        elif isinstance(value, list | tuple) and any(isinstance(part, Distribution) for part in value):
            local[name], builds[name] = _take_all_apart(value, shape)
        elif _holds_arrays(value):
            local[name], builds[name] = _rows_of(whole, name, value, shape)
        else:
            fixed[name] = value

    # The parameters were validated when the user built the distribution.
    if "validate_args" in inspect.signature(type(whole)).parameters:
        fixed["validate_args"] = False

    def build(own: PyTree) -> Distribution:
        return type(whole)(**fixed, **{name: builds[name](own[name]) for name in builds})

    return local, build


def _take_all_apart(parts: Sequence[Distribution], shape: tuple[int, ...]) -> tuple[PyTree, Callable[[PyTree], Any]]:
    taken = [_take_apart(part, shape) for part in parts]
    return [local for local, _ in taken], lambda own: [build(o) for (_, build), o in zip(taken, own, strict=True)]


def _rows_of(
    whole: Distribution, name: str, value: PyTree, shape: tuple[int, ...]
) -> tuple[PyTree, Callable[[PyTree], Any]]:
    """Return the arrays of one argument, broadcast to the rows; elementwise ones have the dimensions of one draw."""
    leaves, treedef = jax.tree.flatten(value)
    constraint = whole.arg_constraints.get(name)
    if constraint is not None:  # a matrix may have the constraint of its rows
        dims = max(constraint.event_dim, jnp.ndim(value) - len(whole.batch_shape))
    elif all(isinstance(part, ELEMENTWISE) or not jax.tree.leaves(part) for part in _parts(value)):
        dims = len(whole.event_shape)
    else:
        raise _refused(whole)
    events = [jnp.shape(leaf)[max(jnp.ndim(leaf) - dims, 0) :] for leaf in leaves]
    local = [jnp.broadcast_to(leaf, shape + event) for leaf, event in zip(leaves, events, strict=True)]
    return local, lambda own: jax.tree.unflatten(treedef, own)


def _arguments(whole: Distribution) -> dict[str, Any]:
    """Return the constructor's arguments, read from the attributes that store them."""
    names = [name for name in inspect.signature(type(whole)).parameters if name != "validate_args"]
    left_out = {other for kept, others in OTHER_FORMS.items() if kept in names for other in others}
    values = {}
    for name in (name for name in names if name not in left_out):
        attributes = [each for each in (KEPT_AS.get(name, name), f"_{name}") if hasattr(whole, each)]
        if not attributes:
            raise _refused(whole)
        values[name] = getattr(whole, attributes[0])
    return values


def _holds_arrays(value: object) -> bool:
    return any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(value))


def _parts(value: PyTree) -> Sequence[PyTree]:
    return value if isinstance(value, list | tuple) else [value]


def _refused(whole: Distribution) -> EnergyError:
    return EnergyError(
        f"A base {type(whole).__name__} of batch shape {whole.batch_shape} cannot be split row by row. "
        "Write it without a batch shape, or as a parametric distribution such as "
        "numpyro.distributions.Normal(loc, scale).to_event(1)."
    )
