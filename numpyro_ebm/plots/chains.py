"""`plot_rank` and `plot_trace`: plots of chains by the installed version of ArviZ."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpyro.infer import MCMC

from numpyro_ebm.diagnostics.arviz.draw import Cycles, draw_chains
from numpyro_ebm.plots._style import SERIES, pyplot
from numpyro_ebm.sampling import Draws
from numpyro_ebm.training import FitResult

_CYCLES = Cycles([each["color"] for each in SERIES], [each["linestyle"] for each in SERIES])


def plot_rank(
    draws: MCMC | Draws | FitResult | Mapping[str, Any],
    *,
    var_names: Sequence[str] | None = None,
    coords: dict[str, Any] | None = None,
    group: str = "posterior",
) -> np.ndarray:
    """Draw rank plots of the chains by ArviZ: if the chains mix, none has more low or high ranks than another.

    ArviZ 0.23 draws a histogram of ranks for each chain, which is flat if they mix. ArviZ 1.x draws a line for each chain,
    with its own dashes: the difference between its distribution of ranks and the uniform one, about 0 if they mix.

    Args:
        draws: a finished ``numpyro.infer.MCMC``, the result of `sample`, a dict of arrays ``(num_chains, num_draws, ...)``
            or the result of `to_arviz`.
        var_names: names of variables; None for all.
        coords: entries to plot, by dimension; None for all. Up to 20 panels.
        group: group of ArviZ data, whose variables have the shape ``(chain, draw, ...)``.

    Returns:
        The axes, ``(num_panels,)``, on a figure that ArviZ created.

    Raises:
        EnergyError: (a ValueError) for draws that `to_arviz` refuses, for variables, entries or groups that are not
            there, and for more than 20 panels.
        TypeError: for anything else.
        ImportError: without matplotlib.

    Example:
        ``plot_rank(sample(key, distribution))``

    References:
        Vehtari et al., Rank-normalization, folding, and localization: an improved R-hat (2021).
    """
    pyplot()
    return draw_chains("rank", draws, group, _CYCLES, var_names=var_names, coords=coords)


def plot_trace(
    draws: MCMC | Draws | FitResult | Mapping[str, Any],
    *,
    var_names: Sequence[str] | None = None,
    coords: dict[str, Any] | None = None,
    group: str = "posterior",
) -> np.ndarray:
    """Draw densities and traces of the chains by ArviZ, with a line for each chain and marks for divergent draws.

    Args:
        draws: as in `plot_rank`.
        var_names: names of variables; None for all.
        coords: entries to plot, by dimension; None for all. Up to 20 panels.
        group: group of ArviZ data, whose variables have the shape ``(chain, draw, ...)``.

    Returns:
        The axes, ``(num_panels, 2)``, with a density and a trace in each row, on a figure that ArviZ created.

    Raises:
        EnergyError: (a ValueError) for draws that `to_arviz` refuses, for variables, entries or groups that are not
            there, and for more than 20 panels.
        TypeError: for anything else.
        ImportError: without matplotlib.

    Example:
        ``plot_trace(sample(key, distribution), var_names=["x"])``
    """
    pyplot()
    return draw_chains("trace", draws, group, _CYCLES, var_names=var_names, coords=coords)
