"""`minibatch`: a handler under which the rows that a model is called with are a batch of a larger data set."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Int
from numpyro.primitives import Messenger

from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.typing import Array
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators import AbstractEstimator

Message = dict[str, Any]


class minibatch(Messenger):  # noqa: N801 (a handler, named as NumPyro names its own)
    r"""Scale the rows of a plate by :math:`N / B`, where the model sees a batch of B of the N rows of a data set.

    The plate may be written for the batch, ``numpyro.plate("rows", len(x))``, or for the whole data set,
    ``numpyro.plate("rows", num_rows, subsample_size=len(x))``. Both give the same densities: each row of the batch counts
    :math:`N / B` times and everything outside the plate once. The indices that the model gets from a plate are those of the
    plate's own size: places in the batch, for ``x[i]``, or in the data set, for parameters with an entry for each of its
    rows. Estimators get places in the data set from both (``"rows"`` in the plate's message), so that chains and latents
    that belong to rows are found again.

    Args:
        fn: a model or a guide.
        batch_size: number of rows of the batch, B.
        num_rows: number of rows of the data set, N; None takes it from a plate that is written for the whole data set.
        index: ``(batch_size,)``, place of each row in the data set; None where it is not known.
        plate: name of the plate of the rows, or names of several; None for the plates that fit.

    Attributes:
        seen: sizes of the plates that the model has run in, by name.
        found: number of rows of the data set by name of plate, for the plates that fit; None where it is not known.
        of_batch: names of those that are written for the batch.

    Raises:
        EnergyError: when the model runs, for sites in the named plate if its size fits neither the batch nor the data set,
            and for parameters of rows in a plate that is written for the batch or whose indices are not known.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        batch_size: int,
        num_rows: int | None,
        index: Int[Array, " rows"] | None = None,
        plate: str | Sequence[str] | None = None,
    ):
        self.batch_size, self.num_rows, self.index = batch_size, num_rows, index
        self.named = () if plate is None else (plate,) if isinstance(plate, str) else tuple(plate)
        self.seen: dict[str, int] = {}
        self.found: dict[str, int | None] = {}
        self.of_batch: set[str] = set()
        super().__init__(fn)

    def process_message(self, msg: Message) -> None:
        """Give the plate of the rows its size and indices, and scale the sites inside it."""
        if msg["type"] == "plate":
            self._enlarge(msg)
        elif msg["type"] in ("sample", "param"):
            names = [frame.name for frame in msg["cond_indep_stack"]]
            for name in self.named:
                if name in names and name not in self.found:
                    self._refuse(msg["name"], name)
            if not self.found.keys().isdisjoint(names):
                self._take_part(msg, sum(name in self.of_batch for name in names))

    def _enlarge(self, msg: Message) -> None:
        name, (size, subsample_size) = msg["name"], msg["args"]
        self.seen[name] = size
        if self.named and name not in self.named:
            return
        is_of_batch = size == self.batch_size and subsample_size in (None, size)
        is_whole = size == self.num_rows or (self.num_rows is None and subsample_size == self.batch_size != size)
        if not (is_whole or is_of_batch):
            return
        self.found[name] = size if is_whole else self.num_rows
        if not is_whole:
            self.of_batch.add(name)
        msg["args"] = (self.found[name] or size, self.batch_size)
        msg["rows"] = jnp.arange(self.batch_size) if self.index is None else self.index
        msg["value"] = msg["rows"] if is_whole else jnp.arange(self.batch_size)

    def _take_part(self, msg: Message, is_of_batch: int) -> None:
        if msg["type"] == "sample":  # a plate that is written for the data set scales by itself
            share = (self.num_rows or self.batch_size) / self.batch_size
            msg["scale"] = (1.0 if msg["scale"] is None else msg["scale"]) * share**is_of_batch
        has_rows = msg["type"] == "param" and msg["kwargs"].get("event_dim") is not None
        if has_rows and (is_of_batch or self.index is None):
            why = "the plate around it is written for one batch" if is_of_batch else "an iterator does not number its rows"
            raise EnergyError(
                f"The parameter '{msg['name']}' has an entry for each row, and {why}, so that rows of different batches "
                f"would share the entries. Write numpyro.plate('rows', {self.num_rows or 'num_rows'}, "
                "subsample_size=len(x)), and pass arrays: fit(..., batches=x, batch_size=256)."
            )

    def _refuse(self, site: str, plate: str) -> None:
        raise EnergyError(
            f"The site '{site}' is in the plate '{plate}' of size {self.seen.get(plate)}, which fits neither "
            f"the batch of {self.batch_size} rows nor the data set of {self.num_rows}. Write numpyro.plate('{plate}', "
            f"len(x)) for the rows x that the model is called with, or numpyro.plate('{plate}', {self.num_rows}, "
            "subsample_size=len(x))."
        )


def the_plates(handler: minibatch) -> tuple[tuple[str, ...], int]:
    """Return the names of the plates of the rows, and the number of rows of the data set, after a run of the model.

    Raises:
        EnergyError: if no plate fits, or several do and are not named, or the number of rows is not known.
    """
    size, num_rows, found = handler.batch_size, handler.num_rows, handler.found
    if num_rows is not None and num_rows < size:
        raise EnergyError(
            f"data_size={num_rows} is the number of rows of the whole data set, and the first batch alone has {size}. Write "
            "data_size=60_000."
        )
    for name in handler.named:
        if name not in handler.seen:
            raise EnergyError(f"row_plate='{name}' is no plate of the model. {nearest(name, handler.seen)}")
    if not found:
        of_all = "" if num_rows is None else f" or the data set of {num_rows} rows (data_size, or the length of batches=)"
        raise EnergyError(
            f"The model has the plates {handler.seen}, and none fits the batch of {size} rows{of_all}, so it is not known "
            "which sites count for each row. Write with numpyro.plate('rows', len(x)): around the sites of the rows x that "
            "the model is called with."
        )
    names = tuple(sorted(found))
    if len(found) > 1 and not handler.named:
        raise EnergyError(
            f"The plates {[*names]} all fit the batch of {size} rows. Write row_plate='{names[0]}' if that one holds the "
            f"rows, or row_plate={names} if each does."
        )
    known = set(found.values())
    if None in known:
        raise EnergyError(
            "An iterator of batches does not say how many rows there are in all, by which the rows of a batch are scaled "
            "against priors. Write fit(..., batches=loader, data_size=60_000), or in the model "
            f"numpyro.plate('{names[0]}', num_rows, subsample_size=len(x))."
        )
    if len(known) > 1:
        raise EnergyError(f"The plates of the rows have different sizes, {found}. Write one number of rows in all.")
    return names, next(iter(found.values()))  # pyright: ignore[reportReturnType]


def check_rows_are_not_told_apart(sites: Iterable[tuple[AbstractEstimator, Site]]) -> None:
    """Refuse chains that belong to rows.

    Raises:
        EnergyError: with what to write.
    """
    for estimator, site in sites:
        if estimator.persists_chains and site.local is not None:
            raise EnergyError(
                f"At site '{site.name}': the estimator '{estimator.name}' keeps a chain for each row, since rows have a "
                "context or a base of their own, and an iterator of batches does not say which rows come. Pass arrays, "
                "fit(..., batches=(x, context), batch_size=256), or write 'replay', whose chains keep their context."
            )
