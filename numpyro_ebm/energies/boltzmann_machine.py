"""The fully visible Boltzmann machine."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from numpyro_ebm._core.discrete import log_sum_over_states, num_states
from numpyro_ebm._core.energies import as_floats
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.records import record
from numpyro_ebm._core.typing import Array, ArrayLike, Scalar
from numpyro_ebm.energies._units import (
    UnitEnergy,
    Units,
    as_parameters,
    check_finite,
    check_units,
    offsets_of,
    symmetric,
    values_of_units,
)


@record("units", eq=False)
class BoltzmannMachine(UnitEnergy):
    r"""The fully visible Boltzmann machine, an Ising model in which all units are coupled.

    .. math:: E(x) = -\sum_{i<j} w_{ij} (x_i - m_i)(x_j - m_j) - \sum_i b_i (x_i - m_i)

    The conditionals of all ``d`` units together cost ``d ** 2`` operations, instead of the ``d ** 3`` of an ordinary
    function, so `Pseudolikelihood` and its like are as cheap as one energy. log Z is the sum over ``2 ** d`` states.

    Args:
        weights: ``(d, d)``, symmetric with zeros on the diagonal. A trained or sampled matrix counts with its symmetric
            part, without its diagonal.
        biases: ``(d,)``, or one number.
        offsets: ``(d,)``, subtracted from the units, or one number; the means of the data centre them. Centred units train
            alike whichever of its two values a unit calls 1.
        units: "boolean" (0 and 1) or "spins" (-1 and 1).
        centered: short for the offsets in the middle of the two values.

    Raises:
        EnergyError: for weights that are not square, not finite, not symmetric or have a diagonal, and for biases of another
            length.

    Example:
        >>> energy = BoltzmannMachine(jnp.array([[0.0, 1.0], [1.0, 0.0]]), jnp.zeros(2))
        >>> round(float(energy.log_partition()), 4)  # log(3 + e)
        1.7437

    References:
        Ackley, Hinton and Sejnowski, A learning algorithm for Boltzmann machines (1985); Melchior, Fischer and Wiskott, How
        to center deep Boltzmann machines (2016), for the offsets.
    """

    linear_in = ("weights", "biases")
    weights: Any
    biases: Any = 0.0
    offsets: Any = None
    units: Units = "boolean"

    def __init__(
        self,
        weights: ArrayLike,
        biases: ArrayLike = 0.0,
        offsets: ArrayLike | None = None,
        units: Units = "boolean",
        *,
        centered: bool = False,
    ):
        owner = type(self).__name__
        check_units(owner, units)
        weights = jnp.asarray(weights, float)
        if weights.ndim != 2 or weights.shape[0] != weights.shape[1]:
            raise EnergyError(f"{owner} needs square weights, (d, d); got shape {weights.shape}.")
        check_finite(owner, "weights", weights)
        size = len(weights)
        on_diagonal = (
            f"{owner} got weights with a diagonal: a unit has no coupling to itself, use biases for it. Write "
            f"weights * (1 - jnp.eye({size}))."
        )
        on_asymmetry = (
            f"{owner} needs symmetric weights; got a matrix that is not. For one parameter per pair write "
            f"{owner}.from_pairs(pairs, ...), with {size * (size - 1) // 2} pairs."
        )
        object.__setattr__(self, "weights", symmetric(weights, 1, on_diagonal, on_asymmetry))
        shape = weights.shape[:1]
        object.__setattr__(self, "biases", as_parameters(owner, "biases", biases, shape))
        object.__setattr__(self, "offsets", offsets_of(owner, offsets, shape, values_of_units(units), centered=centered))
        object.__setattr__(self, "units", units)

    @classmethod
    def from_pairs(
        cls,
        pairs: ArrayLike,
        biases: ArrayLike = 0.0,
        offsets: ArrayLike | None = None,
        units: Units = "boolean",
        *,
        centered: bool = False,
    ) -> "BoltzmannMachine":
        """Return a machine from one weight for each pair of units, ``(d (d - 1) / 2,)``.

        The pairs are in the order of ``np.triu_indices(d, 1)``: (0, 1), (0, 2), ..., (1, 2), ... The other arguments are
        those of the class.

        Raises:
            EnergyError: for a number of weights that no ``d`` has.

        Example:
            >>> BoltzmannMachine.from_pairs(jnp.array([0.5, -0.2, 0.1])).event_shape
            (3,)
        """
        pairs = jnp.asarray(pairs, float)
        size = (1 + int(np.sqrt(1 + 8 * pairs.size))) // 2
        if pairs.ndim != 1 or size * (size - 1) // 2 != pairs.size:
            raise EnergyError(
                f"from_pairs needs one weight for each pair of d units, d (d - 1) / 2 in all; got shape {pairs.shape}. For "
                f"{size} units write shape ({size * (size - 1) // 2},)."
            )
        upper = jnp.zeros((size, size)).at[np.triu_indices(size, 1)].set(pairs)
        return cls(upper + upper.T, biases, offsets, units, centered=centered)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """``(d,)``."""
        return self.weights.shape[:1]

    def __call__(self, event: Shaped[Array, " d"]) -> Scalar:
        """Return the energy of one event."""
        x = as_floats(event) - self.offsets
        return -x @ (0.5 * (self.weights @ x) + self.biases)

    def local_fields(
        self, event: Shaped[Array, " d"], index: Int[Array | np.ndarray, "..."] | None = None
    ) -> Float[Array, "..."]:
        """Return ``sum_j w_ij (x_j - m_j) + b_i`` of units."""
        x = as_floats(event) - self.offsets
        if index is None:
            return self.weights @ x + self.biases
        return self.weights[index] @ x + self.biases[index]

    @property
    def num_terms(self) -> int:
        """``2 ** d``."""
        return num_states(values_of_units(self.units), self.event_shape)

    def log_partition(self) -> Scalar:
        """Return log Z by the sum over all states."""
        return log_sum_over_states(values_of_units(self.units), self.event_shape, lambda x: -self(x))
