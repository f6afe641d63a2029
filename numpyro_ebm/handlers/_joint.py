"""Collect the sites that `energy_factor` names while a model runs, and join those that factors connect."""

import dataclasses
import functools
import math
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Shaped
from numpyro.distributions import Distribution, ExpandedDistribution, MaskedDistribution

from numpyro_ebm._core.concrete import eager, is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.members import lay_end_to_end
from numpyro_ebm._core.typing import Array
from numpyro_ebm._core.wrappers import is_improper, without_rows
from numpyro_ebm.distributions.bases import split_rows
from numpyro_ebm.distributions.blocks import Product, cut_events, joint_support
from numpyro_ebm.distributions.energy import EnergyDistribution
from numpyro_ebm.distributions.factor import EnergyFactor
from numpyro_ebm.distributions.missing import EventPart
from numpyro_ebm.distributions.rows import Unwrapped
from numpyro_ebm.distributions.shapes import rows_of_data
from numpyro_ebm.distributions.supports import check_one_support
from numpyro_ebm.handlers._emit import kept

Message = dict[str, Any]


class Member(NamedTuple):
    """One site of a joint event: its message, and its own distribution without masks."""

    name: str
    message: Message
    base: Any
    mask: Any

    @property
    def is_hidden(self) -> bool:
        """Whether neither data nor a guide give it a value."""
        return bool(self.message.get("is_hidden"))

    @property
    def part(self) -> EventPart:
        """The member as a part of the event's vector."""
        may_lack = jnp.issubdtype(jnp.result_type(self.message["value"]), jnp.floating)
        return EventPart(self.name, self.event_shape, self.is_hidden, bool(may_lack) and self.message["is_observed"])

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of the member's event."""
        return tuple(self.base.event_shape)


class Factor(NamedTuple):
    """A factor and its message."""

    fn: EnergyFactor
    message: Message

    def site_of(self, key: str, sites: Collection[str]) -> str | None:
        """Return the site that a value is, looked up inside the factor's scopes, then outside; None if it is not a site."""
        prefix = self.message["name"].removesuffix(self.fn.name)
        return next((name for name in (prefix + key, key) if name in sites), None)

    def sites_of(self, sites: Collection[str]) -> dict[str, str]:
        """Map the names of values that are sites to the names of these sites."""
        found = {key: self.site_of(key, sites) for key in self.fn.values}
        return {key: site for key, site in found.items() if site is not None}


@dataclasses.dataclass(frozen=True)
class JointSite:
    """The sites that factors connect, and these factors: one event with one density.

    Attributes:
        members: the sites, in the order of the model.
        factors: the factors that name them.
    """

    members: list[Member]
    factors: list[Factor]

    @property
    def name(self) -> str:
        """The members' names, joined by commas."""
        return ",".join(self.names)

    @property
    def names(self) -> list[str]:
        """The members' names."""
        return [member.name for member in self.members]

    @property
    def message(self) -> Message:
        """The first member's message; plates and scale are the same for all."""
        return self.members[0].message

    @property
    def is_observed(self) -> bool:
        """Whether every member is observed."""
        return all(member.message["is_observed"] for member in self.members)

    @functools.cached_property
    def value(self) -> Any:
        """The value of the only member, or the concatenated events of the members."""
        values = [member.message["value"] for member in self.members]
        if len(values) == 1:
            return values[0]
        with eager(values):
            rows = [_whole_rows(member) for member in self.members]
            lead = jnp.broadcast_shapes(*(r.shape[: r.ndim - len(s)] for r, s in zip(rows, self._shapes, strict=True)))
            # Floating-point data of a discrete support may hold NaN, which an integer cannot.
            is_whole = all(m.base.support.is_discrete for m in self.members) and not any(
                jnp.issubdtype(each.dtype, jnp.floating) for each in rows
            )
            dtype = int if is_whole else float
            blocks = [jnp.broadcast_to(r, lead + s).astype(dtype) for r, s in zip(rows, self._shapes, strict=True)]
            return lay_end_to_end(blocks, self._shapes)

    @functools.cached_property
    def unwrapped(self) -> Unwrapped:
        """The joint density: the factors' energies over the members' own distributions, with covariates as context."""
        batch_shape = tuple(self.message["fn"].batch_shape)
        base, tilts = self._bases()
        split = {name: split_rows(tilt, batch_shape) for name, tilt in tilts.items()}
        named = [factor.sites_of(self.names) for factor in self.factors]
        covariates = [_covariates(factor.fn, keys) for factor, keys in zip(self.factors, named, strict=True)]
        context = ([own for _, own in covariates], {name: local for name, (_, local) in split.items()})

        def energy(event, context):
            pieces = self._pieces(event)
            total = -sum(log_prob(pieces[name], context[1][name]) for name, (log_prob, _) in split.items())
            for factor, keys, (shared, _), own in zip(self.factors, named, covariates, context[0], strict=True):
                events = {key: pieces[site] for key, site in keys.items()}
                total = total + factor.fn.evaluate_energy({**events, **shared, **own})
            return total

        has_context = bool(jax.tree.leaves(context))
        size = sum(math.prod(shape) for shape in self._shapes)
        distribution = EnergyDistribution(
            energy if has_context else (lambda event: energy(event, context)),
            self._shapes[0] if len(self.members) == 1 else (size,),
            context=context if has_context else None,
            batch_shape=batch_shape,
            support=self._support,
            base=base,
        )
        parts = tuple(member.part for member in self.members)
        return Unwrapped(distribution, batch_shape, 0, self._mask(batch_shape), parts)

    def own_log_prob(self) -> Any:
        """Return the log probability of the members' own distributions that the model already counts, per row."""
        counted = [member.message for member in self.members if not member.message.get("is_held")]
        return sum(message["fn"].log_prob(message["value"]) for message in counted)

    @property
    def _shapes(self) -> list[tuple[int, ...]]:
        return [member.event_shape for member in self.members]

    def _pieces(self, event: Shaped[Array, "*event"]) -> dict[str, Shaped[Array, "..."]]:
        """Return each member's part of one event."""
        if len(self.members) == 1:
            return {self.name: event}
        return dict(zip(self.names, cut_events(event, self._support, self._shapes), strict=True))

    def _bases(self) -> tuple[Any, dict[str, Any]]:
        """Return the base, if every member has a proper distribution, or the distributions that the energy must include."""
        proper = {m.name: without_rows(m.base) for m in self.members if not is_improper(m.base)}
        if len(proper) < len(self.members):
            return None, proper
        return (proper[self.name] if len(proper) == 1 else Product(self.names, list(proper.values()))), {}

    @functools.cached_property
    def _support(self) -> Any:
        supports = [member.base.support for member in self.members]
        if len(supports) == 1:
            return supports[0]
        for member, support in zip(self.members, supports, strict=True):
            check_one_support(support, member.event_shape)
        return joint_support(self.names, supports, self._shapes)

    def _mask(self, batch_shape: tuple[int, ...]) -> Any:
        """Return the rows in which every member and every factor takes part; None for all."""
        masks = [m.mask for m in self.members] + [f.fn.row_mask for f in self.factors]
        masks = [jnp.broadcast_to(mask, batch_shape) for mask in masks if mask is not None]
        return functools.reduce(jnp.logical_and, masks) if masks else None


class FactoredSites:
    """Sites and factors of one run of a model, in the order of the model."""

    def __init__(self):
        self._messages: dict[str, Message] = {}
        self._factors: list[Factor] = []

    def add_site(self, message: Message, *, is_hidden: bool = False, is_held: bool = False) -> None:
        """Record a sample site that is not an energy site by itself.

        Args:
            message: its message.
            is_hidden: whether it is hidden in a joint event.
            is_held: whether the model does not count the log probability of its own distribution.
        """
        self._messages[message["name"]] = kept(message) | {"is_hidden": is_hidden, "is_held": is_held}

    def add_factor(self, message: Message) -> None:
        """Record a factor."""
        self._factors.append(Factor(message["fn"], kept(message)))

    def add_value(self, name: str, message: Message) -> None:
        """Record the final value of a site."""
        if name in self._messages:
            self._messages[name].update(value=message["value"], is_observed=message["is_observed"])

    def check_not_named(self, name: str) -> None:
        """Refuse a factor on a site whose distribution is an energy.

        Raises:
            EnergyError: naming both.
        """
        for factor in self._factors:
            if factor.sites_of([name]):
                raise EnergyError(
                    f"The factor '{factor.fn.name}' names '{name}', which is an EnergyDistribution. Put the factor's energy "
                    f"into the EnergyDistribution, or write its base as the distribution of '{name}'."
                )

    def joints(self) -> list[JointSite]:
        """Return the joint events of a finished run: sites that factors name, joined where one factor names several.

        Raises:
            EnergyError: for a factor that names no site, has another value than its site, or is in other plates or under
                another scale than its sites.
        """
        groups: list[set[str]] = []
        for factor in self._factors:
            named = set(self._sites_of(factor).values())
            touched = [group for group in groups if group & named]
            groups = [group for group in groups if not group & named] + [named.union(*touched)]
        members = {group: [name for name in self._messages if name in group] for group in map(frozenset, groups)}
        ordered = sorted(members.values(), key=lambda names: list(self._messages).index(names[0]))
        return [self._joint(names) for names in ordered]

    def _joint(self, names: list[str]) -> JointSite:
        members = [Member(name, self._messages[name], *strip_masks(self._messages[name]["fn"])) for name in names]
        return JointSite(members, [factor for factor in self._factors if factor.sites_of(names)])

    def _sites_of(self, factor: Factor) -> dict[str, str]:
        fn = factor.fn
        named = factor.sites_of(self._messages)
        masked = next((key for key in fn.values if f"{key}_unobserved" in self._messages), None)
        if masked is not None:
            raise EnergyError(
                f"The factor '{fn.name}' names '{masked}', which obs_mask makes two sites, '{masked}_observed' and "
                f"'{masked}_unobserved'. Put NaN in place of what is missing, without obs_mask: numpyro.sample('{masked}', "
                "..., obs=x) under estimate(model, 'pcd', positive_phase=numpyro_ebm.PositivePhase())."
            )
        if not named:
            raise EnergyError(
                f"The factor '{fn.name}' names no sample site ({', '.join(fn.values)}), so under estimate it belongs "
                f"to no density. Name the site it tilts: energy_factor('{fn.name}', energy, x=x) after "
                "x = numpyro.sample('x', ...)."
            )
        for key, name in named.items():
            self._check_same(factor, key, name)
        return named

    def _check_same(self, factor: Factor, key: str, name: str) -> None:
        """Refuse a factor whose value, plates or scale are not those of its site."""
        fn, site = factor.fn, self._messages[name]
        is_same = _is_same(fn.values[key], site["value"])
        if factor.message.get("_control_flow_done"):
            if not is_same or fn.batch_shape != tuple(site["fn"].batch_shape):
                raise EnergyError(
                    f"The factor '{fn.name}' and its site '{name}' are inside scan, and estimate sees their values after "
                    "it, when it can no longer check that they are the same. Instead of the factor, write the site as an "
                    "EnergyDistribution(..., base=..., context=...)."
                )
        if not is_same:
            raise EnergyError(
                f"The factor '{fn.name}' got another value for '{name}' than the site has. Write "
                f"energy_factor('{fn.name}', energy, {key}={key}), and transform it inside the energy."
            )
        if fn.batch_shape != tuple(site["fn"].batch_shape) or _plates(factor.message) != _plates(site):
            raise EnergyError(
                f"The factor '{fn.name}' is in plates {_plates(factor.message)} of shape {fn.batch_shape}, its site "
                f"'{name}' in {_plates(site)} of shape {tuple(site['fn'].batch_shape)}. Write both in the same plates (and "
                f"move dimensions outside plates into the event: .to_event(1)); if '{name}' is a parameter of the energy "
                "and not part of its event, close over it instead."
            )
        if _known_to_differ(factor.message["scale"], site["scale"]):
            raise EnergyError(
                f"The factor '{fn.name}' and its site '{name}' are scaled differently ({factor.message['scale']} and "
                f"{site['scale']}). Write both under the same numpyro.handlers.scale."
            )


def strip_masks(fn: Distribution) -> tuple[Distribution, Bool[Array, "*batch"] | None]:
    """Return a distribution without its masks of rows, and the combined mask (None for all)."""
    batch_shape, mask = tuple(fn.batch_shape), None
    while isinstance(fn, MaskedDistribution) or (
        isinstance(fn, ExpandedDistribution) and isinstance(fn.base_dist, MaskedDistribution)
    ):
        masked: Any = fn if isinstance(fn, MaskedDistribution) else fn.base_dist
        own = jnp.broadcast_to(masked._mask, batch_shape)
        mask = own if mask is None else mask & own
        fn = masked.base_dist.expand(batch_shape)
    return fn, mask


def _covariates(factor: EnergyFactor, sites: Collection[str]) -> tuple[dict[str, Array | np.ndarray], dict[str, Array]]:
    """Return a factor's covariates: those that all rows share, and those that lead with the rows."""
    shape = factor.batch_shape
    beside = {name: value for name, value in factor.values.items() if name not in sites}
    shared = {name: value for name, value in beside.items() if value.ndim == 0 or not shape}
    own = {n: jnp.broadcast_to(v, shape + v.shape[len(shape) :]) for n, v in beside.items() if n not in shared}
    return shared, own


def _whole_rows(member: Member) -> Array:
    """Return a member's value, broadcast to its batch shape.

    Raises:
        EnergyError: if the value has another shape.
    """
    value, shape, event = jnp.asarray(member.message["value"]), tuple(member.base.batch_shape), member.event_shape
    cut_at = max(value.ndim - len(event), 0)
    try:
        if value.shape[cut_at:] == event:
            return jnp.broadcast_to(value, rows_of_data(value.shape, shape, event) + event)
    except EnergyError:
        raise
    except ValueError:
        pass
    raise EnergyError(
        f"Data of shape {value.shape} for '{member.name}' do not match its rows {shape} and event_shape={event}: they "
        f"need shape {shape + event}. Reshape them, or change the plate's size."
    )


def _plates(message: Message) -> list[str]:
    return sorted(frame.name for frame in message["cond_indep_stack"])


def _known_to_differ(ours: ArrayLike | None, theirs: ArrayLike | None) -> bool:
    ours, theirs = (1.0 if scale is None else scale for scale in (ours, theirs))
    if ours is theirs or not is_concrete(ours, theirs):
        return False
    return not np.allclose(np.asarray(ours), np.asarray(theirs))


def _is_same(ours: ArrayLike, theirs: ArrayLike) -> bool:
    if ours is theirs:
        return True
    if jnp.shape(ours) != jnp.shape(theirs) or not is_concrete(ours, theirs):
        return False
    with eager(ours, theirs):  # in one dtype: a Python float is more precise than the factor's array
        ours, theirs = jnp.asarray(ours), jnp.asarray(theirs)
    return np.array_equal(np.asarray(ours), np.asarray(theirs), equal_nan=True)
