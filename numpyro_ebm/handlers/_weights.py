"""The weights of `estimate`: one number for all energy sites, or a mapping by site."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Float

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_positive
from numpyro_ebm._core.typing import Array

Weight = Any
"""A positive scalar, an array or traced, or a mapping from site names to such numbers; None for no weight."""


def checked(weight: Weight) -> Weight:
    """Return the weight, after a check of what is concrete.

    Raises:
        EnergyError: for anything but positive numbers.
    """
    given = weight.items() if isinstance(weight, Mapping) else [("", weight)]
    for name, each in given:
        check_positive("estimate", f"weight['{name}']" if name else "weight", each, scalar=True)
    return dict(weight) if isinstance(weight, Mapping) else weight


def weight_of(weight: Weight, name: str, members: Sequence[str] = ()) -> Any:
    """Return the weight of a site, given its own name or that of a member; None where there is none.

    Raises:
        EnergyError: for two weights of one joint event.
    """
    if not isinstance(weight, Mapping):
        return weight
    given = [key for key in dict.fromkeys((name, *members)) if key in weight]
    if len(given) > 1:
        raise EnergyError(
            f"Factors join {list(members)} to one event, '{name}', but estimate got weights for {given}. Give one."
        )
    return weight[given[0]] if given else None


def weighted(weight: Any, values: Float[Array, " rows"], *, is_observed: bool) -> Float[Array, " rows"]:
    """Return the weighted surrogate of each row.

    Raises:
        EnergyError: for a weight of a latent energy.
    """
    if weight is None:
        return values
    if not is_observed:
        raise EnergyError(
            "estimate got a weight for this energy, which is latent: a power of a prior would change the model, not the "
            "weight of data. Write weight={'site': ...} with the observed sites only."
        )
    return jnp.asarray(weight, values.dtype) * values
