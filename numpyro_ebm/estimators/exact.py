"""Exact maximum likelihood of discrete events with few states."""

import dataclasses
from typing import cast

import jax

from numpyro_ebm._core.energies import AbstractEnergy, summable
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import PRNGKey, PyTree, RowValues
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.distributions.states import in_words, log_sum_over_states, num_states
from numpyro_ebm.estimators._base import AbstractEstimator
from numpyro_ebm.estimators.parts.single_changes import check_finite_values


@dataclasses.dataclass(frozen=True)
class Exact(AbstractEstimator):
    r"""Exact maximum likelihood: log Z by the sum over all states of the event, or as a ready-made energy knows it.

    .. math:: \log p(x) = -E(x) - \log \sum_{x'} e^{-E(x')}

    The value is the log likelihood itself, so SVI with any guide, and NUTS, give the posterior of the parameters. One update
    costs as many energies as there are states, for each row if rows have a context or a base of their own. It is the truth
    that other estimators are compared with.

    Args:
        max_states: the largest number of states that is summed over, or of terms in the log Z of a ready-made energy.

    Raises:
        EnergyError: for a continuous support (except for a ready-made energy with a known log Z), and for more states than
            ``max_states``.

    Example:
        ``estimate(model, "exact")`` with ``EnergyDistribution(energy, (9,), support=constraints.boolean)``
    """

    name = "exact"
    role = "objective"
    is_deterministic = True
    is_likelihood = True
    takes_discrete = True
    max_states: int = 2**20

    def __post_init__(self):
        check_count(type(self).__name__, "max_states", self.max_states)

    def check(self, site: Site) -> None:
        """Refuse continuous events, and events with too many states."""
        super().check(site)
        known = summable(site.distribution.ready_energy)
        if known is not None:
            self._check_terms(known)
            return
        check_finite_values(site, self.name)
        count = num_states(site.distribution)
        if count > self.max_states:
            raise EnergyError(
                f"The event has {in_words(site.distribution)} states, more than max_states={self.max_states}. Write "
                f"estimate(model, 'pseudolikelihood') or estimate(model, 'pcd'), or Exact(max_states={count})."
            )

    def _check_terms(self, energy: AbstractEnergy) -> None:
        if cast(int, energy.num_terms) > self.max_states:
            raise EnergyError(
                f"The log Z of this {type(energy).__name__} is a sum of {energy.num_terms} terms, more than "
                f"max_states={self.max_states}. Write estimate(model, 'pseudolikelihood') or estimate(model, 'pcd'), or "
                f"Exact(max_states={energy.num_terms})."
            )

    def surrogate(self, rng_key: PRNGKey | None, site: Site, state: PyTree) -> tuple[RowValues, PyTree]:
        """Return the log likelihood of each row."""
        values = jax.vmap(site.log_density)(site.position, site.local)

        def log_partition(local):
            known = summable(site.distribution.row_energy(local))
            if known is not None:
                return known.log_partition()
            return log_sum_over_states(site.distribution, lambda event: site.log_density(event, local))

        if site.rows_differ:
            return values - jax.lax.map(jax.checkpoint(log_partition), site.local), state
        return values - log_partition(jax.tree.map(lambda leaf: leaf[0], site.local)), state
