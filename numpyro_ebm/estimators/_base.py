"""The interface of every estimator: settings in a frozen dataclass, a surrogate per row, state in and state out."""

import abc
from typing import ClassVar, Literal

import numpyro.distributions as dist

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import PRNGKey, PyTree, RowValues, Scalar
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.distributions.rounded import warn_of_lattice
from numpyro_ebm.distributions.site import Site

FOR_DISCRETE = (
    " Estimators for discrete events: 'bregman_nce', 'cd', 'discrete_fisher', 'energy_discrepancy', 'exact', "
    "'generalized_sm', 'mean_field_cd', 'mle', 'mpf', 'nce', 'pcd', 'pseudolikelihood', 'ranking_nce', 'ratio_matching', "
    "'replay', 'unbiased'."
)
FOR_MIXED = (
    " Estimators for them: 'cd', 'energy_discrepancy', 'mle', 'pcd', 'pseudolikelihood', 'replay'; 'exact' where all are "
    "discrete."
)


class AbstractEstimator(abc.ABC):
    """A method that trains an energy without computing its log Z.

    Attributes:
        name: the name that `estimate` takes.
        role: "objective" where the surrogate is a function to maximise, "gradient" where only its gradient is meaningful.
        is_deterministic: whether the surrogate uses no randomness, so that NUTS may target it (a generalised posterior);
            where that depends on the event, `draws_noise` decides.
        is_persistent: whether state is carried from one update to the next.
        is_likelihood: whether the value is a log likelihood, of the data or of what is data among a fixed noise set, so
            that a posterior under it needs no calibration.
        holds_noise: whether rows are compared with draws that stay the same, so that other data need other draws.
        couples_rows: whether a row's value depends on the events of other rows, beyond scales fitted to the batch.
        needs_energy: whether the estimator evaluates the energy; if not, a `ScoreDistribution` is enough.
        persists_chains: whether chains continue from one update to the next and none restarts, so that their ends are
            draws of the model as far as they have converged.
        takes_discrete: whether events may be discrete.
        takes_mixed: whether events may have discrete members beside continuous ones.
        takes_ends: whether rows may lie on the boundary of the support, which unconstrained space does not contain.
        takes_missing: whether rows may lack elements of the event: hidden members and entries that are NaN.
    """

    name: ClassVar[str]
    role: ClassVar[Literal["objective", "gradient"]]
    is_deterministic: ClassVar[bool] = False
    is_persistent: ClassVar[bool] = False
    is_likelihood: ClassVar[bool] = False
    holds_noise: ClassVar[bool] = False
    couples_rows: ClassVar[bool] = False
    needs_energy: ClassVar[bool] = True
    persists_chains: ClassVar[bool] = False
    takes_discrete: ClassVar[bool] = False
    takes_mixed: ClassVar[bool] = False
    takes_ends: ClassVar[bool] = False
    takes_missing: ClassVar[bool] = False

    @abc.abstractmethod
    def surrogate(self, rng_key: PRNGKey, site: Site, state: PyTree) -> tuple[RowValues, PyTree]:
        """Return one value per row that stands in for its log likelihood (to be maximised), and the new state.

        Args:
            rng_key: random key (None only for deterministic estimators).
            site: the rows.
            state: what `init` or the last update returned; None for an estimator without state.

        Returns:
            Values ``(num_rows,)`` and the new state.
        """

    def init(self, rng_key: PRNGKey, site: Site) -> PyTree:
        """Return the state before the first update: a pytree of arrays, or None."""
        return None

    def check(self, site: Site) -> None:
        """Check that this estimator can train the site.

        Raises:
            EnergyError: if it cannot, with what is wrong and what to write.
        """
        self.check_mixed(site)
        if site.distribution.is_discrete:
            self._check_discrete(site)
            return
        if site.missing is None:  # placeholders are whole numbers
            warn_of_lattice(site.name, site.value, site.mask, site.distribution.support)
        if self.needs_energy and not site.distribution.has_energy:
            raise EnergyError(
                f"The estimator '{self.name}' needs values of an energy, but a {type(site.distribution).__name__} has only "
                "their gradient. Write estimate(model, 'dsm', sigma=0.1) or estimate(model, 'ssm_vr'), or declare an "
                "EnergyDistribution."
            )

    def check_mixed(self, site: Site) -> None:
        """Raise for an event with discrete members beside continuous ones, unless the estimator takes them.

        Raises:
            EnergyError: with the discrete members.
        """
        if site.distribution.is_mixed and not self.takes_mixed:
            raise EnergyError(
                f"The members {site.distribution.members.discrete} of the event {site.distribution.support} are discrete, "
                f"and the estimator '{self.name}' does not take members with values of different kinds.{FOR_MIXED}"
            )

    def _check_discrete(self, site: Site) -> None:
        if not self.takes_discrete:
            raise EnergyError(
                f"The estimator '{self.name}' works on continuous events; the support {site.distribution.support} is "
                f"discrete.{FOR_DISCRETE}"
            )

    def bind(self, distribution: EventDistribution) -> "AbstractEstimator":
        """Return the estimator with the defaults that depend on the distribution; most have none."""
        return self

    def latents(self, site: Site) -> dict[str, dist.Distribution]:
        """Return the priors of the estimator's own latent sites, by name; `estimate` samples each once for all rows."""
        return {}

    def draws_noise(self, distribution: EventDistribution) -> bool:
        """Return whether the surrogate uses randomness for events of this distribution."""
        return not self.is_deterministic

    def may_lack(self, distribution: EventDistribution) -> bool:
        """Return whether rows of this distribution may lack elements of the event."""
        return self.takes_missing

    def figures(self, rng_key: PRNGKey, site: Site) -> dict[str, Scalar]:
        """Return figures of the rows under the current energy for `training_report`, as scalars by name.

        Args:
            rng_key: random key.
            site: the rows, with the energy at its trained parameters.
        """
        return {}

    def notes(self) -> tuple[str, ...]:
        """Return notes for reports on how the settings change the energy that is learned: penalties, biases."""
        return ()

    def refuse_local(self, site: Site, reason: str) -> None:
        """Raise where rows have a context or a base of their own.

        Raises:
            EnergyError: for such rows, with the reason.
        """
        if site.local is not None:
            raise EnergyError(
                f"The estimator '{self.name}' cannot train an energy whose rows have a context or a base of their own: "
                f"{reason} Write estimate(model, 'cd') or estimate(model, 'dsm', sigma=0.1)."
            )
