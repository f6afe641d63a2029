"""The values of discrete elements as whole numbers, and the steps from one to another."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int, Shaped

from numpyro_ebm._core.typing import Array
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.distributions.supports import discrete_values, integer_bounds
from numpyro_ebm.kernels.elements import Elements


@dataclasses.dataclass(frozen=True)
class Lattice:
    """The codes of an event's elements: indices of their values, or the integers of a support without two bounds.

    Attributes:
        elements: the elements where their values can be listed, else None.
        like: an event, for its shape and dtype.
        low: lowest code of each element, ``(num_elements,)``; -inf for none.
        high: highest code of each element, ``(num_elements,)``; inf for none.
        wraps: whether a step beyond either end of an element leads to the other end, ``(num_elements,)``.
    """

    elements: Elements | None
    like: jax.ShapeDtypeStruct
    low: np.ndarray
    high: np.ndarray
    wraps: np.ndarray

    @classmethod
    def of(cls, distribution: EventDistribution, *, cyclic: bool = True) -> "Lattice":
        """Return the lattice of a discrete event.

        Args:
            distribution: distribution of the event.
            cyclic: whether elements with two ends are rings.

        Raises:
            EnergyError: for a support that is neither integers nor a list of values.
        """
        like = jax.ShapeDtypeStruct(distribution.event_shape, jnp.result_type(int))
        values = discrete_values(distribution.support, distribution.event_shape)
        if values is not None:
            elements: Any = Elements.of(values, like)
            low, high = np.zeros(sum(elements.sizes)), np.full(sum(elements.sizes), len(values) - 1.0)
        else:
            bounds = integer_bounds(distribution.support, distribution.event_shape)
            elements, (low, high) = None, bounds.reshape(2, -1)
        return cls(elements, like, low, high, cyclic & np.isfinite(high - low))

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return len(self.low)

    def codes(self, position: Shaped[Array, "*event"]) -> Int[Array, " elements"]:
        """Return the codes of an event."""
        return position.ravel() if self.elements is None else self.elements.codes(position)

    def position(self, codes: Int[Array, " elements"]) -> Shaped[Array, "*event"]:
        """Return the event with these codes."""
        return codes.reshape(self.like.shape) if self.elements is None else self.elements.position(codes, self.like)

    def moved(
        self, codes: Int[Array, "*num"], shifts: Int[Array, "*num"], i: Int[Array, "*num"]
    ) -> tuple[Int[Array, "*num"], Bool[Array, "*num"]]:
        """Return codes of elements ``i`` after a shift, and whether there are such values other than their own.

        Where there is none, the code stays as it was.
        """
        low, high, wraps = (jnp.asarray(each)[i] for each in (self.low, self.high, self.wraps))
        size = jnp.where(wraps, high - low + 1, 1).astype(codes.dtype)
        start = jnp.where(wraps, low, 0).astype(codes.dtype)
        there = jnp.where(wraps, start + (codes - start + shifts) % size, codes + shifts)
        exists = jnp.where(wraps, jnp.abs(shifts) < size, (low <= there) & (there <= high))
        return jnp.where(exists, there, codes), exists
