"""The members of mixed events: what kernels need to know of them, and where chains start."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Float
from numpyro.distributions import constraints

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, Scalar
from numpyro_ebm.distributions.blocks import Blocks, Product, elementary, is_real, members_of
from numpyro_ebm.distributions.discrete_references import discrete_reference
from numpyro_ebm.distributions.supports import discrete_values, integer_bounds


@dataclasses.dataclass(frozen=True)
class Part:
    """Members of a mixed event or latents of a model, all discrete or all continuous, as a target of a kernel.

    Attributes:
        supports: the constraint of each discrete member; empty for continuous members.
        shapes: their shapes.
        known: None, since no ready-made energy makes up the density of some members given others.
    """

    supports: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    known: None = None

    @property
    def is_discrete(self) -> bool:
        """Whether the members are discrete."""
        return bool(self.supports)

    @property
    def discrete_values(self) -> dict[str, np.ndarray] | None:
        """By discrete member, the values that one of its elements takes, in increasing order; None for continuous members.

        Raises:
            EnergyError: for a member whose values cannot be listed.
        """
        values = {name: discrete_values(part, self.shapes[name]) for name, part in self.supports.items()}
        unlisted = next((name for name, each in values.items() if each is None), None)
        if unlisted is not None:
            raise EnergyError(_unlisted(unlisted, self.supports[unlisted]))
        return cast(dict[str, np.ndarray], values) or None

    @property
    def endless(self) -> list[str]:
        """Names of the discrete members whose values cannot be listed."""
        return [name for name, part in self.supports.items() if discrete_values(part, self.shapes[name]) is None]

    def only(self, names: Collection[str]) -> "Part":
        """Return some of the members."""
        supports, shapes = ({n: own[n] for n in own if n in names} for own in (self.supports, self.shapes))
        return Part(supports, shapes)

    @property
    def integer_bounds(self) -> dict[str, np.ndarray]:
        """By discrete member, the lowest and the highest value of each element.

        Raises:
            EnergyError: for a member that is not of integers.
        """
        for name, part in self.supports.items():
            if isinstance(elementary(part), Blocks):
                raise EnergyError(_unlisted(name, part))
        return {name: integer_bounds(part, self.shapes[name]) for name, part in self.supports.items()}


def _unlisted(name: str, support: Any) -> str:
    """Return the message for values that cannot be listed."""
    if isinstance(elementary(support), Blocks):
        return (
            f"At site '{name}': no kernel of a model moves an event with members of several kinds, {support}. Write "
            "sample(rng_key, distribution) to sample the distribution itself, or give each member a site of its own."
        )
    return (
        f"The values of '{name}' cannot be listed: its support {support} needs two bounds, the same for all elements, as in "
        "constraints.boolean and constraints.integer_interval(0, 99). Chains take integers between any bounds with "
        f"kernel='lattice_walk', or kernel={{'{name}': 'lattice_walk', ...}}."
    )


def part_of(owner: str, support: Any, names: Sequence[str]) -> Part:
    """Return the members with these names.

    Args:
        owner: name of the distribution's class, for messages.
        support: its support.
        names: names of members.

    Raises:
        EnergyError: for a support that is not mixed.
    """
    if not (isinstance(support, Blocks) and support.is_discrete):
        raise EnergyError(
            f"A kernel by site is for the latents of a NumPyro model and for the members of a mixed event; this {owner} is "
            "one event. Write kernel='nuts', or kernel='gibbs' for a discrete support."
        )
    each = zip(support.names, support.parts, support.shapes, strict=True)
    own = {name: (part, shape) for name, part, shape in each if part.is_discrete and name in names}
    return Part({name: part for name, (part, _) in own.items()}, {name: shape for name, (_, shape) in own.items()})


def reference_of(support: Blocks) -> Product:
    """Return independent members: standard normals in unconstrained space, and the references of discrete members."""
    parts = []
    for part, shape in zip(support.parts, support.shapes, strict=True):
        if part.is_discrete:
            parts.append(_discrete_reference(part, shape))
            continue
        transform = dist.biject_to(part)
        source = tuple(transform.inverse_shape(shape))
        normal = dist.Normal(jnp.zeros(source), 1.0).to_event(len(source))
        parts.append(normal if is_real(part) else dist.TransformedDistribution(normal, transform))
    return Product(support.names, parts)


def log_reference_of(support: Blocks, position: Float[Array, " d"]) -> Scalar:
    """Return the log density of `reference_of` at an unconstrained position, Jacobian included."""
    members: Any = members_of(support)
    by_name, log_prob = members.split(position), jnp.sum(dist.Normal(0.0, 1.0).log_prob(position[members.is_continuous]))
    for name, part, shape in zip(support.names, support.parts, support.shapes, strict=True):
        if part.is_discrete:
            log_prob += _discrete_reference(part, shape).log_prob(by_name[name])
    return log_prob


def _discrete_reference(part: Any, shape: tuple[int, ...]) -> dist.Distribution:
    extra = len(shape) - part.event_dim
    return discrete_reference(constraints.independent(part, extra) if extra else part, shape)
