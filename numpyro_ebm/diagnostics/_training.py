"""Checks of a training: losses, chains of the negative phase, and reported figures of the data."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from numpyro.infer.svi import SVIRunResult, SVIState

from numpyro_ebm._core.programs import compiled
from numpyro_ebm._core.spreads import spread
from numpyro_ebm.diagnostics._bounds import normal_bound
from numpyro_ebm.diagnostics._data import MAX_POINTS, MIN_POINTS, modes
from numpyro_ebm.diagnostics._findings import Finding, judge, unchecked
from numpyro_ebm.diagnostics.reports import NothingToReport, SiteReport, site_report, training_report
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators import CONDITIONS, AbstractEstimator
from numpyro_ebm.estimators.dsm import SMOOTHING_BOUNDS
from numpyro_ebm.estimators.state import EstimatorState, Pool, carried, chain_states
from numpyro_ebm.handlers import estimate
from numpyro_ebm.handlers.energy_sites import energy_sites
from numpyro_ebm.handlers.results import Result, mutable_state, values_of
from numpyro_ebm.training import FitResult
from numpyro_ebm.training.overfitting import held_out_rise, runaway
from numpyro_ebm.training.unseen import REMEDY, Occurrences, occurrences, unseen

OVERLAP = 0.01
"""Least overlap of data and noise, at least `EFFECTIVE_ROWS` rows: with less the classifier gives almost no gradient."""
EFFECTIVE_ROWS = 10
"""Fewest rows in the overlap of data and noise, since only these give a gradient."""
SCORE_DEPARTURE = 0.25
"""Difference of logs beyond sampling error that still counts as the optimum; smaller values ask for longer training."""
FALLING = 0.02
"""Share of the whole fall of the loss in the last fifth of the updates; smaller values ask for longer training."""
MIN_UPDATES = 100
"""Fewest updates for the check of descent, each of whose batches then has two losses or more."""


class Seen:
    """A trained site, with the energies of its rows.

    Attributes:
        estimator: the estimator of the site.
        site: the laid-out rows.
        energies: minus the log density in unconstrained space, of the rows that take part.
    """

    def __init__(self, estimator: AbstractEstimator, site: Site, energies: Float[np.ndarray, " {site.num_rows}"]):
        self.estimator, self.site = estimator, site
        keep = slice(None) if site.mask is None else np.asarray(site.mask)
        self.energies = energies[keep]
        self.rows = np.asarray(site.position)[keep].reshape(len(self.energies), -1)


def check_training(model: estimate, result: Result, args: tuple, kwargs: dict[str, Any]) -> list[Finding]:
    """Check a model with the result of its training."""
    found, has_rows = check_losses(result, _roles(model)), not isinstance(result, SVIState) and bool(args or kwargs)
    if has_rows:
        counted = occurrences(model, values_of("diagnose", result), args, kwargs)
        found += [_values(name, each) for name, each in counted.items()]
    try:
        reports = training_report(model, result, *args, **kwargs).sites
    except NothingToReport as error:
        return [*found, unchecked("figures", str(error))]
    seen = _look(model, result, args, kwargs) if has_rows else {}
    pools = {site: chains.pool for site, chains in chain_states(mutable_state(result)).items()}
    for report in reports:
        found += _site(report, seen.get(report.site))
        pool = pools.get(report.site)
        if pool is not None and report.site in seen and seen[report.site].estimator.persists_chains:
            found += _pool(seen[report.site], pool)
    return found


def check_result(result: FitResult | SVIRunResult | SVIState) -> list[Finding]:
    """Check a result without its model."""
    found = check_losses(result, set())
    for each in carried(mutable_state(result)):
        if isinstance(each.state, EstimatorState) and each.state.chains is not None:
            report = site_report(each, {})
            found += [_conditions(report), _gap(report, None)]
    return [*found, unchecked("figures", "figures of the data need the model", "Write diagnose(model, result, x).")]


def check_losses(result: object, roles: set[str]) -> list[Finding]:
    """Check the losses, where the result has any."""
    if not isinstance(result, FitResult | SVIRunResult):
        return [unchecked("loss", "a state has no losses", "Pass the result of fit or of svi.run.")]
    losses = np.asarray(result.losses, float)
    bad = np.flatnonzero(~np.isfinite(losses))
    found = [
        judge(
            "loss",
            f"{bad.size} of {losses.size} losses are not finite, the first at update {bad[0] + 1}" if bad.size else "finite",
            "finite",
            "Use a smaller learning rate, optax.chain(optax.clip_by_global_norm(1.0), ...), or look where the energy "
            "overflows.",
            is_bad=bad.size or getattr(result, "stopped", "") == "nonfinite",
        )
    ]
    if "gradient" in roles or not roles:
        why = "the surrogate of a 'gradient' estimator measures no fit" if roles else "the estimator is not known here"
        found.append(unchecked("descent", why, "" if roles else "Write diagnose(model, result, x)."))
    elif not bad.size:
        found += _descent(losses)
    if isinstance(result, FitResult) and result.held_out_losses.size > 1:
        rise = held_out_rise(result.held_out_losses, result.check_steps, losses[: result.check_steps[-1]])
        found.append(
            judge(
                "held-out loss",
                rise or "it has not risen well above its best",
                "no rise",
                "The energy has memorised its rows. Stop early with fit(..., patience=5), or use more rows, a smaller "
                "network, or an estimator whose loss has a lower bound, 'dsm' or 'regularized_sm'.",
                is_bad=rise,
            )
        )
    return found


def _roles(model: estimate) -> set[str]:
    estimators = model.estimators.values() if isinstance(model.estimators, dict) else [model.estimators]
    return {each.role for each in estimators}


def _descent(losses: Float[np.ndarray, " updates"]) -> list[Finding]:
    """Check whether the losses still fall, by means of ten batches each of the last two fifths."""
    if losses.size < MIN_UPDATES:
        return [unchecked("descent", f"fewer than {MIN_UPDATES} updates")]
    fall = runaway(losses)
    if fall:
        advice = "Pass held-out rows, fit(..., held_out=(x_test,), patience=5), or use 'dsm' or 'regularized_sm'."
        return [judge("descent", fall, "a loss that settles", advice, is_bad=True)]
    width = losses.size // 50
    batches = losses[losses.size - 20 * width :].reshape(20, width).mean(axis=1)
    before, last = batches[:10], batches[10:]
    change = before.mean() - last.mean()
    error = np.sqrt((before.var(ddof=1) + last.var(ddof=1)) / 10)
    whole = max(float(losses[:width].mean() - last.mean()), 0.0)
    part = change / whole if whole > 0 and spread(losses) > 0 else 0.0
    return [
        judge(
            "descent",
            f"the last fifth of the updates made {part:.1%} of the whole fall, {change / max(error, 1e-300):.2g} "
            "standard errors",
            f"below {FALLING:.0%}, or {normal_bound():.2g} standard errors",
            "The loss still falls: train for longer, or with a larger learning rate.",
            is_bad=part > FALLING and change > normal_bound() * error,
        )
    ]


def _look(model: estimate, result: Result, args: tuple, kwargs: dict[str, Any]) -> dict[str, Seen]:
    found, _ = energy_sites(model.fn, values_of("diagnose", result), args, kwargs)
    seen = {}
    for estimator, site in model.lay_out(found).values():
        if site.distribution.has_energy and site.missing is None:
            log_density = compiled(jax.vmap(site.log_density), site.position, site.local)
            seen[site.name] = Seen(estimator, site, -np.asarray(log_density))
    return seen


def _site(report: SiteReport, seen: Seen | None) -> list[Finding]:
    figures, name = report.figures, report.site
    found = []
    if "acceptance_rate" in figures and "energy_gap" in figures:
        found += [_conditions(report), _gap(report, seen)]
    if "overlap" in figures:
        found += _overlap(name, figures, seen)
    if "smoothing_min" in figures:
        found.append(_smoothing(name, figures))
    if "score_norm" in figures:
        found.append(_score(name, figures, seen))
    return found or [
        unchecked(f"{name} figures", f"the figures of '{report.estimator}' have no bounds: see training_report")
    ]


def _conditions(report: SiteReport) -> Finding:
    held = report.held
    return judge(
        f"{report.site} chains",
        f"these hold: {', '.join(held)}" if held else f"none of {', '.join(CONDITIONS)} holds",
        "none",
        " ".join(report.conditions),
        is_bad=held,
    )


def _gap(report: SiteReport, seen: Seen | None) -> Finding:
    """Check the energy of the data minus that of the chains, in standard errors of both batches."""
    name, gap = f"{report.site} energy gap", report.figures["energy_gap"]
    if not np.isfinite(gap):
        return unchecked(name, f"the gap is {gap}: there was no update, or chains are not finite")
    if seen is None:
        return unchecked(name, f"{gap:.3g} nats, with an unknown error", "Write diagnose(model, result, x).")
    error = float(spread(seen.energies) * np.sqrt(2 / len(seen.energies)))
    ratio = abs(gap) / error if error > 0 else 0.0
    return judge(
        name,
        f"data minus chains {gap:.3g} nats, {ratio:.2g} standard errors",
        f"below {normal_bound():.2g}",
        "Chains and data are at different energies: the chains do not follow the energy. Use more num_steps, a smaller "
        "learning rate, or chains that persist ('pcd').",
        is_bad=ratio > normal_bound(),
    )


def _overlap(name: str, figures: Mapping[str, float], seen: Seen | None) -> list[Finding]:
    overlap, rows = figures["overlap"], None if seen is None else len(seen.energies)
    least = OVERLAP if rows is None else max(OVERLAP, min(EFFECTIVE_ROWS / rows, 0.5))
    found = [
        judge(
            f"{name} overlap",
            f"noise and data overlap by {overlap:.2g}",
            f"at least {least:.2g}",
            "The classifier is saturated, and nothing more is learned. Use noise nearer to the data: noise=... with a "
            "distribution fitted to them, 'flow_nce', or 'tre' with intermediate steps.",
            is_bad=not overlap >= least,
        )
    ]
    if rows is None or "accuracy" not in figures:
        return found
    expected = 1 - overlap / 2
    error = 0.5 / np.sqrt(rows)
    ratio = abs(figures["accuracy"] - expected) / error
    found.append(
        judge(
            f"{name} accuracy",
            f"{figures['accuracy']:.3g} for data against noise, {expected:.3g} for an energy that fits, {ratio:.2g} "
            "standard errors apart",
            f"below {normal_bound():.2g}",
            "The energy does not fit the data yet: train for longer, or use a more flexible energy.",
            is_bad=not ratio <= normal_bound(),
        )
    )
    return found


def _smoothing(name: str, figures: Mapping[str, float]) -> Finding:
    smallest, largest = figures["smoothing_min"], figures["smoothing_max"]
    low, high = SMOOTHING_BOUNDS
    return judge(
        f"{name} smoothing",
        f"sigma is {smallest:.3g} to {largest:.3g} standard deviations of the data",
        f"{low} to {high}",
        "The loss is almost all noise: use a larger sigma, or control_variate=True."
        if smallest < low
        else "The noise is wider than the data, and the energy is that of the smoothed data: use a smaller sigma.",
        is_bad=not (smallest >= low and largest <= high),
    )


def _score(name: str, figures: Mapping[str, float], seen: Seen | None) -> Finding:
    r"""Check :math:`E|s|^2 = -E \operatorname{tr} \nabla s`, with a Gaussian's standard error for that of the ratio."""
    square, trace = figures["score_norm"] ** 2, figures["trace_per_dim"]
    noise = 0.0 if seen is None else np.sqrt(2 / seen.rows.size)
    bound = SCORE_DEPARTURE + normal_bound() * noise
    departure = abs(np.log(square / -trace)) if square > 0 > trace else np.inf
    return judge(
        f"{name} score",
        f"square of the score {square:.3g} and minus its divergence {-trace:.3g} per dimension, their logs {departure:.2g} "
        "apart",
        f"below {bound:.2g}; equal at the optimum",
        "The energy is not at its optimum: train for longer. On held-out rows: it has memorised the training rows.",
        is_bad=not departure < bound,
    )


def _values(name: str, counted: Occurrences) -> Finding:
    """Say which values no row has: no fault in itself, as of pixels that are dark in every image."""
    missing = unseen(counted)
    return Finding(f"{name} values", "ok", missing or "each column takes each of its values", "", REMEDY if missing else "")


def _pool(seen: Seen, pool: Pool) -> list[Finding]:
    """Compare the persistent chains with the data."""
    if seen.site.local is not None:
        return [unchecked(f"{seen.site.name} modes", "each row's chain has a density of its own")]
    kernel: Any = seen.estimator.kernel.bind(seen.site.distribution)  # pyright: ignore[reportAttributeAccessIssue]
    chains = np.asarray(jax.vmap(kernel.lower)(pool.position))
    chains = chains.reshape(len(chains), -1)[:MAX_POINTS]
    chains = chains[np.all(np.isfinite(chains), axis=1)]
    size = min(len(chains), len(seen.rows))
    if size < MIN_POINTS:
        return [unchecked(f"{seen.site.name} modes", f"fewer than {MIN_POINTS} chains or rows to compare")]
    rows = seen.rows[np.random.default_rng(0).permutation(len(seen.rows))[:size]]
    return modes(seen.site.name, chains[:size], rows)[:2]
