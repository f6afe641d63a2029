"""Values that the elements of discrete events take in no row: maximum likelihood makes them impossible."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int, Shaped
from numpyro.infer import SVI

from numpyro_ebm._core.pytrees import assemble
from numpyro_ebm.distributions.missing import in_position
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.handlers import estimate
from numpyro_ebm.handlers.energy_sites import energy_sites, whole_plates
from numpyro_ebm.kernels.elements import Elements
from numpyro_ebm.training._held_out import Arguments
from numpyro_ebm.training.recording import find_estimate

MOST_VALUES = 100
"""Most values of an element that are counted: of more, as of counts up to a bound, many are missing in any data."""
REMEDY = (
    "By maximum likelihood its parameters run away, as its probability is 0: give the parameters a prior (AutoDelta) or a "
    "penalty, optax.chain(optax.add_decayed_weights(1e-3), ...), or leave the value out of the support."
)


class Occurrences(NamedTuple):
    """How often the elements of a discrete event take each value.

    Attributes:
        name: the site, or the member of a mixed event.
        values: ``(num_values, ...)``.
        counts: ``(elements, num_values)``, the number of rows.
    """

    name: str
    values: Shaped[np.ndarray, "values ..."]
    counts: Int[np.ndarray, "elements values"]

    def named(self, element: int, value: int) -> str:
        """Return the value of an element in words."""
        own = self.values[value]
        return f"column {element} of '{self.name}' is {own if not own.ndim else f'category {value}'}"


def occurrences(
    model: estimate, values: Mapping[str, Any], args: tuple, kwargs: Mapping[str, Any]
) -> dict[str, Occurrences]:
    """Count the values in all rows of each observed energy site that is discrete, or has discrete members, by name.

    Missing entries do not count.

    Args:
        model: the model as `estimate` returned it.
        values: parameters by name.
        args: the model's arguments.
        kwargs: its keyword arguments.
    """
    with whole_plates():
        found, _ = energy_sites(model.fn, values, args, kwargs)
    sites = [site.lay_out(may_touch_ends=True, may_lack=True) for site in found.values() if site.is_observed]
    return {each.name: each for site in sites for each in _of_site(site)}


def _of_site(site: Site) -> list[Occurrences]:
    distribution, rows = site.distribution, np.asarray(site.position)
    lacks = np.zeros(rows.shape, bool)
    if site.missing is not None:
        lacks = np.asarray(in_position(distribution.support, site.missing.elements))
    if site.mask is not None:
        rows, lacks = rows[np.asarray(site.mask)], lacks[np.asarray(site.mask)]
    if distribution.is_mixed:
        members, parts = distribution.members, {}
        listed = [name for name in members.discrete if name not in members.endless]
        blocks = [jax.tree.map(np.asarray, members.split(each)) for each in (rows, lacks.astype(float))]
        for name in listed:
            values = distribution.part((name,)).discrete_values[name]
            parts[f"{site.name}.{name}"] = (blocks[0][name], blocks[1][name] > 0, values)
    elif distribution.is_discrete and distribution.lists_values:
        parts = {site.name: (rows, lacks, distribution.discrete_values)}
    else:
        parts = {}
    return [_counted(name, *each) for name, each in parts.items() if len(each[2]) <= MOST_VALUES]


def _counted(
    name: str, rows: Shaped[np.ndarray, " rows *event"], lacks: Bool[np.ndarray, " rows *event"], values: Any
) -> Occurrences:
    codes = np.asarray(jax.vmap(Elements.of(values, rows[0]).codes)(rows))
    has = ~lacks.reshape(*codes.shape, -1).any(axis=-1)
    counts = np.stack([np.sum(has & (codes == value), axis=0) for value in range(len(values))], axis=1)
    return Occurrences(name, np.asarray(values), counts)


def unseen(train: Occurrences) -> str | None:
    """Describe the values that no row has; None if there are none."""
    missing = np.argwhere(train.counts == 0)
    if not len(missing):
        return None
    more = f" ({len(missing)} such values)" if len(missing) > 1 else ""
    return f"no row has the value: {train.named(*missing[0])}{more}"


def new_values(svi: SVI, train: Arguments, held_out: Arguments, params: Mapping[str, Any]) -> str:
    """Describe the values that held-out rows have and no training row has; empty if there are none."""
    model = find_estimate(svi)
    if model is None:
        return ""
    before, after = (occurrences(model, params, *assemble(*rows)) for rows in (train, held_out))
    for name in before.keys() & after.keys():
        new = np.argwhere((before[name].counts == 0) & (after[name].counts > 0))
        if len(new):
            rows = after[name].counts[tuple(new[0])]
            return (
                f" Held-out rows have {len(new)} values that no training row has: {before[name].named(*new[0])} in {rows} "
                f"of them. {REMEDY}"
            )
    return ""
