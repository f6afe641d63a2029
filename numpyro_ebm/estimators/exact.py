"""Exact maximum likelihood: of discrete events with few states, and in one to three continuous dimensions."""

import dataclasses
from typing import Any, cast

import jax

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.energies import AbstractEnergy, summable
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.trapezoid import check_edges
from numpyro_ebm._core.typing import PRNGKey, PyTree, RowValues
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.distributions.states import has_states, in_words, log_sum_over_states, num_states
from numpyro_ebm.estimators._base import AbstractEstimator
from numpyro_ebm.estimators.parts.quadrature import Box, where_covered
from numpyro_ebm.estimators.parts.single_changes import check_finite_values
from numpyro_ebm.estimators.parts.unknown import Unknown, log_completions


@dataclasses.dataclass(frozen=True)
class Exact(AbstractEstimator):
    r"""Exact maximum likelihood: log Z by a sum over all states or over a grid, or as a ready-made energy knows it.

    .. math:: \log p(x) = -E(x) - \log \sum_{x'} e^{-E(x')}, \qquad
        \log p(x) = -E(x) - \log \int e^{-E(x')} dx'

    The value is the log likelihood itself, so SVI with any guide, and NUTS, give the posterior of the parameters. It is the
    truth that other estimators are compared with.

    **Discrete events.** One update costs as many energies as there are states, for each row if rows have a context or a base
    of their own. The members of an event may have different values, as the columns of a table do. Rows of an event whose
    elements have the same values may lack elements: hidden members of a joint event, without data and without a value from
    the guide, and entries that are NaN in floating-point data. The likelihood of such a row is a sum over its completions,
    :math:`p(x_{obs}) = \sum_{x_{mis}} e^{-E(x)} / Z`, which costs each row an energy for every state of the elements that
    any row may lack.

    **Continuous events** of one to three dimensions. The integral is that of the trapezoidal rule in unconstrained space,
    the Jacobian included; for a smooth density that has faded at the edges, its error falls faster than any power of the
    spacing (see `numpyro_ebm.partition.grid.Grid`). One update costs as many energies as there are points, for each row if
    rows have a context or a base of their own. The box stays where it is while the parameters change: by default it is that
    of the batch, and ten standard deviations beyond. At each update the error is bounded by what may lie beyond the edges
    and by the difference from a grid of half the points. Where it is above 0.001 the value is NaN, never a number that is
    wrong: training raises, and MCMC rejects the parameters and warns. A mode that lies beyond the box altogether is not
    seen.

    Args:
        max_states: the largest number of states that is summed over, or of terms in the log Z of a ready-made energy.
        low: lower edges of the grid in unconstrained space, one number or one per coordinate; None for the default.
        high: upper edges.
        num_points: points per dimension, an odd number; None for 1001, 201 and 61 in 1, 2 and 3 dimensions.

    Raises:
        EnergyError: for more states than ``max_states``; for a continuous support of more than three dimensions, edges out
            of order or of another shape, an even number of points, options of a grid for discrete events, and in training
            for a density that the grid does not cover. Inside ``jit``, JAX raises the last one as
            ``jax.errors.JaxRuntimeError``.

    Warns:
        UserWarning: under MCMC, for parameters whose density the grid does not cover.

    Example:
        ``estimate(model, "exact")`` with ``EnergyDistribution(energy, (9,), support=constraints.boolean)``, or
        ``estimate(model, "exact", low=-8.0, high=8.0)`` with ``EnergyDistribution(energy, (2,))``

    References:
        Trefethen and Weideman, The exponentially convergent trapezoidal rule (2014), for the grid.
    """

    name = "exact"
    role = "objective"
    is_deterministic = True
    is_likelihood = True
    takes_discrete = True
    takes_missing = True
    max_states: int = 2**20
    low: Any = None
    high: Any = None
    num_points: int | None = None

    def __post_init__(self):
        check_count(type(self).__name__, "max_states", self.max_states)
        check_edges(type(self).__name__, self.low, self.high, self.num_points)

    def check_mixed(self, site: Site) -> None:
        """Refuse events with members whose values cannot be listed."""
        if not has_states(site.distribution):
            super().check_mixed(site)

    def may_lack(self, distribution):
        """Return whether the event is discrete, so that what rows lack can be summed over."""
        return distribution.is_discrete

    def check(self, site: Site) -> None:
        """Refuse events with too many states or dimensions, and options of a grid where there is none."""
        super().check(site)
        known = summable(site.distribution.ready_energy)
        is_on_grid = known is None and site.distribution.is_continuous
        given = [name for name in ("low", "high", "num_points") if getattr(self, name) is not None]
        if given and not is_on_grid:
            raise EnergyError(
                f"The log Z of this site is a sum over states or known, not an integral over a grid: {given} do not apply. "
                "Write estimate(model, 'exact')."
            )
        if is_on_grid:
            self._box.check(type(self).__name__, site)
        elif known is not None:
            self._check_terms(known)
        else:
            self._check_states(site)
        if site.missing is not None:
            self._check_missing(site)

    def _check_states(self, site: Site) -> None:
        if not has_states(site.distribution):
            check_finite_values(site, self.name)
        count = num_states(site.distribution)
        if count > self.max_states:
            raise EnergyError(
                f"The event has {in_words(site.distribution)} states, more than max_states={self.max_states}. Write "
                f"estimate(model, 'pseudolikelihood') or estimate(model, 'pcd'), or Exact(max_states={count})."
            )

    def _check_missing(self, site: Site) -> None:
        count, missing = Unknown.of(site).num_states, site.missing
        # Rows of a traced program may be complete; if they are not, the value is NaN.
        is_known = missing is not None and (missing.is_certain or is_concrete(missing.elements))
        if count > self.max_states and is_known:
            raise EnergyError(
                f"The elements that rows lack have {count} states, more than max_states={self.max_states}. Write "
                "estimate(model, 'pcd', positive_phase=numpyro_ebm.PositivePhase()), or "
                f"Exact(max_states={count})."
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
        if summable(site.distribution.ready_energy) is None and site.distribution.is_continuous:
            log_z, is_covered = self._box.log_partition(site)
            values = jax.vmap(site.distribution.log_density)(site.value, site.local)
            return where_covered(site, values - log_z, is_covered), state
        values = log_completions(site, self.max_states)

        def log_partition(local):
            known = summable(site.distribution.row_energy(local))
            if known is not None:
                return known.log_partition()
            return log_sum_over_states(site.distribution, lambda event: site.log_density(event, local))

        if site.rows_differ:
            return values - jax.lax.map(jax.checkpoint(log_partition), site.local), state
        return values - log_partition(jax.tree.map(lambda leaf: leaf[0], site.local)), state

    @property
    def _box(self) -> Box:
        return Box(self.low, self.high, self.num_points)
