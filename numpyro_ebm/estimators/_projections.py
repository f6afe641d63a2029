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


def directions(rng_key: PRNGKey, law: Projection, num: int, like: Array) -> Array:
    """``num`` independent directions ``v`` with ``E[v v^T] = I``, of the shape and dtype of ``like``.

    Args:
        rng_key: random key.
        law: "rademacher" (signs), "gaussian" or "sphere" (uniform on the sphere of radius sqrt(d)).
        num: how many.
        like: one event.

    Returns:
        ``(num, *like.shape)``.
    """
    shape = (num, *like.shape)
    if law == "rademacher":
        return jax.random.rademacher(rng_key, shape, like.dtype)
    normal = jax.random.normal(rng_key, shape, like.dtype)
    if law == "gaussian":
        return normal
    length = jnp.sqrt(jnp.sum(normal.reshape(num, -1) ** 2, axis=1) / max(like.size, 1))
    return normal / length.reshape((-1,) + (1,) * like.ndim)
