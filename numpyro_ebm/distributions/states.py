"""Sums over all states of a discrete event."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Shaped

from numpyro_ebm._core.typing import Array, Scalar
from numpyro_ebm.distributions.discrete import num_elements
from numpyro_ebm.distributions.events import EventDistribution

AT_ONCE = 2**14
"""States evaluated at once: more run faster and need more memory."""


def num_states(distribution: EventDistribution) -> int:
    """Return the number of states of one event."""
    return len(distribution.discrete_values) ** num_elements(distribution.discrete_values, distribution.event_shape)


def in_words(distribution: EventDistribution) -> str:
    """Return the number of states as a power, for messages."""
    values = distribution.discrete_values
    return f"{len(values)}**{num_elements(values, distribution.event_shape)}"


def log_sum_over_states(distribution: EventDistribution, log_density: Callable[[Shaped[Array, "*event"]], Scalar]) -> Scalar:
    """Return the log of the sum of ``exp(log_density(event))`` over all states, in blocks of bounded memory.

    The backward pass computes each block again instead of keeping it.

    Args:
        distribution: determines the states; the caller checks that they are few enough.
        log_density: function of one event.
    """
    values = jnp.asarray(distribution.discrete_values)
    count, size = num_states(distribution), num_elements(values, distribution.event_shape)
    places = len(values) ** jnp.arange(size)

    def at_index(index):
        event = values[index // places % len(values)].reshape(distribution.event_shape)
        return jnp.where(index < count, log_density(event), -jnp.inf)

    def of_block(first):
        return jax.nn.logsumexp(jax.vmap(at_index)(first + jnp.arange(min(AT_ONCE, count))))

    return jax.nn.logsumexp(jax.lax.map(jax.checkpoint(of_block), jnp.arange(0, count, AT_ONCE)))
