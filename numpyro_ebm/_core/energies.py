"""The interface of ready-made energies: what an energy may know of its own structure."""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped
from numpyro.distributions import constraints

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.records import rebuilt
from numpyro_ebm._core.typing import Array, PRNGKey, Scalar


class AbstractEnergy(abc.ABC):
    r"""A ready-made energy: a frozen pytree of parameters, called with one event.

    Besides its value, an energy may know three things that a function does not tell, all of them optional: its log Z, the
    conditionals of the elements of a discrete event, and a draw of all elements by blocks. Kernels and estimators use what
    they find, and call the energy otherwise. Compiled programs are kept by the structure of the pytree, so an energy
    depends on nothing but its fields.

    Elements are numbered as in the flat event, and the values of an element as in the support: 0 and 1, -1 and 1, the
    integers upwards, the categories of a one-hot vector.

    Attributes:
        linear_in: names of the fields that, all of them times a factor, make the energy times the factor; empty for none.
        takes_context: whether the energy is called as ``energy(event, context)``; `given` then returns that of one row.
    """

    linear_in: ClassVar[tuple[str, ...]] = ()
    takes_context: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one event."""

    @property
    def support(self) -> constraints.Constraint:
        """The constraint of one element."""
        return constraints.real

    @property
    def described(self) -> str:
        """What messages call the energy: the name of its class."""
        return type(self).__name__

    @abc.abstractmethod
    def __call__(self, event: Shaped[Array, "*event"]) -> Scalar:
        """Return the energy of one event."""

    def given(self, context: Any) -> "AbstractEnergy":
        """Return the energy of one row, given its context; without a context, the energy itself.

        Raises:
            EnergyError: for a context that the energy does not take.
        """
        if context is None:
            return self
        raise EnergyError(
            f"{type(self).__name__} is an energy of the event alone and takes no context. Make it from the context in a "
            f"function: EnergyDistribution(lambda x, c: {type(self).__name__}(...)(x), event_shape, context=context)."
        )

    @property
    def is_differentiable(self) -> bool:
        """Whether the energy has a gradient in the event; False where it uses elements as indices."""
        return True

    @property
    def num_terms(self) -> int | None:
        """Number of terms that `log_partition` sums; None if log Z is not known."""
        return None

    def log_partition(self) -> Scalar:
        """Return the exact log Z.

        Raises:
            EnergyError: for an energy whose log Z is not known.
        """
        raise EnergyError(
            f"The log Z of {type(self).__name__} is not known. Write numpyro_ebm.log_partition(rng_key, distribution, "
            "method='ais')."
        )

    @property
    def has_conditionals(self) -> bool:
        """Whether `conditional_logits` is known."""
        return type(self).conditional_logits is not AbstractEnergy.conditional_logits

    def conditional_logits(
        self, event: Shaped[Array, "*event"], index: Int[Array | np.ndarray, "..."] | None = None
    ) -> Float[Array, "... values"]:
        """Return the log probabilities of the values of elements given all other elements, up to a constant per element.

        Args:
            event: one event.
            index: numbers of elements, of any shape; None for all elements.

        Returns:
            Logits of shape ``index.shape + (num_values,)``.

        Raises:
            NotImplementedError: for an energy without `has_conditionals`.
        """
        raise NotImplementedError(f"The conditionals of {type(self).__name__} are not known.")

    @property
    def has_logits_of_many(self) -> bool:
        """Whether `logits_of_many` is known."""
        return type(self).logits_of_many is not AbstractEnergy.logits_of_many

    def logits_of_many(
        self, elements: Shaped[Array, "elements events"], index: Int[np.ndarray, " chosen"]
    ) -> Float[Array, "values chosen events"]:
        """Return `conditional_logits` of elements in each of many events, which lie side by side on the last axis.

        The elements of one number are then next to each other in memory, and a graph's neighbours are read in runs.

        Args:
            elements: the flat events, one per column, in any dtype that holds the values.
            index: numbers of elements.

        Raises:
            NotImplementedError: for an energy without `has_logits_of_many`.
        """
        raise NotImplementedError(f"The conditionals of many events of {type(self).__name__} are not known.")

    @property
    def has_log_ratios(self) -> bool:
        """Whether `log_ratio` is known."""
        return type(self).log_ratio is not AbstractEnergy.log_ratio

    def log_ratio(self, event: Shaped[Array, "*event"], index: Int[Array, ""], value: Shaped[Array, ""]) -> Scalar:
        """Return the log density with one element at another value minus that of the event.

        Args:
            event: one event.
            index: number of the element.
            value: its other value.

        Raises:
            NotImplementedError: for an energy without `has_log_ratios`.
        """
        raise NotImplementedError(f"The ratios of {type(self).__name__} at the values of one element are not known.")

    @property
    def blocks(self) -> tuple[np.ndarray, ...] | None:
        """Sets of elements, each independent within itself given the others, which together are all elements.

        `BlockGibbs` checks that each element is in one block, and not the independence, which the energy has to know: the
        conditional logits of a block must not change with the elements of the block.
        """
        return None

    @property
    def has_sweep(self) -> bool:
        """Whether `sweep` is known."""
        return type(self).sweep is not AbstractEnergy.sweep

    def sweep(self, rng_key: PRNGKey, event: Shaped[Array, "*event"]) -> Shaped[Array, "*event"]:
        """Draw all elements of an event by blocks, which leaves ``exp(-energy)`` invariant.

        Raises:
            NotImplementedError: for an energy without `has_sweep`.
        """
        raise NotImplementedError(f"A draw of {type(self).__name__} by blocks is not known.")

    def scaled(self, factor: Scalar | float) -> "AbstractEnergy | None":
        """Return the energy times a factor as another energy of its family; None if the family does not have it."""
        if not self.linear_in:
            return None
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # pyright: ignore[reportArgumentType]
        changed = {name: jax.tree.map(lambda leaf: factor * leaf, own[name]) for name in self.linear_in}
        return rebuilt(type(self), own | changed)

    @property
    def has_bonds(self) -> bool:
        """Whether `bonds` are known, for an energy given covariates those of each row."""
        return self.bonds is not None

    @property
    def bonds(self) -> Any:
        """`Bonds` of an energy in which equal neighbours attract each other; None for other energies."""
        return None


def ready_made(function: Any) -> AbstractEnergy | None:
    """Return a function as the ready-made energy that it is; None for any other function.

    An energy with parts that are ordinary functions is not known as a whole.
    """
    is_known = isinstance(function, AbstractEnergy) and not any(callable(leaf) for leaf in jax.tree.leaves(function))
    return function if is_known else None


def of_row(energy: AbstractEnergy, local: Any) -> AbstractEnergy:
    """Return the energy of one row, given its context and base parameters ``(context, base)``, or None without any."""
    return energy.given(local[0]) if energy.takes_context else energy


def summable(energy: AbstractEnergy | None) -> AbstractEnergy | None:
    """Return an energy whose log Z is known, else None."""
    return None if energy is None or energy.num_terms is None else energy


def as_floats(event: Shaped[Array, "..."]) -> Float[Array, "..."]:
    """Return an event as floating-point numbers."""
    event = jnp.asarray(event)
    return event if jnp.issubdtype(event.dtype, jnp.floating) else event.astype(float)
