"""The learned log normaliser of contrastive estimators."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpyro

from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.typing import Array
from numpyro_ebm.distributions.site import Site

LogNormalizer = Literal["learned", "fixed"]


def learned_normalizer(site: Site, choice: LogNormalizer | None, at_data: Array, at_noise: Array) -> Array:
    """``log Z``: one parameter of the site, or 0 where the energy holds it.

    It starts where the first batch is not told from its noise: half way between the medians of the log ratios at both. From
    0 it would have to go the whole way, some units for each dimension, at the rate of the optimiser, while the classifier is
    saturated and the energy's parameters move in its place.

    Args:
        site: the rows.
        choice: what the user says.
        at_data: log ratios of unnormalised densities at the rows, ``(*shape, num_rows)``, ``shape`` that of the parameter.
        at_noise: the same at what each row is told from, of the same shape.

    Raises:
        EnergyError: where the rows have a context or a base of their own and nothing is chosen.
    """
    if choice is None and site.rows_differ:
        raise EnergyError(
            "Each row has a context or a base of its own, so log Z is a function of the row, and one number would be "
            "learned in its place. Write estimate(model, 'ranking_nce') or estimate(model, 'cd'), which do not need log Z; "
            "or put a term b(context) into the energy that can become log Z and write log_normalizer='fixed'; or, only "
            "where log Z is the same for every row (a context that shifts the density), log_normalizer='learned'."
        )
    if choice == "fixed":
        return jnp.zeros(at_data.shape[:-1])

    def start(_):
        middle = jnp.mean(_median(jnp.stack([at_data, at_noise]), site.mask), axis=0)
        return jax.lax.stop_gradient(jnp.where(jnp.isfinite(middle), middle, 0.0)).astype(float)

    value: Any = numpyro.param(f"{site.name}$log_normalizer", start)
    return value


def _median(values: Array, mask: Array | None) -> Array:
    """Over the rows that take part, on the last axis; infinite where there is none, and no NaN on the way."""
    takes_part = jnp.ones(values.shape[-1], bool) if mask is None else mask
    ordered = jnp.sort(jnp.where(takes_part, values, jnp.inf), axis=-1)
    last = jnp.maximum(jnp.sum(takes_part) - 1, 0)
    return (ordered[..., last // 2] + ordered[..., (last + 1) // 2]) / 2


def check_normalizer(owner: str, choice: Any) -> None:
    """Refuse what is no choice of `learned_normalizer`.

    Raises:
        EnergyError: with the known ones.
    """
    if choice is not None and choice not in get_args(LogNormalizer):
        raise EnergyError(f"{owner} has no log_normalizer {choice!r}. {nearest(str(choice), get_args(LogNormalizer))}")
