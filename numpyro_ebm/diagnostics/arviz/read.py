"""Read draws of any source as arrays by name."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped
from numpyro.infer import MCMC

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.keys import is_key
from numpyro_ebm._core.typing import ArrayLike
from numpyro_ebm.sampling import Draws
from numpyro_ebm.training import FitResult

STATISTICS = {
    "accept_prob": "acceptance_rate",
    "acceptance_rate": "acceptance_rate",
    "diverging": "diverging",
    "is_divergent": "diverging",
    "num_steps": "n_steps",
    "num_gradients": "n_steps",
    "potential_energy": "lp",
    "energy": "energy",
    "step_size": "step_size",
    "tree_depth": "tree_depth",
    "is_nonfinite": "nonfinite",
    "swap_rate": "swap_rate",
    "inner_accept_prob": "inner_acceptance_rate",
    "inner_move": "inner_move",
}
"""ArviZ's names of the statistics, by the names that samplers give them."""


def collect(owner: str, draws: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return arrays and sampler statistics by name from an MCMC, `Draws` or a dict.

    Raises:
        EnergyError: for an MCMC that has not run.
        TypeError: for any other type.
    """
    if isinstance(draws, Draws):
        return dict(draws.samples), dict(draws.stats)
    if isinstance(draws, MCMC):
        if draws.last_state is None:
            raise EnergyError("This MCMC has no draws yet. Write mcmc.run(jax.random.key(0)) first.")
        fields = draws.get_extra_fields(group_by_chain=True)
        return dict(draws.get_samples(group_by_chain=True)), {k: v for k, v in fields.items() if v is not None}
    if isinstance(draws, Mapping):
        return dict(draws), {}
    raise TypeError(
        f"{owner} needs an MCMC, the result of sample or of fit, or a dict of arrays; got {type(draws).__name__}."
    )


def check_shapes(posterior: dict[str, Any]) -> tuple[int, int]:
    """Return the shape (chains, draws) that all variables share.

    Raises:
        EnergyError: for variables whose shapes do not begin with the same (chains, draws).
    """
    for name, value in posterior.items():
        if isinstance(value, Mapping):
            raise EnergyError(f"'{name}' is a dict; to_arviz needs one flat dict of arrays (chains, draws, ...).")
    shapes = {name: np.shape(value)[:2] for name, value in posterior.items()}
    distinct = set(shapes.values())
    if len(distinct) != 1 or len(next(iter(distinct))) != 2:
        raise EnergyError(
            f"All variables need shapes that begin with the same (chains, draws); got {shapes}. For one chain write x[None]."
        )
    return next(iter(distinct))  # pyright: ignore[reportReturnType]


def as_numpy(name: str, value: ArrayLike) -> np.ndarray:
    """Convert to an array that netCDF can store: half precision is widened, and random keys raise an EnergyError."""
    if is_key(value):
        raise EnergyError(f"'{name}' holds random keys, which are not data. Leave it out.")
    value = np.asarray(value)  # NumPy, because JAX would narrow float64
    return value.astype(np.float32) if value.dtype in (jnp.bfloat16, jnp.float16) else value


ByName: TypeAlias = dict[str, Shaped[np.ndarray, "chains draws ..."]]
"""Arrays by name, with chains and draws in front."""


class Recorded(NamedTuple):
    """Draws in the form that the diagnostics use.

    Attributes:
        variables: draws by variable, ``(chains, draws, ...)``.
        stats: sampler statistics by ArviZ's names, ``(chains, draws, ...)``.
        observed: data that came with the draws, by name.
        kernel: kernel that drew them, where it is known.
    """

    variables: ByName
    stats: ByName
    observed: dict[str, np.ndarray]
    kernel: Any = None


def read(owner: str, draws: object) -> Recorded:
    """Read draws in any form that `to_arviz` accepts or returns, or training chains.

    Args:
        owner: name of the calling function, for messages.
        draws: an MCMC, `Draws`, a dict of arrays, ``InferenceData``, a ``DataTree``, or the result of `fit` with its
            recorded chains.

    Raises:
        EnergyError: (a ValueError) for missing draws, or shapes that do not begin with chains and draws.
        TypeError: for any other type.
    """
    if isinstance(draws, FitResult):
        if draws.chains is None:
            raise EnergyError(f"{owner}: this result of fit has no chains. Write fit(..., record_chains=8).")
        return Recorded(draws.chains.samples, {}, {})
    if hasattr(draws, "groups"):  # ArviZ data of either version
        if "posterior" not in group_names(draws):
            raise EnergyError(f"{owner} needs a posterior group. Write to_arviz(draws).")
        return Recorded(*(arrays_of(draws, group) for group in ("posterior", "sample_stats", "observed_data")))
    posterior, stats = collect(owner, draws)
    check_shapes(posterior)
    kernel = getattr(draws, "kernel", None) if isinstance(draws, Draws) else getattr(draws, "sampler", None)
    variables = {name: as_numpy(name, value) for name, value in posterior.items()}
    known = {STATISTICS[name]: as_numpy(name, value) for name, value in stats.items() if name in STATISTICS}
    return Recorded(variables, known, {}, getattr(kernel, "kernel", kernel) if isinstance(draws, MCMC) else kernel)


def group_names(data: Any) -> set[str]:
    """Return the names of the groups of ArviZ data of either version."""
    names: Any = data.groups() if callable(data.groups) else data.groups
    return {name.strip("/") for name in names}


def arrays_of(data: Any, group: str) -> dict[str, np.ndarray]:
    """Return the variables of a group of ArviZ data as ``(chains, draws, ...)``; empty where the group is missing."""
    if group not in group_names(data):
        return {}
    arrays = {name: data[group][name] for name in data[group].data_vars}
    if group != "observed_data":
        arrays = {name: array.transpose("chain", "draw", ...) for name, array in arrays.items()}
    return {name: np.asarray(array.values) for name, array in arrays.items()}
