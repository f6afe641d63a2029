"""Log Z as a sum over all states."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import PRNGKey, PyTree
from numpyro_ebm.distributions.discrete import num_elements
from numpyro_ebm.partition._base import AbstractPartition, Densities, Estimate

AT_ONCE = 2**14
"""States evaluated at once: more run faster and need more memory."""
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
        num_states = self._num_states(distribution)
        if num_states > self.max_states:
            raise EnergyError(
                f"This event has {len(distribution.discrete_values)}**{self._size(distribution)} states, more than "
                f"max_states={self.max_states}. Write method='ais', or Enumeration(max_states={num_states})."
            )

    def estimate(self, rng_key: PRNGKey | None, densities: Densities, starts: PyTree, draws: PyTree) -> Estimate:
        """Return the log of the sum, computed in blocks of states."""
        distribution = densities.distribution
        values, size = jnp.asarray(distribution.discrete_values), self._size(distribution)
        num_states = self._num_states(distribution)
        places = len(values) ** jnp.arange(size)

        def log_density(index):
            event = values[index // places % len(values)].reshape(distribution.event_shape)
            return jnp.where(index < num_states, densities.log_target(event), -jnp.inf)

        def block(total, first):
            scores = jax.vmap(log_density)(first + jnp.arange(min(AT_ONCE, num_states)))
            return jnp.logaddexp(total, jax.nn.logsumexp(scores)), None

        total, _ = jax.lax.scan(block, jnp.asarray(-jnp.inf, float), jnp.arange(0, num_states, AT_ONCE))
        return Estimate(total, jnp.zeros(()), jnp.full((), jnp.inf))

    def _size(self, distribution) -> int:
        return num_elements(distribution.discrete_values, distribution.event_shape)

    def _num_states(self, distribution) -> int:
        return len(distribution.discrete_values) ** self._size(distribution)


jax.tree_util.register_dataclass(Enumeration, data_fields=[], meta_fields=["max_states"])
