"""The discrete Fisher divergence."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Float

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree, RowValues, Scalar
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators._base import AbstractEstimator
from numpyro_ebm.estimators.parts.exponentials import tangent_exp
from numpyro_ebm.estimators.parts.lattice import Lattice
from numpyro_ebm.estimators.parts.single_changes import check_discrete, over_single_changes

STEEPEST = 30.0
"""Log of a ratio of probabilities beyond which it continues as its tangent: a row this unlikely moves no optimum."""


@dataclasses.dataclass(frozen=True)
class DiscreteFisherDivergence(AbstractEstimator):
    r"""The discrete Fisher divergence (Matsubara et al.): ratios to the previous and the next value of each element.

    Let ``x^{i-}`` and ``x^{i+}`` be the event with element ``i`` at its previous and at its next value. The squared distance
    between the ratios ``p(x^{i-}) / p(x)`` of the model and those of the data is, up to a constant, the mean over the data
    of

    .. math:: \sum_i \left(\frac{p(x^{i-})}{p(x)}\right)^2 - 2\, \frac{p(x)}{p(x^{i+})}

    in which log Z cancels. An element with two bounds is a ring, where the lowest value follows the highest. At an end
    without a ring, such as the 0 of a count, there is no value beyond: the probability of ``x^{i-}`` is 0 at the lowest, and
    the second term is left out at the highest. A neighbour whose energy is infinite counts as no value either. A row whose
    own density is 0 has an infinite loss, or NaN where its neighbours have no density either. The order of the values is
    that of the support, for one-hot vectors that of the categories.

    It is the estimator for counts and other integers without an upper bound, where the values of a conditional cannot be
    listed: a row of ``d`` elements takes ``1 + 2 d`` energies (``1 + d`` for two values, for which the loss is that of
    "generalized_sm" plus 3 per element). It is consistent for every distribution that is positive on its support. Rows that
    the model makes unlikely weigh by the squared ratio. If data lack the next value of a row, a model that is free to make
    it impossible lowers the loss without end. Ratios beyond ``e^30`` continue as their tangents in the log, so that training
    that starts far from the data stays finite.

    It draws no randomness, so NUTS may target it: with ``numpyro.handlers.scale(scale=beta)`` around the site that is the
    generalised posterior of the paper, whose section 4 chooses ``beta``.

    Args:
        cyclic: whether elements with two bounds are rings; with False they are lines with two ends.

    Raises:
        EnergyError: for a continuous support, and a discrete one that is neither integers nor a list of values.

    Example:
        ``estimate(model, "discrete_fisher")`` with
        ``EnergyDistribution(energy, (d,), support=constraints.nonnegative_integer)``

    References:
        Matsubara, Knoblauch, Briol and Oates, Generalised Bayesian inference for discrete intractable likelihood (2023).
    """

    name = "discrete_fisher"
    role = "objective"
    is_deterministic = True
    takes_discrete = True
    cyclic: bool = True

    def __post_init__(self):
        if not isinstance(self.cyclic, bool):
            raise EnergyError(f"DiscreteFisherDivergence needs cyclic as True or False; got {self.cyclic!r}.")

    def check(self, site: Site) -> None:
        """Refuse events that are not discrete, and supports without an order."""
        check_discrete(site, self.name)
        super().check(site)
        Lattice.of(site.distribution, cyclic=self.cyclic)

    def surrogate(self, rng_key: PRNGKey | None, site: Site, state: PyTree) -> tuple[RowValues, PyTree]:
        """Return minus the loss of each row."""
        lattice = Lattice.of(site.distribution, cyclic=self.cyclic)
        # On a ring of two values the next one is also the previous one.
        is_one = lattice.wraps.all() and (lattice.high - lattice.low == 1).all()
        return -over_single_changes(site, loss_of_neighbours, lattice, (1,) if is_one else (1, -1)), state


def loss_of_neighbours(changes: Float[Array, " neighbours"]) -> Scalar:
    """Return the loss of one element, given the changes of the log density to its next and to its previous value."""
    is_absent = changes == -jnp.inf
    rises = jnp.where(is_absent, 0.0, changes)  # NaN stays NaN: there is no density
    squared = jnp.where(is_absent[-1], 0.0, tangent_exp(rises[-1], STEEPEST) ** 2)
    loss = squared - 2 * jnp.where(is_absent[0], 0.0, tangent_exp(-rises[0], STEEPEST))
    return jnp.where(jnp.any(changes == jnp.inf), jnp.inf, loss)  # the row itself has density 0
