"""A batched base distribution, taken apart so that each row carries its own."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from numpyro.distributions import Distribution, ExpandedDistribution, ImproperUniform, Independent

from numpyro_ebm._blocks import Product, cut
from numpyro_ebm._errors import EnergyError
from numpyro_ebm._typing import Array, PyTree


def split_rows(base: Distribution, batch_shape: tuple[int, ...]) -> tuple[Callable[[Array, PyTree], Array], PyTree]:
    """``log_prob`` of one row under its own base, and what each row has of its own.

    Args:
        base: a normalised distribution whose batch shape broadcasts to ``batch_shape``.
        batch_shape: the rows.

    Returns:
        ``log_prob(event, local)`` and ``local`` with leaves ``batch_shape + ...`` (None where the rows share one base).

    Raises:
        EnergyError: where the base has a batch shape and no parameters to split.
    """
    inner, reinterpreted = strip(base)
    if isinstance(inner, Product):
        return _split_product(inner, batch_shape)
    own = inner.batch_shape[: len(inner.batch_shape) - reinterpreted]
    if all(size == 1 for size in own):
        return lambda event, _: jnp.sum(inner.log_prob(event)), None
    return _parametric(inner), _parameters(inner, batch_shape + base.event_shape[:reinterpreted])


def is_improper(base: Distribution) -> bool:
    """Whether a distribution is Lebesgue measure."""
    return isinstance(strip(base)[0], ImproperUniform)


def without_rows(base: Distribution) -> Distribution:
    """The same base without a batch shape, where it was only expanded over rows; else itself."""
    inner, reinterpreted = strip(base)
    if not base.batch_shape or len(inner.batch_shape) > reinterpreted:
        return base
    return inner.expand(base.event_shape[:reinterpreted]).to_event(reinterpreted)


def _split_product(product: Product, batch_shape: tuple[int, ...]) -> tuple[Callable[[Array, PyTree], Array], PyTree]:
    rows = [split_rows(part, batch_shape) for part in product.parts]
    local = tuple(own for _, own in rows)

    def log_prob(event, local):
        pieces = cut(event, product.shapes)
        return jnp.sum(jnp.stack([part(x, own) for (part, _), x, own in zip(rows, pieces, local, strict=True)]))

    if all(own is None for own in local):
        return (lambda event, _: log_prob(event, local)), None
    return log_prob, local


def strip(base: Distribution) -> tuple[Distribution, int]:
    """What is inside expand and to_event, and how many dimensions the latter took."""
    inner, reinterpreted = base, 0
    while isinstance(inner, ExpandedDistribution | Independent):
        reinterpreted += inner.reinterpreted_batch_ndims if isinstance(inner, Independent) else 0
        inner = inner.base_dist
    return inner, reinterpreted


def _parametric(inner: Distribution) -> Callable[[Array, PyTree], Array]:
    # The rows' parameters went through their constraints when the user built the distribution.
    return lambda event, local: jnp.sum(type(inner)(**local, validate_args=False).log_prob(event))


def _parameters(inner: Distribution, batch_shape: tuple[int, ...]) -> dict[str, Array]:
    arguments: dict[str, Any] = inner.get_args()
    if not arguments or set(inner.gather_pytree_data_fields()) - set(arguments) - {"base_dist", "transforms", "_support"}:
        raise EnergyError(
            f"A base {type(inner).__name__} of batch shape {inner.batch_shape} cannot be given row by row. "
            "Write it without a batch shape, or as a parametric distribution such as "
            "numpyro.distributions.Normal(loc, scale).to_event(1)."
        )
    if "scale_tril" in arguments:  # the other forms of one covariance, of which the class takes one
        arguments = {k: v for k, v in arguments.items() if k not in ("covariance_matrix", "precision_matrix")}
    local = {}
    for name, value in arguments.items():
        event_dim = inner.arg_constraints[name].event_dim
        event = jnp.shape(value)[jnp.ndim(value) - event_dim :]
        local[name] = jnp.broadcast_to(value, batch_shape + event)
    return local
