"""The members of mixed events: what kernels need to know of them, and where chains start."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Float
from numpyro.distributions import constraints

from numpyro_ebm._core.discrete import num_elements
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, Scalar
from numpyro_ebm.distributions.blocks import Blocks, Product, is_real, members_of
from numpyro_ebm.distributions.supports import discrete_values
from numpyro_ebm.distributions.uniform_values import UniformValues


@dataclasses.dataclass(frozen=True)
class Part:
    """Some members of a mixed event, which are all discrete or all continuous, as a target of a kernel.

    Attributes:
        discrete_values: by discrete member, the values that one of its elements takes; None for continuous members.
        known: None, since no ready-made energy makes up the density of some members given others.
    """

    discrete_values: dict[str, np.ndarray] | None
    known: None = None

    @property
    def is_discrete(self) -> bool:
        """Whether the members are discrete."""
        return self.discrete_values is not None


def part_of(owner: str, support: Any, names: Sequence[str]) -> Part:
    """Return the members with these names.

    Args:
        owner: name of the distribution's class, for messages.
        support: its support.
        names: names of members.

    Raises:
        EnergyError: for a support that is not mixed, and for discrete members whose values cannot be listed.
    """
    if not (isinstance(support, Blocks) and support.is_discrete):
        raise EnergyError(
            f"A kernel by site is for the latents of a NumPyro model and for the members of a mixed event; this {owner} is "
            "one event. Write kernel='nuts', or kernel='gibbs' for a discrete support."
        )
    values = values_of_members(support)
    own = {name: values[name] for name in names if name in values}
    return Part(own or None)


def values_of_members(support: Blocks) -> dict[str, np.ndarray]:
    """Return the values that one element of each discrete member takes, in increasing order.

    Raises:
        EnergyError: for a member whose values cannot be listed.
    """
    found = {}
    for name, part, shape in zip(support.names, support.parts, support.shapes, strict=True):
        if part.is_discrete:
            found[name] = discrete_values(part, shape)
            if found[name] is None:
                raise EnergyError(
                    f"The values of the discrete member '{name}' cannot be listed: its support {part} needs two bounds, the "
                    "same for all elements, as constraints.boolean and constraints.integer_interval(0, 99) have."
                )
    return found


def reference_of(support: Blocks) -> Product:
    """Return independent members: standard normals in unconstrained space, and uniform ones over discrete values."""
    values, parts = values_of_members(support), []
    for name, part, shape in zip(support.names, support.parts, support.shapes, strict=True):
        if name in values:
            extra = len(shape) - part.event_dim
            parts.append(UniformValues(values[name], constraints.independent(part, extra) if extra else part, shape))
            continue
        transform = dist.biject_to(part)
        source = tuple(transform.inverse_shape(shape))
        normal = dist.Normal(jnp.zeros(source), 1.0).to_event(len(source))
        parts.append(normal if is_real(part) else dist.TransformedDistribution(normal, transform))
    return Product(support.names, parts)


def log_reference_of(support: Blocks, position: Float[Array, " d"]) -> Scalar:
    """Return the log density of `reference_of` at an unconstrained position, Jacobian included."""
    values, shapes = values_of_members(support), dict(zip(support.names, support.shapes, strict=True))
    log_uniform = -sum(num_elements(own, shapes[name]) * math.log(len(own)) for name, own in values.items())
    is_continuous = members_of(support).is_continuous  # pyright: ignore[reportOptionalMemberAccess]
    return jnp.sum(dist.Normal(0.0, 1.0).log_prob(position[is_continuous])) + log_uniform
