"""Log densities that keep the ready-made energy behind them, so that kernels can use what it knows."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from numpyro_ebm._core.energies import AbstractEnergy, as_floats, of_row
from numpyro_ebm._core.typing import Array, ChainLogDensityFn, LogDensityFn, Position, PRNGKey, PyTree, Scalar


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """What is known of a log density of one event: it is ``-factor * energy(event)`` plus a term of each element.

    Attributes:
        energy: the energy.
        factor: inverse temperature.
        offsets: ``(elements, values)``, the terms of the elements of a discrete event; None for 0.
        transform: the map from positions to events; None for the identity.
    """

    energy: AbstractEnergy
    factor: Any = 1.0
    offsets: Any = None
    transform: Any = None

    @property
    def is_whole(self) -> bool:
        """Whether the log density is minus the energy itself, at temperature 1."""
        return isinstance(self.factor, float) and self.factor == 1.0 and self.offsets is None

    @property
    def has_blocks(self) -> bool:
        """Whether the event can be drawn by blocks of elements."""
        return self.energy.has_conditionals and self.energy.blocks is not None

    def tempered(self, factor: Any) -> "Known":
        """Return what is known of the log density times a factor."""
        offsets = None if self.offsets is None else factor * self.offsets
        return dataclasses.replace(self, factor=self.factor * factor, offsets=offsets)

    def of_row(self, local: PyTree) -> "Known":
        """Return what is known of the log density of one row, given its context and base parameters."""
        return dataclasses.replace(self, energy=of_row(self.energy, local))

    def frozen(self) -> "Known":
        """Return the same with the parameters of the energy cut off from differentiation."""
        return dataclasses.replace(self, energy=jax.lax.stop_gradient(self.energy))

    def held(self, event: Shaped[Array, "*event"]) -> Shaped[Array, "*event"]:
        """Return an event as the floating-point numbers that each conditional makes of it; indices stay integers."""
        return as_floats(event) if self.energy.is_differentiable else event

    def conditional_logits(
        self, event: Shaped[Array, "*event"], index: Int[Array | np.ndarray, "..."]
    ) -> Float[Array, "... values"]:
        """Return the log probabilities of the values of elements given all others, up to a constant per element."""
        logits = self.factor * self.energy.conditional_logits(event, index)
        return logits if self.offsets is None else logits + self.offsets[index]

    @property
    def has_log_ratios(self) -> bool:
        """Whether the change of the log density with one element is known without that of the whole event."""
        return self.energy.has_log_ratios and self.offsets is None

    def log_ratio(self, event: Shaped[Array, "*event"], index: Int[Array, ""], value: Shaped[Array, ""]) -> Scalar:
        """Return the log density with one element at another value minus that of the event."""
        return self.factor * self.energy.log_ratio(event, index, value)

    def sweep(self, rng_key: PRNGKey, position: Shaped[Array, "*position"]) -> Shaped[Array, "*position"]:
        """Draw all elements of the event by the energy's own sweep, given the position and returned as one."""
        if self.transform is None:
            return self.energy.sweep(rng_key, position)
        return self.transform.inv(self.energy.sweep(rng_key, self.transform(position)))


@dataclasses.dataclass(frozen=True, eq=False)
class KnownDensity:
    """A log density ``(position, local)``, and what is known of it.

    Attributes:
        function: the log density.
        known: the energy behind it.
    """

    function: LogDensityFn
    known: Known

    def __call__(self, position: Position, local: PyTree = None) -> Scalar:
        """Return the log density."""
        return self.function(position, local)


@dataclasses.dataclass(frozen=True, eq=False)
class ChainDensity:
    """The log density of one chain, a function of its position, and what is known of it.

    Attributes:
        function: the log density.
        known: the energy behind it; None if it is an ordinary function.
    """

    function: ChainLogDensityFn
    known: Known | None = None

    def __call__(self, position: Position) -> Scalar:
        """Return the log density."""
        return self.function(position)


def keep(log_density: Any, known: Known | None) -> Any:
    """Return a log density ``(position, local)`` together with what is known of it."""
    return log_density if known is None else KnownDensity(log_density, known)


def at(log_density: LogDensityFn, position: Position, local: PyTree, temperature: Scalar | None = None) -> ChainDensity:
    """Return the log density of one chain, divided by a temperature if there is one.

    Its values have the dtype of the position, since a scan needs a fixed dtype.
    """
    dtype = jnp.result_type(*jax.tree.leaves(position), float)
    known = known_of(log_density)
    own = None if known is None else known.of_row(local)
    of_chain = ChainDensity(lambda x: jnp.asarray(log_density(x, local), dtype), own)
    return of_chain if temperature is None else tempered(of_chain, temperature)


def known_of(log_density: Any) -> Known | None:
    """Return what is known of a log density; None for an ordinary function."""
    return log_density.known if isinstance(log_density, KnownDensity | ChainDensity) else None


def described(known: Known | None) -> str:
    """Return the name of the energy behind a log density for messages, or what else there may be."""
    return "an ordinary function, or an energy over a base" if known is None else known.energy.described


def has_conditionals(log_density: Any) -> bool:
    """Return whether the energy behind a log density knows the conditionals of single elements."""
    known = known_of(log_density)
    return known is not None and known.energy.has_conditionals


def tempered(log_density: ChainLogDensityFn, temperature: Scalar) -> ChainDensity:
    """Return the log density of one chain divided by a temperature."""
    known = known_of(log_density)

    def divided(position):
        value = log_density(position)
        return jnp.asarray(value / temperature, value.dtype)

    return ChainDensity(divided, None if known is None else known.tempered(1 / temperature))
