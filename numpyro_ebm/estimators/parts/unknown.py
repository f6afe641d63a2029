"""The elements that rows lack as a target of kernels: the density of an event given its other elements."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Shaped

from numpyro_ebm._core.autodiff import freeze
from numpyro_ebm._core.discrete import OneHot, log_sum_over_states
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.members import Members
from numpyro_ebm._core.typing import Array, LogDensityFn, PyTree, RowValues
from numpyro_ebm.distributions.blocks import elementary
from numpyro_ebm.distributions.missing import in_position
from numpyro_ebm.distributions.mixed import Part
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.kernels import AbstractKernel, BySite
from numpyro_ebm.kernels.clamped import ClampedEnergy
from numpyro_ebm.kernels.densities import Known, keep


@dataclasses.dataclass(frozen=True, eq=False)
class Unknown:
    """The numbers of a position that rows may lack, as kernels move them, and the others as they are held.

    Kernels move the numbers that any row may lack. In a row that has some of these, the density does not depend on what the
    kernel moves in their place, and the result is not used: a kernel that leaves the density of all moved numbers invariant
    leaves the conditional density of the missing ones invariant.

    Attributes:
        site: the rows.
        lacks: ``(num_rows, *position_shape)``, which numbers each row lacks.
        columns: which entries of the flat position are moved: single numbers, or whole vectors of a one-hot support.
        keeps_energy: whether all numbers are moved, with what the ready-made energy of the site knows.
    """

    site: Site
    lacks: Bool[Array, " rows *position"]
    columns: np.ndarray
    keeps_energy: bool

    @classmethod
    def of(cls, site: Site, *, keeps_energy: bool = False) -> "Unknown":
        """Return what the rows of a site lack.

        Args:
            site: the rows.
            keeps_energy: whether to keep what a ready-made energy knows, if it knows the conditionals of discrete elements.

        Raises:
            EnergyError: if they lack nothing.
        """
        support, missing = site.distribution.support, site.missing
        if missing is None:
            raise EnergyError(f"The rows of the site '{site.name}' lack no elements.")
        lacks, may = in_position(support, missing.elements), in_position(support, missing.may)
        known = site.distribution.known
        keeps = keeps_energy and known is not None and known.energy.has_conditionals and site.distribution.is_discrete
        members: Members | None = site.distribution.members
        if members is not None:  # whole members, so that each keeps its shape
            sizes = [math.prod(shape) for shape in members.shapes]
            may = np.repeat([block.any() for block in np.split(may, np.cumsum(sizes)[:-1])], sizes)
        chosen = may.reshape(-1, _width(site))[:, 0]
        return cls(site, lacks, np.arange(len(chosen)) if keeps else np.flatnonzero(chosen), keeps)

    @property
    def distribution(self) -> Any:
        """The distribution of the site."""
        return self.site.distribution

    @property
    def is_discrete(self) -> bool:
        """Whether the whole event is discrete."""
        return self.distribution.is_discrete

    @property
    def energy(self) -> Any:
        """The energy of the site; None for a score."""
        return getattr(self.distribution, "energy", None)

    @property
    def discrete_values(self) -> Any:
        """The values of one element of a discrete event."""
        return self.distribution.discrete_values

    @property
    def known(self) -> Known | None:
        """What kernels may know of the density of the missing elements."""
        known = self.distribution.known
        if known is None or not self.keeps_energy:
            return None
        return dataclasses.replace(known, energy=ClampedEnergy.of(known.energy))

    @property
    def members(self) -> Members | None:
        """The members of a mixed event that rows may lack; None for other events."""
        members: Members | None = self.distribution.members
        if members is None:
            return None
        of_member = np.repeat(np.arange(len(members.names)), [math.prod(shape) for shape in members.shapes])
        fields = list(zip(members.names, members.shapes, members.are_discrete, strict=True))
        chosen = [fields[i] for i in np.unique(of_member[self.columns])]
        names, shapes, are_discrete = zip(*chosen, strict=True)
        return Members(names, shapes, are_discrete)

    def part(self, names: Sequence[str]) -> Part:
        """Return what kernels need to know of some members of a mixed event."""
        return self.distribution.part(names)

    def bind(self, kernel: AbstractKernel, by_name: Mapping[str, Any]) -> Any:
        """Return the kernel for what rows may lack: of a mixed event, the kernels of these members.

        Args:
            kernel: the kernel of the whole event.
            by_name: the kernel of each member of a mixed event.
        """
        members = self.members
        if members is None:
            return kernel.bind(self)
        return BySite({name: by_name[name] for name in members.names}).bind(self)

    def density(self) -> LogDensityFn:
        """Return the log density of moved numbers, given ``(local, held, lacks)`` of their row, with parameters frozen."""
        site = self.site
        first = jax.tree.map(lambda leaf: leaf[0], (site.position, site.local))
        whole = freeze(site.log_density, *first)
        known = self.known

        def log_density(moved, row):
            (local, held, lacks) = row[0]
            return whole(self.filled(moved, held, lacks), local)

        return keep(log_density, None if known is None else known.frozen())

    def moved(self, position: Shaped[Array, "*position"]) -> Shaped[Array, "..."]:
        """Return the numbers of one position that are moved."""
        if self.keeps_energy:
            return position
        width = _width(self.site)
        return position.reshape(-1, width)[self.columns] if width > 1 else position.reshape(-1)[self.columns]

    def filled(
        self, moved: Shaped[Array, "..."], held: Shaped[Array, "*position"], lacks: Bool[Array, "*position"]
    ) -> Shaped[Array, "*position"]:
        """Return one position with the moved numbers where they are missing."""
        if self.keeps_energy:
            return jnp.where(lacks, moved, held.astype(moved.dtype))
        width = _width(self.site)
        flat = held.astype(moved.dtype)
        rows = flat.reshape(-1, width) if width > 1 else flat.reshape(-1)
        return jnp.where(lacks, rows.at[self.columns].set(moved).reshape(held.shape), flat)

    def of_moved(self, per_number: Float[Array, "*position"] | None) -> Float[Array, "..."] | None:
        """Return figures per number of a position for the numbers that are moved; None for None."""
        return per_number if per_number is None or jnp.ndim(per_number) == 0 else self.moved(per_number)

    @property
    def num_states(self) -> int:
        """Number of states of the moved numbers of a discrete event."""
        return len(self.discrete_values) ** len(self.columns)

    @property
    def counted(self) -> Bool[Array, " rows"]:
        """``(num_rows,)``, rows that lack numbers that a step size moves: continuous ones, unless all are discrete."""
        lacks = self.lacks.reshape(len(self.lacks), -1)
        members: Members | None = self.distribution.members
        if members is not None and not all(members.are_discrete):
            lacks = lacks & members.is_continuous
        lacks = jnp.any(lacks, axis=1)
        return lacks if self.site.mask is None else lacks & self.site.mask


def log_completions(site: Site, max_states: int) -> RowValues:
    """Return, for each row of a discrete site, the log of the sum of its density over all values of what it lacks.

    It is NaN for rows that lack elements if the elements that any row may lack have more than ``max_states`` states.
    """
    complete = lambda: jax.vmap(site.log_density)(site.position, site.local)  # noqa: E731
    if site.missing is None:
        return complete()
    unknown = Unknown.of(site)
    if unknown.num_states > max_states:
        return complete() * jnp.where(unknown.counted, jnp.nan, 1.0)
    values, shape = jnp.asarray(unknown.discrete_values), unknown.moved(site.position[0]).shape
    num_moved = len(unknown.columns)

    def of_row(row):
        held, lacks, local = row
        # Each value of a number that the row has counts as another state with the same density.
        repeats = math.log(len(values)) * (num_moved - jnp.sum(lacks) / _width(site))
        total = log_sum_over_states(values, shape, lambda moved: site.log_density(unknown.filled(moved, held, lacks), local))
        return total - repeats

    def summed():
        return jax.lax.map(jax.checkpoint(of_row), (site.position, unknown.lacks, site.local))

    return summed() if site.missing.is_certain else jax.lax.cond(jnp.any(unknown.lacks), summed, complete)


def by_member(kernel: BySite) -> dict[str, PyTree]:
    """Return the kernel of each member; members of one group share the object."""
    return {name: each for each, group in zip(kernel.kernels, kernel.groups, strict=True) for name in group}


def check_names(given: Mapping[str, Any], members: Members) -> None:
    """Refuse kernels for members that the event does not have.

    Raises:
        EnergyError: with the members.
    """
    unknown = sorted(set(given) - set(members.names))
    if unknown:
        raise EnergyError(
            f"The kernel of the positive phase names {unknown}, and the members of the event are {list(members.names)}."
        )


def _width(site: Site) -> int:
    """Return the number of numbers of one element: that of the categories of a one-hot support, else 1."""
    is_one_hot = isinstance(elementary(site.distribution.support), OneHot)
    return site.distribution.event_shape[-1] if is_one_hot else 1
