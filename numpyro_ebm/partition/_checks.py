"""Checks of what a method has found: what is refused, and what is warned of."""

import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from numpyro_ebm._core.errors import EnergyError, UnreliableLogPartitionWarning
from numpyro_ebm._core.inputs import check_outside_jit
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.partition._base import AbstractPartition, Estimate

MIN_ESS = 10
"""With fewer effective draws the mean weight is uncertain by a third or more, too much for the delta method."""
HEAVY_TAIL = 0.7
"""Pareto shape above which a mean weight is unreliable (Vehtari et al. 2024)."""

Place = Callable[[int], str]
"""Words for the place of a value in the flat array of all values of log Z; empty where there is only one."""


def check_found(
    owner: str,
    method: AbstractPartition,
    distribution: EventDistribution,
    found: Estimate,
    place: Place | None = None,
    stacklevel: int = 3,
) -> None:
    """Check what a method found, on behalf of a public function.

    Args:
        owner: the public function.
        method: the method.
        distribution: the energy, or one of several of the same event.
        found: estimates of any shape.
        place: words for the place of a value; None for the number of its row.
        stacklevel: of the warning, whose place is the call of the public function.

    Raises:
        EnergyError: if log Z is not finite, or the method did not finish.

    Warns:
        UnreliableLogPartitionWarning: with the reason not to trust the standard error.
    """
    check_finite(owner, found, place=place)
    where = _first(~jnp.asarray(found.is_finished), found, place)
    if where is not None:
        raise EnergyError(f"The method '{method.name}' did not finish{where}. {method.unfinished}")
    doubt = _doubt(method, distribution, found, place)
    if doubt is not None:
        warnings.warn(f"{doubt} {method.unreliable}", UnreliableLogPartitionWarning, stacklevel=stacklevel)


def check_finite(owner: str, *found: Estimate, place: Place | None = None) -> None:
    """Check that log Z is finite, and raise otherwise.

    Raises:
        EnergyError: with its value and the likely cause.
    """
    check_outside_jit(owner, found)
    for each in found:
        bad = jnp.flatnonzero(~jnp.isfinite(each.value).ravel())
        if bad.size:
            value = float(each.value.ravel()[bad[0]])
            where = (place or _row_of(each))(int(bad[0]))
            what = {
                jnp.inf: "The energy is minus infinity somewhere",
                -jnp.inf: "No draw has a density: the start and the target do not overlap, or the energy is infinite or NaN",
            }.get(value, "The energy overflows or is NaN")
            raise EnergyError(f"{owner} found log Z{where} = {value}. {what}. Look at the energy, or give another start.")


def _doubt(method: AbstractPartition, distribution: EventDistribution, found: Estimate, place: Place | None) -> str | None:
    """Return the reason not to trust the standard error of an estimate; None if every check passes."""
    name = method.name
    where = _first(~jnp.asarray(found.covers), found, place)
    if where is not None:
        return (
            f"The start of '{name}' does not cover the target{where}: chains that came from it are not at rest under the "
            "target, so log Z is too small and its standard error means nothing. Give the EnergyDistribution a base, or "
            "write start=a distribution of one event around its mass, or data=rows, to which a start is fitted."
        )
    where = _first(~jnp.asarray(found.are_draws), found, place)
    if where is not None:
        return (
            f"The draws given to '{name}' are not draws of this energy{where} (by more than 5 standard errors), or they are "
            "correlated: log Z is wrong and its standard error means nothing. Give draws of this energy, with "
            "num_chains= if they come from chains."
        )
    where = _first(found.ess < MIN_ESS, found, place)
    if where is not None:
        return (
            f"Fewer than {MIN_ESS} effective draws ({float(jnp.min(found.ess)):.1f}) are behind log Z{where} by '{name}': "
            "its standard error means nothing."
        )
    # States of a discrete support recur, so their weights have no such tail.
    where = None if distribution.is_discrete else _first(jnp.asarray(found.tail) > HEAVY_TAIL, found, place)
    if where is not None:
        return (
            f"The weights behind log Z{where} by '{name}' have a heavy tail (Pareto shape {float(jnp.max(found.tail)):.2f}, "
            f"above {HEAVY_TAIL}): a few of them dominate, and its standard error is too small."
        )
    return None


def _first(is_bad: Any, found: Estimate, place: Place | None) -> str | None:
    """Return words for the place of the first bad value; None if all are good."""
    bad = jnp.flatnonzero(jnp.broadcast_to(is_bad, found.value.shape).ravel())
    return (place or _row_of(found))(int(bad[0])) if bad.size else None


def _row_of(found: Estimate) -> Place:
    return lambda index: f" of row {index}" if found.value.size > 1 else ""
