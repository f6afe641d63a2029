"""Shared by the plots: the import of matplotlib, colours that differ in grey too, and axes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpyro.infer import MCMC

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import ArrayLike
from numpyro_ebm.sampling import Draws

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DATA = "0.72"
"""Fill colour of data, a grey."""

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
"""Line styles and markers of up to six series, in Okabe and Ito's colours; no two series differ by hue alone."""


def pyplot() -> Any:
    """Import matplotlib, which only this module does, and return pyplot.

    Raises:
        ImportError: naming the extra that installs it.
    """
    try:
        import matplotlib.pyplot
    except ImportError as error:
        raise ImportError("numpyro_ebm.plots needs matplotlib: pip install 'numpyro-ebm[plots]'.") from error
    return matplotlib.pyplot


def one_axes(owner: str, ax: "Axes | None", size: tuple[float, float] = (5.5, 4.0)) -> Any:
    """Return the given axes, or those of a new figure.

    Raises:
        TypeError: for anything but matplotlib axes.
    """
    if ax is None:
        return pyplot().subplots(figsize=size, layout="constrained")[1]
    _check_axes(owner, "ax", ax)
    return ax


def several_axes(
    owner: str,
    axes: "Axes | Sequence[Any] | np.ndarray | None",
    shape: tuple[int, int],
    size: tuple[float, float],
    **options: Any,
) -> np.ndarray:
    """Return an array of axes of this shape: the given axes in reading order, or those of a new figure.

    Args:
        owner: name of the calling function, for messages.
        axes: the user's axes, in any nesting; None for a new figure.
        shape: rows and columns.
        size: size of a new figure, in inches.
        **options: options of ``pyplot.subplots``.

    Raises:
        EnergyError: for another number of axes.
        TypeError: for anything but matplotlib axes.
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


def numbers(owner: str, name: str, values: Any, *, by_chain: bool = False) -> Float[np.ndarray, "..."]:
    """Return values, or the draws of the only variable, as a numpy array of floats.

    Args:
        owner: name of the calling function, for messages.
        name: name of the argument, for messages.
        values: an array, the result of `sample`, or a finished ``MCMC``.
        by_chain: whether the shape of draws begins with ``(num_chains, num_draws)``, or with their product.

    Raises:
        EnergyError: for empty arrays, and for draws of several variables.
        TypeError: for anything but an array of real numbers.
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
            f"{owner} needs {name} of one variable; the variables are {sorted(samples)}. Write "
            f"draws.get_samples()['{min(samples)}']."
        )
    return next(iter(samples.values()))


def events_of(
    owner: str, name: str, values: ArrayLike | Draws | MCMC, event_shape: tuple[int, ...]
) -> Float[np.ndarray, " num *event"]:
    """Return values ``(..., *event_shape)`` as ``(num, *event_shape)``.

    Raises:
        EnergyError: for values whose shape does not end in the event's shape.
    """
    array = numbers(owner, name, values)
    cut = array.ndim - len(event_shape)
    if cut < 0 or array.shape[cut:] != event_shape:
        wanted = ", ".join(["...", *map(str, event_shape)])
        raise EnergyError(f"{owner} needs {name} of shape ({wanted}); got {array.shape}. Write {name}={name}.reshape(...).")
    return array.reshape(-1, *event_shape)


def bars(ax: Any, values: Float[np.ndarray, "..."], edges: Float[np.ndarray, " edges"], **options: Any) -> None:
    """Draw a histogram whose area is the fraction of values between the edges, not 1."""
    values = values.reshape(-1)
    weights = np.full(values.size, 1 / (values.size * (edges[1] - edges[0])))
    keep = np.isfinite(values)
    ax.hist(values[keep], edges, weights=weights[keep], **options)


def share_outside(values: Float[np.ndarray, "..."], edges: Float[np.ndarray, " edges"]) -> float:
    """Return the fraction of values that a histogram does not show, including values that are not finite."""
    return 1 - float(np.mean((values >= edges[0]) & (values <= edges[-1])))


def outline(width: float = 3.0) -> list[Any]:
    """Return a white edge around a line, which keeps it visible on any background."""
    pyplot()
    from matplotlib import patheffects

    return [patheffects.Stroke(linewidth=width, foreground="white"), patheffects.Normal()]


def figure_legend(axes: np.ndarray, handles: Sequence[Any], *, is_new: bool) -> None:
    """Draw one legend for all axes: above a new figure, or inside the first of the user's axes."""
    if is_new:
        axes.flat[0].figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    else:
        axes.flat[0].legend(handles=handles, fontsize="small")


def _check_axes(owner: str, name: str, ax: object) -> None:
    pyplot()
    from matplotlib.axes import Axes

    if not isinstance(ax, Axes):
        raise TypeError(f"{owner} needs {name} from matplotlib, e.g. pyplot.subplots()[1]; got {type(ax).__name__}.")
