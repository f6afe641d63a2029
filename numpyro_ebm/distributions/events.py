"""Shared by energies and scores: events laid out in rows, their support, and their unconstrained space."""

import abc
import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, Shaped
from numpyro.distributions import constraints

from numpyro_ebm._core.energies import AbstractEnergy, of_row, ready_made
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.inputs import as_numbers, check_key
from numpyro_ebm._core.jax_modes import in_own_modes, in_users_modes
from numpyro_ebm._core.members import Members
from numpyro_ebm._core.programs import trace
from numpyro_ebm._core.pytrees import assemble, check_pickles, dismantle
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree, Scalar
from numpyro_ebm.distributions._row_distribution import RowDistribution
from numpyro_ebm.distributions.advice import needs_integers, on_integers, to_shape
from numpyro_ebm.distributions.bases import split_rows
from numpyro_ebm.distributions.blocks import Blocks, is_real, members_of
from numpyro_ebm.distributions.discrete_references import discrete_reference
from numpyro_ebm.distributions.mixed import Part, log_reference_of, part_of, reference_of
from numpyro_ebm.distributions.shapes import as_shape, repeat, widen
from numpyro_ebm.distributions.supports import all_values, check_same_support, discrete_values, event_support, integer_bounds
from numpyro_ebm.kernels.densities import Known


class Rows(NamedTuple):
    """Events laid out one per row.

    Attributes:
        value: ``(num_rows, *event_shape)``.
        local: context and base parameters of each row, leaves ``(num_rows, ...)``; None without any.
    """

    value: Shaped[Array, " rows *event"]
    local: PyTree


class EventDistribution(RowDistribution):
    """An unnormalised distribution of events laid out in rows, each with its own context and base.

    Subclasses define ``unconstrained_score(position, local)``, the gradient of one row's log density in unconstrained space
    (Jacobian included), and ``target(kernel)``, the log density that a kernel targets.

    Attributes:
        has_energy: whether the log density is known up to a constant; if not, only its gradient is known.
    """

    arg_constraints = {}
    pytree_aux_fields = ("_sampler_structure", "_frozen_support")
    has_energy: ClassVar[bool]

    def __init__(
        self,
        event_shape: tuple[int, ...],
        context: PyTree,
        batch_shape: tuple[int, ...] | None,
        support: constraints.Constraint,
        base: dist.Distribution | None,
        sampler: Callable[..., Array],
        *,
        validate_args: bool | None,
    ):
        if not callable(sampler):
            raise TypeError(f"{type(self).__name__} needs a callable sampler; got {type(sampler).__name__}.")
        event_shape = _event_shape(event_shape)
        self._place(context, batch_shape)
        self._frozen_support = event_support(support, event_shape)
        if base is not None:
            self._spread_over(_check_base(base, event_shape, self._own_shape, self.support))
        self._sampler_arrays, self._sampler_structure = dismantle(sampler)
        self.base = base
        super().__init__(self._own_shape, event_shape, validate_args=validate_args)

    def closed(self, dtype: DTypeLike | None = None, *, order: int = 1) -> Any:
        """Return a copy with the energy or score traced, so that compiled programs are cached by what it computes.

        The copy has no sampler: draws are taken outside such programs.

        Args:
            dtype: dtype of the events; None for that of positions.
            order: number of derivatives taken in the event, see `trace`.
        """
        event = jnp.zeros(self.event_shape, (int if self.is_discrete else float) if dtype is None else dtype)
        new, function = copy.copy(self), self._function
        new.context = jax.tree.map(lambda leaf: widen(leaf, booleans=False), self.context)
        local = jax.eval_shape(lambda: new.rows(event, new.batch_shape).local)
        rows = () if new.context is None else (None if local is None else local[0],)
        contexts = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), rows)

        def as_written(*given):
            with in_users_modes():
                return jnp.asarray(function(*given))

        if ready_made(function) is None:  # a ready-made energy is a pytree that computes what its class says
            function = trace(as_written, event, *contexts, order=order)
        new._function_arrays, new._function_structure = dismantle(function)
        new._sampler_arrays, new._sampler_structure = dismantle(_no_sampler)
        return new

    @property
    def ready_energy(self) -> AbstractEnergy | None:
        """The ready-made energy that makes up the log density alone, of all rows or by their context; None for others."""
        return None

    @property
    def known(self) -> Known | None:
        """What kernels may know of the log density of a position; None unless the energy is a ready-made one."""
        return None

    @property
    def known_energy(self) -> AbstractEnergy | None:
        """The `ready_energy` if all rows share it; None for others."""
        return self.ready_energy if self.context is None else None

    def row_energy(self, local: PyTree) -> AbstractEnergy | None:
        """Return the `ready_energy` of one row, given its context and base parameters; None for others."""
        energy = self.ready_energy
        return None if energy is None else of_row(energy, local)

    @property
    def _function(self) -> Callable[..., Array]:
        """The energy or the score, as passed to the constructor."""
        return assemble(self._function_arrays, self._function_structure)

    @abc.abstractmethod
    def unconstrained_score(self, position: Float[Array, "*position"], local: PyTree = None) -> Float[Array, "*position"]:
        """Return the gradient of one row's log density in unconstrained space, the Jacobian included."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Reduce like any object, after a check that pickle finds its functions.

        Raises:
            TypeError: for a lambda or a local function, with what to write.
        """
        for function in (self._function, self.sampler):
            check_pickles(type(self).__name__, dismantle(function)[1].static)
        return super().__reduce_ex__(protocol)

    @property
    def sampler(self) -> Callable[..., Array]:
        """The function that ``sample`` calls."""
        return assemble(self._sampler_arrays, self._sampler_structure)

    @property
    def support(self) -> constraints.Constraint:
        """The constraint of one event."""
        return self._frozen_support.thaw()

    @property
    def has_rsample(self) -> bool:
        """False: no gradient flows through a sampler."""
        return False

    @in_own_modes
    def sample(self, key: PRNGKey | None, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw with the sampler; MCMC draws are approximate.

        Args:
            key: random key.
            sample_shape: shape of independent draws.

        Returns:
            Draws of shape ``sample_shape + batch_shape + event_shape``.
        """
        if key is None:
            raise EnergyError(
                f"{type(self).__name__}.sample needs a random key. Inside a model, write numpyro.handlers.seed(model, 0)."
            )
        check_key(f"{type(self).__name__}.sample", key)
        shape = self.shape(sample_shape)
        if 0 in shape:
            return jnp.zeros(shape)
        return self.sampler(key, self, tuple(sample_shape))

    def constrain(self, position: Shaped[Array, "*position"]) -> Shaped[Array, "*event"]:
        """Map an unconstrained position to one event; a discrete event is its own position."""
        return position if self.is_discrete else self._transform(position)

    def unconstrain(self, event: Shaped[Array, "*event"]) -> Shaped[Array, "*position"]:
        """Map one event to its unconstrained position; a discrete event becomes an integer array."""
        return jnp.asarray(event, int) if self.is_discrete else self._transform.inv(event)

    @property
    def is_discrete(self) -> bool:
        """Whether the whole event is discrete; an event that also has other members is `is_mixed` instead."""
        return bool(self.support.is_discrete) and not self.is_mixed

    @property
    def lists_values(self) -> bool:
        """Whether the values of an element of a discrete event can be listed."""
        return discrete_values(self.support, self.event_shape) is not None

    @property
    def is_mixed(self) -> bool:
        """Whether the event has discrete members beside continuous ones, or beside discrete ones with other values."""
        return self.members is not None

    @property
    def is_continuous(self) -> bool:
        """Whether no element is discrete, so that the event has derivatives."""
        return not self.support.is_discrete

    @property
    def members(self) -> Members | None:
        """The members of a mixed event, as positions hold them: floating-point numbers; None for other events."""
        return members_of(self.support)

    def part(self, names: Sequence[str]) -> Part:
        """Return what kernels need to know of some members of a mixed event.

        Raises:
            EnergyError: for an event that is not mixed, and for discrete members whose values cannot be listed.
        """
        return part_of(type(self).__name__, self.support, names)

    def is_inside(self, event: Shaped[Array, "*event"]) -> Bool[Array, ""]:
        """Return whether one event has a finite unconstrained position, so is not on the boundary of the support.

        Compiled, ``log(exp(z))`` becomes ``z`` even where ``exp(z)`` underflows, so the support is checked as well.
        """
        return jnp.all(jnp.isfinite(self.unconstrain(event))) & jnp.all(self.support(event))

    def rows(self, value: Array, batch_shape: tuple[int, ...]) -> Rows:
        """Broadcast events to ``batch_shape`` and lay them out one per row, with each row's context and base parameters."""
        flat = jnp.broadcast_to(value, batch_shape + self.event_shape).reshape((-1, *self.event_shape))
        base_parameters = None if self.base is None else split_rows(self.base, self._own_shape)[1]
        own = (self.context, base_parameters)
        if not jax.tree.leaves(own):
            return Rows(flat, None)
        own = jax.tree.map(lambda leaf: repeat(leaf, len(self._own_shape), batch_shape), own)
        return Rows(flat, jax.tree.map(lambda leaf: _flat_rows(leaf, len(batch_shape)), own))

    @property
    def reference(self) -> dist.Distribution:
        """The base; without one, a standard normal in unconstrained space, and uniform where the support is discrete.

        Over integers without a largest value it is a geometric distribution.
        By default chains start from it, and NCE takes its noise from it.
        """
        if self.base is not None:
            return self.base
        if self.is_discrete:
            return discrete_reference(self.support, self.event_shape)
        if isinstance(self.support, Blocks) and self.is_mixed:
            return reference_of(self.support)
        shape = self.unconstrained_shape
        normal = dist.Normal(jnp.zeros(shape), 1.0).to_event(len(shape))
        return normal if self._is_real else dist.TransformedDistribution(normal, self._transform)

    def unconstrained_log_reference(self, position: Shaped[Array, "*position"], local: PyTree = None) -> Scalar:
        """Return the log density of `reference` at an unconstrained position, Jacobian included, under the row's base."""
        if self.base is not None:
            base_parameters = None if local is None else local[1]
            return self._log_base(self.constrain(position), base_parameters) + self.log_jacobian(position)
        if self.is_discrete:
            return jnp.asarray(discrete_reference(self.support, self.event_shape).log_prob(position), float)
        if isinstance(self.support, Blocks) and self.is_mixed:
            return log_reference_of(self.support, position)
        return jnp.sum(dist.Normal(0.0, 1.0).log_prob(position))

    def reference_sample(self, rng_key: PRNGKey, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw from `reference`, with shape ``sample_shape + batch_shape + event_shape``."""
        return self.as_events(self.reference.expand(self.batch_shape).sample(rng_key, sample_shape))

    @property
    def discrete_values(self) -> Int[np.ndarray, "values ..."]:
        """The values that one element of a finite discrete support takes, in increasing order.

        They are numbers ``(num_values,)``, or vectors ``(num_values, num_categories)`` for one-hot categories.

        Raises:
            EnergyError: for a support without two finite bounds.
        """
        if self.is_mixed:
            raise EnergyError(f"The members of the support {self.support} have values of their own; there is no one list.")
        return all_values(self.support, self.event_shape)

    @property
    def integer_bounds(self) -> Float[np.ndarray, " 2 *event"]:
        """The lowest and the highest value of each element of a support of integers, infinite where there is none.

        Raises:
            EnergyError: for another support.
        """
        return integer_bounds(self.support, self.event_shape)

    @property
    def unconstrained_shape(self) -> tuple[int, ...]:
        """Shape of one event in unconstrained space."""
        return self.event_shape if self.is_discrete else tuple(self._transform.inverse_shape(self.event_shape))

    def as_events(self, value: object) -> Array:
        """Return values as an array of the default float type (discrete ones as integers), and check their shape.

        Raises:
            EnergyError: if the trailing shape is not ``event_shape`` or the leading shape does not broadcast.
            TypeError: for complex or non-numeric values.
        """
        value = as_numbers(type(self).__name__, value)
        value = widen(value) if self.is_discrete else value.astype(float)
        self._broadcast(value)
        return value

    def _broadcast(self, value: Array) -> tuple[int, ...]:
        """Return the shape of a value's rows."""
        cut = value.ndim - len(self.event_shape)
        problem = cut < 0 or value.shape[cut:] != self.event_shape
        if not problem:
            try:
                return jnp.broadcast_shapes(value.shape[:cut], self.batch_shape)
            except ValueError:
                pass
        write = f"Write {type(self).__name__}(..., event_shape={value.shape[len(self.batch_shape) or 1 :]})"
        if isinstance(self._function, AbstractEnergy):
            write = f"The event is that of the parameters of {type(self._function).__name__}: change these"
        raise EnergyError(
            f"Data of shape {value.shape} do not match event_shape={self.event_shape} and "
            f"batch_shape={self.batch_shape}: the data need shape (..., {', '.join(map(str, self.event_shape)) or 'rows'}). "
            f"{write}, or reshape the data.{to_shape(self.support, self.event_shape, value.shape)}"
        )

    def _log_base(self, event: Shaped[Array, "*event"], parameters: PyTree) -> Any:
        """Return the log density of one event under its row's base; 0 without a base."""
        return 0.0 if self.base is None else split_rows(self.base, self._own_shape)[0](event, parameters)

    def log_jacobian(self, position: Shaped[Array, "*position"]) -> Scalar:
        """Return the log Jacobian determinant of the transform at one unconstrained position; 0 on the real line."""
        if self._is_real or self.is_discrete:
            return jnp.zeros((), float)
        return jnp.sum(self._transform.log_abs_det_jacobian(position, self.constrain(position)))

    def _call(self, function: Callable[..., Any], event: Shaped[Array, "*event"], context: PyTree) -> Array:
        """Call the user's function on one event and, if there is a context, its row's context."""
        own = () if self.context is None else (jax.tree.map(lambda leaf: widen(leaf, booleans=False), context),)
        with in_users_modes():
            try:
                return jnp.asarray(function(event, *own))
            except (TypeError, ValueError) as error:
                if not isinstance(error, EnergyError) and needs_integers(function, event, *own):
                    raise on_integers(self.support) from error
                raise

    @property
    def _transform(self) -> Any:
        if self.is_discrete:
            raise EnergyError(
                f"The support {self.support} is discrete: gradient kernels and score-based estimators cannot work on it."
            )
        return dist.biject_to(self.support)

    @property
    def _is_real(self) -> bool:
        return is_real(self.support)


def _event_shape(shape: object) -> tuple[int, ...]:
    shape = as_shape("event_shape", shape)
    if 0 in shape:
        raise EnergyError(f"event_shape={shape} is an event without elements. Write event_shape=() for a scalar, or (3,).")
    return shape


def _check_base(
    base: object, event_shape: tuple[int, ...], batch_shape: tuple[int, ...], support: constraints.Constraint
) -> tuple[int, ...]:
    """Check that the base fits, and return the batch shape broadcast with the base's."""
    if not isinstance(base, dist.Distribution):
        raise TypeError(f"base needs a numpyro distribution; got {type(base).__name__}.")
    if base.event_shape != event_shape:
        raise EnergyError(
            f"base has event_shape {base.event_shape}, the energy has {event_shape}. "
            f"Write base=numpyro.distributions.Normal(0, 1).expand({list(event_shape)}).to_event({len(event_shape)})."
        )
    check_same_support("base", base, support)
    try:
        return jnp.broadcast_shapes(batch_shape, base.batch_shape)
    except ValueError:
        raise EnergyError(f"base has batch shape {base.batch_shape}, which does not broadcast to {batch_shape}.") from None


def _flat_rows(leaf: Array, ndim: int) -> Array:
    return leaf.reshape((-1, *leaf.shape[ndim:]))


def _no_sampler(rng_key: PRNGKey, distribution: EventDistribution, sample_shape: tuple[int, ...]) -> Array:
    raise TypeError("A distribution inside a traced program has no sampler.")
