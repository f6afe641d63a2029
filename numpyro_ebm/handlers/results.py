"""What reports and standard errors take of a result: parameters, mutable state, and what is missing."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from numpyro.infer.svi import SVIState

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm.estimators.state import holds_state


@runtime_checkable
class Trained(Protocol):
    """The result of a training: of `fit`, or of ``svi.run``.

    Attributes:
        params: constrained parameters by name.
        state: the last `numpyro.infer.svi.SVIState`.
    """

    params: Any
    state: Any


Result = SVIState | Trained | Mapping[str, Any]


def mutable_state(state: Any) -> Mapping[str, Any]:
    """Mutable state by site; empty where there is none."""
    if isinstance(state, Trained):
        state = state.state
    if isinstance(state, SVIState):
        state = state.mutable_state
    return state or {}


def values_of(owner: str, state: Any) -> dict[str, Any]:
    """Parameters that have a value, and mutable state of layers without that of estimators.

    Raises:
        EnergyError: for a state of SVI, which holds parameters in another form.
        TypeError: for what holds no values by name.
    """
    if isinstance(state, SVIState):
        raise EnergyError(
            f"A state of SVI alone holds parameters in unconstrained form, and the model cannot run on it. Pass to {owner} "
            "the result of fit or of svi.run, or svi.get_params(state)."
        )
    if not isinstance(state, Trained | Mapping):
        raise TypeError(
            f"{owner} needs parameters by name: a dict, or the result of fit or of svi.run; got {type(state).__name__}."
        )
    is_result = isinstance(state, Trained)
    values = {**state.params, **mutable_state(state)} if is_result else dict(state)
    return {name: value for name, value in values.items() if value is not None and not holds_state(name, value)}


def check_values_given(trace: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse a run of the model in which parameters or latent sites had to start anew.

    Raises:
        EnergyError: naming them.
    """
    params = [name for name, site in trace.items() if site["type"] == "param" and name not in given]
    if params:
        raise EnergyError(
            f"The parameters {params} have no value, and figures would be those of their initial ones. Pass the result of "
            "fit or svi.run, or svi.get_params(state)."
        )
    latents = [n for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"] and n not in given]
    if latents:
        raise EnergyError(
            f"The sites {latents} are latent, and their values are the guide's. Pass them beside the parameters: "
            "params | guide.median(params) in the place of the result."
        )
