"""`fit`: SVI with batches, held-out rows and checkpoints, which returns what was trained however the run ends."""

import numbers
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.inputs import as_arrays, check_key, check_outside_jit
from numpyro_ebm._core.keys import is_key
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import Array, PRNGKey
from numpyro_ebm.estimators.parts.health import as_it_was_raised
from numpyro_ebm.training._held_out import check_taken, take_apart
from numpyro_ebm.training._loop import Plan, result_of, to_the_end
from numpyro_ebm.training._run import Run, check
from numpyro_ebm.training._task import Average, Carry, Task, check_scales_steps
from numpyro_ebm.training._warnings import warn_of
from numpyro_ebm.training.batches import Batch, Feed, Layout, feed_of
from numpyro_ebm.training.checkpoints import restored, storage_of
from numpyro_ebm.training.recording import check_recordable, estimators_of
from numpyro_ebm.training.results import FitResult
from numpyro_ebm.training.sharding import TrainingPlacement, sizes_of_plates


def fit(
    rng_key: PRNGKey,
    svi: SVI,
    num_steps: int,
    *args: Any,
    held_out: tuple | Callable[[dict[str, Any]], Any] | None = None,
    held_out_kwargs: dict[str, Any] | None = None,
    check_every: int = 100,
    patience: int | None = None,
    init_state: SVIState | FitResult | None = None,
    init_params: dict[str, Any] | None = None,
    record_chains: int = 0,
    progress_bar: bool = True,
    batches: Any = None,
    batch_size: int | None = None,
    data_size: int | None = None,
    row_plate: str | Sequence[str] | None = None,
    ema: float | None = None,
    on_unhealthy: Literal["rollback"] | None = None,
    callback: Callable[[dict[str, float]], object] | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int | None = None,
    sharding: Mesh | int | None = None,
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

    **Batches.** With ``batches`` each update takes other rows, which need not fit on the device: while an update runs, the
    next batch is read and sent. An array, also one that is mapped from a file, is shuffled anew in each epoch, by the key;
    its last batch is the rows that are left. In the model, the plate of the rows may be written for the batch,
    ``numpyro.plate("rows", len(x))``, or for the whole data set, ``numpyro.plate("rows", num_rows, subsample_size=len(x))``:
    the rows of a batch are scaled by their share, so that losses are those of the whole data set and priors count once.
    The indices of the first are places in the batch, ``x[i]``; those of the second are places in the data set, ``w[i]`` for
    a parameter with an entry for each of its rows.
    Weights and masks of rows are arguments of the model like the rows themselves: ``batches=(x, weight)``.

    **Checkpoints.** A folder ``checkpoint`` holds the last state of the run: parameters and their averages, moments of the
    optimiser, chains, random key, place in the data, and the record so far. The same call goes on from it, after a crash or
    with more ``num_steps``; a call that differs is refused with the difference. Of data, held-out rows and initial values
    checksums are compared, which read arrays above 64 MB in part (the first and the last 1000 rows, and 1000 between them);
    functions for ``held_out`` and ``callback``, and batches of an iterator, are not compared. An iterator of batches is set
    back where it can be (grain), or passed over to its place, for which it has to yield the same batches again.

    **Devices.** With ``sharding`` rows and persistent chains are split over the devices. Parameters are on all of them, or
    split over a second axis of the mesh. The results are those of one device up to rounding. Use ``batches`` of a size that
    the number of devices divides: rows that a plate subsamples from all devices have to be sent.

    **Averages.** With ``ema`` a moving average of the unconstrained parameters, :math:`\bar\theta \leftarrow \beta\bar\theta
    + (1 - \beta)\theta` with :math:`\beta` = ``ema``, without the weight of its start, stands for them in the held-out loss
    and in the result. It averages out the noise of single updates, most of which comes from the chains.

    Args:
        rng_key: random key; the updates are those of ``svi.run`` under it.
        svi: the SVI object, usually with a model from `estimate`.
        num_steps: number of updates.
        *args: positional arguments of the model and the guide.
        held_out: the positional arguments with held-out rows in their place, a tuple as long as those of training; or a
            function of the parameters that returns a loss, such as minus an estimated log likelihood, which also serves
            estimators whose surrogate has no meaningful value. None for neither.
        held_out_kwargs: keyword arguments that differ for the held-out rows; the others are those of training.
        check_every: number of updates between checks.
        patience: stop when the held-out loss has not improved for this many checks in a row; None for never.
        init_state: state to continue from: a `FitResult`, with its moving average, the size of steps after its rollbacks and
            its place in the batches, or ``FitResult.state`` without them. ``rng_key`` then serves the held-out loss and the
            order of the rows alone.
        init_params: initial values of parameters, as in ``svi.run``.
        record_chains: how many persistent chains of each energy site ("pcd", "replay", "f_ebm") to record in
            ``FitResult.chains`` at every check. Each is the chain in one slot of the pool; "replay" occasionally restarts a
            slot.
        progress_bar: whether to show progress, with the mean loss since the last check and the held-out loss.
        batches: rows by the batch: an array, a tuple of arrays (the first positional arguments of the model) or a dict of
            arrays (keyword arguments), all with the same number of rows; or an iterable that yields batches in these forms,
            such as a data loader. ``args`` follow after the batch. None if the arguments hold all rows.
        batch_size: number of rows of a batch, for arrays. Without ``batches`` it is an argument of the model.
        data_size: number of rows of the data set, for an iterable, where the plate of the rows does not say it.
        row_plate: name of the plate of the rows, if several have as many rows as the first batch, or a tuple of names if
            several hold the rows.
        ema: decay of a moving average of the parameters, such as 0.999 for one over about 1000 updates; None for none.
        on_unhealthy: "rollback" returns to the last healthy check if a loss or parameters are not finite or the chains are
            unhealthy (see `NegativePhaseHealth`), and goes on with steps of half the size and other random numbers.
            ``FitResult.rollbacks`` lists the returns; after 10 in a row the run stops. None only stops for what is not
            finite.
        callback: function of the figures of each check, a dict of numbers as in ``FitResult.history``:
            ``lambda figures: wandb.log(figures)``.
        checkpoint: a folder for checkpoints (extra ``checkpoint``), which are folders ``ebm_step_100`` in it; ``~`` is the
            user's home. If it holds one, the run goes on from it: its updates count among ``num_steps``, and the result is
            that of a run without interruption, bit for bit.
        checkpoint_every: number of updates between checkpoints, which are written at checks; None for one at each check.
        sharding: a `jax.sharding.Mesh`, whose first axis splits rows and chains and whose second axis, if any, splits the
            longest dimension of each parameter that it divides; or a number of devices for the first; None for one device.
        **kwargs: keyword arguments of the model and the guide.

    Returns:
        `FitResult`. With held-out rows ``params`` are those of the check with the smallest held-out loss, with or without
        ``patience``, and ``state`` is the last one. A loss or parameters that are not finite stop the run at the next check,
        and a keyboard interruption, an iterator of batches that ends or raises, a later batch that the model does not take,
        and a callback that raises stop it at once. All return the results so far, and ``stopped`` says why.

    Raises:
        UnhealthyChainsError: under ``on_unhealthy="raise"``; its ``result`` is the `FitResult` as of the last check, from
            whose ``state`` training can continue.
        EnergyError: (a ValueError) for counts below 1, ``patience`` without held-out rows, held-out rows under a "gradient"
            estimator, whose surrogate has no meaningful value, held-out rows that the model does not accept, a held-out loss
            that is not finite before training, ``init_params`` beside ``init_state``, and ``record_chains`` above the number
            of persistent chains; for batches without rows, without a plate that fits or with an unknown number of rows in
            all; for a model that looks up rows of a batch by places in the data set or the reverse, or whose plates leave
            out some of the rows; for an argument that is also in the batches; for ``ema`` outside of (0, 1), for "rollback"
            with an optimiser that is not from optax, and for a checkpoint of another model, estimator, data set, held-out
            set, initial values or version, naming the difference; for rows that ``sharding`` cannot split evenly.
        CheckpointError: (an OSError) if a checkpoint cannot be written or read; ``result`` is the `FitResult` so far.
        ImportError: for ``checkpoint`` without orbax.
        TypeError: for an ``svi`` that is not an SVI, for ``held_out`` that is not such a tuple, and for ``batches`` that are
            neither arrays nor iterable.

    Warns:
        OverfittingWarning: if the held-out loss has risen well above its best while the training loss fell, or if the loss
            of an "objective" estimator falls ever faster, as that of score matching can: it has no lower bound.
        NonFiniteLossWarning: if a loss, also of held-out rows, or parameters become non-finite.
        TrainingStoppedWarning: if the source of batches or the callback stopped the run.

    Example:
        ::

            result = fit(key, svi, 5000, x_train, held_out=(x_test,), patience=5)
            result = fit(key, svi, 50_000, batches=np.load("x.npy", mmap_mode="r"), batch_size=256, ema=0.999)

    References:
        Prechelt, Early stopping, but when? (1998).
    """
    check_key("fit", rng_key)
    watched, held_out = (held_out, None) if callable(held_out) else (None, held_out)
    args, kwargs, held_out, held_out_kwargs = as_arrays("fit", (args, kwargs, held_out, held_out_kwargs))
    check_outside_jit("fit", rng_key, args, kwargs, held_out, held_out_kwargs, init_state, init_params)
    has_held_out = held_out is not None or held_out_kwargs is not None
    _check_settings(svi, num_steps, check_every, patience, has_rows=has_held_out, is_watched=watched is not None)
    _check_options(ema, on_unhealthy, callback, checkpoint, checkpoint_every)
    goes_back = on_unhealthy == "rollback"
    if batches is None:
        _check_no_batches(data_size=data_size, row_plate=row_plate)
        feed, kwargs = None, kwargs if batch_size is None else kwargs | {"batch_size": batch_size}
    else:
        feed = feed_of(jax.random.fold_in(rng_key, 2), batches, batch_size, data_size)
    layout = Layout(0, ()) if feed is None else _first(feed).layout
    _check_given_once(layout, kwargs)
    placement = TrainingPlacement.of(sharding)
    train = take_apart(args, kwargs)
    if placement is not None:
        _check_can_split(placement, svi, feed, args, kwargs)
    task = Task(
        svi,
        train,
        _held_out_rows(args, kwargs, held_out, held_out_kwargs, len(args) + layout.num_args),
        jax.random.fold_in(rng_key, 1),
        feed,
        layout,
        plates=row_plate,
        num_rows=None if feed is None else feed.num_rows,
        decay=ema,
        num_recorded=record_chains,
        watched=watched,
        placement=placement,
    )
    with as_it_was_raised():
        run, task = _start(rng_key, task, init_state, init_params, goes_back=goes_back)
    plan = Plan(num_steps, check_every, patience, goes_back, callback, progress_bar, checkpoint_every)
    options = {"check_every": check_every, "ema": ema, "on_unhealthy": on_unhealthy, "batch_size": batch_size}
    options |= {"record_chains": record_chains}
    begin = {"init_params": init_params, "init_state": init_state}
    opened = nullcontext() if checkpoint is None else storage_of(checkpoint, task, run, rng_key, options, begin)
    with opened as storage:
        if storage is None or storage.step is None:
            run = _checked_first(run, task)
        else:
            run = restored(storage, task, run)
            if run.num_updates >= num_steps and run.num_updates % check_every:
                run = check(run, task)  # the last check of a run that ends between two, which is not stored
        run = to_the_end(run, task, plan, storage)
    result = result_of(run, task)
    warn_of(result, task, run)
    return result


def _check_settings(
    svi: object, num_steps: object, check_every: object, patience: object, *, has_rows: bool, is_watched: bool
) -> None:
    if not isinstance(svi, SVI):
        raise TypeError(
            f"fit needs a numpyro.infer.SVI; got {type(svi).__name__}. Write fit(rng_key, SVI(estimate(model, 'dsm', "
            "sigma=0.1), empty_guide, optax.adam(1e-3), Trace_ELBO()), num_steps, x)."
        )
    check_count("fit", "num_steps", num_steps)
    check_count("fit", "check_every", check_every)
    if patience is not None:
        check_count("fit", "patience", patience)
        if not (has_rows or is_watched):
            raise EnergyError(
                f"patience={patience} needs the loss of held-out rows, and there are none. Write fit(rng_key, svi, "
                f"num_steps, x_train, held_out=(x_test,), patience={patience})."
            )
    gradient = [estimator.name for estimator in estimators_of(svi) if estimator.role == "gradient"]
    if has_rows and is_watched:
        raise EnergyError("held_out is a function, so held_out_kwargs has no rows to go with it. Pass one of the two.")
    if has_rows and gradient:
        raise EnergyError(
            f"Held-out rows cannot be compared under the estimator '{gradient[0]}': only the gradient of its surrogate "
            "is meaningful, and its value is no measure of fit. Pass a function of the parameters, held_out=lambda params: "
            "-log_likelihood(...).mean; or use an objective: estimate(model, 'dsm', sigma=0.1), 'ssm_vr' or 'nce'."
        )


def _first(feed: Feed) -> Batch:
    try:
        return feed.peek()
    except StopIteration:
        raise EnergyError("batches= yields no batches. Check the filter or the file that they come from.") from None


def _check_given_once(layout: Layout, kwargs: dict[str, Any]) -> None:
    twice = sorted(kwargs.keys() & set(layout.names))
    if twice:
        raise EnergyError(
            f"The argument '{twice[0]}' is given twice, by itself and in batches=. Leave it out: fit(rng_key, svi, "
            f"num_steps, batches={{'{twice[0]}': {twice[0]}}}, batch_size=256)."
        )


def _check_options(ema: Any, on_unhealthy: object, callback: object, checkpoint: object, checkpoint_every: object) -> None:
    if ema is not None and not (isinstance(ema, numbers.Real) and 0 < float(ema) < 1):
        raise EnergyError(f"fit needs ema between 0 and 1; got ema={ema!r}. Write ema=0.999.")
    if on_unhealthy not in (None, "rollback"):
        raise EnergyError(f"fit needs on_unhealthy=None or 'rollback'; got {on_unhealthy!r}. Write on_unhealthy='rollback'.")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback needs a function of a dict; got {type(callback).__name__}. Write callback=print.")
    if checkpoint_every is not None:
        check_count("fit", "checkpoint_every", checkpoint_every)
        if checkpoint is None:
            raise EnergyError("checkpoint_every belongs to checkpoint=, and there is none. Write checkpoint='folder'.")


def _check_no_batches(**options: object) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise EnergyError(
            f"{given[0]} belongs to batches=, and there are none. Write fit(rng_key, svi, num_steps, batches=x, "
            "batch_size=256), or numpyro.plate('rows', len(x), subsample_size=256) in the model."
        )


def _check_can_split(placement: TrainingPlacement, svi: SVI, feed: Feed | None, args: tuple, kwargs: dict[str, Any]) -> None:
    if feed is not None:
        placement.check_batches(len(feed.peek().arrays[0]), feed.num_rows)
    else:
        plates = sizes_of_plates(svi.model, args, kwargs | svi.static_kwargs)
        placement.check_arguments(take_apart(args, kwargs).arrays, plates)


def _held_out_rows(
    args: tuple, kwargs: dict[str, Any], held_out: object, held_out_kwargs: dict[str, Any] | None, num_args: int
) -> Any:
    if held_out is None and held_out_kwargs is None:
        return None
    if held_out is not None and (not isinstance(held_out, tuple) or len(held_out) != num_args):
        what = f"a tuple of {len(held_out)}" if isinstance(held_out, tuple) else type(held_out).__name__
        raise TypeError(
            f"held_out replaces the model's {num_args} positional arguments, as a tuple; got {what}. Write fit(rng_key, "
            "svi, num_steps, x_train, held_out=(x_test,)), or held_out_kwargs={'x': x_test} for keyword arguments."
        )
    return take_apart(args if held_out is None else held_out, kwargs | (held_out_kwargs or {}))


def _start(rng_key: PRNGKey, task: Task, init_state: Any, init_params: dict | None, *, goes_back: bool) -> tuple[Run, Task]:
    if init_state is not None and init_params is not None:
        raise EnergyError("init_state already holds parameters, so init_params would have no effect. Pass one of the two.")
    before = init_state if isinstance(init_state, FitResult) else None
    state: Any = init_state if before is None else before.state
    if state is None or task.svi.constrain_fn is None or task.feed is not None:
        started, task = task.started(rng_key, init_params)
        state = started if state is None else state
    check_outside_jit("fit", state)
    check_recordable(task.svi, task.num_recorded, state)
    average = None
    if task.decay is not None:
        average = None if before is None else before.average
        average = Average.of(task.svi.optim.get_params(state.optim_state)) if average is None else average
    rate = None
    if goes_back:
        check_scales_steps(task.svi, state)
        rate = jnp.ones((), float) if before is None or before.rate is None else before.rate
    carry = jax.tree.map(_strong, Carry(state, average, rate))
    task = task.spread()
    carry = task.placed(carry)
    run = Run(carry, healthy=(carry, 0) if goes_back else None)
    if before is not None and task.feed is not None:
        task.feed.skip(before.num_batches)
        run = run._replace(num_batches=before.num_batches)
    return run, task


def _checked_first(run: Run, task: Task) -> Run:
    """Evaluate the held-out loss before any update, and refuse rows that the model does not take."""
    if task.held_out is not None:
        check_taken(task.svi, task.held_out, task.key_held_out, run.carry.svi)
    run = check(run, task)
    if run.held_out_losses and not np.isfinite(run.held_out_losses[0]):
        what = "of the held-out rows" if task.watched is None else "from the function held_out"
        raise EnergyError(
            f"The loss {what} is {run.held_out_losses[0]} before the first update. Look at the rows that it is computed "
            "from (NaN, values outside the support or at which the energy overflows) and at the initial parameters."
        )
    return run


def _strong(leaf: ArrayLike) -> Array:
    """Remove weak types. The first update would make them strong, and so need a second program."""
    leaf = jnp.asarray(leaf)
    return leaf if is_key(leaf) else jax.lax.convert_element_type(leaf, leaf.dtype)
