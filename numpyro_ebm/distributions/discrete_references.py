"""Simple distributions of discrete events: uniform over their values, and geometric over integers without an end."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import constraints

from numpyro_ebm._core.discrete import num_elements
from numpyro_ebm._core.typing import Array, ArrayLike, PRNGKey
from numpyro_ebm.distributions.supports import discrete_values, integer_bounds

MEAN_COUNT = 1.0
"""Mean of the geometric distribution, above the lowest value. Chains climb from there as fast as they would come down, and
restarted ones ("replay") that have not moved yet do not dominate the moments of small counts."""


def discrete_reference(support: constraints.Constraint, event_shape: tuple[int, ...]) -> dist.Distribution:
    """Return independent elements: uniform over their values or, for integers without a largest value, geometric.

    Args:
        support: the constraint of a whole event.
        event_shape: shape of an event.

    Raises:
        EnergyError: for a support whose values can neither be listed nor are integers between known bounds.
    """
    values = discrete_values(support, event_shape)
    if values is None:
        return IntegerValues(integer_bounds(support, event_shape), support, event_shape)
    return UniformValues(values, support, event_shape)


class ByElement(dist.Distribution):
    """A distribution of events with independent elements.

    Args:
        table: what the elements are drawn from.
        support: the constraint of a whole event.
        event_shape: shape of an event.
    """

    arg_constraints = {}
    pytree_data_fields = ("table",)
    pytree_aux_fields = ("_set",)
    _set: constraints.Constraint

    def __init__(self, table: Any, support: constraints.Constraint, event_shape: tuple[int, ...]):
        self.table = table
        self._set = support
        super().__init__((), event_shape)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """The constraint of an event."""
        return self._set


class UniformValues(ByElement):
    """The uniform distribution of events whose elements take given values, ``(num_values, ...)``."""

    def sample(self, key: PRNGKey, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw each element independently."""
        shape = (*sample_shape, *self.batch_shape, num_elements(self.table, self.event_shape))
        codes = jax.random.randint(key, shape, 0, len(self.table))
        return jnp.asarray(self.table)[codes].reshape(self.shape(sample_shape))

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> Array:
        """Return minus the log of the number of states; -inf outside the support."""
        log_prob = -num_elements(self.table, self.event_shape) * math.log(len(self.table))
        return jnp.where(self._set(jnp.asarray(value)), log_prob, -jnp.inf)


class IntegerValues(ByElement):
    """Independent integers: uniform between two bounds, and the lowest value plus a geometric number where there is no end.

    The table holds the lowest and the highest value of each element, ``(2, *event_shape)``.
    """

    def sample(self, key: PRNGKey, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw each element independently."""
        low, num = self._lowest_and_number()
        shape = (*sample_shape, *self.batch_shape, *self.event_shape)
        key_uniform, key_geometric = jax.random.split(key)
        ends = jnp.isfinite(num)
        uniform = jax.random.randint(key_uniform, shape, 0, jnp.where(ends, num, 1.0).astype(int))
        return low.astype(int) + jnp.where(ends, uniform, jnp.asarray(_GEOMETRIC.sample(key_geometric, shape), int))

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> Array:
        """Return the log probability; -inf outside the support."""
        low, num = self._lowest_and_number()
        ends = jnp.isfinite(num)
        each = jnp.where(ends, -jnp.log(jnp.where(ends, num, 1.0)), _GEOMETRIC.log_prob(jnp.asarray(value, float) - low))
        log_prob = jnp.sum(each, axis=tuple(range(-len(self.event_shape), 0)))
        return jnp.where(self._set(jnp.asarray(value)), log_prob, -jnp.inf)

    def _lowest_and_number(self) -> tuple[Array, Array]:
        """Return the lowest value of each element, and the number of its values."""
        low, high = jnp.asarray(self.table, float)
        return low, high - low + 1


_GEOMETRIC: Any = dist.GeometricProbs(1 / (1 + MEAN_COUNT))
