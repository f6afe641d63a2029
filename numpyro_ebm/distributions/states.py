"""The states of a discrete event."""

from collections.abc import Callable

from jaxtyping import Shaped

from numpyro_ebm._core import discrete
from numpyro_ebm._core.typing import Array, Scalar
from numpyro_ebm.distributions.events import EventDistribution


def num_states(distribution: EventDistribution) -> int:
    """Return the number of states of one event."""
    return discrete.num_states(distribution.discrete_values, distribution.event_shape)


def in_words(distribution: EventDistribution) -> str:
    """Return the number of states as a power, for messages."""
    values = distribution.discrete_values
    return f"{len(values)}**{discrete.num_elements(values, distribution.event_shape)}"


def log_sum_over_states(distribution: EventDistribution, log_density: Callable[[Shaped[Array, "*event"]], Scalar]) -> Scalar:
    """Return the log of the sum of ``exp(log_density(event))`` over all states; the caller checks that they are few."""
    return discrete.log_sum_over_states(distribution.discrete_values, distribution.event_shape, log_density)
