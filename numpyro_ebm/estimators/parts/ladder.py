"""Shared by the estimators that draw a noise level per row."""

import warnings
from typing import SupportsFloat

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from numpyro_ebm._core.concrete import eager
from numpyro_ebm._core.typing import Array, PRNGKey
from numpyro_ebm.distributions.site import Site


def stratified(rng_key: PRNGKey, num: int) -> Float[Array, " {num}"]:
    """Draw a uniform number per row, one in each of ``num`` equal parts of [0, 1)."""
    key_order, key_shift = jax.random.split(rng_key)
    order = jax.random.permutation(key_order, num)
    return (order + jax.random.uniform(key_shift)) / num


def rungs_at(quantile: Float[Array, "*batch"], num: int) -> Int[Array, "*batch"]:
    """Return which of ``num`` rungs of a ladder lies at each quantile in [0, 1)."""
    return jnp.minimum(jnp.floor(quantile * num).astype(int), num - 1)


def warn_of_scale(site: Site, largest: SupportsFloat) -> None:
    """Warn if the largest noise level is below the data's standard deviation.

    Args:
        site: the rows.
        largest: largest level, in units of the data.

    Warns:
        UserWarning: with both numbers.
    """
    with eager():
        spread, largest = float(jnp.max(site.spread, initial=0.0)), float(largest)
    if largest < spread:
        warnings.warn(
            f"At site '{site.name}': the largest noise level is {largest:.3g}, the data's standard deviation "
            f"{spread:.3g}; noise that small does not connect separate modes, so their weights are not learned. Give "
            "larger levels.",
            stacklevel=2,
        )
