"""The states of a discrete event, whose members may have different values."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Shaped

from numpyro_ebm._core import discrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.members import Shape, lay_end_to_end
from numpyro_ebm._core.typing import Array, Scalar
from numpyro_ebm.distributions.events import EventDistribution


class _Block(NamedTuple):
    """Elements with the same values: their values and the shape that holds them."""

    values: Shaped[np.ndarray, "values ..."]
    shape: Shape

    @property
    def num_states(self) -> int:
        return discrete.num_states(self.values, self.shape)


def has_states(distribution: EventDistribution) -> bool:
    """Return whether the event is discrete, with values that can be listed for each element."""
    if distribution.members is None:
        return distribution.is_discrete and distribution.lists_values
    return all(distribution.members.are_discrete) and not distribution.members.endless


def num_states(distribution: EventDistribution) -> int:
    """Return the number of states of one event."""
    return math.prod(block.num_states for block in _blocks(distribution))


def in_words(distribution: EventDistribution) -> str:
    """Return the number of states as a product of powers, for messages."""
    powers = [f"{len(block.values)}**{discrete.num_elements(*block)}" for block in _blocks(distribution)]
    return " * ".join(powers)


def log_sum_over_states(distribution: EventDistribution, log_density: Callable[[Shaped[Array, "*event"]], Scalar]) -> Scalar:
    """Return the log of the sum of ``exp(log_density(event))`` over all states; the caller checks that they are few.

    Raises:
        EnergyError: for more than 2**30 states.
    """
    if distribution.members is None:
        return discrete.log_sum_over_states(distribution.discrete_values, distribution.event_shape, log_density)
    count, blocks = num_states(distribution), _blocks(distribution)
    if count > discrete.MOST_STATES:
        raise EnergyError(f"A sum over {in_words(distribution)} states is beyond 2**30. Write method='ais'.")
    return discrete.log_sum(count, lambda index: log_density(_state_at(blocks, index)))


def _blocks(distribution: EventDistribution) -> list[_Block]:
    """Return the elements of an event by their values: one block, or one for each member."""
    members = distribution.members
    if members is None:
        return [_Block(distribution.discrete_values, distribution.event_shape)]
    values = distribution.part(members.names).discrete_values or {}
    return [_Block(values[name], shape) for name, shape in zip(members.names, members.shapes, strict=True)]


def _state_at(blocks: list[_Block], index: Int[Array, ""]) -> Shaped[Array, " d"]:
    """Return the state with a number, whose digits in the numbers of states of the blocks are the states of these."""
    states = []
    for block in blocks:
        states.append(discrete.state_at(*block, index % block.num_states).astype(float))
        index = index // block.num_states
    return lay_end_to_end(states, [block.shape for block in blocks])
