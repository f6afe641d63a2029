"""From draws to ArviZ: the only door to it, the same for ArviZ 0.23 and 1.x."""

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import xarray
from numpyro.infer import MCMC

from numpyro_ebm._errors import EnergyError, nearest
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


MAX_PANELS = 20


def draw_chains(
    kind: Literal["rank", "trace"], draws: Any, group: str, colors: list[str], dashes: list[Any], **choice: Any
) -> np.ndarray:
    """Rank or trace plots by whichever ArviZ there is; what `numpyro_ebm.plots` draws chains by.

    Args:
        kind: which.
        draws: what `to_arviz` takes or returns.
        group: the group to draw.
        colors: of the chains, in turn.
        dashes: line styles of the chains, in turn.
        **choice: ArviZ's ``var_names`` and ``coords``.

    Returns:
        The axes, ``(num_panels,)`` or for traces ``(num_panels, 2)``.

    Raises:
        EnergyError: for groups, variables or coordinates that are not there, and for more than 20 panels.
    """
    is_old = arviz.__version__.startswith("0.")
    data = draws if isinstance(draws, arviz.InferenceData if is_old else xarray.DataTree) else to_arviz(draws)
    _check_choice(data, group, **choice)
    with warnings.catch_warnings():
        # ArviZ 0.23 calls what matplotlib 3.11 is going to take away, and has no successor of its own line.
        warnings.filterwarnings("ignore", "Passing a dict or None as alias_mapping")
        axes = (_draw_by_0 if is_old else _draw_by_1)(kind, data, group, colors, dashes, choice)
    axes.flat[0].figure.set_layout_engine("constrained")
    return axes


def _check_choice(data: Any, group: str, var_names: Any, coords: Any) -> None:
    found = data.groups() if callable(data.groups) else data.groups
    names = [name.strip("/") for name in found]  # pyright: ignore[reportGeneralTypeIssues]
    if group not in names:
        raise EnergyError(f"There is no group '{group}'. {nearest(group, [name for name in names if name])}")
    known = data[group].data_vars
    for name in var_names or ():
        if name not in known:
            raise EnergyError(f"There is no variable '{name}'. {nearest(name, map(str, known))}")
    chosen = data[group].to_dataset() if hasattr(data[group], "to_dataset") else data[group]
    try:
        chosen = chosen[list(var_names or known)].sel(coords or {})
    except KeyError as error:
        sizes = dict(chosen.sizes)
        raise EnergyError(f"There are no coordinates {coords!r} in the group '{group}', which has {sizes}.") from error
    panels = sum(value.size // (value.sizes["chain"] * value.sizes["draw"]) for value in chosen.values())
    if panels > MAX_PANELS:
        raise EnergyError(
            f"{panels} panels are too many to read, {MAX_PANELS} the most. Write var_names=['x'] or coords="
            f"{{'x_dim_0': [0, 1]}} for some of the {dict(chosen.sizes)}."
        )


def _draw_by_0(kind: str, data: Any, group: str, colors: list[str], dashes: list[Any], choice: dict[str, Any]) -> np.ndarray:
    data = data if group == "posterior" else data[group]
    if kind == "rank":
        axes = np.atleast_1d(arviz.plot_rank(data, colors="#56B4E9", **choice)).reshape(-1)
        return np.array([ax for ax in axes if ax.has_data()])
    chain_prop = {"color": colors, "linestyle": dashes}
    return arviz.plot_trace(data, compact=False, chain_prop=chain_prop, legend=True, **choice)


def _draw_by_1(kind: str, data: Any, group: str, colors: list[str], dashes: list[Any], choice: dict[str, Any]) -> np.ndarray:
    options = {"aes": {"color": ["chain"], "linestyle": ["chain"]}, "color": colors, "linestyle": dashes}
    if kind == "rank":
        drawn = arviz.plot_rank(data, group=group, backend="matplotlib", **options, **choice)  # pyright: ignore
    else:
        drawn = arviz.plot_trace_dist(  # pyright: ignore
            data, group=group, compact=False, backend="matplotlib", visuals={"trace": {"width": 0.7}}, **options, **choice
        )
    drawn.add_legend("chain")
    axes = np.array([ax for ax in drawn.viz["figure"].item().axes if ax.has_data()])
    return axes.reshape(-1, 2) if kind == "trace" else axes
