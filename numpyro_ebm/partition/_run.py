"""`log_partition`, the main function for log Z."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from numpyro_ebm._core import programs
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.inputs import check_key
from numpyro_ebm._core.typing import ArrayLike, PRNGKey, PyTree
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.handlers.results import values_of
from numpyro_ebm.partition import _problem
from numpyro_ebm.partition._base import AbstractPartition, Estimate, LogPartition, in_shape, shaped
from numpyro_ebm.partition._checks import check_found
from numpyro_ebm.partition._rows import estimate_rows
from numpyro_ebm.partition.family import at_each, samples_of
from numpyro_ebm.partition.names import METHODS


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
    posterior_samples: Mapping[str, ArrayLike] | None = None,
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
        posterior_samples: draws of the model's latents by name, the number of draws in front, as ``mcmc.get_samples()``
            returns them. There is then one log Z for each draw, in front of the shape above; the draws run one after the
            other in one compiled program, each with its own random key.
        site: name of the model's energy site; for sites that a factor joins, their names joined by commas.
        model_args: the model's arguments, as far as the energy depends on them (its context).
        model_kwargs: the model's keyword arguments.
        **options: the method's options, if it is a name.

    Returns:
        `LogPartition`.

    Raises:
        EnergyError: (a ValueError) for an unknown method, a model without an energy, parameters without a value, and a
            distribution that the method cannot handle (see there); if log Z is infinite or the method does not finish. For
            draws of the latents that differ in number, and with them for data or draws of the event.
        TypeError: for unknown options, and for anything other than a model or an energy.

    Warns:
        UnreliableLogPartitionWarning: if the start does not cover the target (chains that came from it are not at rest under
            the target), if the draws given for the target cannot be draws of it, if fewer than 10 effective draws are behind
            log Z, or if the tail of its weights has a Pareto shape above 0.7, as with a start whose tails are lighter than
            the target's. The standard error then means nothing.

    Example:
        >>> import jax
        >>> log_z = log_partition(None, EnergyDistribution(lambda x: 2.0 * x**2), method="grid")  # doctest: +SKIP
        >>> log_zs = log_partition(key, model, posterior_samples=mcmc.get_samples())  # doctest: +SKIP

    References:
        Song and Kingma, How to train your energy-based models (2021), section 3; Vehtari et al., Pareto smoothed importance
        sampling (2024), for the tail; and each method's own.
    """
    chosen = METHODS.resolve(method, **options)
    if rng_key is None and chosen.needs_key:
        raise EnergyError(f"The method '{chosen.name}' is random. Write log_partition(jax.random.key(0), ...).")
    if rng_key is not None:
        check_key("log_partition", rng_key)
    if posterior_samples is not None:
        draws_of = samples_of("log_partition", posterior_samples)
        given = values_of("log_partition", {} if params is None else params)
        find = functools.partial(_problem.find, "log_partition", dist_or_model)
        family = lambda draw: find(given | draw, site, model_args, model_kwargs)  # noqa: E731
        return at_each("log_partition", rng_key, chosen, family, draws_of, lambda index: f" of draw {index}")
    distribution = _problem.find("log_partition", dist_or_model, params, site, model_args, model_kwargs)
    chosen.check(distribution)
    data = chosen.data
    draws = None if data is None else _problem.data_positions(type(chosen).__name__, distribution, data)
    keys: Any = [None] * 3 if rng_key is None else jax.random.split(rng_key, 3)
    if draws is None and chosen.num_draws:
        draws = _problem.target_positions(keys[1], distribution, chosen.num_draws)
    found: Estimate = _estimated(keys[0], keys[2], chosen, distribution.closed(chosen.event_dtype), draws)
    check_found("log_partition", chosen, distribution, found)
    shape = _problem.shape_of(distribution)
    return shaped(in_shape(found, shape), chosen.bound)


@programs.jit
def _estimated(
    key_starts: Any, key_rows: Any, method: AbstractPartition, distribution: EventDistribution, draws: PyTree
) -> Estimate:
    return estimate_rows(key_starts, key_rows, method, distribution, draws)._replace(draws=None)
