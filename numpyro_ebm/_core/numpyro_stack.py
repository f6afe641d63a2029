"""What is running the model (NUTS, an autoguide's set-up, an ELBO), read from NumPyro's handlers and the call stack."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from types import FrameType
from typing import Any, NamedTuple

import jax
from numpyro.distributions import Delta, Distribution
from numpyro.handlers import condition, mask, replay, scale, scope, substitute, trace
from numpyro.infer import SVI, TraceMeanField_ELBO
from numpyro.infer.autoguide import (
    AutoDAIS,
    AutoGuide,
    AutoLaplaceApproximation,
    AutoSemiDAIS,
    AutoSurrogateLikelihoodDAIS,
)
from numpyro.infer.elbo import ELBO, Trace_ELBO
from numpyro.infer.gibbs import GIBBS_SITES_KWARG, CustomGibbs, Gibbs
from numpyro.infer.mcmc import MCMCKernel
from numpyro.infer.util import _substitute_default_key, _unconstrain_params
from numpyro.primitives import _PYRO_STACK, Messenger, plate

from numpyro_ebm._core.errors import EnergyError


class Scoring(NamedTuple):
    """A model whose log density NumPyro is computing, as wrapped by NumPyro, and its arguments."""

    model: Any
    args: tuple
    kwargs: dict[str, Any]


_SCORING = {
    ("numpyro.infer.util", "compute_log_probs"): ("model", "model_args", "model_kwargs"),
    ("numpyro.infer.util", "get_importance_trace"): ("guide model", "args", "kwargs"),
    ("numpyro.infer.elbo", "get_importance_trace_enum"): ("guide model", "args", "kwargs"),
    ("numpyro.infer.elbo", "single_particle_elbo"): ("subs_guide subs_model", "args", "kwargs"),
    ("numpyro.contrib.funsor.infer_util", "_enum_log_density"): ("model", "model_args", "model_kwargs"),
}
"""NumPyro's functions that sum a model's log density, with their variable names for the model and its arguments."""

SAMPLER = "NUTS or HMC"
_POSTERIOR_GUIDES = (AutoLaplaceApproximation, AutoSurrogateLikelihoodDAIS, AutoDAIS, AutoSemiDAIS)
POSTERIOR_GUIDES = tuple(guide.__name__ for guide in _POSTERIOR_GUIDES)
"""Guides whose width comes from the Hessian or from sampler steps instead of from the bound that they maximise."""
NO_VALUE = (
    "The energy site '{name}' is not observed, and the guide has no value for it, so there is nothing to estimate from. "
    "Pass its data: numpyro.sample('{name}', ..., obs=x), or give the guide a site '{name}'. To draw hidden members of a "
    "joint event given the others write estimate(model, 'pcd', positive_phase=numpyro_ebm.PositivePhase()); to draw from "
    "the model, use it without estimate."
)
LINEAR_IN_VALUE = ("TraceGraph_ELBO", "TraceEnum_ELBO")
"""Objectives that are linear in the value of a log density, so that noise of mean 0 in it is harmless."""

_unguarded: ContextVar[bool] = ContextVar("unguarded", default=False)


@contextmanager
def unguarded() -> Iterator[None]:
    """Evaluate log densities of energies without the guard, for callers that know that log Z is missing."""
    token = _unguarded.set(True)
    try:
        yield
    finally:
        _unguarded.reset(token)


def is_unguarded() -> bool:
    """Return whether `unguarded` is active."""
    return _unguarded.get()


def sums_out(model_trace: Mapping[str, Any], sites: Iterable[str]) -> bool:
    """Return whether NumPyro can sum over these discrete sites: it needs funsor, and values that can be listed."""
    return find_spec("funsor") is not None and all(model_trace[name]["fn"].has_enumerate_support for name in sites)


_depth: ContextVar[int] = ContextVar("depth", default=0)


@contextmanager
def one_deeper() -> Iterator[str]:
    """Enter the evaluation of an energy, and yield its nesting depth as a label."""
    token = _depth.set(_depth.get() + 1)
    try:
        yield str(_depth.get())
    finally:
        _depth.reset(token)


def scorings() -> Iterator[Scoring]:
    """Yield the models that NumPyro is scoring, innermost first."""
    for frame in _frames():
        names = _SCORING.get((frame.f_globals.get("__name__", ""), frame.f_code.co_name))
        if names is None:
            continue
        values, (models, args, kwargs) = frame.f_locals, names
        for model in (values.get(name) for name in models.split()):
            if isinstance(model, substitute):  # otherwise NumPyro has not reached that model yet
                yield Scoring(model, values[args], values[kwargs])


def gibbs_sites(scoring: Scoring) -> set[str]:
    """Return the latents that one of NumPyro's Gibbs kernels holds fixed in this model and updates in turn.

    Latents that a user's function updates (`CustomGibbs`) are left out.
    """
    sites = set(scoring.kwargs.get(GIBBS_SITES_KWARG, ()))
    for _, owner in _callers() if sites else ():
        if isinstance(owner, Gibbs):
            for kernel, own in zip(owner._kernels, owner._sites, strict=False):
                sites -= set(own) if isinstance(kernel, CustomGibbs) else set()
    return sites


def model_given(model: Callable | None) -> Any:
    """Return the model that a kernel was given, without NumPyro's wrappers for the potential; None outside of kernels."""
    while model is not None:
        if isinstance(model, _substitute_default_key):
            return getattr(model.fn, "fn", None)
        model = getattr(model, "fn", None)
    return None


def is_training() -> bool:
    """Return whether the model's parameters are being trained, as in an ELBO."""
    return any(isinstance(owner, ELBO) or type(owner).__name__ == "SteinLoss" for _, owner in _callers())


def is_mcmc() -> bool:
    """Return whether an MCMC kernel, NumPyro's or this library's, is running."""
    return any(isinstance(owner, MCMCKernel) for _, owner in _callers())


def guide_being_built() -> str | None:
    """Return the name of the autoguide that is tracing the model before training; None if there is none."""
    return next((type(owner).__name__ for frame, owner in _owners() if _is_prototype(frame)), None)


def user_of_value() -> str | None:
    """Return the name of what uses the value of a model's log density, or its Hessian, and not only the gradient.

    An autoguide that evaluates a potential once, to find finite initial values, does not count.
    """
    for frame, owner in _owners():
        loss = owner.loss if isinstance(owner, SVI) else owner
        if isinstance(loss, ELBO) and not isinstance(loss, Trace_ELBO | TraceMeanField_ELBO):
            return type(loss).__name__
        is_own_model = _is_prototype(frame) and isinstance(owner, AutoSurrogateLikelihoodDAIS)
        if isinstance(owner, _POSTERIOR_GUIDES) and not is_own_model:
            return next(guide.__name__ for guide in _POSTERIOR_GUIDES if isinstance(owner, guide))
        if _is_prototype(frame):
            return None
    return SAMPLER if any(isinstance(handler, _unconstrain_params) for handler in _PYRO_STACK) else None


def guide_has_width(handler: Messenger, energies: Iterable[str]) -> bool:
    """Return whether an ELBO is running with a guide that is wider than a point mass for latents other than energies.

    Args:
        handler: the calling handler.
        energies: names of the latent energy sites, as the handler sees them.
    """
    level = _PYRO_STACK.index(handler)
    for i, each in enumerate(_PYRO_STACK[:level]):
        if isinstance(each, replay) and is_training():
            prefix = scope_prefix(_PYRO_STACK[i + 1 : level])
            sites = {n: s for n, s in each.trace.items() if s["type"] == "sample" and not s["is_observed"]}
            is_wide = any(not isinstance(_inner(site["fn"]), Delta) for site in sites.values())
            own = {name for name, site in sites.items() if not site["infer"].get("is_auxiliary")}
            if is_wide and own - {prefix + name for name in energies}:
                return True
    return False


def _inner(fn: Any) -> Any:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def params_in(trace: Mapping[str, Any]) -> list[str]:
    """Return the names of the parameters in a run of a model that hold numbers.

    That of a NumPyro network whose parameters all have priors holds their shapes only.
    """
    return [name for name, site in trace.items() if site["type"] == "param" and jax.tree.leaves(site["value"])]


def declared_params() -> set[str]:
    """Return the names of the parameters that the running model has declared so far, if it is being traced."""
    traces = [handler.trace for handler in _PYRO_STACK if isinstance(handler, trace)]
    return {name for each in traces for name, msg in each.items() if msg["type"] == "param"}


def check_carries_state(estimator: str) -> None:
    """Check that the ELBO keeps the state of a persistent estimator.

    Raises:
        EnergyError: with the ELBO to write instead.
    """
    for name, owner in _callers():
        if isinstance(owner, ELBO) and owner.num_particles > 1:
            raise EnergyError(
                f"The estimator '{estimator}' carries chains from update to update, and NumPyro drops them when "
                f"num_particles={owner.num_particles} > 1. Write {type(owner).__name__}(num_particles=1); for less noise "
                "take a larger batch or num_chains."
            )
        if name == "init" and isinstance(owner, SVI) and not isinstance(owner.loss, Trace_ELBO | TraceMeanField_ELBO):
            raise EnergyError(
                f"The estimator '{estimator}' carries chains from update to update; {type(owner.loss).__name__} carries "
                "no mutable state. Write SVI(..., loss=Trace_ELBO())."
            )


def scope_prefix(handlers: Iterable[Messenger], kind: str = "sample") -> str:
    """Return the prefix that the scopes among handlers, outermost first, give to the name of a site of this kind."""
    scopes = [each for each in handlers if isinstance(each, scope) and kind not in each.hide_types]
    return "".join(f"{each.prefix}{each.divider}" for each in scopes)


def name_at(handler: Messenger, message: Mapping[str, Any]) -> str:
    """Return the name that a message had at a handler, before the scopes outside of the handler added their prefixes."""
    around = _PYRO_STACK[: _PYRO_STACK.index(handler)]
    return message["name"].removeprefix(scope_prefix(around, message["type"]))


def name_in_model(name: str) -> str:
    """Return the name that a site has in the whole model, with the prefixes of all scopes that are active."""
    return scope_prefix(_PYRO_STACK) + name


@contextmanager
def outside_scopes(handler: Messenger) -> Iterator[None]:
    """Suspend the scopes inside a handler: the names that it takes from messages already have their prefixes."""
    with _suspended(handler, inside=(scope,)):
        yield


@contextmanager
def outside_rows(handler: Messenger) -> Iterator[None]:
    """Suspend all plates, and masks and scales inside a handler: what is sampled has no rows and counts once."""
    with _suspended(handler, inside=(mask, scale), anywhere=(plate,)):
        yield


@contextmanager
def _suspended(handler: Messenger, inside: tuple[type, ...], anywhere: tuple[type, ...] = ()) -> Iterator[None]:
    stack = list(_PYRO_STACK)
    level = stack.index(handler) if handler in stack else len(stack)
    suspended = lambda i, each: isinstance(each, anywhere) or (i > level and isinstance(each, inside))  # noqa: E731
    _PYRO_STACK[:] = [each for i, each in enumerate(stack) if not suspended(i, each)]
    try:
        yield
    finally:
        _PYRO_STACK[:] = stack


def is_given(name: str, handler: Messenger | None = None) -> bool:
    """Return whether a handler around the model gives a latent site a value: a guide, or a substituted value.

    Args:
        name: name of the site, as the handler sees it.
        handler: the calling handler; None outside of handlers.
    """
    return any(_has_value(each, own) for each, own in _around(name, handler))


def check_latent(name: str, handler: Messenger) -> None:
    """Check that a latent energy has a value under a guide and that no ELBO weights by the value of its log density.

    Args:
        name: name of the site, as the handler sees it.
        handler: the calling handler.

    Raises:
        EnergyError: with what to write.
    """
    level = _PYRO_STACK.index(handler)
    inside = [
        (each, name.removeprefix(scope_prefix(_PYRO_STACK[level:i]))) for i, each in enumerate(_PYRO_STACK) if i > level
    ]
    handlers = _around(name, handler) + inside
    replayed = [own in each.trace for each, own in handlers if isinstance(each, replay)]
    if replayed and not any(_has_value(each, own) for each, own in handlers):
        if name.endswith("_unobserved"):
            raise EnergyError(
                f"The energy site '{name}' holds the rows that obs_mask excludes, as latents, and the guide has no value "
                "for it. To exclude missing rows write: with numpyro.handlers.mask(mask=obs_mask): "
                f"numpyro.sample(..., obs=x), without obs_mask. To impute them give the guide a site '{name}', e.g. "
                "AutoNormal(estimate(model, ...))."
            )
        raise EnergyError(NO_VALUE.format(name=name))
    for _, owner in _callers():
        loss = owner.loss if isinstance(owner, SVI) else owner
        if isinstance(loss, ELBO) and not isinstance(loss, Trace_ELBO | TraceMeanField_ELBO):
            raise EnergyError(
                f"The energy site '{name}' is latent. {type(loss).__name__} weights draws by the value of its log density, "
                "and an estimator provides only the gradient. Write SVI(..., loss=Trace_ELBO())."
            )


def _around(name: str, handler: Messenger | None) -> list[tuple[Messenger, str]]:
    """Return the handlers around another one (all of them for None), each with the name that a site has there."""
    level = len(_PYRO_STACK) if handler is None else _PYRO_STACK.index(handler)
    return [(each, scope_prefix(_PYRO_STACK[i + 1 : level]) + name) for i, each in enumerate(_PYRO_STACK[:level])]


def _has_value(handler: Messenger, name: str) -> bool:
    if isinstance(handler, replay):
        return name in handler.trace
    if isinstance(handler, condition):
        return handler.condition_fn is not None or name in (handler.data or {})
    return isinstance(handler, substitute) and (handler.substitute_fn is not None or name in (handler.data or {}))


def plates_shape() -> tuple[int, ...]:
    """Return the shape of the enclosing plates, with 1 for a dimension without a plate."""
    plates = [handler for handler in _PYRO_STACK if isinstance(handler, plate)]
    shape = [1] * max((-each.dim for each in plates), default=0)
    for each in plates:
        shape[each.dim] = each.subsample_size
    return tuple(shape)


def is_in_model() -> bool:
    """Return whether a handler of NumPyro is running a model."""
    return bool(_PYRO_STACK)


def rows_of_plates() -> int:
    """Return the number of rows of the enclosing plates, all rows of those that subsample; 1 without a plate."""
    return math.prod(each.size for each in _PYRO_STACK if isinstance(each, plate))


def site_being_scored() -> str | None:
    """Return the name of the site whose log probability NumPyro is computing, for messages; None if there is none."""
    site = _site_being_scored()
    return None if site is None else site["name"]


@contextmanager
def at_scored_site() -> Iterator[None]:
    """Add the name of the site whose log probability NumPyro is computing to an `EnergyError` raised inside."""
    try:
        yield
    except EnergyError as error:  # only now: the search for the site walks through the whole call stack
        error.site = error.site or site_being_scored()
        raise


def is_scored_whole(distribution: Distribution) -> bool:
    """Return whether NumPyro is computing the log probability of a site whose distribution this is, not a component."""
    site = _site_being_scored()
    return site is not None and isinstance(_inner(site["fn"]), type(distribution))


def _site_being_scored() -> Any:
    for frame in _frames():
        site = _local(frame, "site")
        if isinstance(site, dict) and site.get("type") == "sample":
            return site
    return None


def _callers() -> Iterator[tuple[str, Any]]:
    """Yield name and ``self`` of every running function, innermost first."""
    for frame, owner in _owners():
        yield frame.f_code.co_name, owner


def _owners() -> Iterator[tuple[FrameType, Any]]:
    """Yield frame and ``self`` of every running function, innermost first."""
    for frame in _frames():
        yield frame, _local(frame, "self")


def _frames() -> Iterator[FrameType]:
    """Yield the frame of every running function, innermost first."""
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def _local(frame: FrameType, name: str) -> Any:
    """Return a local variable of a running function by name, or None, without the cost of reading all others."""
    code = frame.f_code
    return frame.f_locals.get(name) if name in code.co_varnames + code.co_freevars + code.co_cellvars else None


def _is_prototype(frame: FrameType) -> bool:
    return frame.f_code is AutoGuide._setup_prototype.__code__
