"""A distribution or a model, and rows of data, as the `Site` that estimators see."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro import handlers

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError, at_site
from numpyro_ebm._core.inputs import as_arrays
from numpyro_ebm._core.typing import Array, PyTree
from numpyro_ebm._core.wrappers import is_improper
from numpyro_ebm.distributions.energy import EnergyDistribution
from numpyro_ebm.distributions.rows import lay_out, unwrap
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.handlers._estimate import estimate
from numpyro_ebm.handlers.results import check_values_given, values_of
from numpyro_ebm.handlers.sites import bare_model, choose, whole_plates

ROWS_AT_ONCE = 4096


def data_site(
    owner: str, dist_or_model: Any, params: Any, args: tuple, kwargs: dict[str, Any], site: str | None = None
) -> Site:
    """The rows of an energy, laid out and checked: of a distribution, or of the observed energy site of a model.

    Args:
        owner: the function that asks, for its messages.
        dist_or_model: an energy or a score (expand, mask and to_event around it allowed), or a NumPyro model.
        params: values of the model's parameters and latent sites, or a result that holds them; None for a distribution.
        args: the rows for a distribution; a model's arguments.
        kwargs: a model's keyword arguments.
        site: which of a model's energy sites.

    Raises:
        EnergyError: for rows that do not fit, parameters or latent sites without values, no energy site or several.
        TypeError: for what is neither, and for arguments that belong to the other.
    """
    args, kwargs = as_arrays(owner, (args, kwargs))
    if isinstance(dist_or_model, dist.Distribution):
        return _of_distribution(owner, dist_or_model, params, args, kwargs, site)
    if not callable(dist_or_model):
        raise TypeError(f"{owner} needs an EnergyDistribution or a NumPyro model; got {type(dist_or_model).__name__}.")
    return _of_model(owner, dist_or_model, params, args, kwargs, site)


def over_rows(function: Callable[[Array, Any], Any], site: Site) -> Any:
    """``function(event, local)`` for every row, a few thousand rows at once."""
    rows = (site.value, site.local)
    if site.num_rows <= ROWS_AT_ONCE:
        return jax.vmap(function)(*rows)
    return jax.lax.map(lambda row: function(*row), rows, batch_size=ROWS_AT_ONCE)


def has_rows_of_its_own(site: Site) -> bool:
    """Whether rows differ in density, by a context or a base of their own."""
    return site.local is not None and int(np.prod(site.distribution.batch_shape)) > 1


def as_energy(distribution: dist.Distribution) -> EnergyDistribution:
    """A normalised NumPyro distribution as the base of an energy that is 0, so that log Z is 0.

    Raises:
        EnergyError: for an improper one.
    """
    if is_improper(distribution):
        raise EnergyError("ImproperUniform has no normaliser: its likelihood is no number. Write a proper distribution.")
    shapes = {"event_shape": distribution.event_shape, "batch_shape": distribution.batch_shape}
    return EnergyDistribution(
        _no_energy, support=distribution.support, base=distribution, normalized=True, **shapes, validate_args=False
    )


def _no_energy(event: Array) -> float:
    return 0.0


def _of_distribution(owner: str, distribution: Any, params: Any, args: tuple, kwargs: dict[str, Any], site: Any) -> Site:
    if params is not None or kwargs or site is not None or len(args) != 1:
        raise TypeError(
            f"{owner} of a distribution takes None for params and its rows, nothing else; a distribution holds its "
            f"parameters. Write {owner}(distribution, None, rows, ...)."
        )
    unwrapped = unwrap(distribution)
    if unwrapped is None:
        raise TypeError(
            f"{owner} is for an energy, whose log Z is not known; {type(distribution).__name__} is normalised. Write "
            "distribution.log_prob(rows), or numpyro_ebm.evaluate to compare it with energies."
        )
    if 0 in jnp.shape(args[0]):
        raise EnergyError(f"{owner} needs rows; got none: shape {jnp.shape(args[0])}.")
    site = lay_out("x", unwrapped, args[0], {})
    check_discrete(site)
    return site


def _of_model(owner: str, model: Any, params: Any, args: tuple, kwargs: dict[str, Any], site: str | None) -> Site:
    given = values_of(owner, {} if params is None else params)
    bare = bare_model(model)
    sites, trace = _sites(bare, given, args, kwargs)
    check_values_given(trace, given)
    found = {name: each for name, each in sites.items() if _is_observed(name, trace)}
    none = (
        f"The model observes no energy site, so {owner} has no rows. Give it held-out rows in the place of those of "
        f"training: {owner}(model, params, x_test, ...)."
    )
    chosen = choose(owner, found, site, none)
    check_discrete(chosen)
    return chosen


def _sites(model: Any, params: PyTree, args: tuple, kwargs: Mapping[str, Any]) -> tuple[dict[str, Site], Mapping[str, Any]]:
    """All energy sites of a model by name, and the trace of its run."""
    with handlers.trace() as trace, whole_plates(), handlers.seed(rng_seed=0), handlers.substitute(data=params):
        pairs = estimate(model, "sm").sites(*args, **kwargs)
    return {each.name: each for _, each in pairs}, trace


def _is_observed(name: str, trace: Mapping[str, Any]) -> bool:
    members = [name] if name in trace else name.split(",")
    return all(trace[member]["is_observed"] for member in members)


def check_discrete(site: Site) -> None:
    """Refuse concrete rows outside a discrete support, which no transform sees.

    Raises:
        EnergyError: with the first such row.
    """
    if not site.distribution.is_discrete or not is_concrete(site.value, site.mask):
        return
    inside = jax.vmap(lambda event: jnp.all(site.distribution.support(event)))(site.value)
    bad = np.flatnonzero(~np.asarray(inside))
    if bad.size:
        with at_site(site.name):
            raise EnergyError(
                f"Row {bad[0]} of the data lies outside the support {site.distribution.support}: {site.value[bad[0]]} "
                f"({bad.size} such rows). Write the support that the data have."
            )
