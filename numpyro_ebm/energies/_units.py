"""Two-valued elements of pairwise energies: their values, and the energies that are linear in each element."""

import abc
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped
from numpyro.distributions import constraints

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.discrete import spins
from numpyro_ebm._core.energies import AbstractEnergy
from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.typing import Array, ArrayLike, PRNGKey
from numpyro_ebm._core.uniforms import uniforms

Units = Literal["boolean", "spins"]
BOOLEAN_VALUES = np.array([0, 1])


def check_units(owner: str, units: str) -> None:
    """Check the name of the units, and raise otherwise."""
    if units not in get_args(Units):
        raise EnergyError(f"{owner} got units={units!r}. {nearest(str(units), get_args(Units))}")


def values_of_units(units: Units) -> Int[np.ndarray, "2"]:
    """Return the two values of an element."""
    return BOOLEAN_VALUES if units == "boolean" else np.array([-1, 1])


def support_of_units(units: Units) -> constraints.Constraint:
    """Return the constraint of an element."""
    return constraints.boolean if units == "boolean" else spins


class UnitEnergy(AbstractEnergy):
    """An energy of two-valued elements: given all others, ``E(x) = -x_i field_i + const`` at both values of an element."""

    units: Units

    @property
    def support(self) -> constraints.Constraint:
        """``constraints.boolean`` or ``numpyro_ebm.spins``."""
        return support_of_units(self.units)

    @abc.abstractmethod
    def local_fields(
        self, event: Shaped[Array, "*event"], index: Int[Array | np.ndarray, "..."] | None = None
    ) -> Float[Array, "..."]:
        """Return ``field_i`` of elements (of all for None), of the shape of ``index``."""

    def conditional_logits(
        self, event: Shaped[Array, "*event"], index: Int[Array | np.ndarray, "..."] | None = None
    ) -> Float[Array, "... values"]:
        """Return ``field_i * value`` for both values of elements."""
        return self.local_fields(event, index)[..., None] * values_of_units(self.units)


def draw(rng_key: PRNGKey, logits: Float[Array, "..."]) -> Int[Array, "..."]:
    """Draw zeros and ones with these log odds of 1."""
    return (uniforms(rng_key, logits.shape, logits.dtype) < jax.nn.sigmoid(logits)).astype(int)


def as_weights(owner: str, weights: ArrayLike) -> Float[Array, "d hidden"]:
    """Return weights between two layers, after a check of concrete values.

    Raises:
        EnergyError: for anything but a matrix with a row and a column or more, and for numbers that are not finite.
    """
    weights = jnp.asarray(weights, float)
    if weights.ndim != 2 or not weights.size:
        raise EnergyError(
            f"{owner} needs weights of shape (d, num_hidden), visible units first; got shape {weights.shape}. Write "
            f"{owner}(jnp.zeros((64, 12)))."
        )
    check_finite(owner, "weights", weights)
    return weights


def check_finite(owner: str, name: str, array: Array | np.ndarray) -> None:
    """Check that concrete parameters are finite.

    Raises:
        EnergyError: with the place of the first number that is not.
    """
    if not is_concrete(array):
        return
    bad = np.argwhere(~np.isfinite(np.asarray(array)))
    if len(bad):
        where = f" at {name}[{', '.join(map(str, bad[0].tolist()))}]" if array.ndim else ""
        raise EnergyError(
            f"{owner} needs finite {name}; got NaN or infinity{where}. If training made it so, lower the learning rate."
        )


def as_parameters(
    owner: str, name: str, value: Any, shape: tuple[int, ...], *, transposed: tuple[int, ...] | None = None
) -> Float[Array, "..."]:
    """Return a parameter as floating-point numbers broadcast to a shape, after a check of concrete values.

    Args:
        owner: the energy.
        name: name of the parameter.
        value: the parameter.
        shape: its shape.
        transposed: the shape that it should have if the weights were transposed.

    Raises:
        EnergyError: for another shape, and for numbers that are not finite.
    """
    array = jnp.asarray(value, float)
    hint = " If the columns of weights are the visible units, write weights.T." if array.shape == transposed else ""
    if array.shape not in ((), shape):
        raise EnergyError(f"{owner} needs {name} of shape {shape}, or one number; got shape {array.shape}.{hint}")
    check_finite(owner, name, array)
    return jnp.broadcast_to(array, shape)


def symmetric(matrix: Float[Array, "n n"], size: int, on_diagonal: str, on_asymmetry: str) -> Float[Array, "n n"]:
    """Return the symmetric part of a matrix of couplings without those of an element to itself.

    Args:
        matrix: the couplings.
        size: rows that belong to one element.
        on_diagonal: message for concrete couplings of an element to itself.
        on_asymmetry: message for concrete couplings that are not symmetric.

    Raises:
        EnergyError: with one of the messages.
    """
    element = np.arange(len(matrix)) // size
    own = element[:, None] == element
    if is_concrete(matrix):
        values = np.asarray(matrix)
        scale = 1e-5 * np.abs(values).max(initial=0.0)
        if np.abs(values[own]).max(initial=0.0) > scale:
            raise EnergyError(on_diagonal)
        if np.abs(values - values.T).max(initial=0.0) > scale:
            raise EnergyError(on_asymmetry)
    return jnp.where(own, 0.0, 0.5 * (matrix + matrix.T))


def offsets_of(
    owner: str, offsets: ArrayLike | None, shape: tuple[int, ...], values: Int[np.ndarray, "2"], *, centered: bool
) -> Float[Array, "..."]:
    """Return offsets of a shape: 0 if none are given or, with ``centered``, the middle of the two values.

    Raises:
        EnergyError: for offsets together with ``centered``.
    """
    if offsets is not None and centered:
        raise EnergyError(
            f"{owner} got offsets and centered=True, which stands for the middle of the values. Leave one out."
        )
    middle = float(values.mean()) if centered else 0.0
    return as_parameters(owner, "offsets", middle if offsets is None else offsets, shape)
