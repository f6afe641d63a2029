"""Energies that are made of other energies of the same event."""

import abc
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Shaped
from numpyro.distributions import constraints

from numpyro_ebm._core.discrete import is_same_support
from numpyro_ebm._core.energies import AbstractEnergy
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, Scalar


class Composition(AbstractEnergy):
    """An energy made of parts: ready-made energies of one event and, beside one or more of them, ordinary functions."""

    @property
    @abc.abstractmethod
    def parts(self) -> tuple[Any, ...]:
        """The parts."""

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The event shape of the ready-made parts."""
        return _first(self.parts).event_shape

    @property
    def support(self) -> constraints.Constraint:
        """The support of the ready-made parts."""
        return _first(self.parts).support

    @property
    def is_differentiable(self) -> bool:
        """Whether all parts have a gradient in the event."""
        return all(part.is_differentiable for part in self.parts if isinstance(part, AbstractEnergy))

    def all_know(self, has: Callable[[AbstractEnergy], bool]) -> bool:
        """Return whether all parts are ready-made energies and have a property."""
        return all(isinstance(part, AbstractEnergy) and has(part) for part in self.parts)

    def values(self, event: Shaped[Array, "*event"]) -> list[Scalar]:
        """Return the energies of the parts.

        Raises:
            EnergyError: for a part that does not return a scalar.
        """
        return [self._value(k, event) for k in range(len(self.parts))]

    def _value(self, k: int, event: Shaped[Array, "*event"]) -> Scalar:
        value = jnp.asarray(self.parts[k](event), float)
        if value.shape not in ((), (1,)):
            raise EnergyError(
                f"Part {k} of {type(self).__name__} returned shape {value.shape} for one event of shape "
                f"{self.event_shape}; it must return a scalar. Write it for one event, e.g. "
                "lambda x: 0.5 * jnp.sum(x**2)."
            )
        return value.reshape(())


def as_parts(owner: str, name: str, parts: Any) -> tuple[Any, ...]:
    """Return the parts of a composition, after a check that they are energies of one event.

    Raises:
        EnergyError: without a ready-made energy, and for ready-made energies of different events.
        TypeError: for anything but a list of callables.
    """
    if not isinstance(parts, list | tuple):
        raise TypeError(f"{owner} needs a list of {name}; got {type(parts).__name__}. Write {owner}([energy_a, energy_b]).")
    for part in parts:
        if not callable(part):
            raise TypeError(f"{owner} needs callable {name}; got {type(part).__name__} among them.")
        if isinstance(part, AbstractEnergy):
            check_no_context(owner, part)
    ready = [part for part in parts if isinstance(part, AbstractEnergy)]
    if not ready:
        raise EnergyError(
            f"{owner} takes event shape and support from a ready-made energy; got none among its {len(parts)} {name}. For "
            "functions alone write EnergyDistribution(lambda x: f(x) + g(x), event_shape, support=...)."
        )
    for part in ready[1:]:
        _check_same_event(owner, ready[0], part)
    return tuple(parts)


def check_no_context(owner: str, part: AbstractEnergy) -> None:
    """Check that a part is the energy of an event alone.

    Raises:
        EnergyError: for an energy that takes a context.
    """
    if part.takes_context:
        raise EnergyError(
            f"{owner} is an energy of the event alone; {type(part).__name__} also takes a context. Compose in a function of "
            "both: EnergyDistribution(lambda x, c: energy.given(c)(x) + other(x), event_shape, context=context)."
        )


def _check_same_event(owner: str, one: AbstractEnergy, other: AbstractEnergy) -> None:
    names = type(one).__name__, type(other).__name__
    if one.event_shape != other.event_shape:
        raise EnergyError(
            f"{owner} needs energies of one event; {names[0]} has events of shape {one.event_shape} and {names[1]} of shape "
            f"{other.event_shape}."
        )
    if not is_same_support(one.support, other.support):
        raise EnergyError(
            f"{owner} needs energies on one support; {names[0]} has {one.support} and {names[1]} has {other.support}. Write "
            "both with the same values, such as units='spins' or units='boolean'."
        )


def _first(parts: tuple[Any, ...]) -> AbstractEnergy:
    return next(part for part in parts if isinstance(part, AbstractEnergy))
