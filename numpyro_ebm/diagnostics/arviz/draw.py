"""ArviZ's rank and trace plots, the same under ArviZ 0.23 and 1.x."""

import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
from numpyro.infer import MCMC

from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm.diagnostics.arviz.convert import to_arviz
from numpyro_ebm.diagnostics.arviz.read import group_names
from numpyro_ebm.sampling import Draws
from numpyro_ebm.training import FitResult

MAX_PANELS = 20
"""Most panels of one figure; more are too small to read."""


class Cycles(NamedTuple):
    """How chains look, in turn: their colours and their line styles."""

    colors: list[str]
    dashes: list[Any]


def draw_chains(
    kind: Literal["rank", "trace"],
    draws: MCMC | Draws | FitResult | Mapping[str, Any],
    group: str,
    cycles: Cycles,
    **choice: Any,
) -> np.ndarray:
    """Draw rank or trace plots with the installed ArviZ, for `numpyro_ebm.plots`.

    Args:
        kind: kind of plot.
        draws: argument or result of `to_arviz`.
        group: name of the group to draw.
        cycles: colours and line styles of the chains.
        **choice: ArviZ's ``var_names`` and ``coords``.

    Returns:
        The axes, ``(num_panels,)`` or for traces ``(num_panels, 2)``.

    Raises:
        EnergyError: for groups, variables or coordinates that do not exist, and for more than 20 panels.
    """
    import arviz
    import xarray

    is_old = arviz.__version__.startswith("0.")
    data = draws if isinstance(draws, arviz.InferenceData if is_old else xarray.DataTree) else to_arviz(draws)
    _check_choice(data, group, **choice)
    with warnings.catch_warnings():
        # ArviZ 0.23 calls a function that matplotlib 3.11 will remove, and has no later release of its own.
        warnings.filterwarnings("ignore", "Passing a dict or None as alias_mapping")
        axes = (_draw_by_0 if is_old else _draw_by_1)(arviz, kind, data, group, cycles, choice)
    axes.flat[0].figure.set_layout_engine("constrained")
    return axes


def _check_choice(
    data: Mapping[str, Any], group: str, var_names: Sequence[str] | None, coords: Mapping[str, Any] | None
) -> None:
    names = group_names(data)
    if group not in names:
        raise EnergyError(f"There is no group '{group}'. {nearest(group, filter(None, names))}")
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
            f"{panels} panels are too many to read; the maximum is {MAX_PANELS}. Write var_names=['x'] or coords="
            f"{{'x_dim_0': [0, 1]}} for some of the {dict(chosen.sizes)}."
        )


def _draw_by_0(
    arviz: ModuleType, kind: str, data: Mapping[str, Any], group: str, cycles: Cycles, choice: Mapping[str, Any]
) -> np.ndarray:
    data = data if group == "posterior" else data[group]
    if kind == "rank":
        axes = np.atleast_1d(arviz.plot_rank(data, colors="#56B4E9", **choice)).reshape(-1)
        return np.array([ax for ax in axes if ax.has_data()])
    chain_prop = {"color": cycles.colors, "linestyle": cycles.dashes}
    return arviz.plot_trace(data, compact=False, chain_prop=chain_prop, legend=True, **choice)


def _draw_by_1(
    arviz: ModuleType, kind: str, data: Mapping[str, Any], group: str, cycles: Cycles, choice: Mapping[str, Any]
) -> np.ndarray:
    options = {"aes": {"color": ["chain"], "linestyle": ["chain"]}, "color": cycles.colors, "linestyle": cycles.dashes}
    if kind == "rank":
        drawn = arviz.plot_rank(data, group=group, backend="matplotlib", **options, **choice)  # pyright: ignore
    else:
        drawn = arviz.plot_trace_dist(  # pyright: ignore
            data, group=group, compact=False, backend="matplotlib", visuals={"trace": {"width": 0.7}}, **options, **choice
        )
    drawn.add_legend("chain")
    axes = np.array([ax for ax in drawn.viz["figure"].item().axes if ax.has_data()])
    return axes.reshape(-1, 2) if kind == "trace" else axes
