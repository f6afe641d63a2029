"""The learned log normaliser of the contrastive estimators."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpyro
from jaxtyping import Bool, Float

from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.typing import Array
from numpyro_ebm.distributions.site import Site

LogNormalizer = Literal["learned", "fixed"]


def learned_normalizer(
    site: Site,
    choice: LogNormalizer | None,
    at_data: Float[Array, "*shape {site.num_rows}"],
    at_noise: Float[Array, "*shape {site.num_rows}"],
) -> Float[Array, "*shape"]:
    """Return ``log Z``: one parameter of the site, or 0 if the energy contains it.

    The parameter starts at the value at which the classifier cannot tell the first batch from its noise: half way between
    the medians of the log ratios at both. From 0 it would have to move some units per dimension at the optimiser's rate,
    while the classifier is saturated and the energy's parameters move in its place.

    Args:
        site: the rows.
        choice: the user's choice, or None.
        at_data: log ratios of unnormalised densities at the rows, ``(*shape, num_rows)``, where ``shape`` is that of the
            parameter.
        at_noise: the same at what each row is compared with, of the same shape.

    Raises:
        EnergyError: if the rows have a context or a base of their own and nothing is chosen.
    """
    if choice is None and site.rows_differ:
        raise EnergyError(
            "Each row has a context or a base of its own, so log Z is a function of the row, and one number cannot "
            "replace it. Write estimate(model, 'ranking_nce') or estimate(model, 'cd'), which do not need log Z; "
            "or add a term b(context) to the energy that can become log Z and write log_normalizer='fixed'; or, only "
            "if log Z is the same for every row (a context that shifts the density), log_normalizer='learned'."
        )
    if choice == "fixed":
        return jnp.zeros(at_data.shape[:-1])

    def start(_):
        middle = jnp.mean(_median(jnp.stack([at_data, at_noise]), site.mask), axis=0)
        return jax.lax.stop_gradient(jnp.where(jnp.isfinite(middle), middle, 0.0)).astype(float)

    value: Any = numpyro.param(f"{site.name}$log_normalizer", start)
    return value


def _median(values: Float[Array, "*batch rows"], mask: Bool[Array, " rows"] | None) -> Float[Array, "*batch"]:
    """Return the median, on the last axis, of the rows that take part; infinite if there are none, and never NaN."""
    takes_part = jnp.ones(values.shape[-1], bool) if mask is None else mask
    ordered = jnp.sort(jnp.where(takes_part, values, jnp.inf), axis=-1)
    last = jnp.maximum(jnp.sum(takes_part) - 1, 0)
    return (ordered[..., last // 2] + ordered[..., (last + 1) // 2]) / 2


def check_normalizer(owner: str, choice: object) -> None:
    """Check that a choice of `learned_normalizer` is known, and raise otherwise.

    Raises:
        EnergyError: with the known choices.
    """
    if choice is not None and choice not in get_args(LogNormalizer):
        raise EnergyError(f"{owner} has no log_normalizer {choice!r}. {nearest(str(choice), get_args(LogNormalizer))}")
