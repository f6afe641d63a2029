"""Noise on the values of discrete elements: a jump process on a graph of the values, and the draws that undo it."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.typing import Array, ArrayLike, PRNGKey

GraphName = Literal["uniform", "ordinal", "cyclic", "absorbing"]

MOST_VALUES = 2**12
"""Values of an element up to which the transition matrix is formed: 64 MB in float32."""


@dataclasses.dataclass(frozen=True)
class GraphNoise:
    """Noise that moves each element by itself, and the recovery of a value from its noisy copy.

    Attributes:
        forward: ``(num_values, num_copies)``, distribution functions of the copy ``y`` of each value ``x``, by ``q(y | x)``.
        recovery: ``(num_copies, num_values)``, those of a value given its copy, by ``q(y | x) / sum_x' q(y | x')``.
    """

    forward: Float[Array, "values copies"]
    recovery: Float[Array, "copies values"]

    @classmethod
    def of(cls, transitions: Float[np.ndarray, "values copies"]) -> "GraphNoise":
        """Return the noise of a matrix ``q(y | x)``, each row a distribution of copies."""
        reached = transitions.sum(axis=0)
        recovery = (transitions / np.where(reached > 0, reached, 1.0)).T
        return cls(*(jnp.asarray(np.cumsum(each, axis=1), float) for each in (transitions, recovery)))

    def draw(self, rng_key: PRNGKey, codes: Int[Array, "*num"]) -> Int[Array, "*num"]:
        """Draw a noisy copy of each value."""
        return _draw(rng_key, self.forward, codes)

    def recover(self, rng_key: PRNGKey, copies: Int[Array, "*num"]) -> Int[Array, "*num"]:
        """Draw a value given each noisy copy."""
        return _draw(rng_key, self.recovery, copies)


def transitions_of(noise: GraphName | ArrayLike, time: float | None, num_values: int) -> Float[np.ndarray, "values copies"]:
    """Return the matrix ``q(y | x)`` of a jump process after some time, or the matrix that the user gives."""
    if not isinstance(noise, str) or time is None:
        return np.asarray(noise, float)
    if noise == "absorbing":
        return np.append(np.exp(-time) * np.eye(num_values), np.full((num_values, 1), -np.expm1(-time)), axis=1)
    rates, directions = np.linalg.eigh(generator(noise, num_values))
    matrix = np.maximum((directions * np.exp(time * rates)) @ directions.T, 0.0)
    return matrix / matrix.sum(axis=1, keepdims=True)


def decay_time(noise: str, num_values: int, share: float) -> float:
    """Return the time by which the slowest mode of a jump process has decayed by a share."""
    gap = 1.0 if noise == "absorbing" or num_values == 1 else -np.sort(np.linalg.eigvalsh(generator(noise, num_values)))[-2]
    return float(-np.log1p(-share) / gap)


def generator(noise: str, num_values: int) -> Float[np.ndarray, "values values"]:
    """Return the symmetric matrix of the rates at which values jump to each other; its rows sum to 0.

    "uniform" draws the value anew at rate 1. "cyclic" and "ordinal" jump to either neighbour at rate 1/2, on a ring and on a
    line, where a jump beyond an end does not take place.
    """
    if noise == "uniform":
        rates = np.full((num_values, num_values), 1 / num_values)
    else:
        up = np.eye(num_values, k=1)
        if noise == "cyclic":
            up[-1, 0] += 1.0
        rates = 0.5 * (up + up.T)
    return rates - np.diag(rates.sum(axis=1))


def check_noise(owner: str, noise: GraphName | ArrayLike | None) -> None:
    """Check that noise is a known name or a matrix of probabilities, and raise otherwise.

    Raises:
        EnergyError: with the known names, or with what is wrong with the matrix.
    """
    if noise is None:
        return
    if isinstance(noise, str):
        if noise not in get_args(GraphName):
            raise EnergyError(f"Unknown noise '{noise}'. {nearest(noise, get_args(GraphName))}")
        return
    write = (
        f"Write {owner}(noise='uniform'), or a matrix whose row x holds the probabilities of the noisy copies of value x."
    )
    if not is_concrete(noise):
        raise EnergyError(f"{owner} needs noise that is known when the model is traced. {write}")
    matrix = np.asarray(noise)
    if matrix.ndim != 2 or not np.issubdtype(matrix.dtype, np.number):
        raise EnergyError(f"{owner} got noise of shape {matrix.shape} and type {matrix.dtype}. {write}")
    if not (np.all(matrix >= 0) and np.allclose(matrix.sum(axis=1), 1.0, atol=1e-5)):
        raise EnergyError(f"{owner} needs noise with rows of probabilities that sum to 1; got {noise!r}. {write}")
    if not _connects(matrix > 0):
        raise EnergyError(
            f"{owner} got noise by which some values never have a copy in common, so that they are never compared: "
            f"{noise!r}. {write}"
        )


def check_fits(noise: GraphName | ArrayLike, num_values: int) -> None:
    """Check that noise has a row for each value, and that its matrix is not too large.

    Raises:
        EnergyError: with both numbers.
    """
    if num_values > MOST_VALUES:
        raise EnergyError(
            f"An element of this support takes {num_values} values, and a matrix of noise has {MOST_VALUES} rows at most. "
            "Write estimate(model, 'ratio_matching') or estimate(model, 'pcd')."
        )
    if not isinstance(noise, str) and len(np.asarray(noise)) != num_values:
        raise EnergyError(
            f"The noise has {len(np.asarray(noise))} rows, and an element of this support takes {num_values} values. Write "
            "noise='uniform', or a matrix with one row per value."
        )


def _connects(is_reached: np.ndarray) -> bool:
    """Return whether all values are joined by chains of copies that two of them share."""
    copies = is_reached[0]
    while not np.array_equal(grown := is_reached[(is_reached & copies).any(axis=1)].any(axis=0), copies):
        copies = grown
    return bool((is_reached & copies).any(axis=1).all())


def _draw(rng_key: PRNGKey, functions: Float[Array, "from to"], codes: Int[Array, "*num"]) -> Int[Array, "*num"]:
    """Draw from the row of each code by bisection of its distribution function, without a row for each draw."""
    num = functions.shape[1]
    uniform = jax.random.uniform(rng_key, codes.shape, functions.dtype)
    drawn = jnp.zeros_like(codes)
    for step in (2**power for power in reversed(range(num.bit_length()))):
        further = drawn + step
        is_below = (further < num) & (functions[codes, jnp.minimum(further, num) - 1] <= uniform)
        drawn = jnp.where(is_below, further, drawn)
    return drawn
