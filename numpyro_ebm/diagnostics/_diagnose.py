"""`diagnose`: check draws or a training for problems, and say what to try."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.typing import ArrayLike
from numpyro.infer import MCMC
from numpyro.infer.svi import SVIRunResult, SVIState
from numpyro.primitives import Messenger

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.inputs import as_arrays, check_outside_jit
from numpyro_ebm._core.typing import PyTree
from numpyro_ebm.bayes import PosteriorKernel
from numpyro_ebm.diagnostics import _chains
from numpyro_ebm.diagnostics._data import check_fits, compare, fits
from numpyro_ebm.diagnostics._findings import Diagnosis, Finding, unchecked
from numpyro_ebm.diagnostics._posterior import check_posterior
from numpyro_ebm.diagnostics._sampler import check_sampler
from numpyro_ebm.diagnostics._training import check_result, check_training
from numpyro_ebm.diagnostics.arviz.read import Recorded, read
from numpyro_ebm.handlers import estimated_in
from numpyro_ebm.sampling import Draws
from numpyro_ebm.training import FitResult


def diagnose(
    subject: Messenger | MCMC | Draws | FitResult | SVIRunResult | SVIState | Mapping[str, Any],
    *args: Any,
    data: PyTree | None = None,
    min_ess: float | None = None,
    **kwargs: Any,
) -> Diagnosis:
    r"""Check draws, or a training, for problems that raise no error, and say what to try.

    Finite numbers do not prove that a run is healthy: kernels reject points that are not finite, ArviZ counts every draw of
    a frozen chain as effective, and chains that all stay in one mode agree. The bounds are such that a healthy run exceeds
    any one of them by chance about once in a million times, or those of the literature where these are wider.

    Draws are checked for values that are not finite, frozen chains, identical chains and chains that move away without
    limit. Further checks are rank-normalised split R-hat of all coordinates and of the log density, below 1.01 or what
    chance allows for chains of this length (at most 1.1); bulk and tail effective sizes; divergences, acceptance, tree
    depth, E-BFMI and a trend of the energy. With data, the checks are the farthest draw; mean and covariance in standard
    errors; and, by the five nearest neighbours among data and draws, modes that the draws miss, draws in places without
    data, equality of the two distributions, and draws that lie on rows of the data.

    A posterior that a kernel of ``numpyro_ebm.bayes`` drew, such as `ExchangeKernel`, is checked by new auxiliary data at
    400 of its draws: whether the auxiliary chains accept and leave the data; whether chains ten times as long from other
    starts would move its mean; and the second Bartlett identity, by which the Hessian of the log posterior and the outer
    product of its gradient sum to zero on average if the posterior is right.

    A training is checked for losses that are not finite or still fall, a rise of the held-out loss, the conditions of
    `NegativePhaseHealth`, the energy of the data minus that of the chains in standard errors, modes that persistent chains
    miss, and the figures of `training_report` for the estimator: overlap and accuracy (nce), smoothing (dsm), the square of
    the score against its divergence (sm and its variants). For discrete events it says which values no row has, which is no
    warning: maximum likelihood makes them impossible.

    Args:
        subject: draws, as an MCMC, the result of `sample`, a dict of arrays ``(num_chains, num_draws, ...)`` or ArviZ data;
            or the model as `estimate` returned it, followed by the result of its training and the arguments of the model,
            as in `training_report`. A result without its model is checked only by its losses and its chains' last update.
        *args: for a model only: the result and the arguments of the model.
        data: for draws: rows ``(num_rows, *event)``, by variable, or an array where there is one variable. None for the
            observed data that came with ArviZ data, where they have the events' shape. Draws in a plate count as draws of
            one distribution, each row as a further chain.
        min_ess: for draws: the required number of effective draws. 100 give a mean to a tenth of a standard deviation;
            Vehtari et al. ask for 400 where tails and R-hat itself have to be reliable.
        **kwargs: for a model only: its keyword arguments (including ``data``).

    Returns:
        `Diagnosis`, which can be printed and has ``is_healthy``, ``warnings`` and ``as_dict()``.

    Raises:
        EnergyError: (a ValueError) for draws or data that do not fit, and parameters without a value.
        TypeError: for anything else.

    Example:
        ``print(diagnose(draws, data=x))`` and ``print(diagnose(estimated, fit(key, svi, 1000, x), x))``

    References:
        Vehtari et al., Rank-normalization, folding, and localization (2021); Betancourt, Diagnosing suboptimal cotangent
        disintegrations in Hamiltonian Monte Carlo (2016); Henze, A multivariate two-sample test based on the number of
        nearest neighbor type coincidences (1988); Naeem et al., Reliable fidelity and diversity metrics for generative
        models (2020); Kang, Hughes and Haran, Measuring sample quality in algorithms for intractable normalizing function
        problems (2021).
    """
    args, kwargs, data = as_arrays("diagnose", (args, kwargs, data))
    check_outside_jit("diagnose", subject if isinstance(subject, Mapping | tuple) else (), args, kwargs, data)
    estimated = estimated_in(subject) if isinstance(subject, Messenger) else None
    if estimated is not None:
        if not args:
            raise TypeError("diagnose of a model needs the result of its training. Write diagnose(model, result, x).")
        given = {"data": data, "min_ess": min_ess}
        kwargs |= {name: value for name, value in given.items() if value is not None}
        return Diagnosis(tuple(check_training(estimated, args[0], args[1:], kwargs)))
    if args or kwargs:
        raise TypeError(
            f"diagnose of {type(subject).__name__} takes no further arguments but data and min_ess. Write diagnose(draws, "
            "data=x), or diagnose(model, result, x) with the model as estimate returned it."
        )
    if isinstance(subject, FitResult | SVIRunResult | SVIState):
        if data is not None or min_ess is not None:
            raise TypeError("data and min_ess are for draws. Write diagnose(model, result, x) for a training.")
        return Diagnosis(tuple(check_result(subject)))
    recorded, min_ess = read("diagnose", subject), 100 if min_ess is None else min_ess
    if isinstance(subject, MCMC) and isinstance(subject.sampler, PosteriorKernel):
        if data is not None:
            raise TypeError("These are draws of parameters, and data is for draws of events. Write diagnose(mcmc).")
        # These kernels have no divergences and no energies, so advice to record them would not help; and chains that leave
        # their start are a sign of energies without a density, where the draws are events.
        found = _of_chains(recorded, min_ess)
        found = [each for each in found if each.status != "not checked" and each.name != "growth"]
        return Diagnosis((*found, *check_posterior(subject)))
    return Diagnosis(tuple(_draws(recorded, data, min_ess)))


def _draws(recorded: Recorded, data: ArrayLike | Mapping[str, ArrayLike] | None, min_ess: float) -> list[Finding]:
    pairs = _pairs(recorded, data)
    found = _of_chains(recorded, min_ess)
    if not pairs:
        why = "there are no data to compare with, and chains that all stay in one mode look converged"
        return [*found, unchecked("modes", why, "Pass the data: diagnose(draws, data=x).")]
    for name, rows in pairs.items():
        found += compare(name, recorded.variables[name], rows)
    return found


def _of_chains(recorded: Recorded, min_ess: float) -> list[Finding]:
    chains = _chains.coordinates(recorded)
    found = [
        _chains.check_finite(recorded),
        _chains.check_moves(chains),
        _chains.check_copies(chains),
        _chains.check_growth(chains),
        *_chains.check_convergence(chains, recorded.stats.get("lp"), min_ess),
    ]
    return found + check_sampler(recorded, is_slow=any(each.name == "ESS" and each.status != "ok" for each in found))


def _pairs(recorded: Recorded, data: ArrayLike | Mapping[str, ArrayLike] | None) -> dict[str, np.ndarray]:
    """Return the data of each variable."""
    variables = recorded.variables
    if data is None:
        known = {name: recorded.observed[name] for name in variables if name in recorded.observed}
        return {name: rows for name, rows in known.items() if fits(variables[name], rows)}
    if not isinstance(data, Mapping):
        if len(variables) != 1:
            raise EnergyError(f"The draws have the variables {sorted(variables)}. Write data={{'{min(variables)}': x}}.")
        data = {next(iter(variables)): data}
    unknown = sorted(set(data) - set(variables))
    if unknown:
        raise EnergyError(f"There are data for {unknown}, but the draws have only the variables {sorted(variables)}.")
    pairs = {name: np.asarray(rows) for name, rows in data.items()}
    for name, rows in pairs.items():
        check_fits(name, variables[name], rows)
    return pairs
