"""What `fit` warns of at its end: losses that are not finite, overfitting, and a run that was stopped from outside."""

import warnings
from typing import Any, cast

import numpy as np
from jaxtyping import Float

from numpyro_ebm._core.errors import NonFiniteLossWarning, OverfittingWarning, TrainingStoppedWarning
from numpyro_ebm.training._held_out import Arguments, row_differences, why_nonfinite
from numpyro_ebm.training._run import Run
from numpyro_ebm.training._task import Task
from numpyro_ebm.training.overfitting import held_out_rise, is_significant, runaway
from numpyro_ebm.training.recording import estimators_of
from numpyro_ebm.training.results import FitResult
from numpyro_ebm.training.unseen import new_values


def warn_of(result: FitResult, task: Task, run: Run) -> None:
    """Warn of what a run has shown.

    Args:
        result: its result.
        task: the training.
        run: the run at its end.

    Warns:
        NonFiniteLossWarning: if a loss, also of held-out rows, or parameters became non-finite.
        OverfittingWarning: if the held-out loss has risen, or the training loss falls without limit.
        TrainingStoppedWarning: if the run was stopped from outside.
    """
    found: tuple[Any, str | None] = (None, None)
    if result.stopped == "nonfinite":
        found = NonFiniteLossWarning, _nonfinite(result, task, run.suspect)
    elif run.error is not None:
        after = f"{run.error}, and training stopped after {len(result.losses)} updates. The result is as of then; fit(..., "
        found = TrainingStoppedWarning, f"{after}init_state=result) goes on from it."
    elif not np.isfinite(result.held_out_losses).all():
        found = NonFiniteLossWarning, _nonfinite_held_out(result)
    elif result.stopped != "patience":
        found = OverfittingWarning, _overfitting(result, task)
    if found[1]:
        warnings.warn(found[1], found[0], stacklevel=3)


def _nonfinite(result: FitResult, task: Task, suspect: str | None) -> str:
    bad = np.flatnonzero(~np.isfinite(result.losses))
    what = f"The loss is {result.losses[bad[0]]} at update {bad[0] + 1}" if bad.size else "Parameters are not finite"
    return (
        f"{what}, and training stopped after {len(result.losses)} updates. The parameters returned are those after "
        f"{result.best_step}. {suspect or why_nonfinite(task.train.arrays)}"
    )


def _nonfinite_held_out(result: FitResult) -> str:
    bad = ~np.isfinite(result.held_out_losses)
    first, which = result.check_steps[bad][0], "the best of the others"
    if bad[1:].all():
        which = "the last ones, as there is none to compare after the start"
    return (
        f"The held-out loss is not finite at {bad.sum()} of {bad.size} checks, first after {first} updates. The parameters "
        f"returned are {which}, those after {result.best_step}. Look at what the loss computes from the parameters there."
    )


def _overfitting(result: FitResult, task: Task) -> str | None:
    remedies = "more rows, a smaller network, or an estimator whose loss has a lower bound, 'dsm' or 'regularized_sm'"
    if task.held_out is not None and result.check_steps.size > 1:
        curves = result.held_out_losses, result.check_steps, result.losses[: result.check_steps[-1]]
        rise = held_out_rise(*curves)
        if rise and is_significant(_row_differences(result, task)):
            return (
                f"Overfitting: {rise}. The parameters returned are those after {result.best_step}. Stop there with "
                f"fit(..., patience=5), or use {remedies}.{_new_values(result, task)}"
            )
    estimators = estimators_of(task.svi)
    if not estimators or any(estimator.role == "gradient" for estimator in estimators):
        return None
    fall = runaway(result.losses)
    return f"Overfitting: {fall}. Write fit(..., held_out=(x_test,), patience=5), or use {remedies}." if fall else None


def _new_values(result: FitResult, task: Task) -> str:
    """Describe values that held-out rows have and no training row has, where all training rows are at hand."""
    return "" if task.feed is not None else new_values(task.svi, task.train, cast(Arguments, task.held_out), result.params)


def _row_differences(result: FitResult, task: Task) -> list[Float[np.ndarray, "..."]]:
    """Return the increase in each held-out row's loss from the best check to the end; empty if a guide draws many times."""
    if getattr(task.svi.loss, "multi_sample_guide", False):
        return []
    mutable = result.state.mutable_state or {}
    last = task.svi.get_params(result.state) if result.ema_params is None else result.ema_params
    before, after = (params | mutable for params in (result.params, last))
    return row_differences(task.svi, cast(Arguments, task.held_out), task.key_held_out, before, after)
