"""`plot_energy`: an energy in one or two dimensions, with data, draws and chains."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Float
from numpyro.infer import MCMC

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count, check_positive
from numpyro_ebm._core.programs import compiled
from numpyro_ebm._core.typing import Array, ArrayLike
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.plots._style import DATA, MODEL, SERIES, bars, events_of, numbers, one_axes, outline
from numpyro_ebm.sampling import Draws

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OWNER = "plot_energy"
NUM_REFERENCE = 1000
GRID = {1: 500, 2: 200}


class _Overlays(NamedTuple):
    """Points and paths to draw over the energy, as ``(..., d)``; None for those not given."""

    data: Float[np.ndarray, "rows d"] | None
    draws: Float[np.ndarray, "draws d"] | None
    chains: Float[np.ndarray, "chains steps d"] | None


def plot_energy(
    distribution: dist.Distribution,
    ax: Any = None,
    *,
    data: ArrayLike | None = None,
    draws: ArrayLike | Draws | MCMC | None = None,
    chains: ArrayLike | Draws | MCMC | None = None,
    limits: Sequence[Any] | None = None,
    row: int | tuple[int, ...] | None = None,
    depth: float = 10.0,
    num_points: int | None = None,
    names: Sequence[str] | None = None,
) -> "Axes":
    r"""Plot the energy of events of one or two numbers, with data, draws and the paths of chains.

    For events of two numbers, the plot shows filled contours of :math:`\log p(x) - \max \log p` (base included, log Z
    cancels), with ten levels from ``-depth`` to 0 nats and a colour bar. Data are dots, draws are crosses, and chains are
    lines that start at their large marker. For events of one number it shows the curve :math:`\exp(-E(x)) / Z` with ``Z``
    summed over the grid, data as grey bars, and draws and chains as outlined bars. Points outside the support are not
    evaluated and stay blank.

    Args:
        distribution: an `EnergyDistribution`, or for comparison a normalised NumPyro distribution without batch shape.
        ax: matplotlib axes to draw on; None for a new figure.
        data: rows, ``(..., *event_shape)``.
        draws: draws of the model, ``(..., *event_shape)``, or the result of `sample`.
        chains: paths of up to six chains, ``(num_chains, num_draws, *event_shape)``, or the result of `sample`.
        limits: ``(low, high)`` for all coordinates, or one such pair for each. None for the range of data, draws and chains,
            or without these the range of starts of chains (the base, or a standard normal in unconstrained space).
        row: index of the row in the batch shape, for energies with a context or a base for each row.
        depth: depth of the lowest level below the top in nats, for events of two numbers.
        num_points: grid points per coordinate; None for 500 in one dimension and 200 in two.
        names: names of the coordinates.

    Returns:
        The axes.

    Raises:
        EnergyError: (a ValueError) for events of more than two numbers or a discrete support; for arrays of other event
            shapes; for a batch shape without ``row``; for more than six chains; for limits out of order or outside the
            support.
        TypeError: for anything but a distribution, and for a distribution with only a score.
        ImportError: without matplotlib.

    Example:
        ``plot_energy(distribution, data=x, chains=sample(key, distribution))``
    """
    dim = _check(distribution, depth, num_points, names)
    overlays = _overlays(distribution.event_shape, data, draws, chains)
    is_new, ax = ax is None, one_axes(OWNER, ax)
    num = num_points or GRID[dim]
    grid = [np.linspace(low, high, num) for low, high in _limits(distribution, overlays, limits, dim)]
    values = _on_grid(distribution, row, grid)
    names = tuple(names or ("x1", "x2")) if dim == 2 else tuple(names or ("x",))
    if dim == 1:
        _draw_curve(ax, grid[0], values, overlays, names[0])
    else:
        _draw_landscape(ax, grid, values, depth)
        _draw_overlays(ax, overlays)
        ax.set(xlabel=names[0], ylabel=names[1], xlim=grid[0][[0, -1]], ylim=grid[1][[0, -1]])
    if ax.get_legend_handles_labels()[0]:
        above = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "ncols": 4, "frameon": False}
        ax.legend(fontsize="small", **(above if is_new and dim == 2 else {"framealpha": 0.9}))
    return ax


def _check(distribution: object, depth: float, num_points: int | None, names: Sequence[str] | None) -> int:
    """Check the arguments, and return the number of coordinates."""
    if not isinstance(distribution, dist.Distribution):
        raise TypeError(f"{OWNER} needs an EnergyDistribution; got {type(distribution).__name__}.")
    if isinstance(distribution, EventDistribution) and not distribution.has_energy:
        raise TypeError(f"{OWNER} needs an energy; {type(distribution).__name__} has only a score.")
    dim = int(np.prod(distribution.event_shape))
    if dim not in (1, 2) or len(distribution.event_shape) > 1:
        raise EnergyError(
            f"{OWNER} needs events of one or two numbers; got event_shape={distribution.event_shape}. For more write "
            "plot_pairs(data, draws) or plot_marginals(data, draws)."
        )
    if distribution.support.is_discrete:  # pyright: ignore[reportOptionalMemberAccess]
        raise EnergyError(f"{OWNER} needs continuous events; the support {distribution.support} is discrete.")
    check_positive(OWNER, "depth", depth, scalar=True)
    if num_points is not None:
        check_count(OWNER, "num_points", num_points, 2)
    if names is not None and (isinstance(names, str) or len(names) != dim):
        raise EnergyError(f"{OWNER} needs {dim} names; got {names!r}. Write names={['x', 'y'][:dim]}.")
    return dim


def _overlays(
    event_shape: tuple[int, ...],
    data: ArrayLike | None,
    draws: ArrayLike | Draws | MCMC | None,
    chains: ArrayLike | Draws | MCMC | None,
) -> _Overlays:
    given = {"data": data, "draws": draws}
    flat = {k: None if v is None else _flat(events_of(OWNER, k, v, event_shape)) for k, v in given.items()}
    if chains is None:
        return _Overlays(**flat, chains=None)
    paths = numbers(OWNER, "chains", chains, by_chain=True)
    if paths.ndim != 2 + len(event_shape) or paths.shape[2:] != event_shape:
        raise EnergyError(
            f"{OWNER} needs chains of shape (num_chains, num_draws, *{event_shape}); got {paths.shape}. For a single chain "
            "write chains=chain[None]; for points without an order, draws=points."
        )
    if len(paths) > len(SERIES):
        raise EnergyError(
            f"{OWNER} draws up to {len(SERIES)} chains; got {len(paths)}. Write chains=chains[:{len(SERIES)}], or "
            "draws=chains for points without paths."
        )
    return _Overlays(**flat, chains=paths.reshape(*paths.shape[:2], -1))


def _flat(events: Float[np.ndarray, " num *event"]) -> Float[np.ndarray, "num d"]:
    return events.reshape(len(events), -1)


def _limits(
    distribution: dist.Distribution, overlays: _Overlays, limits: Sequence[Any] | None, dim: int
) -> Float[np.ndarray, "{dim} 2"]:
    """Return the ends of the grid, ``(dim, 2)``."""
    if limits is None:
        given = [values.reshape(-1, dim) for values in overlays if values is not None]
        return _range(np.concatenate(given), 0.0, 0.1) if given else _range(_reference(distribution, dim), 0.005, 0.25)
    pairs = numbers(OWNER, "limits", limits)
    if pairs.shape not in ((2,), (dim, 2)) or not np.all(np.isfinite(pairs)) or np.any(pairs[..., 0] >= pairs[..., 1]):
        raise EnergyError(
            f"{OWNER} needs limits (low, high), low < high, for all coordinates or one pair for each of {dim}; got "
            f"{limits!r}. Write limits=(-3.0, 3.0)."
        )
    return np.broadcast_to(pairs, (dim, 2))


def _range(points: Float[np.ndarray, "points d"], tail: float, margin: float) -> Float[np.ndarray, "d 2"]:
    points = points[np.all(np.isfinite(points), axis=1)]
    if not len(points):
        raise EnergyError(f"{OWNER} got no finite points to take limits from. Write limits=(-3.0, 3.0).")
    low, high = np.quantile(points, [tail, 1 - tail], axis=0)
    pad = np.where(high > low, margin * (high - low), 1.0)
    return np.stack([low - pad, high + pad], axis=1)


def _reference(distribution: dist.Distribution, dim: int) -> Float[np.ndarray, "points {dim}"]:
    """Draw starts of chains, or draws of a normalised distribution."""
    key = jax.random.key(0)
    is_ours = isinstance(distribution, EventDistribution)
    draws = (distribution.reference_sample if is_ours else distribution.sample)(key, (NUM_REFERENCE,))
    return np.asarray(draws).reshape(-1, dim)


def _on_grid(
    distribution: Any, row: int | tuple[int, ...] | None, grid: list[Float[np.ndarray, " points"]]
) -> Float[np.ndarray, "..."]:
    """Return log densities minus their maximum, ``(num,)`` or ``(num_x, num_y)``; NaN outside the support."""
    mesh = np.stack(np.meshgrid(*grid, indexing="ij"), axis=-1)
    points = jnp.asarray(mesh.reshape(-1, *distribution.event_shape), float)
    inside = np.asarray(distribution.support(points))
    if not inside.any():
        raise EnergyError(
            f"No point of the grid lies inside the support {distribution.support}. Write limits=(low, high) that reach into "
            "it."
        )
    values = np.full(len(points), np.nan)
    values[inside] = np.asarray(compiled(_log_density(distribution, row), points[inside]), float)
    values[~np.isfinite(values)] = np.nan
    if np.isnan(values).all():
        raise EnergyError(f"{OWNER} found no finite log density on the grid. Look at the energy there, or write limits=....")
    return (values - np.nanmax(values)).reshape(mesh.shape[:-1])


def _log_density(
    distribution: Any, row: int | tuple[int, ...] | None
) -> Callable[[Float[Array, " num *event"]], Float[Array, " num"]]:
    """Return the log density of events ``(num, *event_shape)`` in one row, as a function."""
    index = _row_index(distribution.batch_shape, row)
    if not isinstance(distribution, EventDistribution):
        wide = (1,) * len(distribution.batch_shape) + distribution.event_shape
        return lambda events: distribution.log_prob(events.reshape(-1, *wide)).reshape(len(events), -1)[:, index]
    zeros = jnp.zeros(distribution.batch_shape + distribution.event_shape)
    local = distribution.rows(zeros, distribution.batch_shape).local
    return jax.vmap(partial(distribution.log_density, local=jax.tree.map(lambda leaf: leaf[index], local)))  # pyright: ignore


def _row_index(batch_shape: tuple[int, ...], row: int | tuple[int, ...] | None) -> int:
    """Return the flat index of a row."""
    if row is None:
        if np.prod(batch_shape) == 1:
            return 0
        first = 0 if len(batch_shape) == 1 else (0,) * len(batch_shape)
        raise EnergyError(
            f"The distribution has rows of shape {batch_shape}, each with its own density. Write {OWNER}(..., row={first})."
        )
    try:
        return int(np.ravel_multi_index(row if isinstance(row, tuple) else (row,), batch_shape))
    except (ValueError, TypeError) as error:
        known = "Write row=0." if batch_shape else "Write row=None."
        raise EnergyError(f"There is no row {row!r} among rows of shape {batch_shape}. {known}") from error


def _draw_landscape(
    ax: "Axes", grid: list[Float[np.ndarray, " points"]], values: Float[np.ndarray, "points points"], depth: float
) -> None:
    levels = np.linspace(-depth, 0.0, 11)
    options = {"levels": levels, "extend": "min"}
    filled = ax.contourf(*grid, np.ma.masked_invalid(values.T), cmap="cividis", **options)
    ax.contour(*grid, np.ma.masked_invalid(values.T), levels=levels, colors="white", linewidths=0.4, linestyles="-")
    bar = ax.figure.colorbar(filled, ax=ax, ticks=levels[::2])
    bar.set_label("log density below its top (nats)")


def _draw_overlays(ax: "Axes", overlays: _Overlays) -> None:
    if overlays.data is not None:
        ax.plot(*overlays.data.T, "o", ms=3, mfc="0.1", mec="white", mew=0.4, label="data")
    if overlays.draws is not None:
        ax.plot(*overlays.draws.T, "x", ms=5, color="#D55E00", mew=1.4, path_effects=outline(2.8), label="draws")
    for i, path in enumerate([] if overlays.chains is None else overlays.chains):
        style = {**SERIES[i], "lw": 1.2, "ms": 8, "mec": "white", "markevery": [0]}
        ax.plot(*path.T, **style, path_effects=outline(), label=f"chain {i + 1}")


def _draw_curve(
    ax: "Axes",
    grid: Float[np.ndarray, " points"],
    values: Float[np.ndarray, " points"],
    overlays: _Overlays,
    name: str,
) -> None:
    density = np.where(np.isnan(values), 0.0, np.exp(values))
    density = density / np.trapezoid(density, grid)
    edges = np.linspace(grid[0], grid[-1], 51)
    if overlays.data is not None:
        bars(ax, overlays.data, edges, color=DATA, label="data")
    for label, points, dashes in (("draws", overlays.draws, "--"), ("chains", overlays.chains, ":")):
        if points is not None:
            bars(ax, points, edges, histtype="step", lw=1.4, color=MODEL, ls=dashes, label=label)
    ax.plot(grid, np.where(np.isnan(values), np.nan, density), color="black", lw=1.6, label=r"$\exp(-E) / Z$")
    ax.set(xlabel=name, ylabel=f"density (per unit of {name})", xlim=(grid[0], grid[-1]), ylim=(0, None))
