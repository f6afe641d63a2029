"""Log Z as a sum over all states."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from numpyro_ebm._core.discrete import MOST_STATES
from numpyro_ebm._core.energies import summable
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import PRNGKey, PyTree
from numpyro_ebm.distributions.states import has_states, in_words, log_sum_over_states, num_states
from numpyro_ebm.partition._base import AbstractPartition, Densities, Estimate


@dataclasses.dataclass(frozen=True)
class Enumeration(AbstractPartition):
    """The sum over all states of a discrete event: exact up to rounding, for an evaluation of the energy at each state.

    ``d`` elements of ``k`` values have ``k ** d`` states. The members of an event may have different values, as the columns
    of a table of categories do.

    A ready-made energy (`numpyro_ebm.energies`) with a known log Z gives that instead, in fewer terms: over the hidden
    states of a restricted Boltzmann machine, or node by node on a graph.

    Args:
        max_states: the largest number of states, or of terms, that it sums over.

    Raises:
        EnergyError: for a support that is not finite and discrete (unless the energy knows its log Z), for more states than
            ``max_states``, and for a ``max_states`` above 2**30.

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
        if not has_states(distribution):
            super().check(distribution)
        known = summable(distribution.ready_energy)
        if known is not None:
            self._check_count(
                known.num_terms, f"The log Z of this {type(known).__name__} is a sum of {known.num_terms} terms"
            )
            return
        if distribution.is_continuous:
            raise EnergyError(
                f"Enumeration sums over the states of a discrete event; the support is {distribution.support}. Write "
                "method='grid' in 1 to 3 dimensions, or method='ais'."
            )
        self._check_count(num_states(distribution), f"This event has {in_words(distribution)} states")

    def _check_count(self, count: int | None, what: str) -> None:
        if count is not None and count > self.max_states:
            raise EnergyError(
                f"{what}, more than max_states={self.max_states}. Write method='ais', or Enumeration(max_states={count})."
            )

    def estimate(self, rng_key: PRNGKey | None, densities: Densities, starts: PyTree, draws: PyTree) -> Estimate:
        """Return the log of the sum, computed in blocks of states, or as a ready-made energy computes it."""
        known = summable(densities.distribution.row_energy(densities.local))
        if known is not None:
            return Estimate(known.log_partition(), jnp.zeros(()), jnp.full((), jnp.inf))
        total = log_sum_over_states(densities.distribution, densities.log_target)
        return Estimate(total, jnp.zeros(()), jnp.full((), jnp.inf))


jax.tree_util.register_dataclass(Enumeration, data_fields=[], meta_fields=["max_states"])
