"""The uniform distribution of discrete events."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import constraints

from numpyro_ebm._core.discrete import num_elements
from numpyro_ebm._core.typing import Array, ArrayLike, PRNGKey


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
