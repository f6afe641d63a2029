"""`log_partition`, the main function for log Z."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Shaped

from numpyro_ebm._core import programs
from numpyro_ebm._core.errors import EnergyError, UnreliableLogPartitionWarning
from numpyro_ebm._core.inputs import check_key, check_outside_jit
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.partition import _problem
from numpyro_ebm.partition._base import AbstractPartition, Bound, Densities, Estimate, LogPartition, rounding
from numpyro_ebm.partition._start import fits_start, start_around
from numpyro_ebm.partition.names import METHODS

MIN_ESS = 10
"""With fewer effective draws the mean weight is uncertain by a third or more, too much for the delta method."""
HEAVY_TAIL = 0.7
"""Pareto shape above which a mean weight is unreliable (Vehtari et al. 2024)."""


def available_partition_methods() -> tuple[str, ...]:
    """Return the names that ``method=`` of `log_partition` takes, sorted.

    Example:
        ``available_partition_methods()`` returns
        ``('ais', 'bridge', 'enumerate', 'grid', 'importance', 'nce', 'nested', 'smc')``.
    """
    return METHODS.names()


def log_partition(
    rng_key: PRNGKey | None,
    dist_or_model: Callable | EventDistribution,
    *,
    method: str | AbstractPartition = "ais",
    params: PyTree | None = None,
    site: str | None = None,
    model_args: tuple = (),
    model_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> LogPartition:
    r"""Estimate log Z of an energy, ``log \int base(x) exp(-E(x)) dx``, with its standard error.

    Without a base the integral is over Lebesgue measure in the event's own space, whatever its support (a sum if it is
    discrete). An energy with a context, or with a base per row, has one log Z per row; all rows run together.

    | method | how | use |
    |---|---|---|
    | "ais" | chains from a known distribution to the target | any energy; a stochastic lower bound |
    | "smc" | a population with resampling, adaptive temperatures | several modes; costs less than "ais" |
    | "importance" | draws of a mixture fitted to the data | up to about 10 dimensions; cheap |
    | "bridge" | draws of the target and of such a mixture | if draws of the target are at hand |
    | "nested" | slices of equal likelihood | few dimensions, phase transitions |
    | "grid" | trapezoidal rule | 1 to 3 dimensions; exact to rounding |
    | "enumerate" | the sum over all states | few discrete elements; exact |
    | "nce" | classifies data against noise | no draws of the target, but data that follow it |

    Args:
        rng_key: random key; None is enough for "grid" and "enumerate".
        dist_or_model: an `EnergyDistribution`, or a NumPyro model with one energy (or ``site`` names it). A second call with
            the same model or kind of distribution compiles nothing, even if its values differ.
        method: a name of `available_partition_methods` or an object.
        params: values of the model's parameters, or the result of `fit`.
        site: name of the model's energy site; for sites that a factor joins, their names joined by commas.
        model_args: the model's arguments, as far as the energy depends on them (its context).
        model_kwargs: the model's keyword arguments.
        **options: the method's options, if it is a name.

    Returns:
        `LogPartition`.

    Raises:
        EnergyError: (a ValueError) for an unknown method, a model without an energy, parameters without a value, and a
            distribution that the method cannot handle (see there); if log Z is infinite or the method does not finish.
        TypeError: for unknown options, and for anything other than a model or an energy.

    Warns:
        UnreliableLogPartitionWarning: if the start does not cover the target (chains that came from it are not at rest under
            the target), if the draws given for the target cannot be draws of it, if fewer than 10 effective draws are behind
            log Z, or if the tail of its weights has a Pareto shape above 0.7, as with a start whose tails are lighter than
            the target's. The standard error then means nothing.

    Example:
        >>> import jax
        >>> log_z = log_partition(None, EnergyDistribution(lambda x: 2.0 * x**2), method="grid")  # doctest: +SKIP

    References:
        Song and Kingma, How to train your energy-based models (2021), section 3; Vehtari et al., Pareto smoothed importance
        sampling (2024), for the tail; and each method's own.
    """
    chosen = METHODS.resolve(method, **options)
    if rng_key is None and chosen.needs_key:
        raise EnergyError(f"The method '{chosen.name}' is random. Write log_partition(jax.random.key(0), ...).")
    if rng_key is not None:
        check_key("log_partition", rng_key)
    distribution = _problem.find("log_partition", dist_or_model, params, site, model_args, model_kwargs)
    chosen.check(distribution)
    data = chosen.data
    draws = None if data is None else _problem.data_positions(type(chosen).__name__, distribution, data)
    keys: Any = [None] * 3 if rng_key is None else jax.random.split(rng_key, 3)
    if draws is None and chosen.num_draws:
        draws = _problem.target_positions(keys[1], distribution, chosen.num_draws)
    found: Estimate = _estimate(keys[0], keys[2], chosen, distribution.closed(), draws)
    check_finite("log_partition", found)
    if not bool(jnp.all(found.is_finished)):
        raise EnergyError(f"The method '{chosen.name}' did not finish. {chosen.unfinished}")
    shape = _problem.shape_of(distribution)
    result = shaped(Estimate(*(jnp.asarray(leaf).reshape(shape) for leaf in found[:3])), chosen.bound)
    doubt = _doubt(chosen, distribution, found)
    if doubt is not None:
        warnings.warn(f"{doubt} {chosen.unreliable}", UnreliableLogPartitionWarning, stacklevel=2)
    return result


def _doubt(method: AbstractPartition, distribution: EventDistribution, found: Estimate) -> str | None:
    """Return the reason not to trust the standard error of an estimate; None if every check passes."""
    name = method.name
    if not bool(jnp.all(found.covers)):
        return (
            f"The start of '{name}' does not cover the target: chains that came from it are not at rest under the "
            "target, so log Z is too small and its standard error means nothing. Give the EnergyDistribution a base, or "
            "write start=a distribution of one event around its mass, or data=rows, to which a start is fitted."
        )
    if not bool(jnp.all(found.are_draws)):
        return (
            f"The draws given to '{name}' are not draws of this energy (by more than 5 standard errors), or they are "
            "correlated: log Z is wrong and its standard error means nothing. Give draws of this energy, with "
            "num_chains= if they come from chains."
        )
    if bool(jnp.any(found.ess < MIN_ESS)):
        return (
            f"Fewer than {MIN_ESS} effective draws ({float(jnp.min(found.ess)):.1f}) are behind log Z by '{name}': its "
            "standard error means nothing."
        )
    # States of a discrete support recur, so their weights have no such tail.
    if not distribution.is_discrete and bool(jnp.any(found.tail > HEAVY_TAIL)):
        return (
            f"The weights behind log Z by '{name}' have a heavy tail (Pareto shape {float(jnp.max(found.tail)):.2f}, "
            f"above {HEAVY_TAIL}): a few of them dominate, and its standard error is too small."
        )
    return None


@programs.jit
def _estimate(
    key_starts: Any,
    key_rows: PRNGKey | None,
    method: AbstractPartition,
    distribution: EventDistribution,
    draws: Shaped[Array, "rows draws *position"] | None,
) -> Estimate:
    starts = None
    if method.num_starts:
        starts = _problem.start_positions(key_starts, distribution, method.start_distribution, method.num_starts)

    def one(key, local, starts, draws):
        densities, is_there = Densities(distribution, local, method.start_distribution), True
        if fits_start(method, distribution):
            key, key_fit = jax.random.split(key)
            densities, starts, is_there = start_around(key_fit, method, densities, starts, draws)
        found = method.estimate(key, densities, starts, draws)
        return found._replace(covers=found.covers & is_there)

    num = _problem.num_rows(distribution)
    row_keys = None if key_rows is None else jax.random.split(key_rows, num)
    return jax.vmap(one, axis_size=num)(row_keys, _problem.local_of(distribution), starts, draws)


def shaped(found: Estimate, bound: Bound | None) -> LogPartition:
    """Return the result for the user, with rounding added to the standard error."""
    return LogPartition(found.value, found.standard_error + rounding(found.value), found.ess, bound)


def check_finite(owner: str, *found: Estimate) -> None:
    """Check that log Z is finite, and raise otherwise.

    Raises:
        EnergyError: with its value and the likely cause.
    """
    check_outside_jit(owner, found)
    for each in found:
        bad = jnp.flatnonzero(~jnp.isfinite(each.value).ravel())
        if bad.size:
            value = float(each.value.ravel()[bad[0]])
            row = f" of row {int(bad[0])}" if each.value.size > 1 else ""
            what = {
                jnp.inf: "The energy is minus infinity somewhere",
                -jnp.inf: "No draw has a density: the start and the target do not overlap, or the energy is infinite or NaN",
            }.get(value, "The energy overflows or is NaN")
            raise EnergyError(f"{owner} found log Z{row} = {value}. {what}. Look at the energy, or give another start.")
