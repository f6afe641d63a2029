"""What the pictures share: the door to matplotlib, colours that grey keeps apart, and axes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from numpyro_ebm._core.errors import EnergyError

DATA = "0.72"
"""Grey that data are filled with."""

MODEL = "#0072B2"
SECOND = "#D55E00"
FAINT = "0.75"
DARK = "0.15"

SERIES = (
    {"color": "#000000", "linestyle": "-", "marker": "o"},
    {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    {"color": "#0072B2", "linestyle": "-.", "marker": "^"},
    {"color": "#009E73", "linestyle": ":", "marker": "D"},
    {"color": "#CC79A7", "linestyle": (0, (8, 2)), "marker": "v"},
    {"color": "#56B4E9", "linestyle": (0, (3, 1, 1, 1, 1, 1)), "marker": "P"},
)
"""Line styles and markers of up to six series, in colours of Okabe and Ito's palette: no two differ by hue alone."""


def pyplot() -> Any:
    """The only door to matplotlib.

    Raises:
        ImportError: naming the extra that brings it.
    """
    try:
        import matplotlib.pyplot
    except ImportError as error:
        raise ImportError("numpyro_ebm.plots needs matplotlib: pip install 'numpyro-ebm[plots]'.") from error
    return matplotlib.pyplot


def one_axes(owner: str, ax: Any, size: tuple[float, float] = (5.5, 4.0)) -> Any:
    """The axes given, or those of a new figure.

    Raises:
        TypeError: for something that is no matplotlib axes.
    """
    if ax is None:
        return pyplot().subplots(figsize=size, layout="constrained")[1]
    _check_axes(owner, "ax", ax)
    return ax


def several_axes(owner: str, axes: Any, shape: tuple[int, int], size: tuple[float, float], **options: Any) -> np.ndarray:
    """An array of axes of this shape: those given, in reading order, or those of a new figure.

    Args:
        owner: who asks.
        axes: axes of the user's, in any nesting; None for a new figure.
        shape: rows and columns.
        size: of a new figure, in inches.
        **options: of ``pyplot.subplots``.

    Raises:
        EnergyError: for another number of axes.
        TypeError: for something that is none.
    """
    if axes is None:
        return pyplot().subplots(*shape, figsize=size, layout="constrained", squeeze=False, **options)[1]
    given = np.asarray(axes, dtype=object).reshape(-1)
    for each in given:
        _check_axes(owner, "axes", each)
    if given.size != np.prod(shape):
        raise EnergyError(
            f"{owner} draws on {np.prod(shape)} axes here; got {given.size}. Write axes=pyplot.subplots"
            f"({shape[0]}, {shape[1]})[1], or axes=None for a new figure."
        )
    return given.reshape(shape)


def numbers(owner: str, name: str, values: Any, *, by_chain: bool = False) -> np.ndarray:
    """Values as a numpy array of floats; of draws of one variable, those draws.

    Args:
        owner: who asks.
        name: what is asked for.
        values: an array, the result of `sample`, or a finished ``MCMC``.
        by_chain: whether draws lead with ``(num_chains, num_draws)``; else with both in one.

    Raises:
        EnergyError: for none at all, and for draws of several variables.
        TypeError: for what is no array of real numbers.
    """
    if hasattr(values, "get_samples"):
        values = _only_variable(owner, name, values.get_samples(group_by_chain=by_chain))
    try:
        array = np.asarray(values, float)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{owner} needs {name} as an array of real numbers; got {type(values).__name__}.") from error
    if not array.size:
        raise EnergyError(f"{owner} needs at least one value in {name}; got shape {array.shape}.")
    return array


def _only_variable(owner: str, name: str, samples: dict[str, Any]) -> Any:
    if len(samples) != 1:
        raise EnergyError(
            f"{owner} needs {name} of one variable; these draws are of {sorted(samples)}. Write "
            f"draws.get_samples()['{min(samples)}']."
        )
    return next(iter(samples.values()))


def events_of(owner: str, name: str, values: Any, event_shape: tuple[int, ...]) -> np.ndarray:
    """Values ``(..., *event_shape)`` as ``(num, *event_shape)``.

    Raises:
        EnergyError: for values that do not end in the event's shape.
    """
    array = numbers(owner, name, values)
    cut = array.ndim - len(event_shape)
    if cut < 0 or array.shape[cut:] != event_shape:
        wanted = ", ".join(["...", *map(str, event_shape)])
        raise EnergyError(f"{owner} needs {name} of shape ({wanted}); got {array.shape}. Write {name}={name}.reshape(...).")
    return array.reshape(-1, *event_shape)


def bars(ax: Any, values: np.ndarray, edges: np.ndarray, **options: Any) -> None:
    """A histogram whose area is the share of values between the edges: what lies outside takes its part away."""
    values = values.reshape(-1)
    weights = np.full(values.size, 1 / (values.size * (edges[1] - edges[0])))
    keep = np.isfinite(values)
    ax.hist(values[keep], edges, weights=weights[keep], **options)


def share_outside(values: np.ndarray, edges: np.ndarray) -> float:
    """What part of the values a histogram does not show, those that are not finite included."""
    return 1 - float(np.mean((values >= edges[0]) & (values <= edges[-1])))


def outline(width: float = 3.0) -> list[Any]:
    """A white edge around a line, which keeps it visible on any ground."""
    pyplot()
    from matplotlib import patheffects

    return [patheffects.Stroke(linewidth=width, foreground="white"), patheffects.Normal()]


def figure_legend(axes: np.ndarray, handles: Sequence[Any], *, is_new: bool) -> None:
    """One legend for all axes: above a figure of our own, inside the first axes of the user's."""
    if is_new:
        axes.flat[0].figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    else:
        axes.flat[0].legend(handles=handles, fontsize="small")


def _check_axes(owner: str, name: str, ax: Any) -> None:
    pyplot()
    from matplotlib.axes import Axes

    if not isinstance(ax, Axes):
        raise TypeError(f"{owner} needs {name} from matplotlib, e.g. pyplot.subplots()[1]; got {type(ax).__name__}.")
