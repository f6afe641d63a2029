"""Checks of the sampler's statistics: divergences, acceptance, tree depth, energies."""

from typing import Any

import numpy as np
from jaxtyping import Shaped

from numpyro_ebm._core.spreads import spread
from numpyro_ebm.diagnostics._bounds import normal_bound
from numpyro_ebm.diagnostics._findings import Finding, judge, unchecked
from numpyro_ebm.diagnostics.arviz.read import ByName, Recorded
from numpyro_ebm.diagnostics.arviz.statistics import effective_size
from numpyro_ebm.estimators.parts.health import NONFINITE_RATE

EBFMI = 0.3
"""Smallest healthy E-BFMI: the threshold of Stan's diagnostics, which comes from experience."""
SATURATED = 0.01
"""Share of trajectories that may end at the largest tree depth; each costs efficiency and not correctness."""
RUN = "sample(...) records it; for an MCMC write mcmc.run(..., extra_fields=('{}',))."


def check_sampler(recorded: Recorded, *, is_slow: bool) -> list[Finding]:
    """Run all checks that the recorded statistics allow.

    Args:
        recorded: the draws.
        is_slow: whether there are too few effective draws; only then is a high acceptance a fault.
    """
    stats, kernel = recorded.stats, recorded.kernel
    findings = [_divergences(stats), _acceptance(stats, kernel, is_slow=is_slow)]
    if "nonfinite" in stats:
        findings.append(_nonfinite(stats["nonfinite"]))
    depth = _longest(kernel)
    if depth is not None and {"tree_depth", "n_steps"} & set(stats):
        findings.append(_tree_depth(stats, depth))
    if "energy" in stats and np.all(np.isfinite(stats["energy"])):
        findings.append(_ebfmi(stats["energy"]))
    name = "lp" if "lp" in stats else "energy"
    findings.append(_trend(name, stats[name]) if name in stats else _no_energy())
    return findings


def _divergences(stats: ByName) -> Finding:
    if "diverging" not in stats:
        return unchecked("divergences", "no statistics came with the draws", RUN.format("diverging"))
    count = int(np.sum(stats["diverging"]))
    return judge(
        "divergences",
        f"{count} of {stats['diverging'].size} transitions diverged",
        "none",
        "Use a smaller step_size or a higher target acceptance and more num_warmup. Look for walls and narrow valleys of "
        "the energy at the divergent draws, and declare a support in the place of a wall.",
        is_bad=count,
    )


def _acceptance(stats: ByName, kernel: Any, *, is_slow: bool) -> Finding:
    rates = stats.get("acceptance_rate")
    if rates is None or not np.all(np.isfinite(rates)):
        return unchecked("acceptance", "no acceptance rates came with the draws", RUN.format("accept_prob"))
    if not getattr(kernel, "is_exact", True):
        return unchecked("acceptance", f"the kernel '{kernel.name}' never rejects: its draws have a bias from the step size")
    by_chain = rates.reshape(len(rates), -1).mean(axis=1)
    target = getattr(kernel, "target_acceptance", getattr(kernel, "_target_accept_prob", None))
    low = 0.1 if target is None else float(target) / 3
    high = 1.0 if target is None else 1 - (1 - float(target)) / 20
    is_low, is_high = by_chain.min() < low, is_slow and by_chain.max() > high
    advice = "Use a smaller step_size, or more num_warmup." if is_low else "The steps are too small: use a larger step_size."
    return judge(
        "acceptance",
        f"{by_chain.min():.2g} to {by_chain.max():.2g} by chain",
        f"at least {low:.2g}" + (f", and below {high:.3g} where effective draws are few" if target is not None else ""),
        advice,
        is_bad=is_low or is_high,
    )


def _nonfinite(flags: Shaped[np.ndarray, "chains draws ..."]) -> Finding:
    rate = float(np.mean(flags))
    return judge(
        "finite proposals",
        f"the log density was not finite at {rate:.1%} of the proposals, which kernels reject silently",
        f"below {NONFINITE_RATE:.0%}",
        "Declare the support of the energy in the place of a wall, or look where it overflows.",
        is_bad=rate > NONFINITE_RATE,
    )


def _longest(kernel: object) -> int | None:
    depth = getattr(kernel, "max_num_doublings", getattr(kernel, "_max_tree_depth", None))
    return depth[-1] if isinstance(depth, tuple) else depth


def _tree_depth(stats: ByName, depth: int) -> Finding:
    ended = stats["tree_depth"] >= depth if "tree_depth" in stats else stats["n_steps"] >= 2**depth - 1
    rate = float(np.mean(ended))
    return judge(
        "tree depth",
        f"{rate:.1%} of the trajectories ended at the largest depth, {depth}",
        f"below {SATURATED:.0%}",
        "The step is small for the width of the density: use more num_warmup, or coordinates of similar scale.",
        is_bad=rate > SATURATED,
    )


def _ebfmi(energy: Shaped[np.ndarray, "chains draws"]) -> Finding:
    variance = spread(energy.T) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        fraction = np.mean(np.diff(energy, axis=1) ** 2, axis=1) / variance
    smallest = float(np.min(np.where(variance > 0, fraction, 0.0)))
    return judge(
        "E-BFMI",
        f"{smallest:.2g} in the worst chain",
        f"at least {EBFMI}",
        "New momenta do not reach the energies of the tails (Betancourt 2016). Heavy tails need other coordinates, or more "
        "draws.",
        is_bad=smallest < EBFMI,
    )


def _no_energy() -> Finding:
    advice = "BlackJAXKernel records them; for NumPyro's kernels write mcmc.run(..., extra_fields=('potential_energy',))."
    return unchecked("energy trend", "no energies came with the draws", advice)


def _trend(name: str, values: Shaped[np.ndarray, "chains draws ..."]) -> Finding:
    """Compare the first half with the last, in standard errors by the effective sizes of both."""
    half = values.shape[1] // 2
    if half < 4:
        return unchecked("energy trend", "fewer than 8 draws per chain")
    if not np.all(np.isfinite(values)):
        return judge("energy trend", f"{name} is not finite", "finite", "Look at the energy at the draws.", is_bad=True)
    halves = [np.asarray(part, float) for part in (values[:, :half], values[:, -half:])]
    errors = [part.var() / max(float(effective_size(part)), 1.0) for part in halves]
    change = halves[1].mean() - halves[0].mean() if spread(values.ravel()) > 0 else 0.0
    error = np.sqrt(sum(errors))
    ratio = abs(change) / error if error > 0 else (np.inf if change else 0.0)
    return judge(
        "energy trend",
        f"mean {name} changes by {change:.3g} from the first half to the last, {ratio:.2g} standard errors",
        f"below {normal_bound():.2g}",
        "The chains are not stationary. Use more num_warmup; where the energy falls without limit, give it a base.",
        is_bad=ratio > normal_bound(),
    )
