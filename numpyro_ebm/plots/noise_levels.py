"""`plot_noise_levels`: noise levels, or a noise process, beside the length scales of the data."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.scipy.stats import norm
from jaxtyping import Float

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.spreads import spread
from numpyro_ebm._core.typing import ArrayLike
from numpyro_ebm.plots._style import DARK, MODEL, numbers, several_axes
from numpyro_ebm.sampling.noise import AbstractNoiseProcess, check_sigmas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OWNER = "plot_noise_levels"
MAX_ROWS = 1000
"""Most rows for the distances between all pairs, whose number grows with the square."""
NUM_TIMES = 200
GOOD_OVERLAP = 0.5
"""Overlap of neighbouring levels that Song and Ermon (2020) advise, technique 2."""


def plot_noise_levels(
    noise: Any,
    data: ArrayLike | None = None,
    axes: "Axes | Sequence[Any] | np.ndarray | None" = None,
    *,
    dim: int | None = None,
) -> np.ndarray:
    r"""Plot noise levels on a logarithmic scale, with length scales of the data and the overlap of neighbouring levels.

    Lines mark the largest distance between two rows, to which the largest level should be comparable (technique 1 of Song
    and Ermon); the standard deviation of the data, pooled over coordinates; and the median distance to the nearest neighbour
    over :math:`\sqrt d`. In ``d`` dimensions noise of level :math:`\sigma` has length :math:`\sqrt d \sigma`, so the
    smallest level should be small compared with this last line.

    A second panel, for levels in a known dimension, shows the overlap of each level with the one above it,

    .. math:: C = \Phi(\sqrt{2 d} (\gamma - 1) + 3 \gamma) - \Phi(\sqrt{2 d} (\gamma - 1) - 3 \gamma), \qquad
        \gamma = \sigma_{i-1} / \sigma_i

    the probability that noise of the lower level has a length within three standard deviations of that of the upper one;
    about 0.5 is advised (technique 2). The formula approximates many dimensions: in few, it is near 1 at any ratio.

    Args:
        noise: levels, the largest first, as `geometric_sigmas` returns them, drawn over their index; or a noise process
            (`VE`, `VP`), drawn over time as the noise in units of the data, :math:`\sigma(t) / \alpha(t)`.
        data: rows ``(num_rows, *event_shape)`` in the space of the noise (unconstrained space). Distances are those among at
            most 1000 evenly spaced rows.
        axes: one matplotlib axes, or two where the overlap is drawn; None for a new figure.
        dim: dimension of an event, for the overlap without data; None for that of the data.

    Returns:
        The axes, ``(1,)`` or ``(2,)``.

    Raises:
        EnergyError: (a ValueError) for levels that are not positive or not decreasing, for fewer than two finite rows, for a
            ``dim`` that differs from the data's or comes with a process, and for the wrong number of axes.
        TypeError: for data that are not numbers.
        ImportError: without matplotlib.

    Example:
        ``plot_noise_levels(geometric_sigmas(10.0, 0.01, 10), x)``

    References:
        Song and Ermon, Improved techniques for training score-based generative models (2020), techniques 1 and 2.
    """
    rows = None if data is None else _rows(data)
    is_process = isinstance(noise, AbstractNoiseProcess)
    sigmas = None if is_process else _ladder(noise)
    dim = _dimension(dim, rows, is_process=is_process)
    has_overlap = sigmas is not None and len(sigmas) > 1 and dim is not None
    num = 1 + has_overlap
    panels = several_axes(
        OWNER, axes, (num, 1), (6.0, 4.0 + 1.6 * has_overlap), sharex=True, height_ratios=[2, 1][:num]
    ).reshape(-1)
    if sigmas is None:
        times = np.linspace(float(noise.t_min), 1.0, NUM_TIMES)
        levels = np.asarray(noise.sigma(times) / noise.alpha(times), float)
        panels[0].plot(times, levels, color=MODEL, lw=1.8, label=r"noise $\sigma(t)/\alpha(t)$")
    else:
        panels[0].plot(np.arange(1, len(sigmas) + 1), sigmas, color=MODEL, marker="o", ms=4, lw=1.2, label="levels")
    _draw_lengths(panels[0], rows)
    panels[0].set(yscale="log", ylabel="standard deviation (unit of the data)")
    panels[-1].set_xlabel("time" if sigmas is None else "level")
    if has_overlap:
        _draw_overlap(panels[1], sigmas, dim)  # pyright: ignore[reportArgumentType]
    return panels


def _rows(data: ArrayLike) -> Float[np.ndarray, "rows d"]:
    """Return the finite rows, ``(num_rows, d)``."""
    array = np.atleast_1d(numbers(OWNER, "data", data))
    rows = array.reshape(len(array), -1)
    rows = rows[np.isfinite(rows).all(axis=1)]
    if len(rows) < 2:
        raise EnergyError(f"{OWNER} needs two finite rows or more, (num_rows, *event_shape); got shape {array.shape}.")
    return rows


def _ladder(noise: ArrayLike) -> Float[np.ndarray, " levels"]:
    check_sigmas(OWNER, noise)
    sigmas = np.asarray(noise, float)
    if np.any(np.diff(sigmas) >= 0):
        raise EnergyError(
            f"{OWNER} needs decreasing levels, the largest level first; got {sigmas}. Sort them in decreasing order."
        )
    return sigmas


def _dimension(dim: int | None, rows: Float[np.ndarray, "rows d"] | None, *, is_process: bool) -> int | None:
    known = None if rows is None else rows.shape[1]
    if dim is None:
        return known
    check_count(OWNER, "dim", dim)
    if is_process:
        raise EnergyError(f"dim={dim} is for the overlap of noise levels; a process has none. Leave it out.")
    if known not in (None, dim):
        raise EnergyError(f"dim={dim} differs from data of {known} dimensions. Leave it out.")
    return dim


def _draw_lengths(ax: "Axes", rows: Float[np.ndarray, "rows d"] | None) -> None:
    if rows is not None:
        farthest, nearest = _distances(rows)
        scale = float(np.sqrt(np.mean(spread(rows) ** 2)))
        lengths = (
            (farthest, "--", "largest distance between two rows"),
            (scale, "-.", "standard deviation of the data"),
            (nearest / np.sqrt(rows.shape[1]), ":", r"nearest neighbour's distance / $\sqrt{d}$"),
        )
        for value, dashes, label in lengths:
            if value > 0:
                ax.axhline(value, color=DARK, ls=dashes, lw=1.2, label=f"{label}: {value:.3g}")
    ax.legend(fontsize="small")


def _distances(rows: Float[np.ndarray, "rows d"]) -> tuple[float, float]:
    """Return the largest distance, and the median distance to the nearest neighbour."""
    some = rows[np.unique(np.linspace(0, len(rows) - 1, min(MAX_ROWS, len(rows))).astype(int))]
    some = some - some.mean(axis=0)
    squares = np.sum(some**2, axis=1)
    apart = np.sqrt(np.maximum(squares[:, None] + squares - 2 * some @ some.T, 0.0))
    farthest = float(apart.max())
    np.fill_diagonal(apart, np.inf)
    return farthest, float(np.median(apart.min(axis=1)))


def _draw_overlap(ax: "Axes", sigmas: Float[np.ndarray, " levels"], dim: int) -> None:
    ax.plot(np.arange(2, len(sigmas) + 1), _overlap(sigmas[:-1] / sigmas[1:], dim), color=MODEL, marker="s", ms=4, lw=1.2)
    ax.axhline(GOOD_OVERLAP, color=DARK, ls="--", lw=1.0, label="advised: 0.5")
    ax.set(ylim=(-0.05, 1.05), ylabel="overlap with\nthe level above")
    ax.legend(fontsize="small")


def _overlap(ratios: Float[np.ndarray, " levels"], dim: int) -> Float[np.ndarray, " levels"]:
    middle, width = np.sqrt(2 * dim) * (ratios - 1), 3 * ratios
    return np.asarray(norm.cdf(middle + width) - norm.cdf(middle - width), float)
