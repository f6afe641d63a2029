"""Draws of any source as arrays by name."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import MCMC

from numpyro_ebm._core.errors import EnergyError
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
}
"""The names of statistics here, and ArviZ's."""


def collect(owner: str, draws: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and sampler statistics by name, of whatever holds draws.

    Raises:
        EnergyError: for an MCMC that has not run.
        TypeError: for anything else.
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
    """The (chains, draws) that all variables share.

    Raises:
        EnergyError: where they do not share one, or a variable has none.
    """
    for name, value in posterior.items():
        if isinstance(value, Mapping):
            raise EnergyError(f"'{name}' is a dict; to_arviz needs one flat dict of arrays (chains, draws, ...).")
    shapes = {name: np.shape(value)[:2] for name, value in posterior.items()}
    distinct = set(shapes.values())
    if len(distinct) != 1 or len(next(iter(distinct))) != 2:
        raise EnergyError(
            f"Every variable leads with the same (chains, draws); got {shapes}. For a single chain write x[None]."
        )
    return next(iter(distinct))  # pyright: ignore[reportReturnType]


def as_numpy(name: str, value: Any) -> np.ndarray:
    """An array that netCDF can hold: half precision widened, random keys refused."""
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        raise EnergyError(f"'{name}' holds random keys, which are no data. Leave it out.")
    value = np.asarray(value)  # not by JAX, which would narrow float64
    return value.astype(np.float32) if value.dtype in (jnp.bfloat16, jnp.float16) else value


class Recorded(NamedTuple):
    """Draws as diagnostics read them, whatever they came as.

    Attributes:
        variables: by name, ``(chains, draws, ...)``.
        stats: by ArviZ's names, ``(chains, draws, ...)``.
        observed: by name, data that came with the draws.
        kernel: what drew them, where it is known.
    """

    variables: dict[str, np.ndarray]
    stats: dict[str, np.ndarray]
    observed: dict[str, np.ndarray]
    kernel: Any = None


def read(owner: str, draws: Any) -> Recorded:
    """Take what `to_arviz` takes, what it gives, or training chains.

    Args:
        owner: who asks, for messages.
        draws: an MCMC, `Draws`, a dict of arrays, ``InferenceData``, a ``DataTree``, or the result of `fit` with its
            recorded chains.

    Raises:
        EnergyError: (a ValueError) for draws that are not there, or not led by chains and draws.
        TypeError: for anything else.
    """
    if isinstance(draws, FitResult):
        if draws.chains is None:
            raise EnergyError(f"{owner}: this result of fit has no chains. Write fit(..., record_chains=8).")
        return Recorded(draws.chains.samples, {}, {})
    if hasattr(draws, "groups"):  # ArviZ's, of either kind
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
    """Names of the groups of ArviZ data of either version."""
    names: Any = data.groups() if callable(data.groups) else data.groups
    return {name.strip("/") for name in names}


def arrays_of(data: Any, group: str) -> dict[str, np.ndarray]:
    """The variables of a group of ArviZ data, led by chains and draws; empty where there is no such group."""
    if group not in group_names(data):
        return {}
    arrays = {name: data[group][name] for name in data[group].data_vars}
    if group != "observed_data":
        arrays = {name: array.transpose("chain", "draw", ...) for name, array in arrays.items()}
    return {name: np.asarray(array.values) for name, array in arrays.items()}
