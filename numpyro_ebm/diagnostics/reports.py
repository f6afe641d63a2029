"""`training_report`: figures and notes on how an energy was trained."""

import dataclasses
import inspect
import warnings
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jaxtyping import Bool
from numpyro import handlers

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.inputs import as_arrays, check_outside_jit
from numpyro_ebm._core.programs import compiled
from numpyro_ebm._core.typing import Array
from numpyro_ebm.diagnostics.standard_errors import standard_errors
from numpyro_ebm.distributions.empirical import Empirical
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators import CONDITIONS, AbstractEstimator, NegativePhaseHealth, in_words
from numpyro_ebm.estimators.state import Carried, EstimatorState, carried
from numpyro_ebm.handlers import estimate, estimated_in
from numpyro_ebm.handlers.energy_sites import energy_sites
from numpyro_ebm.handlers.results import Result, check_values_given, mutable_state, values_of

MAX_PARAMETERS = 200
"""Most parameters for standard errors with all of them estimated, which take one derivative of the gradient each."""


class NothingToReport(EnergyError):
    """Raised where the state has no chains, and there are no arguments for figures of the data."""


FIGURES = tuple(name for name in NegativePhaseHealth._fields if name not in ("conditions", "reported", "mean_moves"))


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """Report on the training of one energy site.

    Attributes:
        site: name of the site.
        estimator: name of the estimator.
        figures: for estimators with chains, those of `NegativePhaseHealth` and of the state (`ChainState`), such as
            ``num_updates`` and, for persistent chains, the mean and largest ``age``; for others those of the estimator.
        conditions: the conditions of `NegativePhaseHealth` that held in the last update, in words.
        notes: consequences of the estimator's settings for the energy, and conditions that held earlier.
        held: names of ``conditions``.
    """

    site: str
    estimator: str
    figures: dict[str, float]
    conditions: tuple[str, ...]
    notes: tuple[str, ...]
    held: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return a few lines of text."""
        lines = [f"{self.site}: {self.estimator}"]
        lines += [f"  {name:<16} {value:.4g}" for name, value in self.figures.items() if np.isfinite(value)]
        if "acceptance_rate" in self.figures:
            # The report judges only the conditions: diagnose judges the figures, and may find more.
            none = f"  chains: none of {', '.join(CONDITIONS)} held in the last update; diagnose judges the figures"
            lines += [f"  ! {text}" for text in self.conditions] or [none]
        return "\n".join(lines + [f"  note: {text}" for text in self.notes])


@dataclasses.dataclass(frozen=True)
class TrainingReport:
    """Result of `training_report`: one `SiteReport` per energy site with figures; ``str`` gives text.

    Attributes:
        sites: the reports.
    """

    sites: tuple[SiteReport, ...]

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return the reports as plain dicts, by site."""
        return {report.site: dataclasses.asdict(report) for report in self.sites}

    def __str__(self) -> str:
        """Return text with a paragraph per site."""
        return "\n".join(map(str, self.sites))


def training_report(model: estimate, state: Result, *args: Any, **kwargs: Any) -> TrainingReport:
    """Report figures of the chains of the last update, of the data under the energy, and consequences of the settings.

    Estimators with chains (cd, pcd, replay, mle, ...) keep their figures in the state. Others have figures of the rows under
    the trained energy, for which the model runs once more on the given arguments. These are those of training, or held-out
    rows in their place, and both should give similar figures. A model that subsamples uses one subset.

    - sm, ssm, ssm_vr, regularized_sm, hsm, minimum_velocity: ``score_norm`` and ``trace_per_dim``, root mean square of the
      score and mean of its divergence, per dimension.
    - dsm: ``smoothing_min`` and ``smoothing_max``, the noise divided by the data's standard deviation.
    - nce and its variants: ``accuracy`` of the classification of data and noise; ``overlap`` of the two, 0 where nothing
      more can be learned; ``gradient_size``, of the loss in the log ratios; the learned ``log_normalizer`` and
      ``log_normalizer_se``, its `standard_errors` on these rows: with all parameters estimated where there are at most 200
      and they are identified, otherwise that of this energy alone.
    - ksd: ``squared_ksd``, the squared discrepancy of the rows, about 0 where the model fits.
    - lsd: ``stein``, the discrepancy that the critic finds, and ``stein_error``; ``critic_norm``.
    - adversarial: ``log_normalizer_bound``; with weights also ``log_normalizer``, its ``_se``, and ``ess`` as a fraction.

    Args:
        model: the model that was trained, as `estimate` returned it.
        state: the result of `fit` or of ``svi.run``, the state of SVI, or a dict of parameters, of mutable state or of both
            (``svi.get_params(state) | state.mutable_state``); values of latent sites go with the parameters.
        *args: arguments of the model.
        **kwargs: keyword arguments of the model.

    Raises:
        EnergyError: (a ValueError) where there is nothing to report; for arguments together with a bare state of SVI, which
            has the parameters in unconstrained form; for parameters or latent sites without a value.
        TypeError: for a model that does not come from `estimate`.

    Example:
        ``print(training_report(estimated, fit(key, svi, 1000, x), x))``
    """
    estimated = estimated_in(model)
    if estimated is None:
        raise TypeError(f"training_report needs the model as estimate returned it; got {type(model).__name__}.")
    model = estimated
    args, kwargs = as_arrays("training_report", (args, kwargs))
    check_outside_jit("training_report", state, args, kwargs)
    mutable = mutable_state(state)
    found = [site_report(each, model.estimators) for each in carried(mutable)]
    has_arguments = bool(args or kwargs) or not inspect.signature(model.fn).parameters  # pyright: ignore[reportArgumentType]
    if has_arguments and _have_figures(model):
        found += _data_reports(model, values_of("training_report", state), args, kwargs)
    if not found:
        _refuse(model)
    return TrainingReport(tuple(found))


def _have_figures(model: estimate) -> bool:
    estimators = model.estimators.values() if isinstance(model.estimators, dict) else (model.estimators,)
    return any(type(each).figures is not AbstractEstimator.figures for each in estimators)


def _refuse(model: estimate) -> NoReturn:
    chains = "The state holds no chains, which cd, pcd, replay, mle and others have"
    if not _have_figures(model):
        raise NothingToReport(f"{chains}, and the estimator has no figures of the data, so there is nothing to report.")
    raise NothingToReport(
        f"{chains}. For figures of the data under the trained energy pass the result and the model's arguments: "
        "training_report(model, result, x)."
    )


def _data_reports(model: estimate, given: dict[str, Any], args: tuple, kwargs: dict[str, Any]) -> list[SiteReport]:
    """Return reports of the sites whose estimators have figures of the data."""
    notes: dict[str, tuple[str, tuple[str, ...]]] = {}

    def run(given):
        found, trace = energy_sites(model.fn, given, args, kwargs)
        check_values_given(trace, given)
        with handlers.trace() as own, handlers.seed(rng_seed=0), handlers.substitute(data=given):
            pairs = model.lay_out(found).values()
            keys = jax.random.split(jax.random.key(1), len(pairs) + 1)
            figures = {site.name: each.figures(key, site) for key, (each, site) in zip(keys, pairs, strict=False)}
        check_values_given(own, given)  # those of the estimators: log Z, a noise model, a critic
        notes.update({site.name: (each.name, each.notes() + _base_notes(site)) for each, site in pairs})
        return figures

    reports = []
    for site, figures in compiled(run, given).items():
        name, words = notes[site]
        if figures:
            log_z, said = _log_normalizer(site, model, given, args, kwargs)
            numbers = {key: float(value) for key, value in figures.items()} | log_z
            reports.append(SiteReport(site, name, numbers, (), words + said))
    return reports


def _base_notes(site: Site) -> tuple[str, ...]:
    if not isinstance(site.distribution.base, Empirical):
        return ()
    return (
        f"the {len(site.distribution.base.rows)} Empirical rows count as a known distribution: errors omit their sampling.",
    )


def _log_normalizer(
    site: str, model: estimate, given: dict[str, Any], args: tuple, kwargs: dict[str, Any]
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Return the learned log Z with its standard error, and notes on it."""
    name = f"{site}$log_normalizer"
    if name not in given:
        return {}, ()
    value = {"log_normalizer": float(given[name])}
    num_params = sum(np.size(leaf) for leaf in jax.tree.leaves(given))
    choices = {
        None: (),
        (name,): ("log_normalizer_se is that of this energy, with the energy's parameters taken as known.",),
    }
    refusal = ""
    for names, said in choices.items():
        if names is None and num_params > MAX_PARAMETERS:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the figures show the same for these rows
                errors = standard_errors(jax.random.key(2), model, given, *args, names=names, **kwargs).errors
            if name not in errors:  # belongs to another model
                return {}, ()
            return value | {"log_normalizer_se": float(errors[name])}, said
        except EnergyError as error:
            refusal = str(error)
    return value, (f"log_normalizer has no standard error here. {refusal}",)


def site_report(carried: Carried, estimators: AbstractEstimator | Mapping[str, AbstractEstimator]) -> SiteReport:
    """Report on the state of an estimator.

    Args:
        carried: the state, with the names of its site and estimator.
        estimators: the estimator, or a dict of them by site, for their notes; an empty dict for no notes.
    """
    estimator = estimators if isinstance(estimators, AbstractEstimator) else estimators.get(carried.site)
    notes = () if estimator is None else estimator.notes()
    state, figures, held, conditions = carried.state, {}, (), ()
    if isinstance(state, EstimatorState):
        figures = {name: float(value) for name, value in state.figures().items()}
        if state.chains is not None:
            health = state.chains.health
            known = {name: getattr(health, name) for name in FIGURES}
            figures |= {name: float(value) for name, value in known.items() if value is not None}
            held = _names(health.conditions)
            conditions = tuple(f"{name}: {in_words(name, health)}" for name in held)
            earlier = _names(np.asarray(health.reported) & ~np.asarray(health.conditions))
            notes += (f"held earlier in the training, but not in the last update: {', '.join(earlier)}",) if earlier else ()
    return SiteReport(carried.site, carried.estimator, figures, conditions, notes, held)


def _names(conditions: Bool[Array, " conditions"] | Bool[np.ndarray, " conditions"]) -> tuple[str, ...]:
    return tuple(name for name, holds in zip(CONDITIONS, np.asarray(conditions), strict=True) if holds)
