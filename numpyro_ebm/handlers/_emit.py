"""Helpers with which `estimate` adds auxiliary sites."""

from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Float
from numpyro.primitives import apply_stack

from numpyro_ebm._core.typing import Array
from numpyro_ebm.distributions.surrogates import Surrogate


def emit(name: str, log_factor: Float[Array, "*batch"], message: dict[str, Any]) -> None:
    """Add an auxiliary site whose log probability is ``log_factor``, in the plates and under the scale of a message."""
    fn = Surrogate(log_factor, (0,), dist.constraints.real)
    apply_stack(
        {
            "type": "sample",
            "name": name,
            "fn": fn,
            "args": (),
            "kwargs": {"rng_key": None, "sample_shape": ()},
            "value": jnp.zeros((*fn.batch_shape, 0)),
            "scale": message["scale"],
            "is_observed": True,
            "intermediates": [],
            "cond_indep_stack": list(message["cond_indep_stack"]),
            "infer": {"is_auxiliary": True},
        }
    )


def kept(message: dict[str, Any]) -> dict[str, Any]:
    """Copy a message in its current state: outer handlers change it later, and apply again when the surrogate is emitted."""
    return {**message, "cond_indep_stack": list(message["cond_indep_stack"])}
