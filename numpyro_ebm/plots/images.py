"""`plot_images`: grids of images."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpyro.infer import MCMC

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import ArrayLike
from numpyro_ebm.plots._style import numbers, several_axes
from numpyro_ebm.sampling import Draws

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OWNER = "plot_images"
GAP = 1
GROUND = 0.5
"""Grey between the images, from which black and white images both differ."""

CELL = 0.55
MAX_WIDTH = 10.0


def plot_images(
    samples: ArrayLike | Draws | MCMC,
    axes: "Axes | Sequence[Any] | np.ndarray | None" = None,
    *,
    data: ArrayLike | None = None,
    image_shape: tuple[int, ...] | None = None,
    num_rows: int = 8,
    num_columns: int = 8,
    limits: tuple[float, float] | None = None,
) -> np.ndarray:
    """Plot a grid of images, and a grid of data images beside it, both on the same grey scale.

    The plot shows the first ``num_rows * num_columns`` images in reading order, with grey between them. A label gives the
    values of black and white.

    Args:
        samples: images ``(num, height, width)``, colour images ``(num, height, width, 3)``, or with ``image_shape`` any
            ``(..., *image_shape)`` or ``(..., prod(image_shape))``; or the result of `sample` with one variable.
        axes: one matplotlib axes, or two with ``data``; None for a new figure.
        data: images to show first, of the same shape.
        image_shape: shape of one image, ``(height, width)`` or ``(height, width, 3)``.
        num_rows: largest number of rows of the grid.
        num_columns: largest number of columns of the grid.
        limits: values of black and white; None for the smallest and largest finite value of both sets, or for 0 and 1 where
            colours lie inside [0, 1].

    Returns:
        The axes, ``(1,)``, or ``(2,)`` with those of the data first.

    Raises:
        EnergyError: (a ValueError) for arrays that are not images, limits out of order, and the wrong number of axes.
        ImportError: without matplotlib.

    Example:
        ``plot_images(sample(key, distribution), data=digits, image_shape=(8, 8))``
    """
    check_count(OWNER, "num_rows", num_rows)
    check_count(OWNER, "num_columns", num_columns)
    sets = {"draws": _images("samples", samples, image_shape)}
    if data is not None:
        sets = {"data": _images("data", data, image_shape), **sets}
    shapes = {name: images.shape[1:] for name, images in sets.items()}
    if len(set(shapes.values())) > 1:
        raise EnergyError(f"{OWNER} needs images of one shape; got {shapes}. Write image_shape=(height, width) for both.")
    low, high = _limits(sets, limits)
    grids = {
        name: _mosaic((images[: num_rows * num_columns] - low) / (high - low), num_columns) for name, images in sets.items()
    }
    tall, wide = next(iter(grids.values())).shape[:2]
    width = min(MAX_WIDTH, CELL * num_columns * len(sets) + 0.4)
    panels = several_axes(OWNER, axes, (1, len(sets)), (width, width / len(sets) * tall / wide + 0.6)).reshape(-1)
    for ax, (name, grid) in zip(panels, grids.items(), strict=True):
        ax.imshow(np.clip(grid, 0.0, 1.0), cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
        ax.set(xticks=[], yticks=[], xlabel=f"black {low:.3g}, white {high:.3g}")
        ax.spines[:].set_visible(False)
        if len(grids) > 1:
            ax.set_title(name)
    return panels


def _images(
    name: str, values: ArrayLike | Draws | MCMC, image_shape: tuple[int, ...] | None
) -> Float[np.ndarray, "num height width *channels"]:
    """Return images as ``(num, height, width)`` or ``(num, height, width, 3)``."""
    array = numbers(OWNER, name, values)
    if image_shape is None:
        if array.ndim == 3 or (array.ndim == 4 and array.shape[-1] == 3):
            return array
        raise EnergyError(
            f"{OWNER} needs {name} of shape (num, height, width) or (num, height, width, 3); got {array.shape}. For other "
            "layouts write image_shape=(height, width)."
        )
    shape = tuple(image_shape)
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[-1] != 3):
        raise EnergyError(f"{OWNER} needs image_shape=(height, width) or (height, width, 3); got {image_shape!r}.")
    for ending in (shape, (int(np.prod(shape)),)):
        if array.ndim >= len(ending) and array.shape[array.ndim - len(ending) :] == ending:
            return array.reshape(-1, *shape)
    raise EnergyError(
        f"{OWNER} needs {name} of shape (..., {', '.join(map(str, shape))}) or (..., {int(np.prod(shape))}) for image_shape="
        f"{shape}; got {array.shape}."
    )


def _limits(
    sets: dict[str, Float[np.ndarray, "_ height width *channels"]], limits: tuple[float, float] | None
) -> tuple[float, float]:
    """Return the values of black and white."""
    if limits is None:
        values = np.concatenate([images.reshape(-1) for images in sets.values()])
        values = values[np.isfinite(values)]
        if not values.size:
            raise EnergyError(f"{OWNER} got no finite value. Look at the draws, or write limits=(0.0, 1.0).")
        low, high = float(values.min()), float(values.max())
        is_colour = next(iter(sets.values())).ndim == 4
        if is_colour and low >= 0 and high <= 1:
            return 0.0, 1.0
        return (low, high) if high > low else (low - 0.5, low + 0.5)
    ends = numbers(OWNER, "limits", limits)
    if ends.shape != (2,) or not ends[0] < ends[1]:
        raise EnergyError(f"{OWNER} needs limits=(low, high) with low < high; got {limits!r}. Write limits=(0.0, 1.0).")
    return float(ends[0]), float(ends[1])


def _mosaic(
    images: Float[np.ndarray, "num height width *channels"], num_columns: int
) -> Float[np.ndarray, "tall wide *channels"]:
    """Join all images in one, in reading order."""
    num, height, width = images.shape[:3]
    num_columns = min(num_columns, num)
    num_rows = -(-num // num_columns)
    cells = np.full((num_rows * num_columns, height + GAP, width + GAP, *images.shape[3:]), GROUND)
    cells[:num, :height, :width] = images
    cells[num:] = 1.0
    rows = cells.reshape(num_rows, num_columns, *cells.shape[1:])
    picture = np.moveaxis(rows, 2, 1).reshape(num_rows * (height + GAP), num_columns * (width + GAP), *images.shape[3:])
    return picture[:-GAP, :-GAP]
