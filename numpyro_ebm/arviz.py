"""From draws to ArviZ: the only door to it, the same for ArviZ 0.23 and 1.x."""

from collections.abc import Mapping
from typing import Any

import arviz
import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import MCMC

from numpyro_ebm._errors import EnergyError
from numpyro_ebm._typing import Array
from numpyro_ebm.sampling import Draws

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


def to_arviz(
    draws: MCMC | Draws | Mapping[str, Any],
    *,
    observed_data: Mapping[str, Any] | None = None,
    prior: Mapping[str, Any] | None = None,
    posterior_predictive: Mapping[str, Any] | None = None,
    dims: Mapping[str, list[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
) -> Any:
    """Draws and sampler statistics as ArviZ data: ``InferenceData`` (0.23) or ``DataTree`` (1.x).

    There is no ``log_likelihood`` group: the term of an energy site lacks log Z, and ``loo`` of it would be a number
    without meaning.

    Args:
        draws: a finished ``numpyro.infer.MCMC``, the result of `sample`, or a dict of arrays
            ``(num_chains, num_draws, ...)``.
        observed_data: by name, arrays without chain and draw.
        prior: by name, prior (predictive) draws ``(num_draws, ...)``.
        posterior_predictive: by name, draws ``(num_chains, num_draws, ...)`` or ``(num_chains * num_draws, ...)``.
        dims: by variable, names of the dimensions after chain and draw.
        coords: by dimension, its coordinates.

    Returns:
        Groups ``posterior`` and, where known, ``sample_stats`` (``acceptance_rate``, ``diverging``, ``energy``, ``lp``,
        ``n_steps``, ``nonfinite``, ``step_size``, ``swap_rate``, ``tree_depth``), ``observed_data``, ``prior``,
        ``posterior_predictive``.

    Raises:
        EnergyError: (a ValueError) for arrays that are not led by chains and draws, or an MCMC that has not run.
        TypeError: for anything else.

    Example:
        ``arviz.summary(to_arviz(mcmc))``
    """
    posterior, stats = _collect(draws)
    shape = _check_shapes(posterior)
    groups = {
        "posterior": posterior,
        "sample_stats": {STATISTICS[k]: v for k, v in stats.items() if k in STATISTICS},
        "posterior_predictive": {k: _by_chain(k, v, shape) for k, v in (posterior_predictive or {}).items()},
        "prior": {k: jnp.asarray(v)[None] for k, v in (prior or {}).items()},
        "observed_data": dict(observed_data or {}),
    }
    groups = {name: {k: _as_numpy(k, v) for k, v in group.items()} for name, group in groups.items() if group}
    return _build(groups, dict(dims or {}), dict(coords or {}))


def _collect(draws: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    if isinstance(draws, Draws):
        return dict(draws.samples), dict(draws.stats)
    if isinstance(draws, MCMC):
        if draws.last_state is None:
            raise EnergyError("This MCMC has no draws yet. Write mcmc.run(jax.random.key(0)) first.")
        return dict(draws.get_samples(group_by_chain=True)), dict(draws.get_extra_fields(group_by_chain=True))
    if isinstance(draws, Mapping):
        return dict(draws), {}
    raise TypeError(f"to_arviz needs an MCMC, the result of sample or a dict of arrays; got {type(draws).__name__}.")


def _check_shapes(posterior: dict[str, Any]) -> tuple[int, int]:
    """The (chains, draws) that all variables share."""
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


def _by_chain(name: str, value: Any, shape: tuple[int, int]) -> Array:
    value = jnp.asarray(value)
    if value.shape[:2] == shape:
        return value
    if value.shape[:1] != (shape[0] * shape[1],):
        raise EnergyError(f"posterior_predictive '{name}' leads with {value.shape[:2]}; the draws have {shape}.")
    return value.reshape((*shape, *value.shape[1:]))


def _as_numpy(name: str, value: Any) -> np.ndarray:
    """An array that netCDF can hold: half precision widened, random keys refused."""
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        raise EnergyError(f"'{name}' holds random keys, which are no data. Leave it out.")
    if jnp.asarray(value).dtype in (jnp.bfloat16, jnp.float16):
        value = jnp.asarray(value, jnp.float32)
    return np.asarray(value)


def _build(groups: dict[str, dict[str, np.ndarray]], dims: dict[str, Any], coords: dict[str, Any]) -> Any:
    # ArviZ 1 took InferenceData away, and answers a look for it with a warning.
    if arviz.__version__.startswith("0."):
        return arviz.from_dict(**groups, dims=dims, coords=coords)  # pyright: ignore
    return arviz.from_dict(groups, dims=dims, coords=coords)
