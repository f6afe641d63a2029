"""Maximum pseudolikelihood."""

import dataclasses

import jax
import jax.numpy as jnp

from numpyro_ebm._core.typing import PRNGKey, PyTree, RowValues
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.single_changes import SingleChangeEstimator, over_single_changes


@dataclasses.dataclass(frozen=True)
class Pseudolikelihood(SingleChangeEstimator):
    r"""Maximum pseudolikelihood of discrete events: the product of the conditionals of all elements.

    .. math:: \log \tilde p(x) = \sum_i \log p(x_i \mid x_{-i}), \qquad
        p(x_i = v \mid x_{-i}) = \frac{e^{-E(x_{i \to v})}}{\sum_w e^{-E(x_{i \to w})}}

    log Z cancels in each conditional. The estimate is consistent, and for weakly coupled elements nearly as efficient as
    maximum likelihood. A row of ``d`` elements with ``k`` values costs ``d (k - 1)`` energies. The value is no log
    likelihood: it counts the dependence between elements several times, so a posterior under it is too narrow or too wide.

    Raises:
        EnergyError: for a continuous support, and one whose values cannot be listed.

    Example:
        ``estimate(model, "pseudolikelihood")`` with ``EnergyDistribution(energy, (d,), support=constraints.boolean)``

    References:
        Besag, Statistical analysis of non-lattice data (1975); Hyvarinen, Consistency of pseudolikelihood estimation of
        fully visible Boltzmann machines (2006).
    """

    name = "pseudolikelihood"

    def surrogate(self, rng_key: PRNGKey | None, site: Site, state: PyTree) -> tuple[RowValues, PyTree]:
        """Return the log pseudolikelihood of each row."""
        return over_single_changes(site, lambda changes: -jax.nn.logsumexp(jnp.append(changes, 0.0))), state
