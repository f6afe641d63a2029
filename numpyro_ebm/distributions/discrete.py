"""Supports of spins and of one-hot categories, the values of discrete elements, and their uniform distribution."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Int, Shaped
from numpyro.distributions import constraints

from numpyro_ebm._core.typing import Array, ArrayLike, PRNGKey


class Spins(constraints.ParameterFreeConstraint):
    """The set of the two numbers -1 and 1."""

    is_discrete = True
    event_dim = 0

    def __call__(self, x: Any) -> Any:
        """Return whether each number is -1 or 1."""
        return (x == -1) | (x == 1)

    def feasible_like(self, prototype: Any) -> Array:
        """Return ones."""
        return jnp.ones_like(prototype)

    def __repr__(self) -> str:
        return "numpyro_ebm.spins"


class OneHot(constraints.ParameterFreeConstraint):
    """The vectors with a single 1 among zeros."""

    is_discrete = True
    event_dim = 1

    def __call__(self, x: Any) -> Any:
        """Return whether each vector along the last axis has a single 1 among zeros."""
        return jnp.all((x == 0) | (x == 1), axis=-1) & (jnp.sum(x, axis=-1) == 1)

    def feasible_like(self, prototype: Any) -> Array:
        """Return vectors of the first category."""
        return jnp.zeros_like(prototype).at[..., 0].set(1)

    def __repr__(self) -> str:
        return "numpyro_ebm.one_hot"


spins = Spins()
"""Support of numbers that are -1 or 1: ``EnergyDistribution(energy, (9,), support=ebm.spins)``."""
one_hot = OneHot()
"""Support of one-hot vectors: ``EnergyDistribution(energy, (num_sites, num_categories), support=ebm.one_hot)``."""


class UniformValues(dist.Distribution):
    """The uniform distribution of events whose elements take given values.

    Args:
        values: ``(num_values, ...)``, the values of one element.
        support: the constraint of a whole event.
        event_shape: shape of an event.
    """

    arg_constraints = {}
    pytree_data_fields = ("values",)
    pytree_aux_fields = ("_set",)
    _set: constraints.Constraint

    def __init__(self, values: Any, support: constraints.Constraint, event_shape: tuple[int, ...]):
        self.values = values
        self._set = support
        super().__init__((), event_shape)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """The constraint of an event."""
        return self._set

    def sample(self, key: PRNGKey, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw each element independently."""
        shape = (*sample_shape, *self.batch_shape, num_elements(self.values, self.event_shape))
        codes = jax.random.randint(key, shape, 0, len(self.values))
        return jnp.asarray(self.values)[codes].reshape(self.shape(sample_shape))

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> Array:
        """Return minus the log of the number of states; -inf outside the support."""
        log_prob = -num_elements(self.values, self.event_shape) * math.log(len(self.values))
        return jnp.where(self._set(jnp.asarray(value)), log_prob, -jnp.inf)


def num_elements(values: Shaped[np.ndarray | Array, "values ..."], event_shape: tuple[int, ...]) -> int:
    """Return the number of elements of an event, each of which takes one of these values."""
    return math.prod(event_shape[: len(event_shape) - values.ndim + 1])


def values_of(kind: object, num_categories: int) -> Int[np.ndarray, "values ..."] | None:
    """Return the values of an element of spins or one-hot vectors; None for other constraints."""
    if isinstance(kind, Spins):
        return np.array([-1, 1])
    return np.eye(num_categories, dtype=int) if isinstance(kind, OneHot) else None
