"""Who is running the model: NUTS, an autoguide's set-up, an ELBO. NumPyro says it on its stacks only."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from numpyro.handlers import replay, scope, substitute, trace
from numpyro.infer import SVI, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.elbo import ELBO, Trace_ELBO
from numpyro.infer.util import _unconstrain_params
from numpyro.primitives import _PYRO_STACK, Messenger, plate

from numpyro_ebm._errors import EnergyError


def is_potential() -> bool:
    """Whether the model is evaluated as a potential energy, as the HMC family does.

    An autoguide evaluates it once as well, to find finite initial values; that is not sampling.
    """
    if not any(isinstance(handler, _unconstrain_params) for handler in _PYRO_STACK):
        return False
    return not any(name == "_setup_prototype" and isinstance(owner, AutoGuide) for name, owner in _callers())


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
    frame = inspect.currentframe()
    while frame is not None:
        site = frame.f_locals.get("site")
        if isinstance(site, dict) and site.get("type") == "sample":
            return site["name"]
        frame = frame.f_back
    return None


def _callers() -> Iterator[tuple[str, Any]]:
    """Name and ``self`` of every function being run, innermost first."""
    frame = inspect.currentframe()
    while frame is not None:
        yield frame.f_code.co_name, frame.f_locals.get("self")
        frame = frame.f_back
