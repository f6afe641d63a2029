"""Turn a site's message into a `Site`: unwrap its distribution, lay out one event per row, and check the values."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int, Shaped
from numpyro.distributions import Distribution, ExpandedDistribution, Independent, MaskedDistribution

from numpyro_ebm._core.concrete import eager, is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, PyTree
from numpyro_ebm.distributions.advice import describe, describe_outside, to_shape, to_support
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.distributions.missing import EventPart, check_complete, missing_of
from numpyro_ebm.distributions.shapes import check_mesh
from numpyro_ebm.distributions.site import Site

ON_THE_END = (
    "Move such values inside (rounded or censored ones by a random fraction of the rounding); or, if the density is finite "
    "there, write estimate(model, 'generalized_sm'), which accepts them. If rows lie there with positive probability, they "
    "have no density: model whether a row is there with a Bernoulli site, and the other rows with the energy."
)


class Unwrapped(NamedTuple):
    """An energy or a score taken out of expand, mask and to_event, with the members of a joint event."""

    distribution: EventDistribution
    batch_shape: tuple[int, ...]
    event_dims: int
    mask: Bool[Array, "*batch"] | None
    parts: tuple[EventPart, ...] = ()


class Plate(NamedTuple):
    """Indices of the rows that a plate holds, and the number of rows of the whole plate."""

    indices: Int[Array, " rows"]
    size: int


def unwrap(fn: Distribution) -> Unwrapped | None:
    """Return the energy or score inside expand, mask and to_event, or None if there is none."""
    batch_shape, event_dims, masks = tuple(fn.batch_shape), 0, []
    inner = fn
    while not isinstance(inner, EventDistribution):
        if isinstance(inner, Independent):
            batch_shape += tuple(inner.event_shape[: inner.reinterpreted_batch_ndims])
            event_dims += inner.reinterpreted_batch_ndims
        elif isinstance(inner, MaskedDistribution):
            masks.append((inner._mask, event_dims))
        elif not isinstance(inner, ExpandedDistribution):
            return None
        inner = inner.base_dist
    mask = None
    for own, dims_outside in masks:
        own = jnp.asarray(own)
        # A mask outside to_event applies to whole rows: add the inner dimensions that it lacks.
        inside = event_dims - dims_outside
        own = jnp.broadcast_to(own.reshape(own.shape + (1,) * (inside if own.ndim else 0)), batch_shape)
        mask = own if mask is None else mask & own
    return Unwrapped(inner.alone(), batch_shape, event_dims, mask)


def check_holds_no_energy(fn: Distribution) -> None:
    """Refuse a distribution that contains an unnormalised energy: a mixture, a zero inflation, a transformed distribution.

    Raises:
        EnergyError: with what to write.
    """
    for inner in _distributions_in(fn):
        if isinstance(inner, EventDistribution) and not getattr(inner, "normalized", False):
            raise EnergyError(
                f"The {type(fn).__name__} holds an {type(inner).__name__} whose log Z is not known, and estimate accepts "
                "energies only at sites of their own. Write the whole density as one energy, such as E(x) = "
                "-logsumexp of the components; or put log Z into this one, E + "
                "numpyro_ebm.log_partition(rng_key, distribution).value, and write EnergyDistribution(..., normalized=True)."
            )
        check_holds_no_energy(inner)


def _distributions_in(fn: Distribution) -> list[Distribution]:
    """Return the distributions that are attributes of a distribution."""
    parts = [part for value in vars(fn).values() for part in (value if isinstance(value, list | tuple) else [value])]
    return [part for part in parts if isinstance(part, Distribution)]


def lay_out(
    name: str,
    unwrapped: Unwrapped,
    value: object,
    plates: Mapping[int, Plate],
    *,
    may_touch_ends: bool = False,
    may_lack: bool = False,
) -> Site:
    """Lay out a site's data, one event per row, and check concrete values; ``plates`` are keyed by dimension.

    Values on the boundary of the support have no unconstrained position; they are refused unless ``may_touch_ends``. Rows
    with NaN are refused unless ``may_lack``: hidden members and entries that are NaN then become `Site.missing`.
    """
    distribution = unwrapped.distribution
    with eager(value):
        events = distribution.as_events(value)
    check_mesh(events)
    try:
        batch_shape = distribution.rows_of_site(events.shape, unwrapped.batch_shape)
    except EnergyError:
        raise
    except ValueError:
        raise EnergyError(
            f"Data of shape {events.shape} do not match the rows {unwrapped.batch_shape} and "
            f"event_shape={distribution.event_shape}: the data need shape "
            f"{(*unwrapped.batch_shape, *distribution.event_shape)}. Reshape them, or change the plate's size."
            f"{to_shape(distribution.support, distribution.event_shape, events.shape)}"
        ) from None
    if 0 in batch_shape:
        raise EnergyError(
            f"Data of shape {events.shape} hold no rows, so there is nothing to estimate from. Check the filter that they "
            "come from, or leave the site out if there are none."
        )
    local = distribution.rows(events, batch_shape).local
    with eager(events, unwrapped.mask):
        flat = jnp.broadcast_to(events, batch_shape + distribution.event_shape)
        flat = flat.reshape((-1, *distribution.event_shape))
        mask = None if unwrapped.mask is None else jnp.broadcast_to(unwrapped.mask, batch_shape).reshape(-1)
        rows, local = _harmless(flat, local, mask, distribution)
        missing = missing_of(distribution.support, rows, unwrapped.parts) if may_lack else None
        if missing is not None:
            rows = jnp.where(missing.elements, _feasible(distribution, rows[0]).astype(rows.dtype), rows)
        index, num_total = row_index(batch_shape, unwrapped.event_dims, plates)
        site = Site(name, distribution, batch_shape, rows, local, mask, index, num_total, missing)
        _check_values(site, unwrapped.parts, may_touch_ends=may_touch_ends)
    return site


def row_index(
    batch_shape: tuple[int, ...], event_dims: int, plates: Mapping[int, Plate]
) -> tuple[Int[Array, " rows"] | None, int]:
    """Return each row's index in the whole data set, flat over all batch dimensions, and the size of the data set.

    A dimension without a plate, or under ``to_event``, counts as whole. Return None and 0 if int32 cannot count the rows.
    """
    whole = [Plate(jnp.arange(size), size) for size in batch_shape]
    for dim, plate in plates.items():
        position = len(batch_shape) - event_dims + dim
        if batch_shape[position] == len(plate.indices):  # otherwise a plate of one row that broadcasts
            whole[position] = plate
    num_total = math.prod(plate.size for plate in whole)
    if num_total > jnp.iinfo(jnp.int32).max:
        return None, 0
    flat = jnp.zeros((), jnp.int32)
    for indices, size in whole:
        flat = flat[..., None] * size + jnp.asarray(indices, jnp.int32)
    return flat.reshape(-1), num_total


def _harmless(
    value: Shaped[Array, " rows *event"], local: PyTree, mask: Bool[Array, " rows"] | None, distribution: EventDistribution
) -> tuple[Shaped[Array, " rows *event"], PyTree]:
    """Replace masked rows by those that take part, in turn, so that their values reach no gradient and start no chain."""
    if mask is None:
        return value, local
    any_ = jnp.any(mask)
    ours = jnp.nonzero(mask, size=len(mask), fill_value=0)[0]
    source = jnp.where(mask, jnp.arange(len(mask)), ours[(jnp.cumsum(~mask) - 1) % jnp.maximum(jnp.sum(mask), 1)])
    # If no row takes part, NaN in the covariates must be replaced as the values are.
    local = jax.tree.map(lambda leaf: jnp.where(any_, leaf[source], jnp.nan_to_num(leaf[source])), local)
    return jnp.where(any_, value[source], _feasible(distribution, value[0])), local


def _feasible(distribution: EventDistribution, like: Shaped[Array, "*event"]) -> Shaped[Array, "*event"]:
    """Return an event inside the support."""
    if distribution.is_discrete or distribution.is_mixed:
        return distribution.support.feasible_like(jnp.zeros_like(like))
    return distribution.constrain(jnp.zeros(distribution.unconstrained_shape, like.dtype))


def _check_values(site: Site, parts: Sequence[EventPart], *, may_touch_ends: bool) -> None:
    """Refuse concrete rows that are not finite, or lie outside the support or on its boundary."""
    if not is_concrete(site.value, site.mask):
        return
    if jnp.issubdtype(site.value.dtype, jnp.floating):
        check_complete(site.distribution.support, np.asarray(site.value), parts)
    support, values = site.distribution.support, np.asarray(site.value)
    is_finite = lambda row: describe(row, ~np.isfinite(row))  # noqa: E731
    finite = jnp.isfinite(site.value).reshape(site.num_rows, -1).all(axis=1)
    inside = jax.vmap(lambda event: jnp.all(support(event)))(site.value)
    infinite = "Mask such rows: numpyro.handlers.mask(mask=jnp.isfinite(x).all(-1))."
    checks = [
        (finite, "is not finite", is_finite, lambda *_: infinite),
        (inside, f"lies outside the support {support}", lambda row: describe_outside(support, row), to_support),
    ]
    if not site.distribution.is_discrete:
        off_ends = jnp.isfinite(site.position).reshape(site.num_rows, -1).all(axis=1) | may_touch_ends
        checks.append((off_ends, f"lies on the boundary of the support {support}", str, lambda *_: ON_THE_END))
    for fine, fault, told, advice in checks:
        bad = np.flatnonzero(~np.asarray(fine))
        if bad.size:
            row = told(values[bad[0]])
            raise EnergyError(f"Row {bad[0]} of the data {fault}: {row} ({bad.size} such rows). {advice(support, values)}")
