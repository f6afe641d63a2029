"""Checks of draws against data: distance, mean, covariance, and modes by nearest neighbours."""

import numpy as np
from jaxtyping import Float, Shaped

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.spreads import eps_of, or_one, spread
from numpyro_ebm.diagnostics._bounds import gamma_bound, normal_bound
from numpyro_ebm.diagnostics._findings import Finding, judge, unchecked
from numpyro_ebm.diagnostics._neighbors import NUM_NEIGHBORS, neighbors
from numpyro_ebm.diagnostics.arviz.statistics import effective_size
from numpyro_ebm.estimators.parts.health import RUNAWAY_DISTANCE

MAX_POINTS = 600
"""Most points of each sample for the nearest neighbours, whose matrix of distances grows with the square."""
MIN_POINTS = 40
"""Fewest points of each sample for the nearest neighbours: fewer would miss all but gross differences."""
HUGE = 1e100
"""Largest draw that is compared with data: squares of much larger ones overflow."""
FEWEST_DISTINCT = 0.9
"""Share of rows that have to differ: equal rows have no nearest neighbour, and a smaller share admits discrete data."""
MAX_DIMENSIONS = 20
"""Most dimensions in which all covariances are compared, 210 of them; above, only variances."""


def compare(
    name: str, draws: Shaped[np.ndarray, "chains draws ..."], data: Shaped[np.ndarray, " rows *event"]
) -> list[Finding]:
    """Compare the draws of one variable with its data.

    Args:
        name: name of the variable.
        draws: ``(chains, draws, ..., *event)``; axes before the event hold rows of one distribution, each a further chain.
        data: ``(num_rows, *event)``.
    """
    chains, points = _as_chains(draws, data), data.reshape(len(data), -1).astype(float)
    points = points[np.all(np.isfinite(points), axis=1)]
    points = _still(points, eps_of(data))
    if not (np.all(np.isfinite(chains)) and len(points) >= 2):
        return [unchecked(f"{name} against data", "not all draws are finite, or there are fewer than two rows of data")]
    if not np.any(spread(points)):
        return [unchecked(f"{name} against data", "the rows of data are all the same")]
    found = [_distance(name, chains, points)]
    is_huge = np.abs(chains).max() > HUGE
    if is_huge or chains.shape[1] < 8 or not np.any(spread(chains.reshape(-1, chains.shape[-1]), eps=eps_of(draws))):
        return [*found, unchecked(f"{name} modes", "the draws are frozen, too few or huge, and cannot be compared")]
    both = np.concatenate([chains, (chains - chains.mean(axis=(0, 1))) ** 2], axis=2)
    size = float(np.nanmin(effective_size(both)))
    found += _moments(name, chains, points)
    if not np.issubdtype(draws.dtype, np.floating) or len(np.unique(points, axis=0)) < FEWEST_DISTINCT * len(points):
        return [*found, unchecked(f"{name} modes", "values repeat, so nearest neighbours are not defined")]
    return [*found, *_modes(name, chains, points, size)]


def fits(draws: np.ndarray, data: np.ndarray) -> bool:
    """Whether rows of data are events of these draws."""
    event = data.shape[1:]
    return data.ndim >= 1 and draws.ndim - 2 >= len(event) and draws.shape[draws.ndim - len(event) :] == event


def check_fits(name: str, draws: np.ndarray, data: np.ndarray) -> None:
    """Check that rows of data are events of these draws.

    Raises:
        EnergyError: with both shapes.
    """
    if not fits(draws, data):
        raise EnergyError(
            f"The data of '{name}' have shape {data.shape}, and its draws {draws.shape}: the data need shape (num_rows, "
            f"*event), with the event's shape at the end of {draws.shape[2:]}."
        )


def _as_chains(
    draws: Shaped[np.ndarray, "chains draws ..."], data: Shaped[np.ndarray, " rows *event"]
) -> Float[np.ndarray, "series draws d"]:
    """Return the draws as ``(chains * rows, draws, dimensions)``."""
    size = int(np.prod(data.shape[1:]))
    flat = draws.reshape((*draws.shape[:2], -1, size)).astype(float)
    return np.moveaxis(flat, 2, 1).reshape((-1, draws.shape[1], size))


def _still(points: Float[np.ndarray, "points d"], eps: float) -> Float[np.ndarray, "points d"]:
    """Return the points, with coordinates that vary only by rounding set to one value."""
    return np.where(spread(points, eps=eps) > 0, points, points[:1]) if len(points) else points


def _distance(name: str, chains: Float[np.ndarray, "chains draws d"], points: Float[np.ndarray, "points d"]) -> Finding:
    """Check distances: for equal distributions, half a chain beyond twice the farthest of n data has probability < 2^-n."""
    centre, scale = points.mean(axis=0), or_one(np.sqrt(np.mean(spread(points) ** 2)))
    with np.errstate(over="ignore"):
        ours, theirs = (np.sqrt(np.mean((x - centre) ** 2, axis=-1)) / scale for x in (chains, points))
    farthest, typical = float(ours.max()), float(np.median(ours, axis=1).max())
    return judge(
        f"{name} distance",
        f"the farthest draw is {farthest:.3g} standard deviations of the data from their mean, the median draw of a chain "
        f"up to {typical:.3g}, the farthest data point {theirs.max():.3g}",
        f"medians below {2 * theirs.max():.3g}, all below {RUNAWAY_DISTANCE:g}",
        "The energy may fall without limit away from the data, so that it has no density: give the EnergyDistribution a "
        "base, e.g. base=numpyro.distributions.Normal(0, 1).expand([d]).to_event(1), or an energy that grows at infinity.",
        is_bad=not (typical < 2 * theirs.max() and farthest < RUNAWAY_DISTANCE),
    )


def _moments(name: str, chains: Float[np.ndarray, "chains draws d"], points: Float[np.ndarray, "points d"]) -> list[Finding]:
    """Compare means and second moments, in standard errors of draws and data together."""
    advice = (
        "The model does not fit the data, or the chains do not cover all of it. Look at the other findings first; then "
        "train for longer, or use a more flexible energy."
    )
    dim = points.shape[1]
    centre = points.mean(axis=0)
    pairs = [(i, i) for i in range(dim)]
    if dim <= MAX_DIMENSIONS:
        pairs += [(i, j) for i in range(dim) for j in range(i)]
    first, second = np.array(pairs).T

    def products(x):
        return (x - x.reshape(-1, dim).mean(axis=0))[..., first] * (x - x.reshape(-1, dim).mean(axis=0))[..., second]

    found = []
    means = (chains - centre, points - centre)
    squares = (products(chains), products(points))
    for what, (ours, theirs) in {"mean": means, "covariance": squares}.items():
        z = _standardised(ours, theirs)
        worst = int(np.argmax(np.abs(z)))
        where = f"coordinate {worst}" if what == "mean" else f"entry {pairs[worst]}"
        values = [float(x.reshape(-1, x.shape[-1]).mean(axis=0)[worst]) for x in (ours, theirs)]
        if what == "mean":
            values = [value + float(centre[worst]) for value in values]
        bound = normal_bound(len(z))
        measured = f"{where}: draws {values[0]:.4g}, data {values[1]:.4g}, {abs(z[worst]):.2g} standard errors apart"
        found.append(judge(f"{name} {what}", measured, f"below {bound:.2g}", advice, is_bad=abs(z[worst]) > bound))
    return found


def _standardised(
    ours: Float[np.ndarray, "chains draws k"], theirs: Float[np.ndarray, "points k"]
) -> Float[np.ndarray, " k"]:
    sizes = np.clip(np.nan_to_num(effective_size(ours), nan=1.0), 1.0, ours.shape[0] * ours.shape[1])
    # Equal distributions have one variance: take the larger estimate, which is too small in a small heavy-tailed sample.
    widest = np.maximum(spread(ours.reshape(-1, ours.shape[-1])), spread(theirs))
    error = widest * np.sqrt(1 / sizes + 1 / len(theirs))
    change = ours.mean(axis=(0, 1)) - theirs.mean(axis=0)
    return np.where(error > 0, change / or_one(error), np.where(ours[0, 0] == theirs[0], 0.0, np.inf))


def _modes(
    name: str, chains: Float[np.ndarray, "chains draws d"], points: Float[np.ndarray, "points d"], size: float
) -> list[Finding]:
    # Half the effective size: the correlation that remains between draws thinned this much is negligible.
    wanted = int(min(size / 2, len(points), MAX_POINTS))
    if wanted < MIN_POINTS:
        why = f"{size:.0f} effective draws and {len(points)} rows of data are too few to compare"
        return [unchecked(f"{name} modes", why, f"Take at least {2 * MIN_POINTS} effective draws and {MIN_POINTS} rows.")]
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(chains))[:wanted]
    kept = np.linspace(0, chains.shape[1] - 1, wanted // len(chosen)).astype(int)
    thinned = chains[chosen][:, kept].reshape(-1, chains.shape[-1])
    return modes(name, thinned, points[rng.permutation(len(points))[: len(thinned)]])


def modes(name: str, draws: Shaped[np.ndarray, "draws d"], data: Shaped[np.ndarray, "rows d"]) -> list[Finding]:
    """Compare independent draws ``(m, d)`` with data ``(n, d)`` by nearest neighbours."""
    seen = neighbors(data, draws)
    bound = normal_bound()
    missed, alone = (gamma_bound(each.mean, each.sd) for each in (seen.missed, seen.alone))
    return [
        judge(
            f"{name} modes",
            f"{seen.missed.value:.1%} of {len(data)} data points have no draw among their {NUM_NEIGHBORS} nearest "
            f"neighbours, {seen.missed.mean:.1%} expected",
            f"below {missed:.1%}",
            "The draws miss part of the data: the chains stay in one mode, or the energy lacks a mode. Start chains in "
            "every mode, use kernel='parallel_tempering', or train for longer.",
            is_bad=seen.missed.value > missed,
        ),
        judge(
            f"{name} support",
            f"{seen.alone.value:.1%} of {len(draws)} draws have no data point among their {NUM_NEIGHBORS} nearest "
            f"neighbours, {seen.alone.mean:.1%} expected",
            f"below {alone:.1%}",
            "There are draws in places without data. The energy is low there, which dsm and nce with noise near the data do "
            "not detect. Train with chains ('pcd'), or with wider noise.",
            is_bad=seen.alone.value > alone,
        ),
        judge(
            f"{name} neighbours",
            f"{seen.same.value:.1%} of nearest neighbours are in the same sample, {seen.same.mean:.1%} expected "
            f"({seen.same.z:+.2g} standard deviations)",
            f"below {bound:.2g}",
            "Draws and data have different distributions; the other findings may show how.",
            is_bad=seen.same.z > bound,
        ),
        judge(
            f"{name} copies",
            f"{seen.nearest.value:.1%} of points have their nearest neighbour in the same sample, {seen.nearest.mean:.1%} "
            f"expected ({seen.nearest.z:+.2g} standard deviations)",
            f"above {-bound:.2g}",
            "Draws lie on rows of the data: chains that started there have not moved, or the energy has memorised the rows.",
            is_bad=seen.nearest.z < -bound,
        ),
    ]
