"""Random directions whose second moment is the identity, and derivatives along them."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Float

from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.typing import Array, PRNGKey
from numpyro_ebm.distributions.site import Site

Projection = Literal["rademacher", "gaussian", "sphere"]


def check_projection(projection: str) -> None:
    """Check that the distribution of directions is known, and raise otherwise.

    Raises:
        EnergyError: with the known names.
    """
    if projection not in get_args(Projection):
        raise EnergyError(f"Unknown projection '{projection}'. {nearest(str(projection), get_args(Projection))}")


def directions(
    rng_key: PRNGKey, projection: Projection, num: int, rows: Float[Array, " rows *position"]
) -> Float[Array, "{num} rows *position"]:
    """Draw ``num`` independent directions ``v`` with ``E[v v^T] = I`` for each row, all at once.

    Args:
        rng_key: random key.
        projection: "rademacher" (signs), "gaussian" or "sphere" (uniform on the sphere of radius sqrt(d)).
        num: number of directions per row.
        rows: events, ``(num_rows, ...)``; the directions have their shape and dtype.

    Returns:
        ``(num, num_rows, ...)``.
    """
    shape = (num, *rows.shape)
    if projection == "rademacher":
        return jax.random.rademacher(rng_key, shape, rows.dtype)
    normal = jax.random.normal(rng_key, shape, rows.dtype)
    if projection == "gaussian":
        return normal
    flat = normal.reshape(*shape[:2], -1)
    length = jnp.sqrt(jnp.sum(flat**2, axis=2, keepdims=True) / max(flat.shape[2], 1))
    return (flat / length).reshape(shape)


def score_and_curvatures(
    site: Site, directions: Float[Array, "num {site.num_rows} *position"]
) -> tuple[Float[Array, " {site.num_rows} *position"], Float[Array, "num {site.num_rows}"]]:
    """Return the score ``s`` of each row, and ``v^T grad s v`` along its directions ``v``, one direction at a time.

    Args:
        site: the rows.
        directions: ``(num, num_rows, ...)``.

    Returns:
        ``(num_rows, ...)`` and ``(num, num_rows)``.
    """
    score, push = jax.linearize(lambda z: jax.vmap(site.score)(z, site.local), site.position)
    return score, jax.lax.map(lambda v: inner(v, push(v)), directions)


def inner(a: Float[Array, " rows *position"], b: Float[Array, " rows *position"]) -> Float[Array, " rows"]:
    """Return the inner product of each row of ``a`` with that of ``b``."""
    return jnp.sum((a * b).reshape(len(a), -1), axis=1)
