"""Checkpoints of `fit`: what identifies a run, what is stored of it, and how it goes on."""

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from numpyro_ebm._core.digests import checksum, checksum_of_tree, digest, without_addresses
from numpyro_ebm._core.pytrees import assemble
from numpyro_ebm._core.sharding import readable
from numpyro_ebm._core.storage import Storage, from_outline, outline
from numpyro_ebm.estimators import NegativePhaseHealth
from numpyro_ebm.training._run import Run
from numpyro_ebm.training._task import Task
from numpyro_ebm.training.batches import ArrayFeed
from numpyro_ebm.training.recording import Look, estimators_of
from numpyro_ebm.training.results import FitResult, Rollback

PLAIN = ("held_out_losses", "check_steps", "best_step", "history", "num_batches", "feed_state", "reached")
"""Fields of a run that JSON takes as they are."""


def storage_of(
    folder: str | os.PathLike, task: Task, run: Run, rng_key: Any, options: Mapping[str, Any], begin: Mapping[str, Any]
) -> Storage:
    """Open the folder of a run.

    Args:
        folder: the folder.
        task: the training.
        run: the run before its first update.
        rng_key: random key of `fit`.
        options: options of `fit` on which the updates or the checks depend, by name.
        begin: ``init_params`` and ``init_state`` of `fit`, by name.
    """
    feed = task.feed
    data = [*map(readable, task.train.arrays), *(feed.columns if isinstance(feed, ArrayFeed) else ())]
    one = task.data([] if feed is None else [feed.peek()])
    program = task.update(run.carry, one if feed is None else one.like_one)
    estimators = [without_addresses(repr(each)) for each in estimators_of(task.svi)]
    identity = {
        "version of numpyro-ebm": version("numpyro-ebm"),
        "estimator": "; ".join(estimators) or "none",
        "data": f"{_shapes(data)}, checksum {checksum(data)}",
        "held_out": _of_held_out(task),
        **{name: str(value) for name, value in options.items()},
        **{name: _of_begin(value) for name, value in begin.items()},
        "random key": checksum([rng_key]),
        "update (model, guide, energy, loss and optimiser)": digest(program.code.jaxpr, [*map(readable, program.constants)]),
    }
    return Storage(folder, identity)


def _shapes(arrays: Sequence[Any]) -> list[str]:
    return [f"{each.dtype}{list(each.shape)}" for each in arrays]


def _of_held_out(task: Task) -> str:
    """Return the held-out arguments in words, with a checksum of their arrays."""
    if task.held_out is None:
        return "none" if task.watched is None else "a function"
    args, kwargs = assemble(_shapes(task.held_out.arrays), task.held_out.structure)
    arguments = f"{args}, {kwargs}" if kwargs else str(args)
    return f"{without_addresses(arguments)}, checksum {checksum(task.held_out.arrays)}"


def _of_begin(value: Any) -> str:
    if isinstance(value, FitResult):
        value = (value.state, value.average, value.num_batches, value.rate)
    return "none" if value is None else f"checksum {checksum_of_tree(jax.tree.map(readable, value))}"


def save(storage: Storage, run: Run) -> None:
    """Store a run as of its last check."""
    arrays = {
        "carry": run.carry,
        "healthy": None if run.healthy is None else run.healthy[0],
        "params": run.params,
        "losses": np.concatenate(run.losses),
        "looks": _stacked(run.looks),
    }
    values = {name: getattr(run, name) for name in PLAIN} | {
        "lengths": [len(each) for each in run.losses],
        "healthy_step": None if run.healthy is None else run.healthy[1],
        "rollbacks": [each._asdict() for each in run.rollbacks],
        "looks": outline(arrays["looks"]),
        "loss_type": str(arrays["losses"].dtype),
    }
    storage.save(run.num_updates, arrays, values)


def restored(storage: Storage, task: Task, run: Run) -> Run:
    """Return the run of the last checkpoint, and set the source of batches to its place.

    Args:
        storage: the folder, which holds a checkpoint.
        task: the training.
        run: the run before its first update, whose structure is that of the stored one.
    """
    values = storage.about()
    like = {
        "carry": run.carry,
        "healthy": None if values["healthy_step"] is None else run.carry,
        "params": task.params(run.carry) if task.has_held_out else None,
        "losses": np.zeros(sum(values["lengths"]), values["loss_type"]),
        "looks": from_outline(values["looks"]),
    }
    arrays = storage.arrays(like)
    ends = np.cumsum(values["lengths"])[:-1]
    if task.feed is not None:
        task.feed.skip(values["num_batches"], values["feed_state"])
    return run._replace(
        **{name: _as_tuple(values[name]) for name in PLAIN},
        carry=arrays["carry"],
        healthy=None if arrays["healthy"] is None else (arrays["healthy"], values["healthy_step"]),
        params=arrays["params"],
        losses=tuple(np.split(np.asarray(arrays["losses"]), ends)),
        looks=_taken_apart(jax.tree.map(np.asarray, arrays["looks"])),
        rollbacks=tuple(Rollback(**each) for each in values["rollbacks"]),
    )


def _stacked(looks: tuple[Look, ...]) -> dict[str, Any]:
    """Return all snapshots as nested dicts of arrays, with the checks as the first axis."""
    if not looks:
        return {}
    as_dicts = [
        each._asdict() | {"health": {site: _without_none(health) for site, health in each.health.items()}} for each in looks
    ]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *as_dicts)


def _without_none(health: NegativePhaseHealth) -> dict[str, Any]:
    return {name: value for name, value in health._asdict().items() if value is not None}


def _taken_apart(looks: dict[str, Any]) -> tuple[Look, ...]:
    """Return the snapshots that `_stacked` put together."""
    found = []
    for i in range(len(looks.get("step", ()))):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], looks)
        nothing = dict.fromkeys(NegativePhaseHealth._fields)
        health = {site: NegativePhaseHealth(**{**nothing, **figures}) for site, figures in one.get("health", {}).items()}
        found.append(Look(int(one["step"]), health, one.get("samples", {}), one.get("energies", {})))
    return tuple(found)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
