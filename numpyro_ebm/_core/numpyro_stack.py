"""Who is running the model: NUTS, an autoguide's set-up, an ELBO. NumPyro says it on its stacks only."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any, NamedTuple

from numpyro.distributions import Delta
from numpyro.handlers import replay, scope, substitute, trace
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
    """A model whose log density NumPyro is computing, as it runs it, and its arguments."""

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
"""Functions of NumPyro that sum a model's log density, and what they call the model and its arguments."""

SAMPLER = "NUTS or HMC"
_POSTERIOR_GUIDES = (AutoLaplaceApproximation, AutoSurrogateLikelihoodDAIS, AutoDAIS, AutoSemiDAIS)
POSTERIOR_GUIDES = tuple(guide.__name__ for guide in _POSTERIOR_GUIDES)
"""Guides whose width comes from the Hessian, or from steps of a sampler, in the place of the bound that they maximise."""
LINEAR_IN_VALUE = ("TraceGraph_ELBO", "TraceEnum_ELBO")
"""Objectives that take the value of a log density times a weight, so that noise of mean 0 in it does no harm."""

_unguarded: ContextVar[bool] = ContextVar("unguarded", default=False)


@contextmanager
def unguarded() -> Iterator[None]:
    """Log densities of energies are taken as they are: who asks knows that they lack log Z."""
    token = _unguarded.set(True)
    try:
        yield
    finally:
        _unguarded.reset(token)


def is_unguarded() -> bool:
    """Whether `unguarded` is around."""
    return _unguarded.get()


_depth: ContextVar[int] = ContextVar("depth", default=0)


@contextmanager
def one_deeper() -> Iterator[str]:
    """How many energies the one that is being evaluated stands in, as a label."""
    token = _depth.set(_depth.get() + 1)
    try:
        yield str(_depth.get())
    finally:
        _depth.reset(token)


def scorings() -> Iterator[Scoring]:
    """The models that NumPyro is scoring, innermost first."""
    for frame in _frames():
        names = _SCORING.get((frame.f_globals.get("__name__", ""), frame.f_code.co_name))
        if names is None:
            continue
        values, (models, args, kwargs) = frame.f_locals, names
        for model in (values.get(name) for name in models.split()):
            if isinstance(model, substitute):  # else it has not come to that model yet
                yield Scoring(model, values[args], values[kwargs])


def gibbs_sites(scoring: Scoring) -> set[str]:
    """Latents that a Gibbs scheme of NumPyro's holds fixed in this model while others move, and moves itself in turn.

    Those that a function of the user's moves are left to it.
    """
    sites = set(scoring.kwargs.get(GIBBS_SITES_KWARG, ()))
    for _, owner in _callers() if sites else ():
        if isinstance(owner, Gibbs):
            for kernel, own in zip(owner._kernels, owner._sites, strict=False):
                sites -= set(own) if isinstance(kernel, CustomGibbs) else set()
    return sites


def model_given(model: Any) -> Any:
    """The model that a kernel was given, inside what NumPyro makes of it for its potential; None outside of kernels."""
    while model is not None:
        if isinstance(model, _substitute_default_key):
            return getattr(model.fn, "fn", None)
        model = getattr(model, "fn", None)
    return None


def is_training() -> bool:
    """Whether the model's parameters move, as in an ELBO."""
    return any(isinstance(owner, ELBO) or type(owner).__name__ == "SteinLoss" for _, owner in _callers())


def is_mcmc() -> bool:
    """Whether a kernel of NumPyro's or ours is being run."""
    return any(isinstance(owner, MCMCKernel) for _, owner in _callers())


def guide_being_built() -> str | None:
    """Name of the autoguide that looks at the model before training, if one does."""
    return next((type(owner).__name__ for frame, owner in _owners() if _is_prototype(frame)), None)


def user_of_value() -> str | None:
    """What takes the value of a model's log density, or its Hessian, for more than something to follow the gradient of.

    An autoguide evaluates a potential once to find finite initial values; of itself that is none.
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
    """Whether an ELBO is being computed with a guide that gives latents other than energies more than a point mass.

    Args:
        handler: which asks.
        energies: names of latent energy sites, as the handler sees them.
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


def declared_params() -> set[str]:
    """Names of the parameters that the model being run has declared so far, where something traces it."""
    traces = [handler.trace for handler in _PYRO_STACK if isinstance(handler, trace)]
    return {name for each in traces for name, msg in each.items() if msg["type"] == "param"}


def check_carries_state(estimator: str) -> None:
    """Refuse an ELBO that would lose the state of a persistent estimator.

    Raises:
        EnergyError: with the ELBO to write instead.
    """
    for name, owner in _callers():
        if isinstance(owner, ELBO) and owner.num_particles > 1:
            raise EnergyError(
                f"The estimator '{estimator}' carries chains from update to update, and NumPyro drops them when "
                f"num_particles={owner.num_particles} > 1. Write {type(owner).__name__}(num_particles=1), and a larger "
                "batch or num_chains for less noise."
            )
        if name == "init" and isinstance(owner, SVI) and not isinstance(owner.loss, Trace_ELBO | TraceMeanField_ELBO):
            raise EnergyError(
                f"The estimator '{estimator}' carries chains from update to update; {type(owner.loss).__name__} carries "
                "no mutable state. Write SVI(..., loss=Trace_ELBO())."
            )


def scope_prefix(handlers: Iterable[Any], kind: str = "sample") -> str:
    """What the scopes among handlers, outermost first, put in front of the name of a site of this kind."""
    scopes = [each for each in handlers if isinstance(each, scope) and kind not in each.hide_types]
    return "".join(f"{each.prefix}{each.divider}" for each in scopes)


def name_at(handler: Messenger, message: Any) -> str:
    """The name that a message had when it passed a handler, before the scopes around gave it theirs."""
    around = _PYRO_STACK[: _PYRO_STACK.index(handler)]
    return message["name"].removeprefix(scope_prefix(around, message["type"]))


@contextmanager
def outside_scopes(handler: Messenger) -> Iterator[None]:
    """Without the scopes inside a handler: the names that it takes from messages have their prefixes already."""
    stack = list(_PYRO_STACK)
    level = stack.index(handler) if handler in stack else len(stack)
    _PYRO_STACK[:] = [each for i, each in enumerate(stack) if i <= level or not isinstance(each, scope)]
    try:
        yield
    finally:
        _PYRO_STACK[:] = stack


def check_latent(name: str, handler: Messenger) -> None:
    """Refuse a latent energy without a value under a guide, and an ELBO that weighs by the value of its log density.

    Args:
        name: the site's, as the handler sees it.
        handler: which asks.

    Raises:
        EnergyError: with what to write.
    """
    level = _PYRO_STACK.index(handler)
    outside = [(each, scope_prefix(_PYRO_STACK[i + 1 : level]) + name) for i, each in enumerate(_PYRO_STACK[:level])]
    inside = [
        (each, name.removeprefix(scope_prefix(_PYRO_STACK[level:i]))) for i, each in enumerate(_PYRO_STACK) if i > level
    ]
    replayed = [own in each.trace for each, own in outside + inside if isinstance(each, replay)]
    if replayed and not any(replayed) and not any(_has_value(each, own) for each, own in outside + inside):
        if name.endswith("_unobserved"):
            raise EnergyError(
                f"The energy site '{name}' holds the rows that obs_mask leaves out, as latent ones, and the guide has no "
                "value for it. To leave missing rows out write: with numpyro.handlers.mask(mask=obs_mask): "
                f"numpyro.sample(..., obs=x), without obs_mask. To impute them give the guide a site '{name}', e.g. "
                "AutoNormal(estimate(model, ...))."
            )
        raise EnergyError(
            f"The energy site '{name}' is not observed, and the guide has no value for it, so there is nothing to estimate "
            f"from. Pass its data: numpyro.sample('{name}', ..., obs=x), or give the guide a site '{name}'; to draw from "
            "it, use the model without estimate."
        )
    for _, owner in _callers():
        loss = owner.loss if isinstance(owner, SVI) else owner
        if isinstance(loss, ELBO) and not isinstance(loss, Trace_ELBO | TraceMeanField_ELBO):
            raise EnergyError(
                f"The energy site '{name}' is latent. {type(loss).__name__} weighs draws by the value of its log density, "
                "and an estimator knows the gradient only. Write SVI(..., loss=Trace_ELBO())."
            )


def _has_value(handler: Any, name: str) -> bool:
    return isinstance(handler, substitute) and (handler.substitute_fn is not None or name in (handler.data or {}))


def plates_shape() -> tuple[int, ...]:
    """The shape of the plates around; 1 for a dimension that no plate has."""
    plates = [handler for handler in _PYRO_STACK if isinstance(handler, plate)]
    shape = [1] * max((-each.dim for each in plates), default=0)
    for each in plates:
        shape[each.dim] = each.subsample_size
    return tuple(shape)


def site_being_scored() -> str | None:
    """Name of the site whose log probability NumPyro is computing, for messages; None outside of that."""
    site = _site_being_scored()
    return None if site is None else site["name"]


def is_part_of_site(distribution: Any) -> bool:
    """Whether the site whose log probability NumPyro is computing is made of several distributions, this one among them."""
    site = _site_being_scored()
    inner = None if site is None else _inner(site["fn"])
    return inner is not None and not isinstance(inner, type(distribution))


def _site_being_scored() -> Any:
    for frame in _frames():
        site = _local(frame, "site")
        if isinstance(site, dict) and site.get("type") == "sample":
            return site
    return None


def _callers() -> Iterator[tuple[str, Any]]:
    """Name and ``self`` of every function being run, innermost first."""
    for frame, owner in _owners():
        yield frame.f_code.co_name, owner


def _owners() -> Iterator[tuple[FrameType, Any]]:
    """The frame and ``self`` of every function being run, innermost first."""
    for frame in _frames():
        yield frame, _local(frame, "self")


def _frames() -> Iterator[FrameType]:
    """The frame of every function being run, innermost first."""
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def _local(frame: FrameType, name: str) -> Any:
    """A local of a function being run; None where it has none of that name, without the cost of looking at the others."""
    code = frame.f_code
    return frame.f_locals.get(name) if name in code.co_varnames + code.co_freevars + code.co_cellvars else None


def _is_prototype(frame: FrameType) -> bool:
    return frame.f_code is AutoGuide._setup_prototype.__code__
