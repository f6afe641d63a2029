"""What log Z is asked of: a distribution, or the energy of a model; laid out in rows."""

import dataclasses
import math
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from numpyro_ebm._callables import Structure, assemble, dismantle
from numpyro_ebm._data_sites import check_discrete
from numpyro_ebm._doors import as_arrays
from numpyro_ebm._errors import EnergyError
from numpyro_ebm._events import EventDistribution
from numpyro_ebm._reads import reads
from numpyro_ebm._results import values_of
from numpyro_ebm._rows import Unwrapped, lay_out, unwrap
from numpyro_ebm._sites import find_distribution
from numpyro_ebm._typing import Array, PRNGKey, PyTree


@dataclasses.dataclass(frozen=True)
class Problem:
    """A pytree that gives its distribution under jit too, so that new parameters compile nothing.

    Attributes:
        distribution: the energy, where it is given.
        params: values of the model's parameters.
        arrays: the arrays in the model's arguments.
        model: the model; None for a distribution.
        structure: the rest of the arguments.
        site: the site's name, or None.
        owner: who asks, for messages.
        reads: what the model reads beside its arguments.
    """

    distribution: EventDistribution | None
    params: PyTree
    arrays: list[Any]
    model: Any
    structure: Structure | None
    site: str | None
    owner: str
    reads: Hashable = None

    def resolve(self) -> EventDistribution:
        """The energy's distribution."""
        if self.distribution is not None:
            return self.distribution
        args, kwargs = assemble(self.arrays, self.structure)  # pyright: ignore[reportArgumentType]
        return find_distribution(self.owner, self.model, self.params, args, kwargs, self.site)


jax.tree_util.register_dataclass(
    Problem, data_fields=["distribution", "params", "arrays"], meta_fields=["model", "structure", "site", "owner", "reads"]
)


def make_problem(
    owner: str, dist_or_model: Any, params: Any, site: str | None, args: tuple, kwargs: Mapping[str, Any] | None
) -> tuple[Problem, EventDistribution]:
    """The problem, and its distribution with concrete values.

    Raises:
        EnergyError: (a ValueError) as `find_distribution`; for a score without an energy.
        TypeError: for parameters or arguments beside a distribution.
    """
    unwrapped = unwrap(dist_or_model) if isinstance(dist_or_model, dist.Distribution) else None
    if unwrapped is not None:
        if params is not None or site is not None or args or kwargs:
            raise TypeError("params, site and arguments belong to a model; a distribution holds its own.")
        problem = Problem(unwrapped.distribution, None, [], None, None, None, owner)
    else:
        if not isinstance(args, tuple | list):
            raise TypeError(
                f"model_args is a tuple of the model's arguments; got {type(args).__name__}. Write model_args=(x,)."
            )
        arrays, structure = dismantle(as_arrays(owner, (tuple(args), dict(kwargs or {}))))
        given = None if params is None else values_of(owner, params)
        problem = Problem(None, given, arrays, dist_or_model, structure, site, owner, reads(dist_or_model))
    distribution = problem.resolve()
    if not distribution.has_energy:
        raise EnergyError(
            f"{owner} needs values of an energy, and a {type(distribution).__name__} has only their gradient: its density "
            "is not known up to a constant. Declare an EnergyDistribution."
        )
    return problem, distribution


def num_rows(distribution: EventDistribution) -> int:
    """How many densities there are: one where all rows share it."""
    return 1 if local_of(distribution) is None else math.prod(distribution.batch_shape)


def shape_of(distribution: EventDistribution) -> tuple[int, ...]:
    """Shape of log Z."""
    return () if local_of(distribution) is None else distribution.batch_shape


def local_of(distribution: EventDistribution) -> PyTree:
    """What each row has of its own; None where all rows share one density."""
    like = jnp.zeros(distribution.event_shape, int if distribution.is_discrete else float)
    return distribution.rows(like, distribution.batch_shape).local


def start_positions(rng_key: PRNGKey, distribution: EventDistribution, law: Any, num: int) -> Array:
    """Draws of the start, ``(num_rows, num, ...)``, in unconstrained space."""
    if law is None:
        return _by_row(distribution, distribution.reference_sample(rng_key, (num,)))
    events = jnp.asarray(law.sample(rng_key, (num, num_rows(distribution))))
    return _by_row(distribution, events if distribution.is_discrete else events.astype(float))


def target_positions(rng_key: PRNGKey, distribution: EventDistribution, num: int) -> Array:
    """Draws of the distribution's own sampler, ``(num_rows, num, ...)``, in unconstrained space."""
    if local_of(distribution) is None and distribution.batch_shape:
        per_call = math.prod(distribution.batch_shape)
        events = distribution.sample(rng_key, (-(-num // per_call),))
        return _positions(distribution, events.reshape((1, -1, *distribution.event_shape))[:, :num])
    return _by_row(distribution, distribution.sample(rng_key, (num,)))


def data_positions(owner: str, distribution: EventDistribution, data: Any) -> Array:
    """Events ``(num, *batch_shape, *event_shape)`` as positions ``(num_rows, num, ...)``.

    Raises:
        EnergyError: for another shape, and for events that are not finite or not inside the support.
    """
    shape, given = shape_of(distribution), jnp.shape(data)
    if given[1:] != shape + distribution.event_shape or not given[0]:
        raise EnergyError(
            f"{owner} needs events of shape (number, {', '.join(map(str, shape + distribution.event_shape))}); got {given}. "
            "Give the rows of one context after the other along the second dimension."
        )
    lead = (given[0], *(shape or (1,) * len(distribution.batch_shape)))
    events = distribution.as_events(jnp.reshape(data, lead + distribution.event_shape))
    check_discrete(lay_out("data", Unwrapped(distribution, lead, 0, None), events, {}))
    return _positions(distribution, jnp.moveaxis(events.reshape((given[0], -1, *distribution.event_shape)), 0, 1))


def _by_row(distribution: EventDistribution, events: Array) -> Array:
    """From ``(num, *batch_shape, ...)`` to positions ``(num_rows, num, ...)``."""
    events = events.reshape((len(events), -1, *distribution.event_shape))[:, : num_rows(distribution)]
    return _positions(distribution, jnp.moveaxis(events, 0, 1))


def _positions(distribution: EventDistribution, events: Array) -> Array:
    return jax.vmap(jax.vmap(distribution.unconstrain))(events)
