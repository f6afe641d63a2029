"""Uniform random numbers for kernels that draw many elements at once."""

from typing import Any

import jax
from jaxtyping import Float

from numpyro_ebm._core.typing import Array, PRNGKey


def uniforms(rng_key: PRNGKey, shape: tuple[int, ...] = (), dtype: Any = float) -> Float[Array, "..."]:
    """Return ``jax.random.uniform`` at half its cost: both words of each threefry block are used.

    JAX's default throws one of the two words away, so that one long array of random numbers can be spread over devices.
    Chains have a key each, and are spread over devices by chain.
    """
    with jax.threefry_partitionable(new_val=False):
        return jax.random.uniform(rng_key, shape, dtype)
