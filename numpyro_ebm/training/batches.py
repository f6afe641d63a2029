"""Batches of rows for `fit`: from arrays, shuffled by key, or from an iterator of the user."""

import abc
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.inputs import as_arrays
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import PRNGKey


class Layout(NamedTuple):
    """Which arguments of the model the arrays of a batch are.

    Attributes:
        num_args: number of positional arguments, which come first.
        names: names of the keyword arguments.
    """

    num_args: int
    names: tuple[str, ...]

    def __str__(self) -> str:
        """Return places and names."""
        return str([*range(self.num_args), *self.names])

    def in_order(self, arrays: list[Any], layout: "Layout") -> list[Any]:
        """Return arrays of another layout in the order of this one.

        Raises:
            EnergyError: for other arguments.
        """
        if layout.num_args != self.num_args or set(layout.names) != set(self.names):
            raise EnergyError(
                f"Batches need the same arguments: {self} at first, and {layout} now. Yield all in each batch."
            )
        named = dict(zip(layout.names, arrays[layout.num_args :], strict=True))
        return [*arrays[: self.num_args], *(named[name] for name in self.names)]

    def arguments(self, arrays: list[Any]) -> tuple[tuple, dict[str, Any]]:
        """Return positional and keyword arguments."""
        return tuple(arrays[: self.num_args]), dict(zip(self.names, arrays[self.num_args :], strict=True))


class Batch(NamedTuple):
    """One batch, on the host.

    Attributes:
        arrays: its arrays, each with one entry per row.
        layout: which arguments they are.
        index: place of each row in the data set; None where it is not known.
        state: place of the iterator after this batch, as JSON takes it; None for a source that cannot be set back.
    """

    arrays: list[Any]
    layout: Layout
    index: Int[np.ndarray, " rows"] | None
    state: Any = None

    @property
    def shapes(self) -> tuple[Any, ...]:
        """Shapes and types of the arrays."""
        return tuple((each.shape, each.dtype) for each in self.arrays)

    @property
    def num_bytes(self) -> int:
        """Bytes of the arrays."""
        return sum(each.nbytes for each in self.arrays)


class Feed(abc.ABC):
    """A source of batches.

    Attributes:
        num_rows: number of rows of the data set; None where it is not known.
        num_taken: number of batches taken, those of the run before included.
    """

    def __init__(self, num_rows: int | None):
        self.num_rows, self.num_taken = num_rows, 0
        self._ahead: Batch | None = None
        self._failure: Exception | None = None

    @abc.abstractmethod
    def _next(self) -> Batch:
        """Return the next batch; raise StopIteration if there are no more."""

    @abc.abstractmethod
    def skip(self, num_batches: int, state: Any = None) -> None:
        """Go on after this many batches, where a run had stopped; ``state`` is that of the last of them."""

    def peek(self) -> Batch:
        """Return the next batch, which `take` then returns.

        Raises:
            StopIteration: if there are no more.
        """
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if self._ahead is None:
            self._ahead = self._next()
        return self._ahead

    def take(self) -> Batch:
        """Return the next batch.

        Raises:
            StopIteration: if there are no more.
        """
        batch, self._ahead = self.peek(), None
        self.num_taken += 1
        return batch

    def pass_over(self, num_batches: int, state: Any) -> Any:
        """Take batches without use until this many have been taken, or there are no more; return the state of the last."""
        try:
            while self.num_taken < num_batches:
                state = self.take().state
        except Exception as error:  # for the next batch that is asked for
            self._failure = error
        return state

    def take_alike(self, most: int) -> list[Batch]:
        """Return at least one batch and at most this many, all of one shape.

        Raises:
            StopIteration: if there are no more.
        """
        found = [self.take()]
        try:
            while len(found) < most and self.peek().shapes == found[0].shapes:
                found.append(self.take())
        except Exception as error:  # the batches before it are good
            self._failure = error
        return found


class ArrayFeed(Feed):
    """Batches of arrays in memory or mapped from a file; each epoch has its own order of the rows, given by the key.

    The order depends on the number of the epoch alone, so that a run goes on from any batch. The last batch of an epoch
    holds the rows that are left.
    """

    def __init__(self, rng_key: PRNGKey, arrays: list[Any], layout: Layout, batch_size: int):
        super().__init__(len(arrays[0]))
        self._key, self._layout = rng_key, layout
        self._size = min(batch_size, len(arrays[0]))
        self.columns = arrays
        self._number, self._epoch, self._order = 0, -1, np.zeros(0, np.int32)

    def _next(self) -> Batch:
        """Return the rows of a batch in ascending order, in which files are read fastest."""
        epoch, place = divmod(self._number, -(-len(self.columns[0]) // self._size))
        if epoch != self._epoch:
            order = jax.random.permutation(jax.random.fold_in(self._key, epoch), len(self.columns[0]))
            self._epoch, self._order = epoch, np.asarray(order, np.int32)
        index = np.sort(self._order[place * self._size : (place + 1) * self._size])
        self._number += 1
        return Batch([np.asarray(each[index]) for each in self.columns], self._layout, index)

    def skip(self, num_batches: int, state: Any = None) -> None:
        """Go on after this many batches."""
        self._number = self.num_taken = num_batches
        self._ahead = None


class IteratorFeed(Feed):
    """Batches that an iterable yields; one that can be iterated over again starts anew after its last batch."""

    def __init__(self, source: Iterable[Any], num_rows: int | None):
        super().__init__(num_rows)
        self._source, self._iterator = source, iter(source)
        self._is_new = True
        self._layout: Layout | None = None

    def _next(self) -> Batch:
        try:
            batch = next(self._iterator)
        except StopIteration:
            if self._is_new or isinstance(self._source, Iterator):
                raise
            self._iterator, self._is_new = iter(self._source), True
            return self._next()
        self._is_new = False
        arrays, layout = _taken_apart(batch)
        self._layout = self._layout or layout
        return Batch(self._layout.in_order(arrays, layout), self._layout, None, self._state())

    def skip(self, num_batches: int, state: Any = None) -> None:
        """Set the iterator back where it was, or pass over as many batches.

        Raises:
            EnergyError: if there are fewer.
        """
        if state is not None:
            is_bytes = isinstance(self._iterator.get_state(), bytes)  # pyright: ignore[reportAttributeAccessIssue]
            self._iterator.set_state(state.encode() if is_bytes else state)  # pyright: ignore[reportAttributeAccessIssue]
            self._is_new, self._ahead, self.num_taken = False, None, num_batches
            return
        for _ in range(num_batches):
            try:
                self.take()
            except StopIteration:
                raise EnergyError(
                    f"The run goes on after {num_batches} batches, and the iterator has fewer. Pass an iterable that yields "
                    "the same batches again, such as a list or a data loader, or an array with batch_size=; or, to begin "
                    "with its first batch, init_state=result.state."
                ) from None

    def _state(self) -> Any:
        """Return the place of the iterator, for those that can be set back, as those of grain."""
        if not hasattr(self._iterator, "get_state") or not hasattr(self._iterator, "set_state"):
            return None
        state = self._iterator.get_state()  # pyright: ignore[reportAttributeAccessIssue]
        return state.decode() if isinstance(state, bytes) else state


def feed_of(rng_key: PRNGKey, batches: Any, batch_size: int | None, data_size: int | None) -> Feed:
    """Return the source of the batches.

    Args:
        rng_key: random key of the order of the rows.
        batches: an array, a tuple of arrays (positional arguments) or a dict of arrays (keyword arguments), of which each
            batch takes the same rows; or an iterable that yields batches of such forms.
        batch_size: number of rows per batch, for arrays.
        data_size: number of rows of the data set, for an iterable.

    Raises:
        EnergyError: for arrays without rows, of different lengths or without ``batch_size``, and for options of the other
            kind of source.
        TypeError: for anything else, also inside a dict.
    """
    if _is_columns(batches):
        if batch_size is None:
            raise EnergyError("batches= got arrays, and no batch_size. Write fit(..., batches=x, batch_size=256).")
        if data_size is not None:
            raise EnergyError("data_size is the length of the arrays in batches=. Leave it out.")
        check_count("fit", "batch_size", batch_size)
        return ArrayFeed(rng_key, *_taken_apart(batches), batch_size)
    if not isinstance(batches, Iterable):
        raise TypeError(
            f"batches= needs arrays, or an iterable of batches; got {type(batches).__name__}. "
            "Write fit(rng_key, svi, num_steps, batches=x, batch_size=256)."
        )
    if isinstance(batches, Mapping):
        other = next((name for name, value in batches.items() if not _is_array(value)), None)
        got = "an empty dict" if other is None else f"{type(batches[other]).__name__} at '{other}'"
        raise TypeError(f"A dict in batches= needs arrays; got {got}. Write batches={{'x': np.asarray(x)}}, batch_size=256.")
    if batch_size is not None:
        raise EnergyError(
            f"batch_size={batch_size} is for arrays; an iterable, here of type {type(batches).__name__}, yields batches of "
            "its own size. Leave it out, or set it in the data loader. Arrays of which each batch takes the same rows go in "
            "a tuple: batches=(np.asarray(x), np.asarray(weight))."
        )
    if data_size is not None:
        check_count("fit", "data_size", data_size)
    return IteratorFeed(batches, data_size)


def suspicious(batch: Batch) -> str | None:
    """Describe the first row of a batch that is not finite; None if all are."""
    for array in batch.arrays:
        is_float = jnp.issubdtype(array.dtype, jnp.floating)
        if is_float and not np.isfinite(array).all():
            row = int(np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))[0])
            where = f"Row {row} of a batch" if batch.index is None else f"Row {batch.index[row]} of the data set"
            return (
                f"{where}, in an array of batches of shape {array.shape}, is not finite. Mask missing rows: "
                "numpyro.handlers.mask(mask=~jnp.isnan(x).any(-1))."
            )
    return None


def _is_columns(value: object) -> bool:
    """Return whether a value holds all rows: an array, or a tuple or a dict of arrays."""
    if isinstance(value, Mapping):
        return bool(value) and all(map(_is_array, value.values()))
    return all(map(_is_array, value)) if isinstance(value, tuple) and value else _is_array(value)


def _is_array(value: object) -> bool:
    """Return whether a value is an array that rows can be taken from, in memory or not, or a table."""
    return hasattr(value, "__array__") or (hasattr(value, "shape") and hasattr(value, "dtype"))


def _taken_apart(batch: Any) -> tuple[list[Any], Layout]:
    """Return the arrays of a batch, and which arguments they are.

    Raises:
        EnergyError: for no rows, and for different numbers of them.
        TypeError: for anything but arrays.
    """
    named = dict(batch) if isinstance(batch, Mapping) else {}
    args = [] if isinstance(batch, Mapping) else list(batch) if isinstance(batch, tuple | list) else [batch]
    arrays = [_as_rows(each) for each in (*args, *named.values())]
    lengths = [each.shape[0] if each.shape else 0 for each in arrays]
    if not lengths or 0 in lengths:
        raise EnergyError(f"batches= needs rows; got arrays of shapes {[each.shape for each in arrays]}.")
    if len(set(lengths)) > 1:
        raise EnergyError(
            f"The arrays of batches= have {lengths} rows, and each batch takes the same rows of all. Pass arguments that "
            "are no rows by themselves: fit(rng_key, svi, num_steps, other, batches=x, batch_size=256)."
        )
    return arrays, Layout(len(args), tuple(named))


def _as_rows(leaf: Any) -> Any:
    """Return an array; one that is read from a file by slices, as those of h5py and zarr, as it is."""
    if not _is_array(leaf):
        raise TypeError(
            f"A batch needs to be an array, or a tuple, list or dict of arrays; it holds {type(leaf).__name__}. Yield "
            "np.asarray(rows)."
        )
    return leaf if hasattr(leaf, "chunks") else np.asanyarray(as_arrays("fit", leaf))
