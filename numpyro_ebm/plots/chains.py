"""`plot_rank` and `plot_trace`: ArviZ's pictures of chains, whichever ArviZ there is."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from numpyro_ebm.diagnostics.arviz.draw import draw_chains
from numpyro_ebm.plots._style import SERIES, pyplot

_STYLES = [each["color"] for each in SERIES], [each["linestyle"] for each in SERIES]


def plot_rank(
    draws: Any,
    *,
    var_names: Sequence[str] | None = None,
    coords: dict[str, Any] | None = None,
    group: str = "posterior",
) -> np.ndarray:
    """Rank plots of the chains by ArviZ: where chains mix, none has more low or high ranks than another.

    ArviZ 0.23 draws a histogram of ranks for each chain (flat where they mix); 1.x the difference of each chain's
    distribution of ranks from the uniform one, a line for each (about 0 where they mix), which differ in dashes too.

    Args:
        draws: a finished ``numpyro.infer.MCMC``, the result of `sample`, a dict of arrays ``(num_chains, num_draws, ...)``
            or what `to_arviz` returned.
        var_names: which variables; None for all.
        coords: which entries, by dimension; None for all. Up to 20 panels.
        group: of ArviZ data, whose variables lead with chain and draw.

    Returns:
        The axes, ``(num_panels,)``, on a figure that ArviZ made.

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
    return draw_chains("rank", draws, group, *_STYLES, var_names=var_names, coords=coords)


def plot_trace(
    draws: Any,
    *,
    var_names: Sequence[str] | None = None,
    coords: dict[str, Any] | None = None,
    group: str = "posterior",
) -> np.ndarray:
    """Densities and traces of the chains by ArviZ, a line for each chain, divergent draws marked.

    Args:
        draws: as in `plot_rank`.
        var_names: which variables; None for all.
        coords: which entries, by dimension; None for all. Up to 20 panels.
        group: of ArviZ data, whose variables lead with chain and draw.

    Returns:
        The axes, ``(num_panels, 2)``, a density and a trace in each row, on a figure that ArviZ made.

    Raises:
        EnergyError: (a ValueError) for draws that `to_arviz` refuses, for variables, entries or groups that are not
            there, and for more than 20 panels.
        TypeError: for anything else.
        ImportError: without matplotlib.

    Example:
        ``plot_trace(sample(key, distribution), var_names=["x"])``
    """
    pyplot()
    return draw_chains("trace", draws, group, *_STYLES, var_names=var_names, coords=coords)
