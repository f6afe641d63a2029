"""Nearest-neighbour estimate of entropy (Kozachenko and Leonenko), differentiable in the points."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import digamma, gammaln
from jaxtyping import Bool, Float

from numpyro_ebm._core.typing import Array

GROUP = 256
"""Points per search for neighbours. The distances grow as the square of it; groups keep the cost linear in the rows."""


def neighbor_entropies(
    points: Float[Array, "rows d"], takes_part: Bool[Array, " rows"], num_neighbors: int | None
) -> Float[Array, " rows"]:
    r"""Return one term per point; their mean estimates the entropy of the points' common distribution.

    .. math:: \psi(n) - \psi(k) + \log V_d + d \log |x_i - x_{i(k)}|

    with ``V_d`` the volume of the unit ball and ``x_{i(k)}`` the k-th nearest of the other points. The gradient flows
    through both points. More than 256 points are split into groups of at most 256, with one estimate per group.

    Args:
        points: ``(num_rows, d)``.
        takes_part: ``(num_rows,)``, which points count. The others get 0, as do points at distance 0 from their neighbour.
        num_neighbors: ``k``. None for 1 in three or more dimensions, and for the square root of the group's size in fewer,
            where the gradient of the nearest neighbour's distance has infinite variance.
    """
    num_rows = len(points)
    num_groups = -(-num_rows // GROUP)
    # Shuffle, because rows may come in an order; pad groups with points that take no part.
    order = np.random.default_rng(0).permutation(num_rows)
    places = np.resize(order, num_groups * -(-num_rows // num_groups)).reshape(num_groups, -1)
    is_first = (np.arange(places.size) < num_rows).reshape(places.shape)
    values = jax.vmap(lambda p, t: _group_entropies(p, t, num_neighbors))(points[places], takes_part[places] & is_first)
    return values.reshape(-1)[np.argsort(order)]


def _group_entropies(
    points: Float[Array, "points d"], takes_part: Bool[Array, " points"], num_neighbors: int | None
) -> Float[Array, " points"]:
    size, dim = points.shape
    wanted = min(num_neighbors or (1 if dim > 2 else math.ceil(math.sqrt(size))), size - 1)
    fixed = jax.lax.stop_gradient(points - jnp.mean(points, axis=0))
    lengths = jnp.sum(fixed**2, axis=1)
    distances = lengths[:, None] + lengths - 2 * fixed @ fixed.T
    distances = jnp.where(takes_part & ~jnp.eye(size, dtype=bool), distances, jnp.inf)
    near = jax.lax.top_k(-distances, wanted)[1]
    num = jnp.sum(takes_part)
    k = jnp.clip(num - 2, 0, wanted - 1)
    nearest = near[:, k]
    squares = jnp.sum((points - points[nearest]) ** 2, axis=1)
    apart = (squares > 0) & takes_part[nearest] & takes_part
    log_volume = 0.5 * dim * math.log(math.pi) - gammaln(0.5 * dim + 1)
    constant = digamma(jnp.maximum(num, 1).astype(points.dtype)) - digamma((k + 1).astype(points.dtype)) + log_volume
    return jnp.where(apart, constant + 0.5 * dim * jnp.log(jnp.where(apart, squares, 1.0)), 0.0)
