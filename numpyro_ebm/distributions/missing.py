"""Elements of events that rows lack: hidden members, and entries that are NaN."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Shaped

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.discrete import OneHot
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array
from numpyro_ebm.distributions.blocks import Blocks, BlocksTransform, elementary

IMPUTE = (
    "To draw such entries at each update, given the others of their row, write estimate(model, 'pcd', "
    "positive_phase=numpyro_ebm.PositivePhase()); 'cd', 'replay' and 'mle' take it too, and 'exact' sums over discrete "
    "entries. To leave these rows out: numpyro.handlers.mask(mask=~jnp.isnan(x).any(-1))."
)
WHOLE = "Its elements are bound to each other, so one of them cannot be drawn alone. Mask such rows: numpyro.handlers.mask."


class EventPart(NamedTuple):
    """One member of a joint event, as a part of its vector.

    Attributes:
        name: name of its site.
        shape: its event shape.
        is_hidden: whether every row lacks it.
        may_lack: whether its values are floating-point data, in which NaN marks a missing entry.
    """

    name: str
    shape: tuple[int, ...]
    is_hidden: bool = False
    may_lack: bool = True


class Missing(NamedTuple):
    """The elements of the event that rows lack.

    Attributes:
        elements: ``(num_rows, *event_shape)``, which elements each row lacks.
        may: ``event_shape``, which elements any row may lack; known when the model is traced.
        is_certain: whether every row is known to lack some.
    """

    elements: Bool[Array, " rows *event"]
    may: Bool[np.ndarray, "*event"]
    is_certain: bool


def missing_of(support: Any, value: Shaped[Array, " rows *event"], parts: Sequence[EventPart]) -> Missing | None:
    """Return the elements that rows lack: hidden members, and NaN in floating-point data; None where there are none.

    An element of a one-hot support is a whole vector, which lacks all of its numbers if one is NaN.

    Args:
        support: constraint of the event.
        value: the rows, as given.
        parts: the members of a joint event; empty for any other event.
    """
    event_shape = value.shape[1:]
    hidden = _of_parts(parts, [part.is_hidden for part in parts], event_shape)
    may = _of_parts(parts, [part.may_lack for part in parts], event_shape) if parts else np.ones(event_shape, bool)
    may = may & are_separate(support, event_shape) & ~hidden
    if not (jnp.issubdtype(value.dtype, jnp.floating) and may.any()):
        return _hidden_only(hidden, len(value))
    elements = jnp.isnan(value) & may
    if isinstance(elementary(support), OneHot):
        elements = jnp.broadcast_to(jnp.any(elements, axis=-1, keepdims=True), elements.shape)
    if is_concrete(value):
        may = np.asarray(elements).any(axis=0)
        if not may.any():
            return _hidden_only(hidden, len(value))
    return Missing(elements | hidden, may | hidden, bool(hidden.any()))


def are_separate(support: Any, event_shape: tuple[int, ...]) -> Bool[np.ndarray, "*event"]:
    """Return which elements of an event have a constraint of their own, so that one may be missing alone."""
    if not isinstance(support, Blocks):
        return np.full(event_shape, _is_separate(support))
    blocks = [np.full(shape, _is_separate(part)) for part, shape in zip(support.parts, support.shapes, strict=True)]
    return np.concatenate([block.reshape(-1) for block in blocks])


def in_position(support: Any, elements: Bool[Array | np.ndarray, "*rows d"]) -> Any:
    """Return which numbers of an unconstrained position belong to these elements of the event.

    A member whose position has another size than its event is missing as a whole.
    """
    if not isinstance(support, Blocks):
        return elements
    xp: Any = np if isinstance(elements, np.ndarray) else jnp  # static flags stay known inside a traced program
    sources, blocks = BlocksTransform(support)._sources, []
    ends = np.cumsum([math.prod(shape) for shape in support.shapes])
    for block, shape, source in zip(xp.split(elements, ends[:-1], axis=-1), support.shapes, sources, strict=True):
        whole = block.any(axis=-1, keepdims=True)
        size = math.prod(source)
        blocks.append(block if source == shape else xp.broadcast_to(whole, (*whole.shape[:-1], size)))
    return xp.concatenate(blocks, axis=-1)


def check_complete(support: Any, value: Shaped[np.ndarray, " rows *event"], parts: Sequence[EventPart]) -> None:
    """Refuse concrete rows with NaN.

    Raises:
        EnergyError: with the row and the element of the first, the number of all, and what to write.
    """
    lacking = np.isnan(value)
    if not lacking.any():
        return
    row, *element = (int(index[0]) for index in np.nonzero(lacking))
    count, rows = int(lacking.sum()), int(lacking.reshape(len(value), -1).any(axis=1).sum())
    where = _in_words(element, parts)
    separate = are_separate(support, value.shape[1:])[tuple(element)]
    raise EnergyError(
        f"Row {row} of the data is not finite:{where} is NaN, so missing ({count} such entries in {rows} rows). "
        f"{IMPUTE if separate else WHOLE}"
    )


def _hidden_only(hidden: Bool[np.ndarray, "*event"], num_rows: int) -> Missing | None:
    if not hidden.any():
        return None
    return Missing(jnp.broadcast_to(jnp.asarray(hidden), (num_rows, *hidden.shape)), hidden, is_certain=True)


def _of_parts(parts: Sequence[EventPart], flags: list[bool], event_shape: tuple[int, ...]) -> Bool[np.ndarray, "*event"]:
    """Return flags of the members as flags of the elements of their event."""
    if not parts:
        return np.zeros(event_shape, bool)
    blocks = [np.full(part.shape, flag).reshape(-1) for part, flag in zip(parts, flags, strict=True)]
    return np.concatenate(blocks).reshape(event_shape)


def _is_separate(constraint: Any) -> bool:
    kind = elementary(constraint)
    return kind.event_dim == 0 or isinstance(kind, OneHot)


def _in_words(element: list[int], parts: Sequence[EventPart]) -> str:
    """Return the place of an element in its event, by the member that it belongs to if there are several."""
    if len(parts) > 1:
        sizes = [int(np.prod(part.shape, dtype=int)) for part in parts]
        which = int(np.searchsorted(np.cumsum(sizes), element[0], side="right"))
        part, at = parts[which], element[0] - sum(sizes[:which])
        inner = _in_words([int(i) for i in np.unravel_index(at, part.shape)] if part.shape else [], ())
        return f"{inner} of '{part.name}'" if inner else f" '{part.name}'"
    if not element:
        return "" if parts else " it"
    return f" column {element[0]}" if len(element) == 1 else f" element {tuple(element)}"
