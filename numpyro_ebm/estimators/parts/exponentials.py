"""Exponentials that do not overflow where training starts far from the data."""

import jax.numpy as jnp
from jaxtyping import Float

from numpyro_ebm._core.typing import Array


def tangent_exp(exponent: Float[Array, "*batch"], limit: float) -> Float[Array, "*batch"]:
    """Return ``exp(exponent)``, continued by its tangent beyond a limit."""
    return jnp.exp(jnp.minimum(exponent, limit)) * (1 + jnp.maximum(exponent - limit, 0.0))
