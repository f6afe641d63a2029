"""Log densities that keep the ready-made energy behind them, so that kernels can use what it knows."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Float, Int

from numpyro_ebm._core.energies import AbstractEnergy, of_row
from numpyro_ebm._core.typing import Array, ChainLogDensityFn, LogDensityFn, Position, PyTree, Scalar


@dataclasses.dataclass(frozen=True, eq=False)
class KnownDensity:
    """A log density ``(position, local)`` that is minus a ready-made energy of the position, given the row's context.

    Attributes:
        function: the log density.
        energy: the energy.
    """

    function: LogDensityFn
    energy: AbstractEnergy

    def __call__(self, position: Position, local: PyTree = None) -> Scalar:
        """Return the log density."""
        return self.function(position, local)

    def energy_of(self, local: PyTree) -> AbstractEnergy:
        """Return the energy of one row, given its context and base parameters."""
        return of_row(self.energy, local)


@dataclasses.dataclass(frozen=True, eq=False)
class ChainDensity:
    """The log density of one chain: minus ``factor`` times a ready-made energy, if one is known.

    Attributes:
        function: the log density.
        energy: the energy; None if it is not known.
        factor: inverse temperature.
    """

    function: ChainLogDensityFn
    energy: AbstractEnergy | None = None
    factor: Any = 1.0

    def __call__(self, position: Position) -> Scalar:
        """Return the log density."""
        return self.function(position)

    @property
    def has_conditionals(self) -> bool:
        """Whether the energy knows the conditionals of single elements."""
        return self.energy is not None and self.energy.has_conditionals

    def conditional_logits(self, position: Position, index: Int[Array, ""]) -> Float[Array, " values"]:
        """Return the log probabilities of the values of one element given all others, up to a constant."""
        energy: Any = self.energy
        (event,) = jax.tree.leaves(position)
        return self.factor * energy.conditional_logits(event, index)


def keep(log_density: Any, energy: AbstractEnergy | None) -> Any:
    """Return a log density together with its energy, where that is known."""
    return log_density if energy is None else KnownDensity(log_density, energy)


def of_chain(log_density: Any) -> ChainDensity:
    """Return the log density of one chain with what is known of it."""
    return log_density if isinstance(log_density, ChainDensity) else ChainDensity(log_density)


def tempered(log_density: ChainLogDensityFn, temperature: Scalar) -> ChainDensity:
    """Return a log density divided by a temperature."""
    known = of_chain(log_density)
    return ChainDensity(lambda position: known(position) / temperature, known.energy, known.factor / temperature)
