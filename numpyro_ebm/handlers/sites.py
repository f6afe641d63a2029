"""Find and check one energy site of a model or a distribution."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Shaped
from numpyro import handlers
from numpyro.primitives import Messenger

from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.inputs import as_arrays
from numpyro_ebm._core.typing import Array, PyTree
from numpyro_ebm._core.wrappers import is_improper
from numpyro_ebm.distributions.energy import EnergyDistribution
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.distributions.rows import lay_out, unwrap
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.handlers._estimate import estimated_in
from numpyro_ebm.handlers.energy_sites import EnergySite, energy_sites, whole_plates
from numpyro_ebm.handlers.results import check_values_given, values_of

T = TypeVar("T")


def find_distribution(
    owner: str,
    model: Callable,
    params: PyTree | None = None,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    site: str | None = None,
) -> EventDistribution:
    """Return the energy of a model's only energy site, or of the named site; sites that factors join count as one.

    Plates that subsample hold all their rows. An unobserved energy gets a draw of its ``reference`` as its value, from
    which nothing is computed; no chain runs.

    Args:
        owner: the calling function, for messages.
        model: a NumPyro model, or the result of `estimate`.
        params: values of its parameters and of ordinary latent sites, or the result of `fit` or ``svi.run``.
        args: the model's arguments.
        kwargs: the model's keyword arguments.
        site: the site's name; None where there is only one.

    Raises:
        EnergyError: (a ValueError) for a model without an energy site, or with several and no name; for parameters and
            latent sites without a value.
        TypeError: for something that is not a model.
    """
    if not callable(model) or isinstance(model, dist.Distribution):
        raise TypeError(f"{owner} needs a NumPyro model or an EnergyDistribution; got {type(model).__name__}.")
    given = values_of(owner, {} if params is None else params)
    filled = handlers.substitute(bare_model(model), substitute_fn=_any_value)
    with handlers.block(), whole_plates():
        found, trace = energy_sites(filled, given, args, kwargs)
    energies = {member for each in found.values() for member in each.members}
    check_values_given({name: message for name, message in trace.items() if name not in energies}, given)
    none = f"{owner} needs a model with an energy, and this one has none. Write an EnergyDistribution in it."
    return choose(owner, found, site, none).lay_out().distribution


def data_site(
    owner: str, dist_or_model: object, params: PyTree | None, args: tuple, kwargs: dict[str, Any], site: str | None = None
) -> Site:
    """Lay out and check the rows of a distribution, or of the observed energy site of a model.

    Args:
        owner: the calling function, for messages.
        dist_or_model: an energy or a score, possibly under expand, mask and to_event, or a NumPyro model.
        params: values of the model's parameters and latent sites, or a result that holds them; None for a distribution.
        args: the rows for a distribution; a model's arguments.
        kwargs: a model's keyword arguments.
        site: the name of a model's energy site; None if it observes only one.

    Raises:
        EnergyError: for rows that do not fit, parameters or latent sites without values, no energy site or several.
        TypeError: for something that is neither, and for arguments that only the other one takes.
    """
    args, kwargs = as_arrays(owner, (args, kwargs))
    if isinstance(dist_or_model, dist.Distribution):
        return _of_distribution(owner, dist_or_model, params, args, kwargs, site)
    if not callable(dist_or_model):
        raise TypeError(f"{owner} needs an EnergyDistribution or a NumPyro model; got {type(dist_or_model).__name__}.")
    return _of_model(owner, dist_or_model, params, args, kwargs, site)


def choose(owner: str, found: Mapping[str, T], site: str | None, none: str) -> T:
    """Return the only site found, or the named site.

    Args:
        owner: the calling function, for messages.
        found: sites by name.
        site: the name; None where there is only one.
        none: the message if there is none.

    Raises:
        EnergyError: for no site, for several without a name, and for an unknown name.
    """
    if not found:
        raise EnergyError(none)
    if site is None and len(found) > 1:
        raise EnergyError(f"The model has the energy sites {sorted(found)}. Write {owner}(..., site='{sorted(found)[0]}').")
    if site is not None and site not in found:
        raise EnergyError(f"The model has no energy site '{site}'. {nearest(site, found)}")
    return next(iter(found.values())) if site is None else found[site]


def as_energy(distribution: dist.Distribution) -> EnergyDistribution:
    """Return an energy of 0 over a normalised NumPyro distribution as its base, so that log Z is 0.

    Raises:
        EnergyError: for an improper one.
    """
    if is_improper(distribution):
        raise EnergyError("ImproperUniform has no normaliser, so its likelihood is undefined. Write a proper distribution.")
    shapes = {"event_shape": distribution.event_shape, "batch_shape": distribution.batch_shape}
    return EnergyDistribution(
        _no_energy, support=distribution.support, base=distribution, normalized=True, **shapes, validate_args=False
    )


def bare_model(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return the model inside `estimate`; a model without it is returned unchanged."""
    estimated = estimated_in(model) if isinstance(model, Messenger) else None
    return model if estimated is None else estimated.fn


def _no_energy(event: Shaped[Array, "*event"]) -> float:
    return 0.0


def _any_value(message: dict[str, Any]) -> Any:
    """Return a placeholder value for an unobserved energy."""
    if message["type"] != "sample" or message["is_observed"]:
        return None
    unwrapped = unwrap(message["fn"])
    if unwrapped is None:
        return None
    events = unwrapped.distribution.reference_sample(jax.random.key(0))
    return jnp.broadcast_to(events, unwrapped.batch_shape + unwrapped.distribution.event_shape)


def _of_distribution(
    owner: str, distribution: dist.Distribution, params: PyTree | None, args: tuple, kwargs: dict[str, Any], site: str | None
) -> Site:
    if params is not None or kwargs or site is not None or len(args) != 1:
        raise TypeError(
            f"{owner} of a distribution takes None for params and its rows, nothing else; a distribution holds its own "
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
    return lay_out("x", unwrapped, args[0], {})


def _of_model(
    owner: str, model: Callable[..., Any], params: PyTree | None, args: tuple, kwargs: dict[str, Any], site: str | None
) -> Site:
    given = values_of(owner, {} if params is None else params)
    with whole_plates():
        found, trace = energy_sites(bare_model(model), given, args, kwargs)
    _check_not_hidden(owner, found)
    check_values_given(trace, given)
    observed: dict[str, EnergySite] = {name: each for name, each in found.items() if each.is_observed}
    none = (
        f"The model observes no energy site, so {owner} has no rows. Give it held-out rows instead of the training "
        f"rows: {owner}(model, params, x_test, ...)."
    )
    return choose(owner, observed, site, none).lay_out()


def _check_not_hidden(owner: str, found: Mapping[str, EnergySite]) -> None:
    """Refuse joint events of which some members have data and others no value."""
    for each in found.values():
        hidden = [part.name for part in each.unwrapped.parts if part.is_hidden]
        if hidden and len(hidden) < len(each.members):
            raise EnergyError(
                f"The members {hidden} of the event '{each.name}' are hidden, and {owner} of the others is a sum over all "
                "their values, which is not known. Pass values of the hidden members with the parameters for that of the "
                f"whole event: params | {{'{hidden[0]}': values}}."
            )
