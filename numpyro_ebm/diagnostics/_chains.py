"""Checks of chains without data: finite, moving, distinct, bounded, converged and long enough."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from numpyro_ebm._core.spreads import ROUNDING
from numpyro_ebm.diagnostics._bounds import chi2_bound
from numpyro_ebm.diagnostics._findings import Finding, judge, unchecked
from numpyro_ebm.diagnostics.arviz.read import Recorded
from numpyro_ebm.diagnostics.arviz.statistics import effective_size, rank_rhat
from numpyro_ebm.estimators.parts.health import COLLAPSED_ACCEPTANCE

MAX_COORDINATES = 200
"""Most coordinates that are checked; more take longer, and raise the bounds, which allow for the number of tests."""
GROWTH = 10.0
"""Largest growth of a chain's distance from its start; a smaller bound also warns of heavy tails or slow warm-up."""
RHAT, RHAT_AT_MOST = 1.01, 1.1
"""Bounds on R-hat: 1.01 by Vehtari et al. (2021), and for short chains at most the 1.1 that was customary before."""


class Chains(NamedTuple):
    """The coordinates of all variables side by side.

    Attributes:
        names: names of the coordinates, such as ``x[2]``.
        values: ``(chains, draws, coordinates)``, float64.
        eps: machine epsilon of the draws' own type; 0 for integers.
    """

    names: list[str]
    values: Float[np.ndarray, "chains draws coordinates"]
    eps: float

    @property
    def are_frozen(self) -> Bool[np.ndarray, " chains"]:
        """By chain: whether it moves in fewer than 2 % of the transitions, or only by rounding errors."""
        size = np.abs(self.values).max(axis=1, initial=0.0)
        with np.errstate(invalid="ignore"):  # of infinite draws
            is_still = np.all(np.ptp(self.values, axis=1) <= ROUNDING * self.eps * size, axis=1)
        return (self.move_rates < COLLAPSED_ACCEPTANCE) | is_still

    @property
    def move_rates(self) -> Float[np.ndarray, " chains"]:
        """By chain: the fraction of transitions in which any coordinate changed."""
        return np.any(self.values[:, 1:] != self.values[:, :-1], axis=2).mean(axis=1)


def coordinates(recorded: Recorded) -> Chains:
    """Return the coordinates of all variables, 200 evenly spaced ones where there are more."""
    names, columns = [], []
    for name, value in recorded.variables.items():
        flat = np.asarray(value, float).reshape((*value.shape[:2], -1))
        shape = value.shape[2:]
        indices = [",".join(map(str, index)) for index in np.ndindex(*shape)]
        names += [f"{name}[{index}]" if index else name for index in indices]
        columns.append(flat)
    floats = [v.dtype for v in recorded.variables.values() if np.issubdtype(v.dtype, np.floating)]
    values = np.concatenate(columns, axis=2)
    kept = np.unique(np.linspace(0, len(names) - 1, min(len(names), MAX_COORDINATES)).astype(int))
    eps = max((float(np.finfo(dtype).eps) for dtype in floats), default=0.0)
    return Chains([names[i] for i in kept], values[..., kept], eps)


def check_finite(recorded: Recorded) -> Finding:
    """Check that all draws are finite, and name some that are not."""
    bad = []
    for name, value in recorded.variables.items():
        at = np.argwhere(~np.isfinite(np.asarray(value, float)))
        bad += [(name, *index) for index in at[:3]]
    count = sum(int(np.sum(~np.isfinite(np.asarray(v, float)))) for v in recorded.variables.values())
    places = "; ".join(f"{name}{list(map(int, rest))} in chain {c}, draw {d}" for name, c, d, *rest in bad[:3])
    return judge(
        "finite draws",
        f"{count} values are not finite: {places}" if count else "all draws are finite",
        "all finite",
        "Look at the energy there (overflow, a logarithm of 0), use a smaller step_size, or a kernel that rejects.",
        is_bad=count,
    )


def check_moves(chains: Chains) -> Finding:
    """Check that the chains move."""
    if chains.values.shape[1] < 2:
        return unchecked("movement", "one draw per chain")
    frozen = np.flatnonzero(chains.are_frozen)
    measured = f"chains {list(map(int, frozen))} are frozen" if frozen.size else "all chains move"
    return judge(
        "movement",
        f"{measured}; the slowest moves in {chains.move_rates.min():.1%} of its transitions",
        f"at least {COLLAPSED_ACCEPTANCE:.0%}, by more than rounding errors",
        "A frozen chain is worth one draw, whatever its R-hat and ESS. Use a smaller step_size and more num_warmup where "
        "proposals are rejected, a larger step_size where steps are tiny, and look at the energy where the chains are.",
        is_bad=frozen.size,
    )


def check_copies(chains: Chains) -> Finding:
    """Check that no two chains are the same."""
    values = chains.values
    if len(values) < 2:
        return unchecked("independent chains", "one chain", "Draw several: sample(..., num_chains=4).")
    flat = values.reshape(len(values), -1)
    seen: dict[bytes, int] = {}
    pairs = [(seen.setdefault(row.tobytes(), i), i) for i, row in enumerate(flat)]
    pairs = [pair for pair in pairs if pair[0] != pair[1]]
    return judge(
        "independent chains",
        f"chains {pairs[0][0]} and {pairs[0][1]} are identical" if pairs else "all chains are different",
        "all different",
        "Give each chain its own random key: jax.random.split(rng_key, num_chains).",
        is_bad=pairs,
    )


def check_growth(chains: Chains) -> Finding:
    """Check that the chains do not move away from where they began without limit."""
    values = chains.values
    quarter = values.shape[1] // 4
    if quarter < 2:
        return unchecked("growth", "fewer than 8 draws per chain")
    with np.errstate(all="ignore"):
        centre = np.median(values[:, :quarter], axis=1, keepdims=True)
        first, last = (np.median(np.abs(part - centre), axis=1) for part in (values[:, :quarter], values[:, -quarter:]))
        ratio = np.where(first > 0, last / first, 1.0)
    largest = float(np.max(np.where(np.isnan(ratio), np.inf, ratio), initial=0.0))
    return judge(
        "growth",
        f"in its last quarter a chain is up to {largest:.3g} times as far from its start as in its first",
        f"below {GROWTH:g}",
        "The energy may fall without limit, so that it has no density. Give the EnergyDistribution a base, or an energy "
        "that grows at infinity; or the warm-up was too short.",
        is_bad=not largest < GROWTH,
    )


def check_convergence(chains: Chains, lp: np.ndarray | None, min_ess: float) -> list[Finding]:
    """Check the rank-normalised split R-hat and the bulk and tail ESS of all coordinates and of the log density."""
    names, values = list(chains.names), chains.values
    if lp is not None and lp.shape == values.shape[:2]:
        names, values = [*names, "lp"], np.concatenate([values, np.asarray(lp, float)[..., None]], axis=2)
    num_chains, num_draws, _ = values.shape
    why = _why_not(chains, num_draws)
    constant = np.all(values == values[:1, :1], axis=(0, 1))
    keep = np.flatnonzero(np.all(np.isfinite(values), axis=(0, 1)) & ~constant)
    if why or not keep.size:
        advice = "See the other findings first." if num_draws >= 8 else "Draw more: num_samples=1000."
        return [unchecked(name, why or "no coordinate is finite and moves", advice) for name in ("R-hat", "ESS")]
    names, values = [names[i] for i in keep], values[..., keep]
    found = [_check_ess(names, values, min_ess)]
    if num_chains < 2:
        return [unchecked("R-hat", "R-hat needs two or more chains", "Draw several: sample(..., num_chains=4)."), *found]
    return [_check_rhat(names, values), *found]


def _why_not(chains: Chains, num_draws: int) -> str:
    if num_draws < 8:
        return "fewer than 8 draws per chain"
    return "all chains are frozen, and have no R-hat and no effective draws" if chains.are_frozen.all() else ""


def _check_rhat(names: list[str], values: Float[np.ndarray, "chains draws coordinates"]) -> Finding:
    """Check R-hat against 1.01, or against the value that converged chains of this length may reach by chance."""
    stuck = np.all(values == values[:, :1], axis=(0, 1))
    rhat = np.where(stuck, np.inf, rank_rhat(values))
    # The effective size of the worst single chain, because chains that disagree have no common effective size.
    within = np.nan_to_num(effective_size(np.moveaxis(values, 0, 2)[None]), nan=1.0).min(axis=-1)
    halves = 2 * len(values)
    noise = chi2_bound(halves - 1, len(names)) / (halves - 1) / np.maximum(within / 2, 1.0)
    bound = np.clip(np.sqrt(1 + noise), RHAT, RHAT_AT_MOST)
    worst = int(np.nanargmax((rhat - 1) / (bound - 1)))
    return judge(
        "R-hat",
        f"{rhat[worst]:.4g} of {names[worst]}",
        f"below {bound[worst]:.3g} for chains of this length",
        "The chains have not converged to one distribution. Use more num_warmup and num_samples; for chains in different "
        "modes use kernel='parallel_tempering', or better starts.",
        is_bad=not rhat[worst] < bound[worst],
    )


def _check_ess(names: list[str], values: Float[np.ndarray, "chains draws coordinates"], min_ess: float) -> Finding:
    sizes = {method: effective_size(values, method) for method in ("bulk", "tail")}
    method = min(sizes, key=lambda each: np.nanmin(sizes[each]))
    worst = int(np.nanargmin(sizes[method]))
    smallest = float(sizes[method][worst])
    times = max(2, int(np.ceil(min_ess / max(smallest, 1.0))))
    return judge(
        "ESS",
        f"{smallest:.3g} effective draws ({method}) of {names[worst]}, of {values.shape[0] * values.shape[1]}",
        f"at least {min_ess:g}",
        f"Draw {min(times, 100)} times as many, or use a kernel that moves farther: 'nuts', or another step_size.",
        is_bad=not smallest >= min_ess,
    )
