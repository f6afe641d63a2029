"""Ratio matching."""

import dataclasses

import jax
import jax.numpy as jnp

from numpyro_ebm._core.typing import PRNGKey, PyTree, RowValues
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.single_changes import SingleChangeEstimator, over_single_changes


@dataclasses.dataclass(frozen=True)
class RatioMatching(SingleChangeEstimator):
    r"""Ratio matching, the score matching of discrete events.

    It matches the ratios of probabilities between each event and those that differ from it in one element, after a function
    ``g`` that keeps them finite. The loss of a row is

    .. math:: \sum_i \sum_{v \ne x_i} g\!\left(\frac{p(x)}{p(x_{i \to v})}\right)^2, \qquad g(u) = \frac{1}{1 + u},

    in which log Z cancels. For two values per element this is the loss of the paper; for more it sums over all other values.
    A row of ``d`` elements with ``k`` values costs ``d (k - 1)`` energies.

    Raises:
        EnergyError: for a continuous support, and one whose values cannot be listed.

    Example:
        ``estimate(model, "ratio_matching")`` with ``EnergyDistribution(energy, (d,), support=constraints.boolean)``

    References:
        Hyvarinen, Some extensions of score matching (2007), section 4.
    """

    name = "ratio_matching"

    def surrogate(self, rng_key: PRNGKey | None, site: Site, state: PyTree) -> tuple[RowValues, PyTree]:
        """Return minus the loss of each row."""
        return -over_single_changes(site, lambda changes: jnp.sum(jax.nn.sigmoid(changes) ** 2)), state
