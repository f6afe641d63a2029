"""Who is running the model: NUTS, an autoguide's set-up, an ELBO. NumPyro says it on its stacks only."""

import inspect
from collections.abc import Iterator
from typing import Any

from numpyro.infer import SVI, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.elbo import ELBO, Trace_ELBO
from numpyro.infer.util import _unconstrain_params
from numpyro.primitives import _PYRO_STACK

from numpyro_ebm._errors import EnergyError


def is_potential() -> bool:
    """Whether the model is evaluated as a potential energy, as the HMC family does.

    An autoguide evaluates it once as well, to find finite initial values; that is not sampling.
    """
    if not any(isinstance(handler, _unconstrain_params) for handler in _PYRO_STACK):
        return False
    return not any(name == "_setup_prototype" and isinstance(owner, AutoGuide) for name, owner in _callers())


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
