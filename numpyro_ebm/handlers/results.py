"""Read parameters and mutable state from a result, and check that none are missing."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from numpyro.infer.svi import SVIState

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.numpyro_stack import params_in
from numpyro_ebm.estimators.state import holds_state


@runtime_checkable
class Trained(Protocol):
    """The result of `fit` or ``svi.run``."""

    @property
    def params(self) -> Any:
        """Constrained parameters by name."""
        ...

    @property
    def state(self) -> Any:
        """The last `numpyro.infer.svi.SVIState`."""
        ...


Result = SVIState | Trained | Mapping[str, Any]


def mutable_state(state: Any) -> Mapping[str, Any]:
    """Return the mutable state by site; empty if there is none."""
    if isinstance(state, Trained):
        state = state.state
    if isinstance(state, SVIState):
        state = state.mutable_state
    return state or {}


def values_of(owner: str, state: object) -> dict[str, Any]:
    """Return the parameters that have a value, and the mutable state of layers, without that of estimators.

    Raises:
        EnergyError: for an SVI state, which holds unconstrained parameters.
        TypeError: for an object that does not hold values by name.
    """
    if isinstance(state, SVIState):
        raise EnergyError(
            f"An SVI state holds parameters in unconstrained form, on which the model cannot run. Pass to {owner} "
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
    """Refuse a run of the model in which parameters or latent sites had no given value.

    Raises:
        EnergyError: naming them.
    """
    params = [name for name in params_in(trace) if name not in given]
    if params:
        raise EnergyError(
            f"The parameters {params} have no value, so results would be those of their initial values. Pass the result of "
            "fit or svi.run, or svi.get_params(state)."
        )
    latents = [n for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"] and n not in given]
    if latents:
        raise EnergyError(
            f"The sites {latents} are latent, and the guide holds their values. Pass them with the parameters: "
            "params | guide.median(params) instead of the result, or result.log_partition(rng_key, "
            "params=guide.median(result.params))."
        )
