"""`plot_marginals`: data against draws, one dimension at a time."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpyro.infer import MCMC

from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import ArrayLike
from numpyro_ebm.plots._columns import columns, draw_marginal
from numpyro_ebm.plots._style import figure_legend, several_axes
from numpyro_ebm.sampling import Draws

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OWNER = "plot_marginals"
MAX_DIMS = 24
"""Most panels of one figure; more are too small to read."""
NUM_COLUMNS = 4


def plot_marginals(
    data: ArrayLike,
    draws: ArrayLike | Draws | MCMC,
    axes: "Axes | Sequence[Any] | np.ndarray | None" = None,
    *,
    names: Sequence[str] | None = None,
    dims: Sequence[int | str] | None = None,
    bins: int = 40,
) -> np.ndarray:
    """Plot the marginals of data (grey bars) and of a model's draws (outline), one panel per dimension.

    Bins cover the range of the data and 15 % on either side; whole numbers have one bin per value. The area of a bar is the
    fraction of all values in its bin, so draws outside the bins are missing from the outline; the title gives their fraction
    from 1 % on. Missing data (NaN) are left out, and draws that are not finite count as outside.

    Args:
        data: ``(num_rows, *event_shape)``.
        draws: ``(..., *event_shape)``, with chains and draws in front; an xarray DataArray, such as
            ``to_arviz(mcmc).posterior["x"]``, names the dimensions by its last coordinate. Or the result of `sample` with
            one variable.
        axes: one matplotlib axes per dimension; None for a new figure.
        names: names of all dimensions; None for those of the coordinate, or ``x1, x2, ...``.
        dims: dimensions to plot, by index or by name, up to 24; None for all.
        bins: number of bins.

    Returns:
        The axes, ``(num_dims,)``.

    Raises:
        EnergyError: (a ValueError) for shapes, names or dims that do not fit, for more than 24 dimensions, and for the wrong
            number of axes.
        ImportError: without matplotlib.

    Example:
        ``plot_marginals(x_test, sample(key, distribution), names=["acid", "sugar"])``
    """
    check_count(OWNER, "bins", bins)
    both = columns(OWNER, data, draws, names, dims, MAX_DIMS)
    num = len(both.names)
    num_columns = min(num, NUM_COLUMNS)
    shape = (1, num) if axes is not None else (math.ceil(num / num_columns), num_columns)
    grid = several_axes(OWNER, axes, shape, (2.3 * shape[1] + 0.8, 1.7 * shape[0] + 0.6)).reshape(-1)
    for i, ax in enumerate(grid[:num]):
        handles = draw_marginal(ax, both, i, bins)
        ax.set(xlabel=both.names[i], ylabel="density" if i % shape[1] == 0 else "")
    for ax in grid[num:]:
        ax.remove()
    figure_legend(grid, handles, is_new=axes is None)  # pyright: ignore[reportPossiblyUnbound]
    return grid[:num]
