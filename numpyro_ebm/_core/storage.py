"""Checkpoints of a run in a folder, by Orbax: arrays with plain values, of which the last complete one is found again."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from numpyro_ebm._core.errors import CheckpointError, EnergyError
from numpyro_ebm._core.keys import as_numbers, from_numbers
from numpyro_ebm._core.typing import PyTree

FORMAT = 1
"""Number of the format of a checkpoint; others are refused."""
KEPT = 2
"""Checkpoints kept in a folder: the last one, and one before it."""
PREFIX = "ebm_step"
"""Beginning of the names of checkpoints, as in ``ebm_step_100``. Orbax removes old ones by name, and a user may have other
folders whose names are numbers."""


class Storage:
    """The checkpoints of one run.

    A checkpoint is written beside the others and gets its name when it is complete, so that a process that dies while it
    writes leaves the one before as the last.

    Args:
        folder: the folder, which is made if it is missing; ``~`` is the user's home. Other files in it stay as they are.
        identity: what the run is, in words by name: a checkpoint of a run with another identity is refused.
        keeps_all: whether to keep every checkpoint, and not only the last ones.

    Raises:
        CheckpointError: if the folder cannot be made or read.
        ImportError: without orbax, naming the extra that installs it.
    """

    def __init__(self, folder: str | os.PathLike, identity: Mapping[str, str], *, keeps_all: bool = False):
        self.folder = Path(folder).expanduser().absolute()
        self._identity = {"format": str(FORMAT), **identity}
        self._orbax = _orbax()
        kept = None if keeps_all else KEPT
        options = self._orbax.CheckpointManagerOptions(
            max_to_keep=kept, step_prefix=PREFIX, enable_async_checkpointing=False, create=True
        )
        try:
            self._manager = self._orbax.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise CheckpointError(f"The folder {self.folder} for checkpoints cannot be made or read: {error}.") from error

    def __enter__(self) -> "Storage":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    @property
    def step(self) -> int | None:
        """The step of the last complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """The steps of all complete checkpoints."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, arrays: PyTree, values: Mapping[str, Any]) -> None:
        """Write a checkpoint, and wait until it is complete.

        Args:
            step: its number, above those before.
            arrays: a pytree of arrays, random keys included.
            values: plain values, as JSON takes them.

        Raises:
            CheckpointError: if it cannot be written; those before stay as they are.
        """
        named = {name: _numbers(leaf) for name, leaf in _named(arrays).items()}
        held = {f"{i:05d}": leaf for i, leaf in enumerate(named.values()) if leaf.size}
        about = {"identity": self._identity, "arrays": _described(named), "values": dict(values)}
        args = self._orbax.args
        try:
            self._manager.save(
                step, args=args.Composite(arrays=args.StandardSave(held), about=args.JsonSave(about)), force=True
            )
            self._manager.wait_until_finished()
        except Exception as error:
            raise CheckpointError(
                f"The checkpoint of step {step} could not be written to {self.folder}: {error}. Look at the space and the "
                f"rights there. Checkpoints of the steps {self.steps} are as they were."
            ) from error

    def about(self, step: int | None = None) -> dict[str, Any]:
        """Return the plain values of a checkpoint; of the last one for None.

        Raises:
            CheckpointError: if it cannot be read.
            EnergyError: if it is one of another run, naming the difference.
        """
        args, step = self._orbax.args, self.step if step is None else step
        about = self._read(step, args.Composite(about=args.JsonRestore())).about
        was, now = about["identity"], self._identity
        changed = [name for name in now if was.get(name) != now[name]]
        if changed:
            differences = "; ".join(f"{name}: {was.get(name)} in the checkpoint, {now[name]} here" for name in changed)
            raise EnergyError(
                f"The checkpoint of step {step} in {self.folder} is of another run. {differences}. Run it as it was, "
                "or choose another folder."
            )
        return about["values"]

    def arrays(self, like: PyTree, step: int | None = None) -> PyTree:
        """Return the arrays of a checkpoint, in the structure and on the devices of others.

        Args:
            like: arrays of the same shapes and types.
            step: which checkpoint; None for the last one.

        Raises:
            CheckpointError: if it cannot be read.
            EnergyError: if shapes or types differ, naming them.
        """
        args, step = self._orbax.args, self.step if step is None else step
        named = {name: _numbers(leaf) for name, leaf in _named(like).items()}
        was = self._read(step, args.Composite(about=args.JsonRestore())).about["arrays"]
        now = _described(named)
        changed = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
        if changed:
            first = changed[0]
            raise EnergyError(
                f"The checkpoint of step {step} in {self.folder} does not fit: {first} is {was.get(first, 'missing')} "
                f"there and {now.get(first, 'missing')} here ({len(changed)} such arrays). Run it with the model, the "
                "estimator and the optimiser that it had, or choose another folder."
            )
        targets = {f"{i:05d}": _target(leaf) for i, leaf in enumerate(named.values()) if leaf.size}
        found = self._read(step, args.Composite(arrays=args.StandardRestore(targets))).arrays
        leaves = [
            from_numbers(found[f"{i:05d}"] if numbers.size else numbers, leaf)
            for i, (leaf, numbers) in enumerate(zip(jax.tree.leaves(like), named.values(), strict=True))
        ]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def _read(self, step: int | None, what: Any) -> Any:
        try:
            return self._manager.restore(step, args=what)
        except Exception as error:
            raise CheckpointError(
                f"The checkpoint of step {step} in {self.folder} cannot be read: {error}. Remove the folder "
                f"{PREFIX}_{step} in it to go on from another of the steps {self.steps}."
            ) from error


def outline(tree: PyTree) -> Any:
    """Return the shape and the type of each array of nested dicts, as JSON takes them."""
    return jax.tree.map(lambda leaf: [list(leaf.shape), str(leaf.dtype)], tree)


def from_outline(outlined: Any) -> PyTree:
    """Return arrays of the shapes and types that `outline` found."""
    return jax.tree.map(lambda leaf: np.zeros(leaf[0], leaf[1]), outlined, is_leaf=lambda leaf: isinstance(leaf, list))


def _named(tree: PyTree) -> dict[str, Any]:
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _described(named: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in named.items()}


def _numbers(leaf: Any) -> Any:
    """Return an array that can be stored: a random key as its numbers."""
    return as_numbers(leaf) if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _target(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) if isinstance(leaf, jax.Array) else leaf


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError("Checkpoints need orbax: pip install 'numpyro-ebm[checkpoint]'.") from error
    return orbax.checkpoint
