"""Products of experts: sums of energies."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from numpyro_ebm._core.energies import AbstractEnergy
from numpyro_ebm._core.records import record
from numpyro_ebm._core.typing import Array, EnergyFn, Scalar
from numpyro_ebm.energies._parts import Composition, as_parts


@record(eq=False)
class ProductOfExperts(Composition):
    r"""The product of densities: the sum of their energies.

    .. math:: p(x) \propto \prod_k e^{-E_k(x)}, \qquad E(x) = \sum_k E_k(x)

    An event is likely if no expert rules it out. The conditionals of elements are the normalised products of those of the
    experts, so they are known if every expert knows its own. `blocks` are known if every expert knows its own: two elements
    are in one block of the product if they are in one block of each expert. log Z is not known.

    Args:
        experts: a list of ready-made energies of one event and one support. Ordinary functions of the same event may be
            among them; then neither conditionals nor blocks are known.

    Raises:
        EnergyError: without a ready-made energy, and for energies of different events or supports.
        TypeError: for experts that are not callable.

    Example:
        >>> field = Ising(Graph.lattice(2, 2), 0.0, fields=0.5)
        >>> energy = ProductOfExperts([Ising(Graph.lattice(2, 2), 0.3), field])
        >>> len(energy.blocks)
        2

    References:
        Hinton, Training products of experts by minimizing contrastive divergence (2002).
    """

    experts: Any

    def __init__(self, experts: Sequence[AbstractEnergy | EnergyFn]):
        object.__setattr__(self, "experts", as_parts("ProductOfExperts", "experts", experts))

    @property
    def parts(self) -> tuple[Any, ...]:
        """The experts."""
        return self.experts

    def __call__(self, event: Shaped[Array, "*event"]) -> Scalar:
        """Return the energy of one event."""
        return sum(self.values(event), jnp.zeros(()))

    @property
    def has_conditionals(self) -> bool:
        """Whether all experts know their conditionals."""
        return self.all_know(lambda expert: expert.has_conditionals)

    def conditional_logits(
        self, event: Shaped[Array, "*event"], index: Int[Array | np.ndarray, "..."] | None = None
    ) -> Float[Array, "... values"]:
        """Return the sum of the logits of the experts."""
        if not self.has_conditionals:
            return super().conditional_logits(event, index)
        return sum((expert.conditional_logits(event, index) for expert in self.experts), jnp.zeros(()))

    @property
    def blocks(self) -> tuple[np.ndarray, ...] | None:
        """The elements that are in one block of every expert; None if an expert has no blocks."""
        if not self.all_know(lambda expert: expert.blocks is not None):
            return None
        each = np.stack([_numbers(expert.blocks) for expert in self.experts])
        _, block = np.unique(each, axis=1, return_inverse=True)
        return tuple(np.flatnonzero(block == number) for number in range(block.max() + 1))

    def scaled(self, factor: Scalar | float) -> AbstractEnergy | None:
        """Return the product of the scaled experts; None if one of them has no scaled form."""
        if not self.all_know(lambda expert: True):
            return None
        scaled = [expert.scaled(factor) for expert in self.experts]
        return None if None in scaled else ProductOfExperts(scaled)


def _numbers(blocks: tuple[np.ndarray, ...]) -> Int[np.ndarray, " elements"]:
    """Return the number of the block of each element."""
    numbers = np.zeros(sum(map(len, blocks)), int)
    for number, block in enumerate(blocks):
        numbers[block] = number
    return numbers
