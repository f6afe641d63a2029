"""The energy whose log Z is asked for, from a distribution or a model, laid out in rows."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.typing import ArrayLike
from jaxtyping import Shaped

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.inputs import as_arrays
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.distributions.rows import Unwrapped, lay_out, unwrap
from numpyro_ebm.handlers.sites import find_distribution


def find(
    owner: str,
    dist_or_model: Callable | dist.Distribution,
    params: PyTree | None,
    site: str | None,
    args: tuple,
    kwargs: Mapping[str, Any] | None,
) -> EventDistribution:
    """Return the distribution whose log Z is asked for.

    Raises:
        EnergyError: (a ValueError) as `find_distribution`, and for a score without an energy.
        TypeError: for parameters or arguments together with a distribution.
    """
    unwrapped = unwrap(dist_or_model) if isinstance(dist_or_model, dist.Distribution) else None
    if unwrapped is not None:
        if params is not None or site is not None or args or kwargs:
            raise TypeError("params, site and arguments belong to a model; a distribution holds its own.")
        distribution = unwrapped.distribution
    else:
        if not isinstance(args, tuple | list):
            raise TypeError(
                f"model_args is a tuple of the model's arguments; got {type(args).__name__}. Write model_args=(x,)."
            )
        args, kwargs = as_arrays(owner, (tuple(args), dict(kwargs or {})))
        distribution = find_distribution(owner, dist_or_model, params, args, kwargs, site)
    if not distribution.has_energy:
        raise EnergyError(
            f"{owner} needs values of an energy, but a {type(distribution).__name__} has only their gradient: its density "
            "is not known up to a constant. Declare an EnergyDistribution."
        )
    return distribution


def num_rows(distribution: EventDistribution) -> int:
    """Return the number of densities: 1 if all rows share one."""
    return 1 if local_of(distribution) is None else math.prod(distribution.batch_shape)


def shape_of(distribution: EventDistribution) -> tuple[int, ...]:
    """Return the shape of log Z."""
    return () if local_of(distribution) is None else distribution.batch_shape


def local_of(distribution: EventDistribution) -> PyTree:
    """Return the context and base of each row; None if all rows share one density."""
    like = jnp.zeros(distribution.event_shape, int if distribution.is_discrete else float)
    return distribution.rows(like, distribution.batch_shape).local


def start_positions(
    rng_key: PRNGKey, distribution: EventDistribution, start: dist.Distribution | None, num: int
) -> Shaped[Array, "rows {num} *position"]:
    """Draw from the start, ``(num_rows, num, ...)``, in unconstrained space."""
    if start is None:
        return _by_row(distribution, distribution.reference_sample(rng_key, (num,)))
    events = jnp.asarray(start.sample(rng_key, (num, num_rows(distribution))))
    return _by_row(distribution, events if distribution.is_discrete else events.astype(float))


def target_positions(rng_key: PRNGKey, distribution: EventDistribution, num: int) -> Shaped[Array, "rows {num} *position"]:
    """Draw by the distribution's own sampler, ``(num_rows, num, ...)``, in unconstrained space."""
    if local_of(distribution) is None and distribution.batch_shape:
        per_call = math.prod(distribution.batch_shape)
        events = distribution.sample(rng_key, (-(-num // per_call),))
        return _positions(distribution, events.reshape((1, -1, *distribution.event_shape))[:, :num])
    return _by_row(distribution, distribution.sample(rng_key, (num,)))


def data_positions(owner: str, distribution: EventDistribution, data: ArrayLike) -> Shaped[Array, "rows num *position"]:
    """Return events ``(num, *batch_shape, *event_shape)`` as positions ``(num_rows, num, ...)``.

    Raises:
        EnergyError: for another shape, and for events that are not finite or not inside the support.
    """
    shape, given = shape_of(distribution), jnp.shape(data)
    if given[1:] != shape + distribution.event_shape or not given[0]:
        raise EnergyError(
            f"{owner} needs events of shape (number, {', '.join(map(str, shape + distribution.event_shape))}); got {given}. "
            "If each row has a density of its own, the second dimension runs over these rows."
        )
    lead = (given[0], *(shape or (1,) * len(distribution.batch_shape)))
    events = distribution.as_events(jnp.reshape(data, lead + distribution.event_shape))
    lay_out("data", Unwrapped(distribution, lead, 0, None), events, {})
    return _positions(distribution, jnp.moveaxis(events.reshape((given[0], -1, *distribution.event_shape)), 0, 1))


def _by_row(distribution: EventDistribution, events: Shaped[Array, "num ..."]) -> Shaped[Array, "rows num *position"]:
    """Return events ``(num, *batch_shape, ...)`` as positions ``(num_rows, num, ...)``."""
    events = events.reshape((len(events), -1, *distribution.event_shape))[:, : num_rows(distribution)]
    return _positions(distribution, jnp.moveaxis(events, 0, 1))


def _positions(
    distribution: EventDistribution, events: Shaped[Array, "rows num *event"]
) -> Shaped[Array, "rows num *position"]:
    return jax.vmap(jax.vmap(distribution.unconstrain))(events)
