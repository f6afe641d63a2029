"""Minimum probability flow."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Float

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count, check_positive
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree, RowValues
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators._base import AbstractEstimator
from numpyro_ebm.estimators.parts.exponentials import tangent_exp
from numpyro_ebm.estimators.parts.moves import check_scale, in_pairs, loss_of_moves, scale_of
from numpyro_ebm.estimators.parts.projections import directions
from numpyro_ebm.estimators.parts.single_changes import check_finite_values, over_single_changes

STEEPEST = 40.0
"""Log ratio beyond which the exponential continues as its tangent; this changes the loss by less than ``e^-20``."""
DEFAULT_DRAWS = 2
"""Default ``num_draws``: the smallest number in which each move has its opposite."""


@dataclasses.dataclass(frozen=True)
class MinimumProbabilityFlow(AbstractEstimator):
    r"""Minimum probability flow (Sohl-Dickstein et al.): the rate at which probability leaves the data, without log Z.

    States form a graph, over which probability flows at the rate ``sqrt(p(y) / p(x))`` from ``x`` to ``y``; this flow leaves
    ``p`` invariant. The initial flow out of the data is least where the model is the distribution of the data.

    **Continuous events.** The neighbours of a row are reached by moves ``v_j ~ N(0, sd^2)`` (unconstrained space, Jacobian
    included), which each update draws in pairs ``+v, -v``; the last of an odd number has no partner. The loss of a row is

    .. math:: \frac1M \sum_{j=1}^{M} \sqrt{p(x + v_j) / p(x)}

    The estimator is consistent for every ``sd``: a pair of states adds ``p sqrt(q' / q) + p' sqrt(q / q') >= 2 sqrt(p p')``
    to the mean loss, with equality where the model's ratio ``q' / q`` is that of the data. As ``sd`` vanishes the loss is
    ``1 + sd^2 / 4`` times that of "sm", in expectation, without a derivative in x. It costs ``1 + M`` energies per row. The
    efficiency for the precision of a Gaussian in one dimension, with ``sd`` half the data's and the draws held fixed, is
    0.09, 0.37 and 0.73 at 1, 2 and 10 draws (benchmarks/efficiency.py). With longer moves, rows in the tails weigh more and
    more, exponentially in the log ratio, where the loss of "conditional_nce" is linear. Below an ``sd`` of about 0.01
    standard deviations of the data, float32 no longer resolves the differences of energies.

    **Discrete events** with finitely many values. The neighbours are the events that differ in one of the ``d`` elements,
    and the loss of a row is

    .. math:: \sum_{i=1}^{d} \sum_{v \ne x_i} \sqrt{p(x_{i \to v}) / p(x)}

    It is exact and uses no randomness, so NUTS may target it. It costs ``1 + d (k - 1)`` energies per row for ``k`` values,
    and any energy will do, including the free energy of an RBM. For one unit of two values the optimum is the log odds of
    the data, as under maximum likelihood. On Boltzmann machines of five units with couplings of N(0, 1) the efficiency is
    about 0.97.

    Where ``p(y) > e^40 p(x)`` the square root, which would overflow, continues as its tangent in the log ratio, so that
    training that starts far from the data stays finite. A row this unlikely has no part in the optimum, and the loss
    differs by less than ``e^-20`` there.

    Args:
        sd: standard deviation of the moves in data units (in unconstrained units where the support is not the real line), a
            scalar or one value per dimension; None for half the batch's standard deviation, per dimension. Not for
            discrete events.
        num_draws: moves per row; None for 2. Not for discrete events.

    Raises:
        EnergyError: for num_draws that is not a whole number above 0, an sd that is not positive or does not fit the event,
            a discrete support whose values cannot be listed, and sd or num_draws with discrete events.

    Warns:
        UserWarning: where the moves are so long that the loss no longer depends on the energy.

    Example:
        ``estimate(model, "mpf", sd=0.3, num_draws=4)``, or ``estimate(model, "mpf")`` with
        ``EnergyDistribution(energy, (d,), support=constraints.boolean)``

    References:
        Sohl-Dickstein, Battaglino and DeWeese, Minimum probability flow learning (2011).
    """

    name = "mpf"
    takes_discrete = True
    role = "objective"
    sd: Any = None
    num_draws: int | None = None

    def __post_init__(self):
        check_positive(type(self).__name__, "sd", self.sd)
        if self.num_draws is not None:
            check_count(type(self).__name__, "num_draws", self.num_draws)

    def draws_noise(self, distribution: EventDistribution) -> bool:
        """Whether the events are continuous; for discrete events every change is taken."""
        return not distribution.is_discrete

    def check(self, site: Site) -> None:
        """Refuse moves that do not fit the event, and options for moves with discrete events."""
        if not site.distribution.is_discrete:
            super().check(site)
            check_scale(site, "sd", self.sd)
            return
        super().check(site)
        check_finite_values(site, self.name)
        given = [name for name in ("sd", "num_draws") if getattr(self, name) is not None]
        if given:
            raise EnergyError(
                f"Discrete events are compared with all their single changes: there is no move to draw, so {given} does not "
                "apply. Write estimate(model, 'mpf')."
            )

    def surrogate(self, rng_key: PRNGKey | None, site: Site, state: PyTree) -> tuple[RowValues, PyTree]:
        """Return minus the loss of each row."""
        if site.distribution.is_discrete:
            return -over_single_changes(site, lambda changes: jnp.sum(flow(changes))), state
        num = DEFAULT_DRAWS if self.num_draws is None else self.num_draws
        noise = directions(rng_key, "gaussian", -(-num // 2), site.position)  # pyright: ignore[reportArgumentType]
        return -loss_of_moves(site, in_pairs(scale_of(site, self.sd, 0.5) * noise, num), flow), state


def flow(rise: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Return ``exp(rise / 2)``, continued by its tangent beyond `STEEPEST`."""
    return tangent_exp(rise / 2, STEEPEST / 2)
