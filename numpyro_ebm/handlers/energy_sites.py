"""The energy sites of one run of a model."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from numpyro import handlers
from numpyro.primitives import Messenger

from numpyro_ebm._core import numpyro_stack
from numpyro_ebm._core.errors import EnergyError, at_site
from numpyro_ebm._core.wrappers import is_improper
from numpyro_ebm.distributions.factor import EnergyFactor
from numpyro_ebm.distributions.rows import Plate, Unwrapped, check_holds_no_energy, lay_out, unwrap
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.distributions.surrogates import FrozenEnergy, Surrogate
from numpyro_ebm.handlers._hidden import placeholder_of
from numpyro_ebm.handlers._joint import FactoredSites

TWICE = (
    "The model is estimated already: it holds a surrogate in place of the energy, so the inner estimator would be used. "
    "Write one estimate, estimate(model, 'sm'), or a dict with one estimator per site."
)


class EnergySite(NamedTuple):
    """An energy site in one run of a model; sites that factors join count as one.

    Attributes:
        name: the site's name, or the names of joined sites separated by commas.
        members: names of the sample sites that it consists of.
        unwrapped: its energy or score.
        value: its value, data or a draw.
        plates: the enclosing plates by dimension.
        is_observed: whether all members are observed.
    """

    name: str
    members: tuple[str, ...]
    unwrapped: Unwrapped
    value: Any
    plates: dict[int, Plate]
    is_observed: bool

    def lay_out(self, *, may_touch_ends: bool = False, may_lack: bool = False) -> Site:
        """Lay out the value, one event per row, and check it if it is concrete.

        Args:
            may_touch_ends: whether rows may lie on the boundary of the support.
            may_lack: whether rows may lack elements of the event.

        Raises:
            EnergyError: naming the site, for a value that does not fit the energy or its support.
        """
        with at_site(self.name):
            may = {"may_touch_ends": may_touch_ends, "may_lack": may_lack}
            return lay_out(self.name, self.unwrapped, self.value, self.plates, **may)


class whole_plates(Messenger):  # noqa: N801 (a handler, named as NumPyro names its own)
    """Handler under which plates that subsample hold all their rows."""

    def process_message(self, msg: dict[str, Any]) -> None:
        """Replace a subset of the indices by all of them."""
        if msg["type"] == "plate":
            size = msg["args"][0]
            msg["value"], msg["args"] = jnp.arange(size), (size, size)


def energy_sites(
    model: Callable, values: Mapping[str, Any], args: tuple = (), kwargs: Mapping[str, Any] | None = None
) -> tuple[dict[str, EnergySite], dict[str, Any]]:
    """Run a model once and list its energy sites. No log density is computed.

    Handlers around the call, such as `whole_plates`, act on the run.

    Args:
        model: a NumPyro model, without `estimate`.
        values: values of parameters, latent sites and mutable state by name. Latent sites without a value are drawn.
        args: the model's arguments.
        kwargs: the model's keyword arguments.

    Returns:
        The energy sites by name, and the trace of the run.

    Raises:
        EnergyError: for an energy inside another distribution, a model under `estimate`, and a factor that does not fit its
            sites.
    """
    placed = handlers.substitute(handlers.substitute(model, data=dict(values)), substitute_fn=_if_improper)
    with handlers.trace() as trace, handlers.seed(rng_seed=0):
        placed(*args, **(kwargs or {}))
    plates = {name: Plate(m.get("rows", m["value"]), m["args"][0]) for name, m in trace.items() if m["type"] == "plate"}
    factored, found = FactoredSites(), []
    for name, message in trace.items():
        if message["type"] != "sample":
            continue
        fn = message["fn"]
        if isinstance(fn, Surrogate | FrozenEnergy):
            raise EnergyError(f"At site '{name}': {TWICE}")
        unwrapped = None if isinstance(fn, EnergyFactor) else unwrap(fn)
        if isinstance(fn, EnergyFactor):
            factored.add_factor(message)
        elif unwrapped is None:
            with at_site(name):
                check_holds_no_energy(fn)
            is_given = name in values or numpyro_stack.is_given(name)
            factored.add_site(message, is_hidden=not message["is_observed"] and not is_given)
        else:
            own = _plates_of(message, plates)
            found.append(EnergySite(name, (name,), unwrapped, message["value"], own, message["is_observed"]))
    for site in found:
        factored.check_not_named(site.name)
    for joint in factored.joints():
        own = _plates_of(joint.message, plates)
        found.append(EnergySite(joint.name, tuple(joint.names), joint.unwrapped, joint.value, own, joint.is_observed))
    return {site.name: site for site in found}, trace


def _if_improper(message: dict[str, Any]) -> Any:
    """Return a placeholder for an unobserved site of which nothing can be drawn."""
    if message["type"] != "sample" or message["value"] is not None or not is_improper(message["fn"]):
        return None
    return placeholder_of(message["fn"])


def _plates_of(message: dict[str, Any], plates: Mapping[str, Plate]) -> dict[int, Plate]:
    return {frame.dim: plates[frame.name] for frame in message["cond_indep_stack"] if frame.name in plates}
