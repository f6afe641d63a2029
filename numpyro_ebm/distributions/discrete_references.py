"""Simple distributions of discrete events: uniform over listed values, and geometric over integers without an end."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import constraints

from numpyro_ebm._core.discrete import is_endless, num_elements
from numpyro_ebm._core.typing import Array, ArrayLike, PRNGKey
from numpyro_ebm.distributions.blocks import elementary
from numpyro_ebm.distributions.supports import integer_bounds, listed_values

MEAN_COUNT = 1.0
"""Mean of the geometric distribution, above the lowest value. Chains climb from there as fast as they would come down, and
restarted ones ("replay") that have not moved yet do not dominate the moments of small counts."""


def discrete_reference(support: constraints.Constraint, event_shape: tuple[int, ...]) -> dist.Distribution:
    """Return the uniform distribution of independent elements, or a geometric one if they have no largest value.

    Args:
        support: the constraint of a whole event.
        event_shape: shape of an event.

    Raises:
        EnergyError: for a support whose values cannot be listed although they end, as bounds that differ between elements.
    """
    if is_endless(elementary(support)):
        return GeometricValues(integer_bounds(support, event_shape)[0], support, event_shape)
    return UniformValues(listed_values(support, event_shape), support, event_shape)


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


class GeometricValues(dist.Distribution):
    """Independent integers, each of which exceeds its lowest value by a geometric number of mean 1.

    Args:
        low: the lowest value of each element, of the shape of an event.
        support: the constraint of a whole event.
        event_shape: shape of an event.
    """

    arg_constraints = {}
    pytree_data_fields = ("low",)
    pytree_aux_fields = ("_set",)
    _set: constraints.Constraint

    def __init__(self, low: Any, support: constraints.Constraint, event_shape: tuple[int, ...]):
        self.low = low
        self._set = support
        super().__init__((), event_shape)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """The constraint of an event."""
        return self._set

    def sample(self, key: PRNGKey, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw each element independently."""
        excess = _GEOMETRIC.sample(key, (*sample_shape, *self.batch_shape, *self.event_shape))
        return jnp.asarray(self.low, int) + jnp.asarray(excess, int)

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> Array:
        """Return the log probability; -inf outside the support."""
        excess = jnp.asarray(value, float) - jnp.asarray(self.low, float)
        log_prob = jnp.sum(_GEOMETRIC.log_prob(excess), axis=tuple(range(-len(self.event_shape), 0)))
        return jnp.where(self._set(jnp.asarray(value)), log_prob, -jnp.inf)


_GEOMETRIC: Any = dist.GeometricProbs(1 / (1 + MEAN_COUNT))
