"""Random directions whose second moment is the identity."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from numpyro_ebm._errors import EnergyError, nearest
from numpyro_ebm._typing import Array, PRNGKey

Projection = Literal["rademacher", "gaussian", "sphere"]


def check_projection(law: str) -> None:
    """Refuse the name of a law that is not known.

    Raises:
        EnergyError: with the known ones.
    """
    if law not in get_args(Projection):
        raise EnergyError(f"Unknown projection '{law}'. {nearest(str(law), get_args(Projection))}")


def directions(rng_key: PRNGKey, law: Projection, num: int, rows: Array) -> Array:
    """``num`` independent directions ``v`` with ``E[v v^T] = I`` for each row, drawn all at once.

    Args:
        rng_key: random key.
        law: "rademacher" (signs), "gaussian" or "sphere" (uniform on the sphere of radius sqrt(d)).
        num: how many.
        rows: events, ``(num_rows, ...)``; the directions have their shape and dtype.

    Returns:
        ``(num_rows, num, ...)``.
    """
    shape = (rows.shape[0], num, *rows.shape[1:])
    if law == "rademacher":
        return jax.random.rademacher(rng_key, shape, rows.dtype)
    normal = jax.random.normal(rng_key, shape, rows.dtype)
    if law == "gaussian":
        return normal
    flat = normal.reshape(*shape[:2], -1)
    length = jnp.sqrt(jnp.sum(flat**2, axis=2, keepdims=True) / max(flat.shape[2], 1))
    return (flat / length).reshape(shape)
