"""Hidden members of joint events: which sites are hidden, found before the run of a model that `estimate` makes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro import handlers
from numpyro.distributions import Distribution

from numpyro_ebm._core import numpyro_stack
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array
from numpyro_ebm._core.wrappers import is_improper
from numpyro_ebm.distributions.dependencies import SOURCE, flows, mark
from numpyro_ebm.distributions.factor import EnergyFactor
from numpyro_ebm.distributions.rows import unwrap
from numpyro_ebm.handlers._joint import FactoredSites, JointSite

Given = Callable[[str], bool]


class Roles(NamedTuple):
    """Sites of joint events whose estimator takes rows that lack elements.

    Attributes:
        hidden: sites that neither data nor a guide give a value.
        observed: sites with data.
    """

    hidden: frozenset[str] = frozenset()
    observed: frozenset[str] = frozenset()


def roles_of(
    model: Callable[..., Any],
    args: tuple,
    kwargs: Mapping[str, Any],
    is_given: Given,
    takes_missing: Callable[[str, Sequence[str]], bool],
) -> Roles:
    """Trace a model once, without values, and return the roles of the sites that factors join.

    Args:
        model: a NumPyro model, without `estimate`.
        args: its arguments.
        kwargs: its keyword arguments.
        is_given: whether handlers around the model give a site a value.
        takes_missing: whether the estimator of a joint event takes rows that lack elements, given its name and its members.

    Raises:
        EnergyError: for an event of which nothing is observed, and for a hidden site on which other densities depend.
    """
    found: dict[str, Any] = {}

    def run():
        given: set[str] = set()
        placed = handlers.substitute(model, substitute_fn=lambda message: _placeholder(message, is_given, given))
        with handlers.block(), handlers.trace() as trace, handlers.seed(rng_seed=0):
            placed(*args, **kwargs)
        sites = {name: message for name, message in trace.items() if message["type"] == "sample"}
        joints = _joints(sites)
        taken = [joint for joint in joints if takes_missing(joint.name, joint.names)]
        found["roles"] = _roles(taken, given)
        return _densities(sites, joints)

    jaxpr, shape = jax.make_jaxpr(run, return_shape=True)()
    roles: Roles = found["roles"]
    for name, flow in zip(shape, flows(jaxpr), strict=True):
        used = sorted(flow.sources & roles.hidden)
        if used:
            raise EnergyError(
                f"The hidden sites {used} are drawn given the other members of their event, by its factors alone, and the "
                f"density of '{name}' depends on them in another way. Name '{used[0]}' in a factor, energy_factor(..., "
                f"{used[0]}={used[0]}), with the whole term in its energy, or give '{used[0]}' a site of the guide."
            )
    return roles


def placeholder_of(fn: Distribution) -> Array:
    """Return a value inside the support of a distribution, in the shape of its rows."""
    support: Any = fn.support
    value = jnp.broadcast_to(support.feasible_like(jnp.zeros(fn.shape())), fn.shape())
    return value.astype(int if support.is_discrete else float)


def _placeholder(message: dict[str, Any], is_given: Given, given: set[str]) -> Any:
    """Return a value for a site without data, marked as a source unless handlers give it one."""
    if message["type"] != "sample" or message["is_observed"]:
        return None
    name, fn = message["name"], message["fn"]
    if message["value"] is not None or is_given(name):
        given.add(name)
    if message["value"] is not None:
        return None
    unwrapped = unwrap(fn)
    if unwrapped is not None:
        events = unwrapped.distribution.reference_sample(jax.random.key(0))
        return jnp.broadcast_to(events, unwrapped.batch_shape + unwrapped.distribution.event_shape)
    value = placeholder_of(fn) if is_improper(fn) else fn.sample(jax.random.key(0), message["kwargs"]["sample_shape"])
    return value if name in given else mark(value, SOURCE, name)


def _joints(sites: Mapping[str, dict[str, Any]]) -> list[JointSite]:
    factored = FactoredSites()
    for message in sites.values():
        if isinstance(message["fn"], EnergyFactor):
            factored.add_factor(message)
        elif unwrap(message["fn"]) is None:
            factored.add_site(message)
    return factored.joints()


def _roles(joints: Sequence[JointSite], given: set[str]) -> Roles:
    observed, hidden = set(), set()
    for joint in joints:
        data = {member.name for member in joint.members if member.message["is_observed"]}
        latent = set(joint.names) - data
        if latent - given and not data and not latent & given:
            raise EnergyError(
                f"No member of the event '{joint.name}' is observed, so there is nothing to estimate from. Pass the data of "
                f"one: numpyro.sample('{joint.names[0]}', ..., obs=x)."
            )
        if latent - given and latent & given:
            raise EnergyError(
                f"Of the event '{joint.name}' the guide gives {sorted(latent & given)}, and {sorted(latent - given)} are "
                "hidden. Give all of them sites of the guide, or none."
            )
        observed |= data
        hidden |= latent - given
    return Roles(frozenset(hidden), frozenset(observed))


def _densities(sites: Mapping[str, dict[str, Any]], joints: Sequence[JointSite]) -> dict[str, Any]:
    """Return the log densities of all events: those of joint ones at constants, where members enter by closures alone."""
    members = {name for joint in joints for name in joint.names}
    found = {}
    with numpyro_stack.unguarded():
        for name, message in sites.items():
            if name not in members and not isinstance(message["fn"], EnergyFactor):
                found[name] = _density(message)
        for joint in joints:
            distribution: Any = joint.unwrapped.distribution
            shape = joint.unwrapped.batch_shape
            rows = distribution.rows(jnp.zeros(distribution.event_shape), shape)
            found[joint.name] = jax.vmap(distribution.log_density)(rows.value, rows.local)
    return found


def _density(message: dict[str, Any]) -> Array:
    """Return the log density of a site; of a score model, which has none, the score."""
    unwrapped, value = unwrap(message["fn"]), message["value"]
    if unwrapped is None or unwrapped.distribution.has_energy:
        return jnp.sum(message["fn"].log_prob(value))
    rows = unwrapped.distribution.rows(unwrapped.distribution.as_events(value), unwrapped.batch_shape)
    distribution = unwrapped.distribution
    return jax.vmap(lambda event, local: distribution.unconstrained_score(distribution.unconstrain(event), local))(*rows)
