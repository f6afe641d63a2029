"""Check that the log Z missing from an energy's log density is constant in the model that NumPyro is scoring.

A log density may lack a constant. What is missing is constant if no energy depends on the model's latents or trained
parameters except through its event, and if no weight that multiplies an energy's log density depends on them. Both are
properties of the program that computes the model's log density: it is traced once more, without being run, and
`dependencies` reads off what depends on what. This takes no derivative, so the check holds for every inference.
"""

import itertools
import warnings
import weakref
from collections.abc import Callable, Container, Iterable
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from numpyro.handlers import condition, seed, substitute, trace
from numpyro.primitives import _PYRO_STACK, Messenger

from numpyro_ebm._core import numpyro_stack
from numpyro_ebm._core.autodiff import guard
from numpyro_ebm._core.errors import EnergyError, UntrainedParametersWarning
from numpyro_ebm._core.typing import PyTree
from numpyro_ebm.distributions.dependencies import BASE, EVENT, SOURCE, TERM, Flow, flows, mark

WAYS_OUT = (
    "To train or to infer it, write numpyro_ebm.estimate(model, 'dsm', sigma=0.1) or another of "
    "numpyro_ebm.available_estimators(). To sample the event, fix the parameters: "
    "numpyro.handlers.substitute(model, params) or BlackJAXKernel(model, params=params). If Z is constant or already "
    "inside the energy, write EnergyDistribution(..., normalized=True)."
)
DERIVATIVE = (
    "The log density of an energy is known only up to log Z, and log Z depends on the parameters: its derivative in "
    f"anything but the event is wrong. {WAYS_OUT}"
)


class Moving(NamedTuple):
    """A value of the model that inference changes.

    Attributes:
        kind: a latent, or a trained parameter.
        name: the name of its site.
    """

    kind: Literal["latent", "parameter"]
    name: str

    def __str__(self) -> str:
        """Return the description used in messages."""
        return f"{self.kind} '{self.name}'"


_checked: weakref.WeakSet[Any] = weakref.WeakSet()
"""Handlers that NumPyro put around a model to score it, once checked; NumPyro makes a new one each time."""


def log_density(fn: Callable, value: PyTree, name: str | None = None) -> Any:
    """Return ``fn(value)``, the unnormalised log density of a distribution, after a check of the model being scored.

    Args:
        fn: the log density, a function of the event.
        value: the event, a pytree.
        name: for messages, the name to use where NumPyro is not computing the log probability of a site.

    Raises:
        EnergyError: if log Z varies in the model being scored and, later, if anything but ``value`` is differentiated.
    """
    if numpyro_stack.is_unguarded():
        return fn(value)
    for scoring in numpyro_stack.scorings():
        if scoring.model not in _checked:
            _checked.add(scoring.model)
            _check(scoring)
    site = numpyro_stack.site_being_scored() or name
    with numpyro_stack.one_deeper() as depth:  # the same label in each trace, so that programs compare equal
        values = guard(fn, mark(value, EVENT, depth), f"At site '{site}': {DERIVATIVE}" if site else DERIVATIVE)
        return mark(values, TERM, depth)


def _check(scoring: numpyro_stack.Scoring) -> None:
    """Refuse a model in which a missing log Z varies; warn if its energies are untrained."""
    try:
        found, joint = _flows(scoring)
    except jax.errors.JAXTypeError:
        return  # The model needs concrete values of its latents: no NumPyro inference can run it either.
    moves = ("latent", "parameter") if numpyro_stack.is_training() else ("latent",)
    for name, flow in found.items():
        own = {Moving("latent", member) for member in joint.get(name, ())}
        words = _tilted if name in joint else _shifted
        _refuse(name, [each for each in sorted(flow.shifts - own) if each.kind in moves], words)
        _refuse(name, [each for each in sorted(flow.weights) if each.kind in moves], _weighted)
    if numpyro_stack.is_mcmc():
        _warn_untrained(scoring, found)


def _flows(scoring: numpyro_stack.Scoring) -> tuple[dict[str, Flow], dict[str, set[str]]]:
    """Return the flow of each site's log density and, for sites that factors tilt, the sites of their joint event."""
    names, joint = [], {}

    def log_probs():
        sites = _run(scoring, scoring.model)
        samples = {name: site for name, site in sites.items() if site["type"] == "sample"}
        joint.update(_joint_events(samples))
        names.extend(samples)
        return [_log_prob(site, is_tilted=name in joint) for name, site in samples.items()]

    jaxpr = jax.make_jaxpr(log_probs)()
    return dict(zip(names, flows(jaxpr), strict=True)), joint


def _run(scoring: numpyro_stack.Scoring, model: Callable) -> dict[str, dict[str, Any]]:
    """Run a model once more with the values that inference changes marked, under the same handlers that set values."""
    stack = list(_PYRO_STACK)
    around = list(itertools.takewhile(lambda handler: handler is not scoring.model, stack))
    _PYRO_STACK.clear()
    try:
        with seed(rng_seed=0), trace() as sites, _moving(numpyro_stack.gibbs_sites(scoring)), ExitStack() as again:
            for handler in around:
                if isinstance(handler, condition | substitute):
                    again.enter_context(handler)
            model(*scoring.args, **scoring.kwargs)
    finally:
        _PYRO_STACK[:] = stack
    return sites


def _log_prob(site: dict[str, Any], *, is_tilted: bool) -> Any:
    """Return a site's scaled, summed log density; for a tilted site, log Z also depends on its own distribution."""
    value = site["value"]
    log_prob = mark(site["fn"].log_prob(mark(value, EVENT)), BASE) if is_tilted else site["fn"].log_prob(value)
    return jnp.sum(log_prob if site["scale"] is None else site["scale"] * log_prob)


def _joint_events(sites: dict[str, dict[str, Any]]) -> dict[str, set[str]]:
    """Map each site that factors name to the sites of its joint event, for joint events with some observed site."""
    groups: list[set[str]] = []
    for site in sites.values():
        named = _named(site, sites)
        touched = [group for group in groups if group & named]
        groups = [group for group in groups if not group & named] + [named.union(*touched)]
    observed = [group for group in groups if any(sites[name]["is_observed"] for name in group if name in sites)]
    return {name: group for group in observed for name in group}


def _named(site: dict[str, Any], sites: Container[str]) -> set[str]:
    """Return the sites that a factor names, looked up inside its scopes, then outside; empty for other sites."""
    fn = site["fn"]
    prefix = site["name"].removesuffix(getattr(fn, "name", ""))
    keys = getattr(fn, "sites", ())
    return {next((name for name in (prefix + key, key) if name in sites), key) for key in keys}


class _moving(substitute):  # noqa: N801
    """Mark the values that inference changes; latents without one get an unused placeholder."""

    def __init__(self, conditioned: Iterable[str]):
        self.conditioned = frozenset(conditioned)
        super().__init__(substitute_fn=self._marked)

    def _marked(self, msg: dict[str, Any]) -> Any:
        value = msg.get("value")
        if msg["type"] == "param" and value is not None:
            return mark(value, SOURCE, Moving("parameter", msg["name"]))
        if msg["type"] != "sample" or (msg["is_observed"] and msg["name"] not in self.conditioned):
            return None
        if value is None:
            shape = msg["kwargs"].get("sample_shape", ()) + msg["fn"].shape()
            value = jnp.zeros(shape, int if msg["fn"].support.is_discrete else float)
        return mark(value, SOURCE, Moving("latent", msg["name"]))


def _refuse(name: str, sources: list[Moving], words: Callable[[str], str]) -> None:
    if not sources:
        return
    guide = numpyro_stack.guide_being_built()
    if guide is None:
        raise EnergyError(f"At site '{name}': {words('the ' + ' and the '.join(map(str, sources)))}")
    raise EnergyError(
        f"At site '{name}': the guide {guide} was built from the model without its estimator, and log Z of the energy "
        f"depends on the {' and the '.join(map(str, sources))}. Write {guide}(estimate(model, ...)), with the estimated "
        "model that SVI gets."
    )


def _shifted(sources: str) -> str:
    return f"The log density of an energy is known only up to log Z, and log Z depends on {sources}. {WAYS_OUT}"


def _tilted(sources: str) -> str:
    return (
        "A factor tilts this site's own distribution, so their product is known only up to log Z, and log Z "
        f"depends on {sources}. To train or to infer it, write numpyro_ebm.estimate(model, 'dsm', sigma=0.1). To make it "
        "part of the joint event, name it in the factor: energy_factor(name, energy, x=x, t=t)."
    )


def _weighted(sources: str) -> str:
    return (
        f"The log density of an energy is known only up to log Z, and here it has a weight that depends on {sources}: the "
        "weight of a mixture component, the gate of a zero inflation, or a power. Log Z would need the same weight. Put "
        "log Z into the energy, E + numpyro_ebm.log_partition(rng_key, distribution).value, and write "
        "EnergyDistribution(..., normalized=True); or keep the weight constant."
    )


class _unset(Messenger):  # noqa: N801
    """Record the parameters that have no value."""

    def __init__(self, fn: Callable):
        self.names: set[str] = set()
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        """Record a parameter without a value."""
        if msg["type"] == "param" and msg["value"] is None:
            self.names.add(msg["name"])


def _warn_untrained(scoring: numpyro_stack.Scoring, found: dict[str, Flow]) -> None:
    """Warn if energies at latent sites have parameters at their initial values."""
    sites = {
        name: {each for each in flow.shifts if each.kind == "parameter"}
        for name, flow in found.items()
        if any(each.kind == "latent" for each in flow.sources)
    }
    model = numpyro_stack.model_given(scoring.model)
    if model is None or not any(sites.values()):
        return
    probe = _unset(model)
    jax.make_jaxpr(lambda: _run(scoring, probe) and None)()
    for name, params in sites.items():
        untrained = sorted(n for n in probe.names if Moving("parameter", n) in params)
        if untrained:
            warnings.warn(
                f"At site '{name}': the energy's parameters {untrained} have no value, so MCMC samples it with their "
                "initial values. Pass the trained ones: MCMC(BlackJAXKernel(model, 'nuts', params=svi_result.params), "
                "...), or NUTS(numpyro.handlers.substitute(model, data=svi_result.params)).",
                UntrainedParametersWarning,
                stacklevel=2,
            )
