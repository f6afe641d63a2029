"""A run of `fit`: updates from check to check, what is kept of them, and the way back from an unhealthy state."""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from numpyro_ebm._core import programs
from numpyro_ebm._core.errors import UnhealthyChainsError
from numpyro_ebm.estimators import CONDITIONS
from numpyro_ebm.estimators.parts.health import as_it_was_raised
from numpyro_ebm.estimators.state import chain_states
from numpyro_ebm.training._task import Carry, Data, Task
from numpyro_ebm.training.batches import Batch, suspicious
from numpyro_ebm.training.recording import Look, look
from numpyro_ebm.training.results import Rollback, Stop

LOWER_RATE = 0.5
"""Factor of the steps after a rollback. Halving finds a rate that works within a factor of two."""
MOST_ROLLBACKS = 10
"""Rollbacks in a row, without a healthy check in between, before the run stops: steps are then a thousandth."""
MOST_AT_ONCE, MOST_BYTES = 16, 2**25
"""Most batches, and bytes of them, that one call of the device takes: calls cost more than small updates, batches memory."""
AT_CHECKS = ("params", "held_out_losses", "check_steps", "best_step", "healthy")
"""Fields of a run on which its future depends, and which a check changes."""
IN_FLIGHT = 2
"""Calls handed to the device and not finished: one that runs, and one whose batches are on their way."""


class Run(NamedTuple):
    """A run so far. `fit` replaces it as a whole, so that an interruption leaves a consistent one.

    Attributes:
        carry: the last finite state.
        params: constrained parameters of the best check; None without held-out rows.
        losses: losses of the updates, an array per check.
        held_out_losses: loss of the held-out rows at each check.
        check_steps: number of updates before each of these checks.
        best_step: number of updates before the best of them.
        stopped: why the run stopped; None while it goes on.
        looks: snapshots of the chains.
        history: figures at each check.
        rollbacks: in order.
        num_batches: number of batches used.
        feed_state: place of the iterator of batches after the last of them, if it has one.
        reached: number of updates that had been made when ``carry`` was reached.
        healthy: the last state that was healthy at a check, with its number of updates.
        error: why the source of batches or the callback failed.
        suspect: the first row that is not finite, in words.
        before: the fields of `AT_CHECKS` before a check that only the end of the run brought about: a longer run has none
            there. None after any other check.
    """

    carry: Carry
    params: dict[str, Any] | None = None
    losses: tuple[Float[np.ndarray, " updates"], ...] = ()
    held_out_losses: tuple[float, ...] = ()
    check_steps: tuple[int, ...] = ()
    best_step: int = 0
    stopped: Stop | None = None
    looks: tuple[Look, ...] = ()
    history: tuple[dict[str, float], ...] = ()
    rollbacks: tuple[Rollback, ...] = ()
    num_batches: int = 0
    feed_state: Any = None
    reached: int = 0
    healthy: tuple[Carry, int] | None = None
    error: str | None = None
    suspect: str | None = None
    before: dict[str, Any] | None = None

    @property
    def num_updates(self) -> int:
        """Number of updates made, those before a rollback included."""
        return sum(map(len, self.losses))


class Advanced(NamedTuple):
    """Updates from one check to the next.

    Attributes:
        carry: the state after them.
        losses: ``(updates,)``.
        norms: ``(updates,)``, of the gradients.
        data: the arrays of the last update; None if there was none.
        stopped: why there were fewer than asked for; None if there were not.
        error: the message of what failed.
        suspect: the first row of these batches that is not finite, in words.
        feed_state: place of the iterator of batches after the last that was used, if it has one.
    """

    carry: Carry
    losses: Float[np.ndarray, " updates"]
    norms: Float[np.ndarray, " updates"]
    data: Data | None
    stopped: Stop | None = None
    error: str | None = None
    suspect: str | None = None
    feed_state: Any = None


def chunks(done: int, num_steps: int, check_every: int) -> Iterator[int]:
    """Yield the numbers of updates up to each check, from ``done`` updates on; checks are at the same steps for all runs."""
    while done < num_steps:
        length = min(check_every - done % check_every, num_steps - done)
        yield length
        done += length


def to_next_check(run: Run, task: Task, length: int, check_every: int, *, goes_back: bool) -> Run:
    """Make ``length`` updates and the check after them."""
    began, before = time.perf_counter(), {name: getattr(run, name) for name in AT_CHECKS}
    try:
        with as_it_was_raised():
            made = _advance(run, task, length)
    except UnhealthyChainsError as error:
        if not goes_back:
            raise
        # How many batches had been taken depends on how far the device was: all of them are passed over.
        state = task.feed and task.feed.pass_over(run.num_batches + length, run.feed_state)
        made = Advanced(run.carry, np.full(length, np.nan), np.full(length, np.nan), None, feed_state=state)
        return _back(_counted(run, task, made), str(error))
    run = _counted(run, task, made)
    if not made.losses.size:
        return run
    seconds = time.perf_counter() - began
    if not _all_finite([made.losses[-1], task.svi.optim.get_params(made.carry.svi.optim_state)]):
        return _back(run, "nonfinite") if goes_back else run._replace(stopped="nonfinite")
    reason = _unhealthy(made.carry) if goes_back else ""
    if reason:
        return _back(run, reason)
    run = run._replace(carry=made.carry, reached=run.num_updates)
    run = run._replace(healthy=(run.carry, run.reached)) if goes_back else run
    run = _record(run, task, made.data)
    run = check(run, task)._replace(before=before if run.num_updates % check_every else None)
    return run._replace(history=(*run.history, _figures(run, made, seconds)))


def check(run: Run, task: Task) -> Run:
    """Evaluate the held-out loss, and keep the parameters if it is the best so far."""
    if not task.has_held_out:
        return run
    try:
        loss, params = task.loss(run.carry)
    except Exception as error:
        if task.watched is None or not run.losses:
            raise
        return run._replace(stopped="callback", error=f"The function held_out raised {type(error).__name__}: {error}")
    step = run.num_updates
    finite = [each for each in run.held_out_losses if np.isfinite(each)]
    is_better = run.params is None or (np.isfinite(loss) and loss < min(finite, default=np.inf))
    run = run._replace(held_out_losses=(*run.held_out_losses, loss), check_steps=(*run.check_steps, step))
    return run._replace(params=params, best_step=step) if is_better else run


def out_of_patience(run: Run, patience: int | None) -> bool:
    """Return whether the held-out loss has not improved for ``patience`` checks."""
    return patience is not None and sum(step > run.best_step for step in run.check_steps) >= patience


def _counted(run: Run, task: Task, made: Advanced) -> Run:
    """Count the updates, whatever comes of them."""
    losses = (*run.losses, made.losses) if made.losses.size else run.losses
    run = run._replace(losses=losses, stopped=made.stopped, error=made.error, suspect=made.suspect)
    if task.feed is None:
        return run
    return run._replace(num_batches=run.num_batches + len(made.losses), feed_state=made.feed_state)


def _advance(run: Run, task: Task, length: int) -> Advanced:
    if task.feed is not None:
        return _by_batch(run, task, length)
    data, carry = task.data([]), run.carry
    carry, (losses, norms) = _scan(task.update(carry, data), carry, data, length=length)
    return Advanced(task.placed(carry), np.asarray(losses), np.asarray(norms), data)


@programs.jit(static_argnames=("length",))
def _scan(update: programs.Program, carry: Carry, data: Data, *, length: int) -> Any:
    return jax.lax.scan(lambda carry, _: update(carry, data), carry, None, length=length)


def _by_batch(run: Run, task: Task, length: int) -> Advanced:
    """Make updates of one batch each; while some run, the next batches are read and sent to the device."""
    carry, feed_state = run.carry, run.feed_state
    measured: list[Any] = []
    last, stopped, error, suspect, left = None, None, None, None, length
    try:
        while left:
            size, batches = _taken(task.feed, left)
            found = next(filter(None, map(suspicious, batches)), None)
            data, update = _prepared(carry, task, batches, size, is_first=not (measured or run.losses))
            num, suspect, left = len(batches), suspect or found, left - len(batches)
            carry, figures = _loop(update, carry, data, np.int32(num), size=size)
            carry = task.placed(carry)
            measured.append((num, figures))
            last, feed_state = data, batches[-1].state
            jax.block_until_ready(measured[-IN_FLIGHT:][0])
    except KeyboardInterrupt:
        stopped = "interrupted"
    except _NoBatch as missing:
        stopped, error = "data", str(missing)
    losses, norms = (np.concatenate([np.asarray(each[i])[:num] for num, each in measured] or [np.zeros(0)]) for i in (0, 1))
    last = last.at(measured[-1][0] - 1) if last is not None else None
    return Advanced(carry, losses, norms, last, stopped, error, suspect, feed_state)


def _prepared(carry: Carry, task: Task, batches: list[Batch], size: int, *, is_first: bool) -> tuple[Data, programs.Program]:
    """Return the arrays of some batches and the program of their update. An error of a later one keeps what was trained."""
    try:
        data = task.data(batches, size)
        return data, task.update(carry, data.like_one)
    except Exception as error:
        if is_first:
            raise
        shapes = [each.shape for each in batches[0].arrays]
        what = f"Updates cannot be made from a batch of shapes {shapes}: {type(error).__name__}: {error}"
        raise _NoBatch(what.rstrip(".")) from error


@programs.jit(static_argnames=("size",))
def _loop(update: programs.Program, carry: Carry, data: Data, num: Int[ArrayLike, ""], *, size: int) -> Any:
    """Make the first ``num`` updates of ``size``, of one batch each: one program for any number."""
    _, shapes = jax.eval_shape(update, carry, data.at(0))
    nothing = jax.tree.map(lambda each: jnp.zeros(size, each.dtype), shapes)

    def one(i, so_far):
        carry, measured = so_far
        carry, new = update(carry, data.at(i))
        return carry, jax.tree.map(lambda all_, each: all_.at[i].set(each), measured, new)

    return jax.lax.fori_loop(0, num, one, (carry, nothing))


class _NoBatch(Exception):
    """The source of batches has no more, or failed; the message says which."""


def _taken(feed: Any, most: int) -> tuple[int, list[Batch]]:
    """Return how many batches of the next shape go to the device at once, and some of them."""
    try:
        size = int(np.clip(MOST_BYTES // max(1, feed.peek().num_bytes), 1, MOST_AT_ONCE))
        return size, feed.take_alike(min(most, size))
    except StopIteration:
        raise _NoBatch("The iterator of batches came to its end") from None
    except Exception as error:
        raise _NoBatch(f"The iterator of batches raised {type(error).__name__}: {error}") from error


def _back(run: Run, reason: str) -> Run:
    """Return to the last healthy state with smaller steps and other random numbers, or stop after too many returns."""
    carry, step = run.healthy  # pyright: ignore[reportGeneralTypeIssues]
    if len([each for each in run.rollbacks[-MOST_ROLLBACKS:] if each.to_step == step]) == MOST_ROLLBACKS:
        return run._replace(carry=carry, reached=step, stopped="nonfinite" if reason == "nonfinite" else "unhealthy")
    rate: Any = LOWER_RATE * run.carry.rate  # pyright: ignore[reportOptionalOperand, reportOperatorIssue]
    back = Rollback(run.num_updates, step, reason, float(rate))
    svi = carry.svi._replace(rng_key=jax.random.fold_in(carry.svi.rng_key, len(run.rollbacks) + 1))
    return run._replace(carry=carry._replace(svi=svi, rate=rate), reached=step, rollbacks=(*run.rollbacks, back))


def _unhealthy(carry: Carry) -> str:
    """Return the conditions of the chains that hold, by site; empty for healthy ones."""
    found = []
    for site, chains in chain_states(carry.svi.mutable_state).items():
        names = [name for name, holds in zip(CONDITIONS, np.asarray(chains.health.conditions), strict=True) if holds]
        found += [f"{site}: {', '.join(names)}"] if names else []
    return "; ".join(found)


def _all_finite(tree: Any) -> bool:
    return bool(_finite(jax.tree.leaves(tree)))


@jax.jit
def _finite(leaves: list[Any]) -> Any:
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]).all()


def _record(run: Run, task: Task, data: Data | None) -> Run:
    pools = task.look(run.carry, data)  # pyright: ignore[reportArgumentType]
    return run._replace(looks=(*run.looks, look(run.carry.svi, run.num_updates, pools)))


def _figures(run: Run, made: Advanced, seconds: float) -> dict[str, float]:
    """Return the figures of a check by name."""
    figures = {"step": run.num_updates, "loss": made.losses.mean(dtype=float)}
    if np.isfinite(made.norms).any():
        figures["gradient_norm"] = made.norms.mean(dtype=float)
    figures["steps_per_second"] = len(made.losses) / seconds
    if run.held_out_losses:
        figures["held_out_loss"] = run.held_out_losses[-1]
    for site, health in run.looks[-1].health.items():
        figures |= {f"energy_gap/{site}": health.energy_gap, f"acceptance_rate/{site}": health.acceptance_rate}
    return {name: float(value) for name, value in figures.items()}
