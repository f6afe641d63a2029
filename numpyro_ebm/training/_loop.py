"""From check to check: the callback, checkpoints, patience and progress, and the result however the run ends."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from numpyro_ebm._core.errors import CheckpointError, UnhealthyChainsError
from numpyro_ebm._core.storage import Storage
from numpyro_ebm.training._run import Run, chunks, out_of_patience, to_next_check
from numpyro_ebm.training._task import Task
from numpyro_ebm.training.checkpoints import save
from numpyro_ebm.training.recording import chains_of, health_of
from numpyro_ebm.training.results import FitResult


class Plan(NamedTuple):
    """How a run goes from check to check: the options of `fit` of these names, and whether it goes back."""

    num_steps: int
    check_every: int
    patience: int | None
    goes_back: bool
    callback: Callable[[dict[str, float]], object] | None
    progress_bar: bool
    checkpoint_every: int | None


def to_the_end(run: Run, task: Task, plan: Plan, storage: Storage | None) -> Run:
    """Go on with a run until it stops. What an error leaves of it is in the error."""
    bar = tqdm(total=plan.num_steps, initial=run.num_updates, disable=not plan.progress_bar)
    lengths = chunks(run.num_updates, plan.num_steps, plan.check_every)
    run = _patient(run, plan)
    try:
        with bar:
            while run.stopped is None and (length := next(lengths, None)):
                num_checks = len(run.history)
                run = to_next_check(run, task, length, plan.check_every, goes_back=plan.goes_back)
                run = _told(run, plan) if len(run.history) > num_checks else run  # none after a rollback
                run = _patient(run, plan)
                bar.set_postfix_str(_progress(run), refresh=False)
                bar.update(run.num_updates - bar.n)
                if storage is not None:
                    _keep(storage, run, plan)
    except KeyboardInterrupt:
        return run._replace(stopped="interrupted")
    except UnhealthyChainsError as error:
        error.result = result_of(run._replace(stopped="unhealthy"), task)
        raise
    except CheckpointError as error:
        error.result = result_of(run, task)
        raise
    return run


def _patient(run: Run, plan: Plan) -> Run:
    is_over = run.stopped is None and out_of_patience(run, plan.patience)
    return run._replace(stopped="patience") if is_over else run


def _keep(storage: Storage, run: Run, plan: Plan) -> None:
    """Write a checkpoint if it is time, and at the end, unless the run ended in a state that is not to be continued."""
    last = storage.step or 0
    is_end = run.stopped is not None or run.num_updates >= plan.num_steps
    is_due = is_end or run.num_updates - last >= (plan.checkpoint_every or 1)
    if is_due and run.num_updates > last and run.stopped not in ("nonfinite", "unhealthy"):
        save(storage, run._replace(**(run.before or {})))


def _told(run: Run, plan: Plan) -> Run:
    """Tell the callback the figures of the last check."""
    if plan.callback is None or run.stopped:
        return run
    try:
        plan.callback(dict(run.history[-1]))
    except Exception as error:
        return run._replace(stopped="callback", error=f"The callback raised {type(error).__name__}: {error}")
    return run


def _progress(run: Run) -> str:
    words = [f"loss {run.losses[-1].mean(dtype=float):.4g}"] if run.losses else []
    words += [f"held-out {run.held_out_losses[-1]:.4g}"] if run.held_out_losses else []
    words += [f"rollbacks {len(run.rollbacks)}"] if run.rollbacks else []
    return ", ".join(words)


def result_of(run: Run, task: Task) -> FitResult:
    """Return the result of a run as it is.

    The parameters before training are not the best ones because no later held-out loss is finite.
    """
    last = task.for_users(task.params(run.carry))
    if len(run.held_out_losses) > 1 and not np.isfinite(run.held_out_losses[1:]).any():
        run = run._replace(params=None)
    names = dict.fromkeys(name for figures in run.history for name in figures)
    return FitResult(
        last if run.params is None else task.for_users(run.params),
        run.carry.svi,
        np.concatenate(run.losses) if run.losses else np.zeros(0),
        np.asarray(run.held_out_losses),
        np.asarray(run.check_steps, int),
        run.reached if run.params is None else run.best_step,
        run.stopped or "end",
        chains_of(run.looks),
        health_of(run.looks),
        None if task.decay is None else last,
        {name: np.array([figures.get(name, np.nan) for figures in run.history]) for name in names},
        run.rollbacks,
        task.svi.model,
        run.carry.average,
        run.num_batches,
        run.carry.rate,
    )
