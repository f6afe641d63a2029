"""Log Z as a sum over all states."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import PRNGKey, PyTree
from numpyro_ebm.distributions.states import in_words, log_sum_over_states, num_states
from numpyro_ebm.partition._base import AbstractPartition, Densities, Estimate

MOST_STATES = 2**30
"""The largest power of 2 whose states have indices in 32-bit integers."""


@dataclasses.dataclass(frozen=True)
class Enumeration(AbstractPartition):
    """The sum over all states of a discrete event: exact up to rounding, for ``k ** d`` evaluations of the energy.

    Args:
        max_states: the largest number of states that it sums over.

    Raises:
        EnergyError: for a support that is not finite and discrete, for more states than ``max_states``, and for a
            ``max_states`` above 2**30.

    Example:
        ``log_partition(None, EnergyDistribution(energy, (9,), support=constraints.boolean), method="enumerate")``
    """

    name: ClassVar[str] = "enumerate"
    needs_key: ClassVar[bool] = False
    max_states: int = 2**24

    def __post_init__(self):
        check_count(type(self).__name__, "max_states", self.max_states)
        if self.max_states > MOST_STATES:
            raise EnergyError(f"Enumeration counts states up to 2**30; got max_states={self.max_states}.")

    def check(self, distribution):
        """Check that the states can be enumerated, and raise otherwise."""
        super().check(distribution)
        if not distribution.is_discrete:
            raise EnergyError(
                f"Enumeration sums over the states of a discrete event; the support is {distribution.support}. Write "
                "method='grid' in 1 to 3 dimensions, or method='ais'."
            )
        count = num_states(distribution)
        if count > self.max_states:
            raise EnergyError(
                f"This event has {in_words(distribution)} states, more than max_states={self.max_states}. Write "
                f"method='ais', or Enumeration(max_states={count})."
            )

    def estimate(self, rng_key: PRNGKey | None, densities: Densities, starts: PyTree, draws: PyTree) -> Estimate:
        """Return the log of the sum, computed in blocks of states."""
        total = log_sum_over_states(densities.distribution, densities.log_target)
        return Estimate(total, jnp.zeros(()), jnp.full((), jnp.inf))


jax.tree_util.register_dataclass(Enumeration, data_fields=[], meta_fields=["max_states"])
