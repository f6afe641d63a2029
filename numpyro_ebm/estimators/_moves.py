"""What the estimators that tell a row from itself moved a little share."""

import jax
import jax.numpy as jnp

from numpyro_ebm._typing import Array
from numpyro_ebm.estimators._base import Site
from numpyro_ebm.estimators._noise import warn_where_saturated


def loss_of_moves(site: Site, moves: Array) -> Array:
    """``2 mean_j log(1 + p(x + v_j) / p(x))`` per row, in unconstrained space with the Jacobian.

    Args:
        site: the rows.
        moves: ``v_j``, of a law that is symmetric about zero, ``(num, num_rows, *unconstrained_shape)``.
    """
    stays = jnp.zeros_like(moves[:1])
    values = site.over_draws(site.log_density, site.position + jnp.concatenate([stays, moves]))
    rises = values[1:] - values[0]
    fault, fix = "the moves lead out of the density", "Make them shorter: some standard deviations of the data at most."
    warn_where_saturated(site, jnp.mean(jax.nn.sigmoid(rises), axis=0), fault, fix)
    return 2 * jnp.mean(jax.nn.softplus(rises), axis=0)


def in_pairs(draws: Array, num: int) -> Array:
    """Draws and their negatives, cut to ``num``."""
    return jnp.concatenate([draws, -draws])[:num]
