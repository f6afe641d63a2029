"""`training_report`: what the chains that trained an energy did, in words and figures."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpyro.infer.svi import SVIRunResult, SVIState

from numpyro_ebm._errors import EnergyError
from numpyro_ebm._typing import Array
from numpyro_ebm.estimators import CONDITIONS, AbstractEstimator, NegativePhaseHealth
from numpyro_ebm.handlers import estimate

FIGURES = tuple(name for name in NegativePhaseHealth._fields if name not in ("conditions", "reported"))


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """What is known of one energy site's training.

    Attributes:
        site: its name.
        estimator: the estimator's name.
        figures: those of `NegativePhaseHealth`; the numbers in the estimator's state, such as ``num_updates``; for chains
            that are kept the mean and largest ``age``.
        conditions: of `NegativePhaseHealth`, those that held in the last update, in words.
        notes: what the estimator's settings mean for the energy that it trains.
    """

    site: str
    estimator: str
    figures: dict[str, float]
    conditions: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """A few lines of text."""
        lines = [f"{self.site}: {self.estimator}"]
        lines += [f"  {name:<16} {value:.4g}" for name, value in self.figures.items() if np.isfinite(value)]
        lines += [f"  ! {text}" for text in self.conditions] or ["  chains: nothing unusual"]
        return "\n".join(lines + [f"  note: {text}" for text in self.notes])


@dataclasses.dataclass(frozen=True)
class TrainingReport:
    """One `SiteReport` per energy site whose estimator keeps a state; ``str`` gives text.

    Attributes:
        sites: the reports.
    """

    sites: tuple[SiteReport, ...]

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """The same as plain dicts, by site."""
        return {report.site: dataclasses.asdict(report) for report in self.sites}

    def __str__(self) -> str:
        """Text, a paragraph per site."""
        return "\n".join(map(str, self.sites))


def training_report(model: estimate, state: SVIState | SVIRunResult | Mapping[str, Any]) -> TrainingReport:
    """Figures of the chains that gave the last gradient, conditions that hold, and what the settings imply.

    Args:
        model: the model that was trained, as `estimate` returned it.
        state: the state of SVI, the result of ``svi.run``, or a mutable state.

    Raises:
        EnergyError: (a ValueError) where the state holds nothing of an estimator with chains.
        TypeError: for a model that does not come from `estimate`.

    Example:
        ``print(training_report(estimated, svi.run(key, 1000, x)))``
    """
    if not isinstance(model, estimate):
        raise TypeError(f"training_report needs the model as estimate returned it; got {type(model).__name__}.")
    mutable = _mutable_state(state)
    found = [_report(name, value["state"], model.estimators) for name, value in mutable.items() if _is_ours(name, value)]
    if not found:
        raise EnergyError(
            "The state holds no chains. Estimators that sample from the model have some: cd, pcd, replay, mle and others."
        )
    return TrainingReport(tuple(found))


def _mutable_state(state: Any) -> Mapping[str, Any]:
    if isinstance(state, SVIRunResult):
        state = state.state
    if isinstance(state, SVIState):
        state = state.mutable_state
    return state or {}


def _is_ours(name: str, value: Any) -> bool:
    return "$" in name and isinstance(value, Mapping) and isinstance(value.get("state"), Mapping)


def _report(name: str, state: Mapping[str, Any], estimators: Any) -> SiteReport:
    site, _, kind = name.rpartition("$")
    estimator = estimators if isinstance(estimators, AbstractEstimator) else estimators.get(site)
    health = state.get("health")
    figures = {
        key: float(value) for key, value in state.items() if isinstance(value, Array | np.ndarray) and value.ndim == 0
    }
    conditions: tuple[str, ...] = ()
    if isinstance(health, NegativePhaseHealth):
        figures |= {name: float(getattr(health, name)) for name in FIGURES}
        held = zip(CONDITIONS.items(), np.asarray(health.conditions), strict=True)
        conditions = tuple(f"{key}: {text.format(**figures)}." for (key, text), holds in held if holds)
    if "age" in state:
        age = np.asarray(state["age"])
        figures |= {"age_mean": float(age.mean()), "age_max": float(age.max())}
    return SiteReport(site, kind, figures, conditions, () if estimator is None else estimator.notes())
