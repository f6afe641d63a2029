"""`fit`: SVI with held-out rows and early stopping, which returns what was trained however the run ends."""

import warnings
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState
from tqdm import tqdm

from numpyro_ebm._core import programs
from numpyro_ebm._core.errors import EnergyError, NonFiniteLossWarning, OverfittingWarning, UnhealthyChainsError
from numpyro_ebm._core.inputs import as_arrays, check_key, check_outside_jit
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.pytrees import assemble
from numpyro_ebm._core.typing import Array, PRNGKey
from numpyro_ebm.estimators.parts.health import as_it_was_raised
from numpyro_ebm.training import _held_out
from numpyro_ebm.training._held_out import Arguments, check_taken, loss_and_params, row_differences, take_apart
from numpyro_ebm.training.overfitting import held_out_rise, is_significant, runaway
from numpyro_ebm.training.recording import (
    Look,
    RecordedChains,
    RecordedHealth,
    chains_of,
    check_recordable,
    estimators_of,
    health_of,
    look,
    look_at_pools,
)
from numpyro_ebm.training.unseen import new_values

Stop = Literal["end", "patience", "nonfinite", "interrupted", "unhealthy"]


class FitResult(NamedTuple):
    """Result of `fit`.

    Attributes:
        params: values of the ``numpyro.param`` sites: those of the best check with held-out rows, the last finite ones
            without.
        state: the last finite state of SVI; `fit` continues from it by ``init_state``.
        losses: ``(num_updates,)``, the loss of each update that was made, including non-finite ones.
        held_out_losses: loss of the held-out rows at each check, the first before any update; empty without such rows.
        check_steps: number of updates before each of these checks.
        best_step: number of updates that produced ``params``.
        stopped: why the run stopped: "end" (all updates were made), "patience", "nonfinite", "interrupted" (from the
            keyboard), or "unhealthy" (in the ``result`` of an `UnhealthyChainsError`).
        chains: `RecordedChains`; None without ``record_chains``.
        health: `RecordedHealth` (energy gap, acceptance and more at each check); None unless an estimator runs chains.
    """

    params: dict[str, Any]
    state: SVIState
    losses: Float[np.ndarray, " updates"]
    held_out_losses: Float[np.ndarray, " checks"]
    check_steps: Int[np.ndarray, " checks"]
    best_step: int
    stopped: Stop
    chains: RecordedChains | None = None
    health: RecordedHealth | None = None


class _Task(NamedTuple):
    """Training and held-out rows, with the repeated computations as programs, traced once per call of `fit`."""

    svi: SVI
    train: Arguments
    held_out: Arguments | None
    key_held_out: PRNGKey
    num_recorded: int = 0
    update: Any = None
    loss: Any = None
    look: Any = None


class _Run(NamedTuple):
    """A run so far. `fit` replaces it as a whole, so that an interruption leaves a consistent one."""

    state: SVIState
    params: dict[str, Any] | None
    losses: tuple[Float[np.ndarray, " updates"], ...] = ()
    held_out_losses: tuple[float, ...] = ()
    check_steps: tuple[int, ...] = ()
    best_step: int = 0
    stopped: Stop | None = None
    looks: tuple[Look, ...] = ()

    @property
    def num_updates(self) -> int:
        return sum(map(len, self.losses))


def fit(
    rng_key: PRNGKey,
    svi: SVI,
    num_steps: int,
    *args: Any,
    held_out: tuple | None = None,
    held_out_kwargs: dict[str, Any] | None = None,
    check_every: int = 100,
    patience: int | None = None,
    init_state: SVIState | None = None,
    init_params: dict[str, Any] | None = None,
    record_chains: int = 0,
    progress_bar: bool = True,
    **kwargs: Any,
) -> FitResult:
    r"""Run SVI as ``svi.run`` does, evaluate held-out rows on the way, and return what was trained however the run ends.

    The updates between two checks are one compiled ``lax.scan``. The update is traced at each call, and the traced
    computation is the key of the compiled program: a second call compiles nothing, and still sees every change in what the
    model, guide and energy read. Arrays among the arguments are traced, as in ``jax.jit(svi.update)``; numbers and strings
    stay as they are.

    Held-out rows replace the training rows in the same model and guide. Their loss is evaluated at each check under one
    fixed key, so that random losses (dsm, ssm, nce) change with the parameters alone. Losses are sums over rows, as in
    NumPyro, so those of training and held-out rows also differ by the numbers of rows; a model that subsamples evaluates one
    fixed subset. The number of rows has to come from the arguments: ``numpyro.plate("rows", len(x))``.

    Args:
        rng_key: random key; the updates are those of ``svi.run`` under it.
        svi: the SVI object, usually with a model from `estimate`.
        num_steps: number of updates.
        *args: positional arguments of the model and the guide.
        held_out: the positional arguments with held-out rows in their place, a tuple as long as ``args``; None for no
            held-out rows.
        held_out_kwargs: keyword arguments that differ for the held-out rows; the others are those of training.
        check_every: number of updates between checks.
        patience: stop when the held-out loss has not improved for this many checks in a row; None for never.
        init_state: state to continue from, as ``FitResult.state``; ``rng_key`` then serves the held-out loss alone.
        init_params: initial values of parameters, as in ``svi.run``.
        record_chains: how many persistent chains of each energy site ("pcd", "replay", "f_ebm") to record in
            ``FitResult.chains`` at every check. Each is the chain in one slot of the pool; "replay" occasionally restarts a
            slot.
        progress_bar: whether to show progress, with the mean loss since the last check and the held-out loss.
        **kwargs: keyword arguments of the model and the guide.

    Returns:
        `FitResult`. With held-out rows ``params`` are those of the check with the smallest held-out loss, with or without
        ``patience``, and ``state`` is the last one. A loss or parameters that are not finite stop the run at the next check,
        and a keyboard interruption stops it at once; both return the results so far.

    Raises:
        UnhealthyChainsError: under ``on_unhealthy="raise"``; its ``result`` is the `FitResult` as of the last check, from
            whose ``state`` training can continue.
        EnergyError: (a ValueError) for counts below 1, ``patience`` without held-out rows, held-out rows under a "gradient"
            estimator, whose surrogate has no meaningful value, held-out rows that the model does not accept or whose loss is
            not finite before training, ``init_params`` beside ``init_state``, and ``record_chains`` above the number of
            persistent chains.
        TypeError: for an ``svi`` that is not an SVI, and for ``held_out`` that is not such a tuple.

    Warns:
        OverfittingWarning: if the held-out loss has risen well above its best while the training loss fell, or if the loss
            of an "objective" estimator falls ever faster, as that of score matching can: it has no lower bound.
        NonFiniteLossWarning: if a loss or parameters become non-finite.

    Example:
        ``result = fit(key, svi, 5000, x_train, held_out=(x_test,), patience=5)``

    References:
        Prechelt, Early stopping, but when? (1998).
    """
    check_key("fit", rng_key)
    args, kwargs, held_out, held_out_kwargs = as_arrays("fit", (args, kwargs, held_out, held_out_kwargs))
    check_outside_jit("fit", rng_key, args, kwargs, held_out, held_out_kwargs, init_state, init_params)
    _check_settings(svi, num_steps, check_every, patience, is_held_out=held_out is not None or held_out_kwargs is not None)
    task = _make_task(rng_key, svi, args, kwargs, held_out, held_out_kwargs)._replace(num_recorded=record_chains)
    with as_it_was_raised():
        run, task = _start(rng_key, task, args, kwargs, init_state, init_params)
    try:
        with as_it_was_raised(), tqdm(total=num_steps, disable=not progress_bar) as bar:
            for length in _chunks(num_steps, check_every):
                run = _check(_record(_advance(run, task, length), task), task, patience)
                bar.set_postfix_str(_progress(run), refresh=False)
                bar.update(length)
                if run.stopped:
                    break
    except KeyboardInterrupt:
        run = run._replace(stopped="interrupted")
    except UnhealthyChainsError as error:
        error.result = _result(run._replace(stopped="unhealthy"), svi)
        raise
    result = _result(run, svi)
    _warn(result, task)
    return result


def _check_settings(svi: object, num_steps: object, check_every: object, patience: object, *, is_held_out: bool) -> None:
    if not isinstance(svi, SVI):
        raise TypeError(
            f"fit needs a numpyro.infer.SVI; got {type(svi).__name__}. Write fit(rng_key, SVI(estimate(model, 'dsm', "
            "sigma=0.1), empty_guide, optax.adam(1e-3), Trace_ELBO()), num_steps, x)."
        )
    check_count("fit", "num_steps", num_steps)
    check_count("fit", "check_every", check_every)
    if patience is not None:
        check_count("fit", "patience", patience)
        if not is_held_out:
            raise EnergyError(
                f"patience={patience} needs the loss of held-out rows, and there are none. Write fit(rng_key, svi, "
                f"num_steps, x_train, held_out=(x_test,), patience={patience})."
            )
    gradient = [estimator.name for estimator in estimators_of(svi) if estimator.role == "gradient"]
    if is_held_out and gradient:
        raise EnergyError(
            f"Held-out rows cannot be compared under the estimator '{gradient[0]}': only the gradient of its surrogate "
            "is meaningful, and its value is no measure of fit. Train without held_out and look at training_report, "
            "at draws or at estimates of log Z; or use an objective: estimate(model, 'dsm', sigma=0.1), 'ssm_vr' or 'nce'."
        )


def _make_task(
    rng_key: PRNGKey, svi: SVI, args: tuple, kwargs: dict, held_out: object, held_out_kwargs: dict[str, Any] | None
) -> _Task:
    key = jax.random.fold_in(rng_key, 1)
    train = take_apart(args, kwargs)
    if held_out is None and held_out_kwargs is None:
        return _Task(svi, train, None, key)
    if held_out is not None and (not isinstance(held_out, tuple) or len(held_out) != len(args)):
        what = f"a tuple of {len(held_out)}" if isinstance(held_out, tuple) else type(held_out).__name__
        raise TypeError(
            f"held_out replaces the model's {len(args)} positional arguments, as a tuple; got {what}. Write fit(rng_key, "
            "svi, num_steps, x_train, held_out=(x_test,)), or held_out_kwargs={'x': x_test} for keyword arguments."
        )
    rows = take_apart(args if held_out is None else held_out, kwargs | (held_out_kwargs or {}))
    return _Task(svi, train, rows, key)


def _start(
    rng_key: PRNGKey, task: _Task, args: tuple, kwargs: dict, init_state: SVIState | None, init_params: dict | None
) -> tuple[_Run, _Task]:
    if init_state is not None and init_params is not None:
        raise EnergyError("init_state already holds parameters, so init_params would have no effect. Pass one of the two.")
    state = init_state
    if state is None or task.svi.constrain_fn is None:  # init sets constrain_fn
        started = task.svi.init(rng_key, *args, init_params=init_params, **kwargs)
        state = started if state is None else state
    check_outside_jit("fit", state)
    check_recordable(task.svi, task.num_recorded, state)
    run = _Run(jax.tree.map(_strong, state), None)
    if task.held_out is not None:
        check_taken(task.svi, task.held_out, task.key_held_out, run.state)
    task = _traced(task, run.state)
    if task.held_out is None:
        return run, task
    run = _check(run, task, None)
    if not np.isfinite(run.held_out_losses[0]):
        raise EnergyError(
            f"The loss of the held-out rows is {run.held_out_losses[0]} before the first update. Look at these rows (NaN, "
            "values outside the support or at which the energy overflows) and at the initial parameters."
        )
    return run, task


def _traced(task: _Task, state: SVIState) -> _Task:
    """Return the task with its repeated computations traced as programs."""
    rows: Any = task.held_out
    svi, train, num = task.svi, task.train, task.num_recorded

    def update(state, arrays):
        args, kwargs = assemble(arrays, train.structure)
        return svi.update(state, *args, **kwargs)

    def loss(state, arrays):
        return loss_and_params(svi, rows._replace(arrays=arrays), task.key_held_out, state)

    def look_at(state, arrays):
        return look_at_pools(svi, train._replace(arrays=arrays), num, state)

    return task._replace(
        update=programs.trace(update, state, train.arrays),
        loss=None if rows is None else programs.trace(loss, state, rows.arrays),
        look=programs.trace(look_at, state, train.arrays) if num else None,
    )


def _strong(leaf: ArrayLike) -> Array:
    """Remove weak types. The first update would make them strong, and so need a second program."""
    leaf = jnp.asarray(leaf)
    return leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jax.lax.convert_element_type(leaf, leaf.dtype)


def _chunks(num_steps: int, check_every: int) -> Iterator[int]:
    for start in range(0, num_steps, check_every):
        yield min(check_every, num_steps - start)


def _advance(run: _Run, task: _Task, length: int) -> _Run:
    state, losses = _updates(task.update, run.state, task.train.arrays, length=length)
    is_finite = _all_finite([losses[-1], *jax.tree.leaves(task.svi.optim.get_params(state.optim_state))])
    losses = (*run.losses, np.asarray(losses))
    if not is_finite:
        return run._replace(losses=losses, stopped="nonfinite")
    return run._replace(state=state, losses=losses)


@programs.jit(static_argnames=("length",))
def _updates(update: programs.Program, state: SVIState, arrays: list[Any], *, length: int):
    return jax.lax.scan(lambda state, _: update(state, arrays), state, None, length=length)


@jax.jit
def _all_finite(leaves: list[Any]) -> Any:
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]).all()


def _record(run: _Run, task: _Task) -> _Run:
    if run.stopped:
        return run
    pools = programs.call(task.look, run.state, task.train.arrays) if task.num_recorded else ({}, {})
    return run._replace(looks=(*run.looks, look(run.state, run.num_updates, pools)))


def _check(run: _Run, task: _Task, patience: int | None) -> _Run:
    """Evaluate the loss of the held-out rows, and stop if ``patience`` has run out."""
    if task.held_out is None or run.stopped:
        return run
    loss, params = programs.call(task.loss, run.state, task.held_out.arrays)
    step, loss = run.num_updates, float(loss)
    is_better = run.params is None or loss < np.nanmin(run.held_out_losses)
    run = run._replace(held_out_losses=(*run.held_out_losses, loss), check_steps=(*run.check_steps, step))
    if is_better:
        return run._replace(params=params, best_step=step)
    waited = sum(step > run.best_step for step in run.check_steps)
    return run._replace(stopped="patience") if patience is not None and waited >= patience else run


def _progress(run: _Run) -> str:
    text = f"loss {run.losses[-1].mean(dtype=float):.4g}"
    return f"{text}, held-out {run.held_out_losses[-1]:.4g}" if run.held_out_losses else text


def _result(run: _Run, svi: SVI) -> FitResult:
    num_checked = run.num_updates - (len(run.losses[-1]) if run.stopped == "nonfinite" else 0)
    params = svi.get_params(run.state) if run.params is None else run.params
    return FitResult(
        params,
        run.state,
        np.concatenate(run.losses) if run.losses else np.zeros(0),
        np.asarray(run.held_out_losses),
        np.asarray(run.check_steps, int),
        num_checked if run.params is None else run.best_step,
        run.stopped or "end",
        chains_of(run.looks),
        health_of(run.looks),
    )


def _warn(result: FitResult, task: _Task) -> None:
    if result.stopped == "nonfinite":
        bad = np.flatnonzero(~np.isfinite(result.losses))
        what = f"The loss is {result.losses[bad[0]]} at update {bad[0] + 1}" if bad.size else "Parameters are not finite"
        warnings.warn(
            f"{what}, and training stopped after {len(result.losses)} updates. The parameters returned are those after "
            f"{result.best_step}. {_held_out.why_nonfinite(task.train)}",
            NonFiniteLossWarning,
            stacklevel=3,
        )
    elif result.stopped != "patience":
        words = _overfitting(result, task)
        if words:
            warnings.warn(words, OverfittingWarning, stacklevel=3)


def _overfitting(result: FitResult, task: _Task) -> str | None:
    remedies = "more rows, a smaller network, or an estimator whose loss has a lower bound, 'dsm' or 'regularized_sm'"
    if result.check_steps.size > 1:
        curves = result.held_out_losses, result.check_steps, result.losses[: result.check_steps[-1]]
        rise = held_out_rise(*curves)
        if rise and is_significant(_row_differences(result, task)):
            new = new_values(task.svi, task.train, cast(Arguments, task.held_out), result.params)
            return (
                f"Overfitting: {rise}. The parameters returned are those after {result.best_step}. Stop there with "
                f"fit(..., patience=5), or use {remedies}.{new}"
            )
    estimators = estimators_of(task.svi)
    if not estimators or any(estimator.role == "gradient" for estimator in estimators):
        return None
    fall = runaway(result.losses)
    return f"Overfitting: {fall}. Write fit(..., held_out=(x_test,), patience=5), or use {remedies}." if fall else None


def _row_differences(result: FitResult, task: _Task) -> list[Float[np.ndarray, "..."]]:
    """Return the increase in each held-out row's loss from the best check to the end; empty if a guide draws many times."""
    if getattr(task.svi.loss, "multi_sample_guide", False):
        return []
    mutable = result.state.mutable_state or {}
    before, after = (params | mutable for params in (result.params, task.svi.get_params(result.state)))
    return row_differences(task.svi, cast(Arguments, task.held_out), task.key_held_out, before, after)
