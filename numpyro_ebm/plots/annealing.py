"""`plot_annealing`: log Z along the path of annealed importance sampling, in both directions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm.partition.bounds import RELIABLE_GAP, LogPartitionBounds
from numpyro_ebm.plots._style import DARK, MODEL, SECOND, several_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OWNER = "plot_annealing"


def plot_annealing(
    bounds: LogPartitionBounds, axes: "Axes | Sequence[Any] | np.ndarray | None" = None, *, row: int | None = None
) -> np.ndarray:
    r"""Plot log Z of the intermediate densities by annealing from the base and from the model, and the gap between the two.

    The upper panel shows both paths over the inverse temperature :math:`\beta`, from the base (0) to the model (1), with the
    standard errors of their ends. The lower panel shows the path from the model minus that from the base, on its own scale,
    with the error of the gap at the end and a line at 1 nat. Forward annealing bounds log Z from below in expectation and
    reverse annealing from above, so the difference is about 0 or more; it grows where the path is too fast. The title gives
    the gap, and above 1 nat it advises not to report a likelihood.

    Args:
        bounds: `LogPartitionBounds`, with ``lower``, ``upper``, ``betas``, ``forward`` and ``reverse``, in nats.
        axes: two matplotlib axes; None for a new figure.
        row: index of the row, where log Z has a batch shape (one for each context).

    Returns:
        The axes, ``(2,)``.

    Raises:
        EnergyError: (a ValueError) for a batch of paths without ``row``, and for the wrong number of axes.
        TypeError: for anything but `LogPartitionBounds`.
        ImportError: without matplotlib.

    Example:
        ``plot_annealing(log_partition_bounds(key, distribution))``

    References:
        Grosse, Ghahramani and Adams, Sandwiching the marginal likelihood using bidirectional Monte Carlo (2015); Neal,
        Annealed importance sampling (2001).
    """
    betas, forward, reverse, errors = _paths(bounds, row)
    top, bottom = several_axes(OWNER, axes, (2, 1), (6.0, 5.2), sharex=True, height_ratios=[1.7, 1.0]).reshape(-1)
    styles = ({"color": MODEL, "ls": "-"}, {"color": SECOND, "ls": "--"})
    names = ("forward, from the base", "reverse, from the model")
    for path, error, style, name, marker in zip((forward, reverse), errors, styles, names, "os", strict=True):
        top.plot(betas, path, lw=1.6, label=name, **style)
        top.errorbar(betas[-1], path[-1], error, fmt=marker, color=style["color"], ms=5, capsize=4, mfc="white")
    top.set_ylabel("log Z (nats)")
    top.legend(fontsize="small")
    _draw_difference(bottom, betas, reverse - forward, float(np.hypot(*errors)))
    bottom.set_xlabel(r"inverse temperature $\beta$ (0: base, 1: model)")
    top.set_title(_title(reverse[-1] - forward[-1], float(np.hypot(*errors))), fontsize="medium")
    return np.array([top, bottom])


def _paths(
    bounds: LogPartitionBounds, row: int | None
) -> tuple[Float[np.ndarray, " levels"], Float[np.ndarray, " levels"], Float[np.ndarray, " levels"], tuple[float, float]]:
    """Return inverse temperatures, both paths, and the standard errors of their ends."""
    fields = ("lower", "upper", "betas", "forward", "reverse")
    if not all(hasattr(bounds, name) for name in fields):
        raise TypeError(f"{OWNER} needs LogPartitionBounds, from log_partition_bounds; got {type(bounds).__name__}.")
    betas, forward, reverse = (np.asarray(getattr(bounds, name), float) for name in fields[2:])
    errors = np.stack([np.asarray(end.standard_error, float) for end in (bounds.lower, bounds.upper)], axis=-1)
    if forward.ndim > 1:
        if row is None:
            raise EnergyError(f"There is a path for each of the rows {forward.shape[:-1]}. Write {OWNER}(bounds, row=0).")
        by_row = [each.reshape(-1, each.shape[-1]) for each in (betas, forward, reverse, errors)]
        if not -len(by_row[0]) <= row < len(by_row[0]):
            raise EnergyError(f"There is no row {row} among {len(by_row[0])}. Write {OWNER}(bounds, row=0).")
        betas, forward, reverse, errors = (each[row] for each in by_row)
    elif row is not None:
        raise EnergyError(f"There is only one path, and no row {row}. Write {OWNER}(bounds).")
    if not forward.shape == reverse.shape == betas.shape:
        raise EnergyError(f"{OWNER} needs paths as long as betas; got {forward.shape}, {reverse.shape}, {betas.shape}.")
    return betas, forward, reverse, (float(errors[0]), float(errors[1]))


def _draw_difference(
    ax: "Axes", betas: Float[np.ndarray, " levels"], difference: Float[np.ndarray, " levels"], error: float
) -> None:
    ax.plot(betas, difference, color="black", lw=1.4)
    ax.errorbar(betas[-1], difference[-1], error, fmt="o", color="black", ms=5, capsize=4, mfc="white")
    ax.axhline(0.0, color=DARK, lw=0.8)
    if np.any(np.abs(difference) > 0.2 * RELIABLE_GAP):
        ax.axhline(RELIABLE_GAP, color=DARK, lw=1.0, ls=":", label="1 nat")
        ax.legend(fontsize="small")
    ax.set_ylabel("reverse - forward\n(nats)")


def _title(gap: float, error: float) -> str:
    text = f"gap {gap:.2f} ± {error:.2f} nats"
    return text if abs(gap) <= RELIABLE_GAP else f"{text}: do not report a likelihood"
