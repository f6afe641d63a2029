"""Supports of spins and of one-hot categories, the values of discrete elements, and sums over all their states."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Shaped
from numpyro.distributions import constraints

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, Scalar


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


AT_ONCE = 2**14
"""States evaluated at once: more run faster and need more memory."""

MOST_STATES = 2**30
"""The largest power of 2 whose states have indices in 32-bit integers."""

spins = Spins()
"""Support of numbers that are -1 or 1: ``EnergyDistribution(energy, (9,), support=ebm.spins)``."""
one_hot = OneHot()
"""Support of one-hot vectors: ``EnergyDistribution(energy, (num_sites, num_categories), support=ebm.one_hot)``."""


def num_elements(values: Shaped[np.ndarray | Array, "values ..."], event_shape: tuple[int, ...]) -> int:
    """Return the number of elements of an event, each of which takes one of these values."""
    return math.prod(event_shape[: len(event_shape) - values.ndim + 1])


def values_of(kind: object, num_categories: int) -> Int[np.ndarray, "values ..."] | None:
    """Return the values of an element of spins or one-hot vectors; None for other constraints."""
    if isinstance(kind, Spins):
        return np.array([-1, 1])
    return np.eye(num_categories, dtype=int) if isinstance(kind, OneHot) else None


def numbers_of(kind: object) -> Int[np.ndarray, " values"] | None:
    """Return the values of an element that are numbers, in increasing order; None for other constraints."""
    if isinstance(kind, Spins):
        return values_of(kind, 0)
    bounds = interval_of(kind)
    return None if bounds is None else np.arange(bounds[0], bounds[1] + 1)


def interval_of(kind: Any) -> tuple[int, int] | None:
    """Return the bounds of ``constraints.boolean`` or ``constraints.integer_interval``; None for other constraints."""
    if type(kind) is type(constraints.boolean):
        return 0, 1
    if not isinstance(kind, type(constraints.integer_interval(0, 1))):
        return None
    low, high = (np.asarray(bound) for bound in (kind.lower_bound, kind.upper_bound))
    return int(low), int(high)


def is_endless(kind: Any) -> bool:
    """Return whether a constraint is one of integers with a lowest and without a largest value."""
    return isinstance(kind, type(constraints.integer_greater_than(0)))


def is_same_support(one: Any, other: Any) -> bool:
    """Return whether the constraints of two elements are the same set of values."""
    bounds = interval_of(one)
    return bool(one == other) or (bounds is not None and bounds == interval_of(other))


def codes_of(kind: Any, event: Shaped[Array, "*event"]) -> Int[Array, " elements"] | None:
    """Return the index of the value of each element, in the order of the flat event; None if values cannot be listed."""
    if isinstance(kind, OneHot):
        return jnp.argmax(event, axis=-1).reshape(-1)
    bounds = interval_of(kind)
    if not isinstance(kind, Spins) and bounds is None:
        return None
    values = event.reshape(-1).astype(int)
    return values - bounds[0] if bounds is not None else (values + 1) // 2


def at_edges(each: Shaped[Array, " edges"], numbers: Int[Array | np.ndarray, "..."]) -> Shaped[Array, "..."]:
    """Return the entries of the edges with these numbers, and 0 or False for numbers beyond the last edge."""
    if not len(each):  # nothing to gather from
        return jnp.zeros(np.shape(numbers), each.dtype)
    return each.at[numbers].get(mode="fill", fill_value=0)


def num_states(values: Shaped[np.ndarray | Array, "values ..."], event_shape: tuple[int, ...]) -> int:
    """Return the number of states of an event whose elements take these values."""
    return len(values) ** num_elements(values, event_shape)


def state_at(
    values: Shaped[np.ndarray | Array, "values ..."], event_shape: tuple[int, ...], index: Int[Array, ""]
) -> Shaped[Array, "*event"]:
    """Return the state with a number, whose digits in base ``num_values`` are the codes of its elements."""
    values = jnp.asarray(values)
    places = len(values) ** jnp.arange(num_elements(values, event_shape))
    return values[index // places % len(values)].reshape(event_shape)


def log_sum_over_states(
    values: Shaped[np.ndarray | Array, "values ..."],
    event_shape: tuple[int, ...],
    log_density: Callable[[Shaped[Array, "*event"]], Scalar],
) -> Scalar:
    """Return the log of the sum of ``exp(log_density(event))`` over all states, see `log_sum`.

    Args:
        values: values of an element.
        event_shape: shape of an event.
        log_density: function of one event.

    Raises:
        EnergyError: for more than 2**30 states, which 32-bit integers cannot number.
    """
    values = jnp.asarray(values)
    count, size = num_states(values, event_shape), num_elements(values, event_shape)
    if count > MOST_STATES:
        raise EnergyError(
            f"A sum over {len(values)}**{size} states is beyond 2**30. Write "
            "numpyro_ebm.log_partition(rng_key, distribution, method='ais')."
        )

    return log_sum(count, lambda index: log_density(state_at(values, event_shape, index)))


def log_sum(count: int, term: Callable[[Int[Array, ""]], Scalar]) -> Scalar:
    """Return the log of the sum of ``exp(term(index))`` over the first ``count`` numbers, in blocks of bounded memory.

    The backward pass computes each block again instead of keeping it.
    """

    def at_index(index):
        return jnp.where(index < count, term(index), -jnp.inf)

    def of_block(first):
        return jax.nn.logsumexp(jax.vmap(at_index)(first + jnp.arange(min(AT_ONCE, count))))

    return jax.nn.logsumexp(jax.lax.map(jax.checkpoint(of_block), jnp.arange(0, count, AT_ONCE)))
