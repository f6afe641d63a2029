"""The energy of a model's site, its parameters fixed."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.primitives import Messenger

from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.typing import PyTree
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.distributions.rows import unwrap
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators import MaximumLikelihood
from numpyro_ebm.handlers._estimate import estimate, estimated_in
from numpyro_ebm.handlers.results import check_values_given, values_of


class whole_plates(Messenger):  # noqa: N801
    """Plates hold all their rows, also those that subsample."""

    def process_message(self, msg: Any) -> None:
        """All indices in the place of a subset."""
        if msg["type"] == "plate":
            size = msg["args"][0]
            msg["value"], msg["args"] = jnp.arange(size), (size, size)


def bare_model(model: Any) -> Any:
    """The model inside what `estimate` made of it."""
    estimated = estimated_in(model) if isinstance(model, Messenger) else None
    return model if estimated is None else estimated.fn


def find_distribution(
    owner: str,
    model: Callable,
    params: PyTree | None = None,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    site: str | None = None,
) -> EventDistribution:
    """The energy of a model's one energy site, or of the one that is named; sites that a factor joins are one.

    Plates that subsample hold all their rows. An energy that is not observed gets a value of its base, which nothing is
    computed from; no chain runs.

    Args:
        owner: who asks, for messages.
        model: a NumPyro model, or what `estimate` made of it.
        params: values of its parameters and of ordinary latent sites, or the result of `fit` or ``svi.run``.
        args: its arguments.
        kwargs: its keyword arguments.
        site: the site's name; None where there is only one.

    Raises:
        EnergyError: (a ValueError) for a model without such a site, or with several and no name; for parameters and latent
            sites without a value.
        TypeError: for something that is no model.
    """
    if not callable(model) or isinstance(model, dist.Distribution):
        raise TypeError(f"{owner} needs a NumPyro model or an EnergyDistribution; got {type(model).__name__}.")
    given = values_of(owner, {} if params is None else params)
    estimated = estimate(handlers.substitute(bare_model(model), substitute_fn=_any_value), MaximumLikelihood())
    seeded = handlers.seed(rng_seed=0)
    with handlers.block(), handlers.trace() as trace, whole_plates(), seeded, handlers.substitute(data=given):
        found = {each.name: each for _, each in estimated.sites(*args, **(kwargs or {}))}
    energies = {member for name in found for member in name.split(",")}
    check_values_given({name: message for name, message in trace.items() if name not in energies}, given)
    none = f"{owner} needs a model with an energy, and this one has none. Write an EnergyDistribution in it."
    return choose(owner, found, site, none).distribution


def choose(owner: str, found: Mapping[str, Site], site: str | None, none: str) -> Site:
    """The one site found, or the one that is named.

    Raises:
        EnergyError: ``none`` where there is none; for several without a name, and for an unknown name.
    """
    if not found:
        raise EnergyError(none)
    if site is None and len(found) > 1:
        raise EnergyError(f"The model has the energy sites {sorted(found)}. Write {owner}(..., site='{sorted(found)[0]}').")
    if site is not None and site not in found:
        raise EnergyError(f"The model has no energy site '{site}'. {nearest(site, found)}")
    return next(iter(found.values())) if site is None else found[site]


def _any_value(message: dict[str, Any]) -> Any:
    """A value for an energy that is not observed."""
    if message["type"] != "sample" or message["is_observed"]:
        return None
    unwrapped = unwrap(message["fn"])
    if unwrapped is None:
        return None
    events = unwrapped.distribution.reference_sample(jax.random.key(0))
    return jnp.broadcast_to(events, unwrapped.batch_shape + unwrapped.distribution.event_shape)
