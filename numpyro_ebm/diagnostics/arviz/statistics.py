"""ArviZ's R-hat and effective sample size, by coordinate."""

import numpy as np
from jaxtyping import Float, Shaped


def rank_rhat(values: Shaped[np.ndarray, "chains draws *event"]) -> Float[np.ndarray, "*event"]:
    """Return rank-normalised split R-hat of ``(chains, draws, ...)`` by coordinate; NaN for one chain or constant values."""
    return _of_coordinates("rhat", values, "rank")


def effective_size(values: Shaped[np.ndarray, "chains draws *event"], method: str = "bulk") -> Float[np.ndarray, "*event"]:
    """Return the effective sample size of ``(chains, draws, ...)`` by coordinate."""
    return _of_coordinates("ess", values, method)


def _of_coordinates(
    function: str, values: Shaped[np.ndarray, "chains draws *event"], method: str
) -> Float[np.ndarray, "*event"]:
    import arviz
    import xarray

    values = np.asarray(values, float)
    flat = values.reshape((*values.shape[:2], -1))
    dataset = xarray.Dataset({"values": (("chain", "draw", "coordinate"), flat)})
    with np.errstate(all="ignore"):
        return np.asarray(getattr(arviz, function)(dataset, method=method)["values"].values).reshape(values.shape[2:])
