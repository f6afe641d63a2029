"""Data and draws in named columns, for the plots that compare them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpyro.infer import MCMC

from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.typing import ArrayLike
from numpyro_ebm.plots._style import DATA, MODEL, bars, numbers, share_outside
from numpyro_ebm.sampling import Draws

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARGIN = 0.15
"""Margin on either side of the data, as a fraction of their range."""
MAX_WHOLE = 50
"""Largest range of whole numbers that gets one bin per value; wider ones would have too many bins."""
WORTH_SAYING = 0.01
"""Fraction of the draws outside the bins from which a title mentions them; the title shows whole per cent."""


class Columns(NamedTuple):
    """Data ``(num_rows, d)`` and draws ``(num_draws, d)`` of the plotted dimensions, and their names."""

    data: Float[np.ndarray, "rows d"]
    draws: Float[np.ndarray, "draws d"]
    names: tuple[str, ...]

    def edges(self, i: int, bins: int) -> Float[np.ndarray, " edges"]:
        """Return edges of equal bins over the data's range and 15 % on either side, or of one bin per whole number."""
        values = self.data[np.isfinite(self.data[:, i]), i]
        low, high = values.min(), values.max()
        if np.all(values == np.round(values)) and high - low <= MAX_WHOLE and self._is_whole(i):
            return np.arange(low - 1.5, high + 2)
        pad = MARGIN * (high - low) if high > low else 0.5
        return np.linspace(low - pad, high + pad, bins + 1)

    def _is_whole(self, i: int) -> bool:
        draws = self.draws[np.isfinite(self.draws[:, i]), i]
        return bool(np.all(draws == np.round(draws)))


def columns(
    owner: str,
    data: ArrayLike,
    draws: ArrayLike | Draws | MCMC,
    names: Sequence[str] | None,
    dims: Sequence[int | str] | None,
    max_dims: int,
) -> Columns:
    """Check data and draws, and name their dimensions.

    Args:
        owner: name of the calling function, for messages.
        data: ``(num_rows, *event_shape)``.
        draws: ``(..., *event_shape)``; the last coordinate of an xarray DataArray gives the names.
        names: names of the dimensions.
        dims: dimensions to plot, by index or by name.
        max_dims: largest number of dimensions.

    Raises:
        EnergyError: for shapes or names that do not fit together, and for too many dimensions.
    """
    rows = numbers(owner, "data", data)
    event_shape, wide = rows.shape[1:], numbers(owner, "draws", draws)
    size = int(np.prod(event_shape))
    if wide.ndim < rows.ndim or wide.shape[wide.ndim - len(event_shape) :] != event_shape:
        raise EnergyError(
            f"{owner} needs draws of shape (..., *event_shape) for data of shape (num_rows, *event_shape); got {wide.shape} "
            f"for {rows.shape}. Write draws.samples['x'] of a site like the data."
        )
    if not np.isfinite(rows.reshape(-1, size)).any(axis=0).all():
        raise EnergyError(f"{owner} needs a finite value in each column of data; got none in one of {size}.")
    named = _names(owner, names, draws, size)
    chosen = _chosen(owner, dims, named, max_dims)
    return Columns(rows.reshape(-1, size)[:, chosen], wide.reshape(-1, size)[:, chosen], tuple(named[i] for i in chosen))


def draw_marginal(ax: "Axes", both: Columns, i: int, bins: int) -> list[Any]:
    """Draw data as grey bars and draws as an outline, with the fraction of draws outside; return legend handles."""
    edges = both.edges(i, bins)
    bars(ax, both.data[np.isfinite(both.data[:, i]), i], edges, color=DATA, label="data")
    bars(ax, both.draws[:, i], edges, histtype="step", color=MODEL, lw=1.5, label="draws")
    ax.set(xlim=edges[[0, -1]], yticks=[])
    ax.locator_params(axis="x", nbins=4)
    outside = share_outside(both.draws[:, i], edges)
    if outside >= WORTH_SAYING:
        ax.set_title(f"{outside:.0%} of draws outside", fontsize="small", loc="right")
    return ax.get_legend_handles_labels()[0][-2:]


def _names(owner: str, names: Sequence[str] | None, draws: object, size: int) -> list[str]:
    if names is None:
        names = _coordinates(draws, size)
    if isinstance(names, str) or len(names) != size:
        raise EnergyError(f"{owner} needs a name for each of {size} dimensions; got {names!r}. Write names=['a', ...].")
    return [str(name) for name in names]


def _coordinates(draws: object, size: int) -> Sequence[Any]:
    """Return names from the last coordinate of a DataArray, or numbered names."""
    dims, coords = getattr(draws, "dims", ()), getattr(draws, "coords", {})
    if dims and dims[-1] in coords and len(coords[dims[-1]]) == size:
        found = np.asarray(coords[dims[-1]])
        if found.dtype.kind not in "iuf":
            return list(found)
    return ["x"] if size == 1 else [f"x{i + 1}" for i in range(size)]


def _chosen(owner: str, dims: Sequence[int | str] | None, names: list[str], max_dims: int) -> list[int]:
    if dims is None:
        dims = range(len(names))
    if isinstance(dims, str) or not len(dims):
        raise EnergyError(f"{owner} needs dims as a list of indices or names; got {dims!r}. Write dims=[0, 1].")
    for each in dims:
        if isinstance(each, str) and each not in names:
            raise EnergyError(f"There is no dimension '{each}'. {nearest(each, names)}")
    places = [names.index(each) if isinstance(each, str) else int(each) for each in dims]
    if not all(-len(names) <= place < len(names) for place in places):
        raise EnergyError(f"{owner} got dims={list(dims)} for {len(names)} dimensions. Write dims=[0, {len(names) - 1}].")
    if len(places) > max_dims:
        raise EnergyError(
            f"{owner} draws up to {max_dims} dimensions; got {len(places)}. Write dims=[0, 1, 2] or dims={names[:2]}."
        )
    return places
