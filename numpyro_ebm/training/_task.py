"""What `fit` computes again and again: updates, the loss of held-out rows and looks at the chains, each one program."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState
from numpyro.optim import SGD

from numpyro_ebm._core import programs
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.pytrees import assemble
from numpyro_ebm._core.sharding import on_one_device
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree, Scalar
from numpyro_ebm.handlers.minibatch import check_rows_are_not_told_apart, minibatch, the_plates
from numpyro_ebm.training._held_out import Arguments, by_site, in_order, loss_at
from numpyro_ebm.training._rows import check_rows
from numpyro_ebm.training.batches import Batch, Feed, Layout
from numpyro_ebm.training.recording import look_at_pools, sites_of
from numpyro_ebm.training.sharding import TrainingPlacement


class Average(NamedTuple):
    """A moving average of unconstrained parameters, of which the last has a weight of 1 - decay.

    The weights so far are kept beside the mean, so that it is one at any time, also if the decay changes.

    Attributes:
        mean: the average, in float32 or finer: 1 - decay is less than the precision of bfloat16.
        weight: sum of the weights; 0 before the first update.
    """

    mean: PyTree
    weight: Float[Array, ""]

    @classmethod
    def of(cls, params: PyTree) -> "Average":
        """Return the average before the first update: the parameters, without weight."""
        fine = lambda leaf: jnp.asarray(leaf, jnp.promote_types(jnp.result_type(leaf), jnp.float32))  # noqa: E731
        return cls(jax.tree.map(fine, params), jnp.zeros((), float))

    def updated(self, params: PyTree, decay: float) -> "Average":
        """Return the average with the parameters of one more update."""
        weight = decay * self.weight + (1 - decay)
        part = (1 - decay) / weight
        return Average(
            jax.tree.map(lambda mean, new: mean + part.astype(mean.dtype) * (new - mean), self.mean, params), weight
        )


class Carry(NamedTuple):
    """What an update changes.

    Attributes:
        svi: the state of SVI.
        average: the moving average of the unconstrained parameters; None without one.
        rate: the part of each step of the optimiser that is taken; None for whole steps.
    """

    svi: SVIState
    average: Average | None = None
    rate: Float[Array, ""] | None = None


class Data(NamedTuple):
    """Arrays that an update is made from.

    Attributes:
        constants: arrays among the arguments of `fit`, the same for all updates.
        rows: arrays of the batch, empty where the arguments are all there is; those of several updates are stacked.
        index: place of each row of the batch in the data set; None where it is not known.
    """

    constants: list[Any]
    rows: list[Any]
    index: Int[Array, "*updates rows"] | None = None

    @property
    def like_one(self) -> "Data":
        """Shapes and types of the arrays of one update, where those of several are stacked."""
        one = lambda each: jax.ShapeDtypeStruct(each.shape[1:], each.dtype)  # noqa: E731
        return self._replace(rows=[*map(one, self.rows)], index=None if self.index is None else one(self.index))

    def at(self, i: Any) -> "Data":
        """Return the arrays of one update, where those of several are stacked."""
        return self._replace(rows=[each[i] for each in self.rows], index=None if self.index is None else self.index[i])


@dataclasses.dataclass(frozen=True)
class Task:
    """A training: the model with its data, and the programs, traced once for each shape of a batch.

    Attributes:
        svi: the SVI of the user.
        train: the arguments of `fit`, without batches.
        held_out: held-out rows, or None.
        key_held_out: random key of their loss.
        feed: source of batches; None where the arguments hold all rows.
        layout: which arguments the arrays of a batch are.
        plates: names of the plates of the rows, where there are batches; None for those that fit.
        num_rows: number of rows of the data set, where there are batches.
        decay: decay of the moving average of the parameters; None without one.
        num_recorded: how many persistent chains of each site to record.
        watched: a function of the parameters that stands for the loss of held-out rows, or None.
        placement: how arrays are split over devices; None for one device.
    """

    svi: SVI
    train: Arguments
    held_out: Arguments | None
    key_held_out: PRNGKey
    feed: Feed | None = None
    layout: Layout = Layout(0, ())
    plates: str | Sequence[str] | None = None
    num_rows: int | None = None
    decay: float | None = None
    num_recorded: int = 0
    watched: Callable[[dict[str, Any]], Any] | None = None
    placement: TrainingPlacement | None = None
    _updates: dict[Any, Any] = dataclasses.field(default_factory=dict)
    _others: dict[str, Any] = dataclasses.field(default_factory=dict)

    def started(self, rng_key: PRNGKey, init_params: dict[str, Any] | None) -> tuple[SVIState, "Task"]:
        """Initialise SVI on the first batch, and find the plates of the rows.

        Raises:
            EnergyError: if no plate, or several, have as many rows as the batch; if their number in all is not known; for
                chains that belong to rows, if it is not known which rows come; and for a model that looks up wrong rows.
        """
        here = dataclasses.replace(self, placement=None)  # whose values can be read, also by one process of several
        data = here.data([] if self.feed is None else [self.feed.peek()]).at(0)
        (args, kwargs), svi = self.arguments(data), self.bound(data)
        state = svi.init(rng_key, *args, init_params=init_params, **kwargs)
        self.svi.constrain_fn = svi.constrain_fn
        if not data.rows:
            return state, self
        if data.index is None:
            check_rows_are_not_told_apart(sites_of(svi, args, kwargs, state))
        plates, num_rows = the_plates(svi.model)
        task = dataclasses.replace(self, plates=plates, num_rows=num_rows)
        check_rows(task.bound(data), lambda rows: self.arguments(data._replace(rows=rows)), data.rows, state)
        return state, task

    def data(self, batches: Sequence[Batch], size: int = 1) -> Data:
        """Return the arrays of some updates, those of the batches on their way to the device in room for ``size``."""
        if not batches:
            return Data(self.train.arrays, [])
        rows = [_stacked(each, size) for each in zip(*(batch.arrays for batch in batches), strict=True)]
        has_index = batches[0].index is not None
        put = jax.device_put if self.placement is None else self.placement.put_rows
        index = put(_stacked([batch.index for batch in batches], size)) if has_index else None
        return Data(self.train.arrays, [put(each) for each in rows], index)

    def spread(self) -> "Task":
        """Return the task with the arguments of `fit` on the devices."""
        if self.placement is None:
            return self
        return dataclasses.replace(self, train=self.train._replace(arrays=self.placement.put_constants(self.train.arrays)))

    def placed(self, carry: Carry) -> Carry:
        """Return the carry where it lay before an update, so that the next one is the same program."""
        return carry if self.placement is None else self.placement.put(carry)

    def update(self, carry: Carry, data: Data) -> programs.Program:
        """Return the program of an update: ``update(carry, data) -> carry, (loss, norm of the gradient)``.

        Args:
            carry: what it changes.
            data: arrays of one update.
        """
        key = tuple((each.shape, each.dtype) for each in data.rows)
        if key not in self._updates:
            # By shapes: JAX traces arrays that lie on several devices to other operations, and a checkpoint would not fit.
            self._updates[key] = programs.trace(self._update, *jax.tree.map(_shape, (carry, data)))
        return self._updates[key]

    def loss(self, carry: Carry) -> tuple[float, dict[str, Any]]:
        """Return the held-out loss, and the constrained parameters at which it is evaluated."""
        if self.watched is not None:
            params = self.params(carry)
            return _number(self.watched(self.for_users(params))), params
        rows: Any = self.held_out
        if "loss" not in self._others:
            self._others["loss"] = programs.trace(self._loss, carry, rows.arrays)
        loss, params = programs.call(self._others["loss"], carry, rows.arrays)
        return float(loss), params

    def look(self, carry: Carry, data: Data) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return draws of the recorded chains, and their energies."""
        if not self.num_recorded:
            return {}, {}
        key = ("look", *(each.shape for each in data.rows))
        if key not in self._others:
            self._others[key] = programs.trace(self._look, carry, data)  # pyright: ignore[reportArgumentType]
        return programs.call(self._others[key], carry, data)  # pyright: ignore[reportArgumentType]

    @property
    def has_held_out(self) -> bool:
        """Whether there is a held-out loss."""
        return self.held_out is not None or self.watched is not None

    def params(self, carry: Carry) -> dict[str, Any]:
        """Return the constrained parameters: the average where there is one, else the last."""
        last = self.svi.optim.get_params(carry.svi.optim_state)
        constrain: Any = self.svi.constrain_fn
        if carry.average is not None:
            last = jax.tree.map(lambda leaf, mean: mean.astype(leaf.dtype), last, carry.average.mean)
        return constrain(last)

    def for_users(self, params: dict[str, Any]) -> dict[str, Any]:
        """Return parameters that fit any program, where those of a training on a mesh fit only programs on that mesh."""
        return params if self.placement is None else on_one_device(params)

    def arguments(self, data: Data) -> tuple[tuple, dict[str, Any]]:
        """Return the arguments of the model and the guide: those of the batch, then those of `fit`."""
        args, kwargs = assemble(data.constants, self.train.structure)
        rows, named = self.layout.arguments(data.rows)
        return (*rows, *args), kwargs | named

    def bound(self, data: Data) -> SVI:
        """Return the SVI whose model and guide know what part of the data set the batch is."""
        if not data.rows:
            return self.svi
        around = lambda fn: minibatch(fn, len(data.rows[0]), self.num_rows, data.index, self.plates)  # noqa: E731
        return _copied(self.svi, model=around(self.svi.model), guide=around(self.svi.guide))

    def _update(self, carry: Carry, data: Data) -> tuple[Carry, tuple[Scalar, Scalar]]:
        args, kwargs = self.arguments(data)
        svi = self.bound(data)
        svi = _copied(svi, optim=_MeasuredOptimizer(svi.optim, carry.rate), loss=by_site(svi.loss))
        state, measured = svi.update(carry.svi, *args, **kwargs)
        average = carry.average
        if average is not None and self.decay is not None:
            average = average.updated(svi.optim.get_params(state.optim_state), self.decay)
        carry = carry._replace(svi=state, average=average)
        return carry if self.placement is None else self.placement.keep(carry), measured

    def _loss(self, carry: Carry, arrays: list[Any]) -> tuple[Scalar, dict[str, Any]]:
        rows: Any = self.held_out
        params = self.params(carry)
        given = params | (carry.svi.mutable_state or {})  # svi.evaluate would restart the mutable state
        return loss_at(self.svi, rows._replace(arrays=arrays), self.key_held_out, given), params

    def _look(self, carry: Carry, data: Data) -> tuple[dict[str, Any], dict[str, Any]]:
        found = look_at_pools(self.bound(data), *self.arguments(data), self.num_recorded, carry.svi)
        return found if self.placement is None else self.placement.gathered(found)


def _number(loss: Any) -> float:
    if np.ndim(loss) > 0:
        raise TypeError(
            f"The function held_out needs to return one number; got an array of shape {np.shape(loss)}. Write "
            "held_out=lambda params: jnp.mean(loss_of_each_row(params))."
        )
    return float(loss)


def _stacked(arrays: Sequence[Any], size: int) -> np.ndarray:
    """Return arrays along a new first axis, with zeros up to its size."""
    stacked = np.zeros((size, *np.shape(arrays[0])), arrays[0].dtype)
    np.stack(arrays, out=stacked[: len(arrays)])
    return stacked


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=getattr(leaf, "weak_type", False))


def scales_steps(svi: SVI, state: SVIState) -> bool:
    """Return whether the optimiser keeps the parameters where the steps can be shortened, as those of optax do."""
    _, own = state.optim_state
    params = svi.optim.get_params(state.optim_state)
    return isinstance(own, tuple) and len(own) == 2 and jax.tree.structure(own[0]) == jax.tree.structure(params)


def check_scales_steps(svi: SVI, state: SVIState) -> None:
    """Refuse an optimiser whose steps cannot be shortened.

    Raises:
        EnergyError: with the optimiser to write.
    """
    if not scales_steps(svi, state):
        raise EnergyError(
            "on_unhealthy='rollback' takes smaller steps after it went back, and this optimiser does not show where its "
            "parameters are. Write SVI(model, guide, optax.adam(1e-3), ...), with an optimiser from optax."
        )


class _MeasuredOptimizer:
    """An optimiser of NumPyro whose updates also return the norm of the gradient, and take a part of each step."""

    def __init__(self, optimizer: Any, rate: Float[Array, ""] | None):
        self._optimizer, self._rate = optimizer, rate
        self.get_params = optimizer.get_params

    def eval_and_update(self, fn: Any, state: Any, *, forward_mode_differentiation: bool = False) -> Any:
        """Make an update; the first value returned is ``((loss, norm), mutable_state)``."""

        def of_all_sites(params):
            loss, mutable = fn(params)
            return in_order(loss), mutable

        if type(self._optimizer).eval_and_update is not SGD.eval_and_update:  # as `Minimize`, which has no one gradient
            mode = {"forward_mode_differentiation": forward_mode_differentiation}
            (loss, mutable), new = self._optimizer.eval_and_update(of_all_sites, state, **mode)
            return ((loss, jnp.full((), np.nan, loss.dtype)), mutable), new
        params = self.get_params(state)
        (loss, mutable), gradient = jax.value_and_grad(of_all_sites, has_aux=True)(params)
        new = self._optimizer.update(gradient, state, value=loss)
        return ((loss, _norm(gradient)), mutable), self._shortened(params, new)

    def _shortened(self, before: PyTree, state: Any) -> Any:
        if self._rate is None:
            return state
        step, (after, own) = state
        rate = self._rate
        part = jax.tree.map(lambda old, new: old + rate.astype(old.dtype) * (new - old), before, after)
        return step, (part, own)


def _norm(tree: PyTree) -> Scalar:
    return jnp.sqrt(sum(jnp.sum(jnp.abs(leaf) ** 2) for leaf in jax.tree.leaves(tree)))  # pyright: ignore


def _copied(svi: SVI, **attributes: Any) -> SVI:
    new = copy.copy(svi)
    vars(new).update(attributes)
    return new
