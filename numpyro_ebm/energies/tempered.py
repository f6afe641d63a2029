"""Energies at another temperature."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped
from numpyro.distributions import constraints

from numpyro_ebm._core.energies import AbstractEnergy
from numpyro_ebm._core.options import check_positive
from numpyro_ebm._core.records import rebuilt, record
from numpyro_ebm._core.typing import Array, ArrayLike, PRNGKey, Scalar
from numpyro_ebm.energies._parts import check_no_context


@record(eq=False)
class Tempered(AbstractEnergy):
    r"""An energy divided by a temperature.

    .. math:: p_T(x) \propto e^{-E(x) / T}

    Conditionals and blocks are those of the energy, at this temperature. log Z, `sweep` and `bonds` are known if ``E / T``
    is again an energy of the same family, as for `BoltzmannMachine`, `Ising`, `Potts`, `GraphPotts`, `DeepBoltzmannMachine`,
    `GaussianGraphicalModel` and `ExponentialGraphicalModel`, so that curves of log Z over the temperature are exact.
    The free energy of an `RBM` divided by ``T`` is that of no other `RBM`.

    Args:
        energy: a ready-made energy.
        temperature: one number above 0. Above 1 it flattens the density; ``Tempered(energy, 1 / 2)`` is twice the energy.

    Raises:
        EnergyError: for a temperature that is not positive.
        TypeError: for anything but a ready-made energy.

    Example:
        >>> energy = Tempered(Ising(Graph.lattice(3, 3), couplings=0.6, fields=0.2), 2.0)
        >>> round(float(energy.log_partition()), 4)  # as with couplings=0.3, fields=0.1
        6.9127

    References:
        Kirkpatrick, Gelatt and Vecchi, Optimization by simulated annealing (1983).
    """

    energy: AbstractEnergy
    temperature: Any = 1.0

    def __init__(self, energy: AbstractEnergy, temperature: ArrayLike):
        if not isinstance(energy, AbstractEnergy):
            raise TypeError(
                f"Tempered needs a ready-made energy; got {type(energy).__name__}. For a function write "
                "EnergyDistribution(lambda x: energy(x) / temperature, event_shape)."
            )
        check_no_context("Tempered", energy)
        check_positive("Tempered", "temperature", temperature, scalar=True)
        object.__setattr__(self, "energy", energy)
        object.__setattr__(self, "temperature", jnp.asarray(temperature, float))

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The event shape of the energy."""
        return self.energy.event_shape

    @property
    def support(self) -> constraints.Constraint:
        """The support of the energy."""
        return self.energy.support

    @property
    def is_differentiable(self) -> bool:
        """Whether the energy is."""
        return self.energy.is_differentiable

    def __call__(self, event: Shaped[Array, "*event"]) -> Scalar:
        """Return the energy of one event, divided by the temperature."""
        return self.energy(event) / self.temperature

    @property
    def has_conditionals(self) -> bool:
        """Whether the energy knows its conditionals."""
        return self.energy.has_conditionals

    def conditional_logits(
        self, event: Shaped[Array, "*event"], index: Int[Array | np.ndarray, "..."] | None = None
    ) -> Float[Array, "... values"]:
        """Return the logits of the energy, divided by the temperature."""
        return self.energy.conditional_logits(event, index) / self.temperature

    @property
    def blocks(self) -> tuple[np.ndarray, ...] | None:
        """The blocks of the energy."""
        return self.energy.blocks

    @property
    def num_terms(self) -> int | None:
        """Those of ``E / T`` as an energy of the same family; None if it is not one."""
        return None if self._same is None else self._same.num_terms

    def log_partition(self) -> Scalar:
        """Return the log Z of ``E / T`` as an energy of the same family."""
        return super().log_partition() if self._same is None else self._same.log_partition()

    @property
    def has_sweep(self) -> bool:
        """Whether ``E / T`` is an energy of the same family that has a sweep."""
        return self._same is not None and self._same.has_sweep

    def sweep(self, rng_key: PRNGKey, event: Shaped[Array, "*event"]) -> Shaped[Array, "*event"]:
        """Draw all elements by the sweep of ``E / T`` as an energy of the same family."""
        return super().sweep(rng_key, event) if self._same is None else self._same.sweep(rng_key, event)

    @property
    def bonds(self) -> Any:
        """Those of ``E / T`` as an energy of the same family."""
        return None if self._same is None else self._same.bonds

    def scaled(self, factor: Scalar | float) -> "Tempered":
        """Return the energy at the temperature ``T / factor``."""
        return rebuilt(Tempered, {"energy": self.energy, "temperature": self.temperature / factor})

    @property
    def _same(self) -> AbstractEnergy | None:
        return self.energy.scaled(1 / self.temperature)
