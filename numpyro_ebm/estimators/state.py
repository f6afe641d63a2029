"""State that estimators carry from one update to the next, and the mutable sites that hold it."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int

from numpyro_ebm._core.typing import Array, PyTree
from numpyro_ebm.estimators.parts.health import NegativePhaseHealth
from numpyro_ebm.estimators.parts.positive_phase import PositiveState
from numpyro_ebm.estimators.parts.scales import Spread


class Pool(NamedTuple):
    """Chains that continue from one update to the next.

    Attributes:
        position: ``(size, ...)``, positions in unconstrained space, in the form that the kernel moves.
        age: ``(size,)``, transitions since each chain last started; -1 for the chain of a row that no batch has held yet.
        local: context and base that each chain started with, leaves ``(size, ...)``; None where all chains share one
            density, or each belongs to a row of the data set.
        log_factor: ``(size,)``, log of each chain's own step size factor (`numpyro_ebm.kernels.chains.Pace`); None where
            the chains share one step size.
    """

    position: PyTree
    age: Int[Array, " size"]
    local: PyTree = None
    log_factor: Float[Array, " size"] | None = None


class ChainState(NamedTuple):
    """State of a negative phase.

    Attributes:
        health: figures and conditions of the last update.
        num_updates: number of updates so far.
        spread: running mean and variance of the data.
        averaging: BlackJAX's dual averaging state of the step size; None where the step size does not adapt.
        log_scale: log of each dimension's scale; None where the scales do not adapt.
        pool: persistent chains; None where every update starts new chains.
        positive: state of the positive phase; None without one.
    """

    health: NegativePhaseHealth
    num_updates: Int[Array, "*batch"]
    spread: Spread
    averaging: Any = None
    log_scale: Float[Array, "*position"] | None = None
    pool: Pool | None = None
    positive: PositiveState | None = None

    @property
    def chains(self) -> "ChainState":
        """The state itself, as in every `EstimatorState` with a negative phase."""
        return self

    def figures(self) -> dict[str, Any]:
        """Return numbers for reports, without those of ``health``."""
        figures = {"num_updates": self.num_updates}
        if self.pool is not None:
            figures |= {"age_mean": self.pool.age.mean(), "age_max": self.pool.age.max()}
        if self.positive is not None:
            figures |= self.positive.figures()
        return figures


@runtime_checkable
class EstimatorState(Protocol):
    """State that has figures for reports: a NamedTuple of arrays."""

    @property
    def chains(self) -> ChainState | None:
        """State of the negative phase; None for an estimator without one."""
        ...

    def figures(self) -> dict[str, Any]:
        """Return numbers for reports by name, without those of ``chains.health``."""
        ...


class Carried(NamedTuple):
    """State of one estimator, from the mutable state of SVI."""

    site: str
    estimator: str
    state: Any


def state_site(site: str, estimator: str) -> str:
    """Return the name of the mutable site that holds an estimator's state."""
    return f"{site}${estimator}"


def holds_state(name: str, value: object) -> bool:
    """Return whether a mutable site holds the state of an estimator."""
    return "$" in name and isinstance(value, Mapping) and set(value) == {"state"}


def carried(mutable_state: Mapping[str, Any] | None) -> list[Carried]:
    """Return the states of all estimators in the mutable state of SVI."""
    found = [(name, value) for name, value in (mutable_state or {}).items() if holds_state(name, value)]
    return [Carried(*_parts(name), value["state"]) for name, value in found]


def chain_states(mutable_state: Mapping[str, Any] | None) -> dict[str, ChainState]:
    """Return the states of all negative phases in the mutable state of SVI, by energy site."""
    found = {each.site: each.state.chains for each in carried(mutable_state) if isinstance(each.state, EstimatorState)}
    return {site: chains for site, chains in found.items() if chains is not None}


def _parts(name: str) -> tuple[str, str]:
    site, _, estimator = name.rpartition("$")
    return site, estimator
