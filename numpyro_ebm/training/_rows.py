"""Checks of what a model does with the rows of a batch and with the indices of their plates, read off its program."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Jaxpr, Literal, Var
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState
from numpyro.primitives import Messenger

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm.distributions.dependencies import called
from numpyro_ebm.handlers.minibatch import minibatch
from numpyro_ebm.training.recording import traced

SHIFTS = frozenset(
    "add sub select_n broadcast_in_dim reshape squeeze convert_element_type concatenate transpose copy".split()
)
"""Operations after which an index is still the number of a row, or of a row near it."""


class Use(NamedTuple):
    """One use of an index: the operation, and the lengths of the axes from which it picks entries, if it does."""

    operation: str
    lengths: tuple[int, ...] = ()


class _told(Messenger):  # noqa: N801 (a handler, named as NumPyro names its own)
    """Handler around `minibatch`, under which the model gets other indices from the plates of the rows."""

    def __init__(self, rows: minibatch, in_batch: Any, in_data: Any):
        self._rows, self._in_batch, self._in_data = rows, in_batch, in_data
        super().__init__()

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate" and msg["name"] in self._rows.found:
            msg["value"] = self._in_batch if msg["name"] in self._rows.of_batch else self._in_data


def check_rows(
    svi: SVI, arguments: Callable[[list[Any]], tuple[tuple, dict[str, Any]]], rows: list[Any], state: SVIState
) -> None:
    """Refuse a model or a guide that would take wrong rows of a batch, or count them too little, without an error.

    Args:
        svi: its model and guide are under `minibatch`, with the plates of the rows by name.
        arguments: function of the arrays of a batch that returns the arguments of the model and the guide.
        rows: the arrays of the batch.
        state: the parameters to run them with.

    Raises:
        EnergyError: for indices of the data set on rows of a batch and the reverse, for any use of an index that is not
            known, and for an observed site with a value for each row outside of the plates of the rows.
    """
    model: Any = svi.model
    if model.batch_size == model.num_rows:
        return
    sites: dict[str, Any] = {}

    def run(in_batch: Any, in_data: Any, rows: list[Any]) -> dict[str, list[Any]]:
        args, kwargs = arguments(rows)
        with _told(model, in_batch, in_data), _told(svi.guide, in_batch, in_data):
            _, trace = traced(svi, args, kwargs | svi.static_kwargs, state)
        sites.update((name, site) for name, site in trace.items() if _may_be_outside(site, model))
        return {name: _arrays((site["value"], site["fn"])) for name, site in sites.items()}

    indices = jnp.arange(model.batch_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # svi.init gave the same
        program, names = jax.make_jaxpr(run, return_shape=True)(indices, indices, rows)
    of_batch, of_data, *of_rows = program.jaxpr.invars
    _check_index(model, program.jaxpr, of_batch, of_data)
    depends = iter(_reached(program.jaxpr, of_rows))
    for name, arrays in sorted(names.items()):  # as in the outputs
        if any([next(depends) for _ in arrays]):
            _refuse_outside(name, sites[name], model)


def _check_index(model: minibatch, program: Jaxpr, of_batch: Var, of_data: Var) -> None:
    size, num_rows = model.batch_size, model.num_rows
    plates = {name in model.of_batch: name for name in model.found}
    for _, lengths in _uses(program, {of_batch}, None):
        if lengths and max(lengths) > size:
            raise EnergyError(
                f"The plate '{plates[True]}' is written for a batch of {size} rows, so its indices are places in the batch, "
                f"and the model looks up entries of an array of {max(lengths)} by them. Write numpyro.plate("
                f"'{plates[True]}', {num_rows}, subsample_size=len(x)) as i, whose indices are places in the data set of "
                f"{num_rows} rows."
            )
    if model.index is None and next(_uses(program, {of_data}, None), None):
        raise EnergyError(
            f"The model uses the indices of the plate '{plates[False]}' of all {num_rows} rows, and an iterator of batches "
            "does not number its rows. Pass arrays, fit(..., batches=x, batch_size=256), or number the rows yourself: "
            "batches that are (x, row), and w[row]. The rows x are those of the batch; write obs=x, without [i]."
        )
    for _, lengths in _uses(program, {of_data}, SHIFTS):
        if lengths and max(lengths) < (num_rows or 0):
            raise EnergyError(
                f"The plate '{plates[False]}' is written for the data set of {num_rows} rows, so its indices are places in "
                f"the data set, and the model looks up entries of an array of {max(lengths)} by them. The arrays that "
                "batches= passes hold the rows of the batch alone: write obs=x, without [i]."
            )


def _uses(program: Jaxpr, followed: set[Any], through: frozenset[str] | None) -> Iterator[Use]:
    """Yield the uses of an index.

    Args:
        program: a program.
        followed: variables that hold it; those that are computed from it are added.
        through: operations whose results still are the index; None for all but look-ups, whose results are entries.
    """
    for eqn in program.eqns:
        has_index = [not isinstance(atom, Literal) and atom in followed for atom in eqn.invars]
        if not any(has_index):
            continue
        name, inner = eqn.primitive.name, called(eqn)
        if inner is not None:
            own = {var for var, is_index in zip(inner.invars, has_index, strict=True) if is_index}
            yield from _uses(inner, own, through)
            results = zip(eqn.outvars, inner.outvars, strict=True)
            followed |= {outer for outer, var in results if not isinstance(var, Literal) and var in own}
        elif name == "gather" and not has_index[0]:
            axes, operand = eqn.params["dimension_numbers"].start_index_map, cast(ShapedArray, eqn.invars[0].aval)
            yield Use(name, tuple(operand.shape[axis] for axis in axes))
        else:
            yield Use(name)
            followed |= set(eqn.outvars) if through is None or name in through else set()


def _reached(program: Jaxpr, inputs: Iterable[Any]) -> list[bool]:
    """Return whether each output of a program depends on some inputs."""
    reached = set(inputs)
    is_in = lambda atom: not isinstance(atom, Literal) and atom in reached  # noqa: E731
    for eqn in program.eqns:
        reached |= set(eqn.outvars) if any(map(is_in, eqn.invars)) else set()
    return [is_in(atom) for atom in program.outvars]


def _arrays(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]


def _may_be_outside(site: dict[str, Any], model: minibatch) -> bool:
    """Return whether an observed site outside the plates of the rows has as many values as the batch has rows."""
    if site["type"] != "sample" or not site["is_observed"] or model.batch_size == 1:
        return False
    is_inside = any(frame.name in model.found for frame in site["cond_indep_stack"])
    shape = jnp.shape(site["value"])
    first_of_event = shape[: len(shape) - len(site["fn"].event_shape) + 1]
    return not is_inside and model.batch_size in (*site["fn"].batch_shape, *first_of_event)


def _refuse_outside(name: str, site: dict[str, Any], model: minibatch) -> None:
    own = [frame.name for frame in site["cond_indep_stack"] if frame.size == model.batch_size]
    plates, share = sorted(model.found), f"{model.num_rows} / {model.batch_size}"
    line = f"row_plate={(*plates, *own)}" if own else f"with numpyro.plate('{plates[0]}', len(x)): around it"
    raise EnergyError(
        f"The observed site '{name}' depends on the {model.batch_size} rows of the batch and has as many values, and it is "
        f"outside of the plates {plates} of the rows, so that its rows would count once, and not {share} times. Write "
        f"{line}; or, if its values are not rows, a batch of another size."
    )
