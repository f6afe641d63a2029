"""Rows drawn with replacement."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, PRNGKey
from numpyro_ebm.bayes._loss import Rows
from numpyro_ebm.distributions.site import Site


def resampled(taking_part: Sequence[Bool[Array, " _"]]) -> Callable[[PRNGKey], Rows]:
    """Return a function that draws rows with replacement, the same of all sites with equally many rows.

    Raises:
        EnergyError: for a single row.
    """
    if any(int(jnp.sum(mask)) < 2 for mask in taking_part):
        raise EnergyError(
            "The bootstrap draws rows with replacement, and there is one row. Write "
            "Bootstrap(data_sets=numpyro_ebm.bayes.Simulated('gibbs')), for data sets drawn from the model."
        )

    def draw(rng_key):
        keys = jax.random.split(rng_key, len(taking_part))
        # Masked rows stay, so that each set has as many rows that take part as the data.
        chosen = {
            len(mask): jnp.where(
                mask, jax.random.choice(key, len(mask), (len(mask),), p=mask / mask.sum()), jnp.arange(len(mask))
            )
            for key, mask in zip(keys, taking_part, strict=True)
        }
        return lambda name, site: _rows_of(site, chosen[site.num_rows])

    return draw


def _rows_of(site: Site, chosen: Any) -> Site:
    value, local = jax.tree.map(lambda leaf: leaf[chosen], (site.value, site.local))
    mask = None if site.mask is None else site.mask[chosen]
    return dataclasses.replace(site, value=value, local=local, mask=mask)
