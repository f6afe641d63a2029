"""`plot_pairs`: data against draws, two dimensions at a time."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpyro.infer import MCMC

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import ArrayLike
from numpyro_ebm.plots._columns import Columns, columns, draw_marginal
from numpyro_ebm.plots._style import MODEL, figure_legend, pyplot, several_axes
from numpyro_ebm.sampling import Draws

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OWNER = "plot_pairs"
MAX_DIMS = 8
"""Most dimensions of one figure; more give panels that are too small to read."""
SHARES = (0.9, 0.5)
"""Fractions of the draws inside the outer and the inner contour."""

DASHES = {0.9: "--", 0.5: "-"}
DOTS = "0.6"

REACH = 3
SMOOTHING = np.exp(-0.5 * np.arange(-REACH, REACH + 1) ** 2)


def plot_pairs(
    data: ArrayLike,
    draws: ArrayLike | Draws | MCMC,
    axes: "Axes | Sequence[Any] | np.ndarray | None" = None,
    *,
    names: Sequence[str] | None = None,
    dims: Sequence[int | str] | None = None,
    bins: int = 40,
    max_points: int = 500,
) -> np.ndarray:
    """Plot pairs of dimensions: data as dots, draws as regions with 50 % and 90 % of them, and marginals on the diagonal.

    The regions have the highest density in a histogram that is smoothed by a Gaussian of one bin. All draws count, including
    those outside the panel, which covers the range of the data and 15 % on either side. A panel with less than 50 or 90 % of
    the draws lacks that contour, and the titles of the marginals give the fraction outside.

    Args:
        data: ``(num_rows, *event_shape)`` with two dimensions or more.
        draws: ``(..., *event_shape)``; an xarray DataArray names the dimensions by its last coordinate. Or the result of
            `sample` with one variable.
        axes: ``d * d`` matplotlib axes in reading order; None for a new figure. Those above the diagonal are turned off.
        names: names of all dimensions; None for those of the coordinate, or ``x1, x2, ...``.
        dims: dimensions to plot, by index or by name, two to eight; None for all.
        bins: number of bins of the marginals, and of the histograms in each direction.
        max_points: largest number of data points to draw, evenly spaced among the rows.

    Returns:
        The axes, ``(d, d)``.

    Raises:
        EnergyError: (a ValueError) for shapes, names or dims that do not fit, for fewer than two or more than eight
            dimensions, and for the wrong number of axes.
        ImportError: without matplotlib.

    Example:
        ``plot_pairs(x_test, sample(key, distribution), dims=[0, 1, 2])``
    """
    check_count(OWNER, "bins", bins)
    check_count(OWNER, "max_points", max_points)
    both = columns(OWNER, data, draws, names, dims, MAX_DIMS)
    num = len(both.names)
    if num < 2:
        raise EnergyError(f"{OWNER} needs two dimensions or more; got {num}. Write plot_marginals(data, draws).")
    grid = several_axes(OWNER, axes, (num, num), (1.7 * num + 1.4, 1.6 * num + 1.2))
    for i, j in np.ndindex(num, num):
        _draw_cell(grid[i, j], both, i, j, bins, max_points)
    figure_legend(grid, _handles(), is_new=axes is None)
    return grid


def _draw_cell(ax: Any, both: Columns, i: int, j: int, bins: int, max_points: int) -> None:
    if i < j:
        ax.set_axis_off()
        return
    if i == j:
        draw_marginal(ax, both, i, bins)
    else:
        _draw_pair(ax, both, j, i, bins, max_points)
        ax.locator_params(nbins=4)
    _label(ax, both.names, i, j)


def _draw_pair(ax: "Axes", both: Columns, x: int, y: int, bins: int, max_points: int) -> None:
    """Draw column ``x`` on the horizontal axis and column ``y`` on the vertical one."""
    edges = both.edges(x, bins), both.edges(y, bins)
    rows = both.data[:, [x, y]]
    rows = rows[np.isfinite(rows).all(axis=1)]
    shown = rows[np.unique(np.linspace(0, len(rows) - 1, min(max_points, len(rows))).astype(int))] if len(rows) else rows
    ax.plot(*shown.T, ".", ms=3, color=DOTS, label="data", zorder=1)
    counts = _counts(both.draws[:, [x, y]], edges)
    density = _smooth(counts)
    middles = [np.concatenate([[e[0]], (e[1:] + e[:-1]) / 2, [e[-1]]]) for e in edges]
    for share, level in _levels(counts, density, len(both.draws)):
        closed = np.pad(density, 1).T
        ax.contour(*middles, closed, levels=[level], colors=[MODEL], linestyles=[DASHES[share]], linewidths=1.5)
    ax.set(xlim=edges[0][[0, -1]], ylim=edges[1][[0, -1]])


def _counts(
    draws: Float[np.ndarray, "draws 2"], edges: tuple[Float[np.ndarray, " x"], Float[np.ndarray, " y"]]
) -> Float[np.ndarray, "x-1 y-1"]:
    kept = draws[np.isfinite(draws).all(axis=1)]
    return np.histogram2d(*kept.T, bins=edges)[0]


def _smooth(counts: Float[np.ndarray, "x y"]) -> Float[np.ndarray, "x y"]:
    wide, weights = np.pad(counts, REACH), SMOOTHING / SMOOTHING.sum()
    for axis in (0, 1):
        wide = np.apply_along_axis(lambda line: np.convolve(line, weights, mode="same"), axis, wide)
    return wide[REACH:-REACH, REACH:-REACH]


def _levels(
    counts: Float[np.ndarray, "x y"], density: Float[np.ndarray, "x y"], num_draws: int
) -> list[tuple[float, float]]:
    """Return the fractions of draws that the panel contains, each with the density above which bins contain it."""
    order = np.argsort(density, axis=None)[::-1]
    held = np.cumsum(counts.reshape(-1)[order]) / num_draws
    # Halfway to the next bin, so that a single bin with all draws has a contour around it.
    ordered = np.append(density.reshape(-1)[order], 0.0)
    levels = (ordered[:-1] + ordered[1:]) / 2
    return [(share, levels[np.searchsorted(held, share)]) for share in SHARES if held[-1] > share]


def _label(ax: "Axes", names: tuple[str, ...], i: int, j: int) -> None:
    """Label the outer axes only."""
    last = len(names) - 1
    ax.set_xlabel(names[j] if i == last else "")
    ax.set_ylabel(names[i] if j == 0 and i > 0 else "density" if i == j == 0 else "")
    if i != last:
        ax.tick_params(labelbottom=False)
    if j > 0:
        ax.tick_params(labelleft=False)


def _handles() -> list[Any]:
    line = pyplot().Line2D
    regions = [line([], [], color=MODEL, ls=DASHES[s], label=f"{s:.0%} of draws") for s in reversed(SHARES)]
    return [line([], [], color=DOTS, marker="o", ls="", ms=4, label="data"), *regions]
