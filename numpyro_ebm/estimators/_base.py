"""What every estimator is: settings in a frozen dataclass, a surrogate per row, state in and state out."""

import abc
from typing import Any, ClassVar, Literal

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree
from numpyro_ebm.distributions.lattice import warn_of_lattice
from numpyro_ebm.distributions.site import Site

FOR_BINARY_UNITS = " For binary units write estimate(model, 'mpf') or estimate(model, 'mean_field_cd')."


class AbstractEstimator(abc.ABC):
    """A way to train an energy without its log Z.

    Attributes:
        name: what `estimate` calls it.
        role: "objective" where the surrogate is a function to maximise, "gradient" where only its gradient means
            something.
        is_deterministic: whether the surrogate uses no randomness, so that NUTS may target it (a generalised posterior);
            where that depends on the event, `draws_noise` says so.
        is_persistent: whether state is carried from one update to the next.
        couples_rows: whether a row's value depends on the events of other rows by more than scales fitted to the batch.
        needs_energy: whether values of the energy are asked for; without, the gradient of a `ScoreDistribution` will do.
        persists_chains: whether chains continue from one update to the next and none begins anew, so that their ends are
            draws of the model as far as they have converged.
        takes_ends: whether rows may lie on the boundary of the support, where unconstrained space has no place for them.
    """

    name: ClassVar[str]
    role: ClassVar[Literal["objective", "gradient"]]
    is_deterministic: ClassVar[bool] = False
    is_persistent: ClassVar[bool] = False
    couples_rows: ClassVar[bool] = False
    needs_energy: ClassVar[bool] = True
    persists_chains: ClassVar[bool] = False
    takes_ends: ClassVar[bool] = False

    @abc.abstractmethod
    def surrogate(self, rng_key: PRNGKey, site: Site, state: PyTree) -> tuple[Array, PyTree]:
        """One value per row that stands for its log likelihood (to be maximised), and the new state.

        Args:
            rng_key: random key (None only for deterministic estimators).
            site: the rows.
            state: what `init` or the last update left; None where nothing persists.

        Returns:
            Values ``(num_rows,)`` and the state.
        """

    def init(self, rng_key: PRNGKey, site: Site) -> PyTree:
        """State before the first update: a pytree of arrays, or None."""
        return None

    def check(self, site: Site) -> None:
        """Refuse what this estimator cannot do.

        Raises:
            EnergyError: naming what is wrong and what to write.
        """
        if site.distribution.is_discrete:
            raise EnergyError(
                f"The estimator '{self.name}' works on continuous events; the support {site.distribution.support} is "
                f"discrete.{FOR_BINARY_UNITS}"
            )
        warn_of_lattice(site.name, site.value, site.mask, site.distribution.support)
        if self.needs_energy and not site.distribution.has_energy:
            raise EnergyError(
                f"The estimator '{self.name}' needs values of an energy, and a {type(site.distribution).__name__} has only "
                "their gradient. Write estimate(model, 'dsm', sigma=0.1) or estimate(model, 'ssm_vr'), or declare an "
                "EnergyDistribution."
            )

    def draws_noise(self, distribution: Any) -> bool:
        """Whether the surrogate uses randomness for events of this distribution."""
        return not self.is_deterministic

    def figures(self, rng_key: PRNGKey, site: Site) -> dict[str, Array]:
        """Figures of the rows under the energy as it is, for `training_report`; scalars by name.

        Args:
            rng_key: random key.
            site: the rows, the energy's parameters being those that were trained.
        """
        return {}

    def notes(self) -> tuple[str, ...]:
        """What the settings mean for the energy that is trained, for reports: penalties, biases."""
        return ()

    def refuse_local(self, site: Site, reason: str) -> None:
        """Refuse rows with a context (or a base) of their own.

        Raises:
            EnergyError: with the reason.
        """
        if site.local is not None:
            raise EnergyError(
                f"The estimator '{self.name}' cannot train an energy with a context or a base of each row's own: {reason} "
                "Write estimate(model, 'cd') or estimate(model, 'dsm', sigma=0.1)."
            )
