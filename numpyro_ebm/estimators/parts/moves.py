"""Shared by the estimators that compare each row with slightly moved copies of itself."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.spreads import or_one
from numpyro_ebm._core.typing import Array, RowValues
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.saturation import slope, warn_where_saturated

FAULT = "the moves lead out of the density"
FIX = "Make them shorter: a few standard deviations of the data at most."


def logistic(rise: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Return ``2 log(1 + p(x + v) / p(x))`` from the log of the ratio."""
    return 2 * jax.nn.softplus(rise)


def loss_of_moves(
    site: Site,
    moves: Float[Array, "num {site.num_rows} *position"],
    link: Callable[[Float[Array, "*batch"]], Float[Array, "*batch"]] = logistic,
) -> RowValues:
    """Return ``mean_j link(log p(x + v_j) - log p(x))`` per row, in unconstrained space with the Jacobian.

    Args:
        site: the rows.
        moves: ``v_j``, draws of a distribution that is symmetric about zero, ``(num, num_rows, *unconstrained_shape)``.
        link: an increasing convex function.
    """
    stays = jnp.zeros_like(moves[:1])
    values = site.over_draws(site.log_density, site.position + jnp.concatenate([stays, moves]))
    rises = values[1:] - values[0]
    warn_where_saturated(site, jnp.mean(slope(link, rises), axis=0) / 2, FAULT, FIX)
    return jnp.mean(link(rises), axis=0)


def in_pairs(draws: Float[Array, " half *shape"], num: int) -> Float[Array, " {num} *shape"]:
    """Return draws and their negatives, cut to ``num``."""
    return jnp.concatenate([draws, -draws])[:num]


def scale_of(site: Site, given: ArrayLike | None, share: float) -> Float[Array, "..."]:
    """Return the standard deviation of moves: as given, or a share of the batch's per dimension (of 1 where that is 0)."""
    if given is not None:
        return jnp.asarray(given, site.position.dtype)
    return share * or_one(site.spread)


def check_scale(site: Site, name: str, given: ArrayLike | None) -> None:
    """Check that a standard deviation is one number or one per coordinate, and raise otherwise.

    Raises:
        EnergyError: with both shapes.
    """
    shape = site.distribution.unconstrained_shape
    if given is not None and np.shape(given) not in ((), shape):
        raise EnergyError(
            f"{name} has shape {np.shape(given)}, the event has {shape}. Write one number, or one per coordinate."
        )
