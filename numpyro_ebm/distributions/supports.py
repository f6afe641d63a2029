"""Supports of energies: static constraints of one event, and whether two constraints describe the same set."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.typing import ArrayLike
from jaxtyping import Float, Int
from numpyro.distributions import constraints

from numpyro_ebm._core.discrete import values_of
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.known import Frozen, freeze_tree, known
from numpyro_ebm.distributions.blocks import Blocks, elementary, is_real

SAME_BOUND = 1e-6
"""Relative difference allowed between equal bounds: a transform in float32 returns rounded ends."""


SPHERE = (
    "Write the event as angles: on the circle support=numpyro.distributions.constraints.circular with u = (cos a, sin a) in "
    "the energy; on the sphere support=constraints.interval(jnp.zeros(2), jnp.array([jnp.pi, 2 * jnp.pi])) of polar angle "
    "and azimuth, with - jnp.log(jnp.sin(polar)) in the energy for the area element."
)
REGISTER = "Write another support, or give {name} a transform: numpyro.distributions.biject_to.register(type(support))(...)."


def event_support(support: constraints.Constraint, event_shape: tuple[int, ...]) -> Frozen:
    """Return the constraint of a whole event, given that of its elements, as static structure known under jit."""
    extra = len(event_shape) - support.event_dim
    if extra < 0:
        raise EnergyError(
            f"The support {support} constrains events of {support.event_dim} dimensions; event_shape={event_shape} has "
            f"{len(event_shape)}. Write event_shape=(n,)."
        )
    check_one_support(support, event_shape)
    _check_transform(support)
    frozen = freeze_tree(constraints.independent(support, extra) if extra else support)
    if frozen is None:
        raise EnergyError(
            f"A bound of the support {name_of(support)} is not known when the model is traced: it is trained, sampled or an "
            "argument. log Z depends on it, which no estimator accounts for. Write numbers, made outside the model, such as "
            "support=numpyro.distributions.constraints.interval(0.0, 2.0)."
        )
    return frozen


def _check_transform(support: constraints.Constraint) -> None:
    """Refuse a continuous support without a transform, on which no chain or score can work."""
    if support.is_discrete:
        return
    try:
        dist.biject_to(support)
    except NotImplementedError:
        name = name_of(support)
        instead = SPHERE if name == "Sphere" else REGISTER.format(name=name)
        raise EnergyError(
            f"The support {name} has no transform from the real line (numpyro.distributions.biject_to), which chains and "
            f"scores need. {instead}"
        ) from None


def check_one_support(support: constraints.Constraint, event_shape: tuple[int, ...]) -> None:
    """Refuse bounds that differ between rows.

    Raises:
        EnergyError: with the shape of the bounds.
    """
    for bound in jax.tree.leaves(support):
        if jnp.ndim(bound) > len(event_shape):
            raise EnergyError(
                f"The support {support} has bounds of shape {jnp.shape(bound)} for events of shape {event_shape}: all rows "
                "must share one support. Write bounds of one event, and move the rest into the energy."
            )


def check_same_support(role: str, distribution: dist.Distribution, support: constraints.Constraint) -> None:
    """Refuse a distribution whose support is not that of the energy.

    Raises:
        EnergyError: naming both supports.
    """
    theirs, ours, what = elementary(distribution.support), elementary(support), role.removesuffix("'s")
    region = region_of(theirs)
    if any(bound is None for bound in region.bounds):
        raise EnergyError(
            f"A bound of the {role} {type(distribution).__name__} is not known when the model is traced: it is trained, "
            f"sampled or an argument, and the energy's support {ours} is fixed. Write numbers as its bounds."
        )
    if not region.is_that_of(region_of(ours)):
        raise EnergyError(
            f"The {role} {type(distribution).__name__} has support {theirs}, the energy has {ours}. Give both the "
            f"same: write support={theirs} in the distribution, or another {what}."
        )


def discrete_values(support: constraints.Constraint, event_shape: tuple[int, ...]) -> Int[np.ndarray, "values ..."] | None:
    """Return the values of one element of a discrete support, in increasing order; None without two finite bounds.

    They are numbers ``(num_values,)``, or vectors ``(num_values, num_categories)`` for one-hot categories.
    """
    special = values_of(elementary(support), event_shape[-1] if event_shape else 0)
    if special is not None:
        return special
    region = region_of(support)
    if region.kind != "integers" or any(bound is None for bound in region.bounds):
        return None
    low, high = (np.unique(bound) for bound in region.bounds)
    if not (low.size == high.size == 1 and np.all(np.isfinite([low, high]))):
        return None
    return np.arange(int(low[0]), int(high[0]) + 1)


def all_values(support: constraints.Constraint, event_shape: tuple[int, ...]) -> Int[np.ndarray, "values ..."]:
    """Return `discrete_values`.

    Raises:
        EnergyError: for a support without two finite bounds.
    """
    values = discrete_values(support, event_shape)
    if values is None:
        raise EnergyError(
            f"The values of the support {name_of(support)} cannot be listed: it needs two bounds, the same for all "
            "elements. Write support=numpyro.distributions.constraints.boolean, or constraints.integer_interval(0, 99) "
            "with a bound far above all values; chains take any bounds with kernel='lattice_walk'."
        )
    return values


def integer_bounds(support: constraints.Constraint, event_shape: tuple[int, ...]) -> Float[np.ndarray, " 2 *event"]:
    """Return the lowest and the highest value of each element of a support of integers, infinite where there is none.

    Raises:
        EnergyError: for a support that is none of integers between known bounds.
    """
    region = region_of(support)
    if region.kind != "integers" or any(bound is None for bound in region.bounds):
        raise EnergyError(
            f"The elements of the support {name_of(support)} are not integers between bounds of their own. Write "
            "kernel='gibbs' for spins and categories; for integers write constraints.nonnegative_integer or "
            "constraints.integer_interval(0, 99) of numpyro.distributions as the support."
        )
    shape = np.broadcast_shapes(event_shape, *map(np.shape, region.bounds))  # the site of a model may have bounds by row
    return np.stack([np.broadcast_to(np.asarray(bound, float), shape) for bound in region.bounds])


class Region(NamedTuple):
    """The set that a constraint describes.

    Attributes:
        kind: "interval" (open or closed), "integers", or the constraint's type and the rest of its static structure.
        bounds: the lower and upper bound, or the constraint's other numbers; None for each that is not known.
    """

    kind: Any
    bounds: tuple[Any, ...]

    def is_that_of(self, other: "Region") -> bool:
        """Return whether another region is the same in every row and element, up to float32 rounding of bounds."""
        pairs = zip(self.bounds, other.bounds, strict=False)
        return self.kind == other.kind and len(self.bounds) == len(other.bounds) and all(_equal(a, b) for a, b in pairs)


def region_of(constraint: constraints.Constraint) -> Region:
    """Return the set that the constraint of an event or of its elements describes."""
    constraint = elementary(constraint)
    if isinstance(constraint, Blocks):
        parts = [region_of(part) for part in constraint.parts]
        return Region((tuple(part.kind for part in parts), constraint.shapes), sum((part.bounds for part in parts), ()))
    if type(constraint) is type(constraints.boolean):
        return Region("integers", (0, 1))
    has_bounds = hasattr(constraint, "lower_bound") or hasattr(constraint, "upper_bound")
    if constraint.event_dim or not (has_bounds or is_real(constraint)):
        leaves, treedef = jax.tree.flatten(constraint)
        return Region((type(constraint), treedef), tuple(map(known, leaves)))
    bounds = getattr(constraint, "lower_bound", -np.inf), getattr(constraint, "upper_bound", np.inf)
    return Region("integers" if constraint.is_discrete else "interval", tuple(map(known, bounds)))


def _equal(a: ArrayLike, b: ArrayLike) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    try:
        return bool(np.all(np.isclose(a, b, rtol=SAME_BOUND, atol=0.0)))
    except ValueError:
        return False


def name_of(constraint: constraints.Constraint) -> str:
    """Return the name of a constraint, without its bounds."""
    return type(elementary(constraint)).__name__.removeprefix("_")
