"""Data on a lattice, where a density on the real line is degenerate."""

import warnings

import numpy as np

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.typing import Array
from numpyro_ebm.distributions.blocks import is_real

FEWEST_ROWS, MOST_ROWS = 20, 5000
REPEATS = 2
BOOLEAN = "Write support=numpyro.distributions.constraints.boolean in the EnergyDistribution"
UNITS = {(0, 1): BOOLEAN, (-1, 1): f"{BOOLEAN}, (x + 1) / 2 for the data, and s = 2 * x - 1 in the energy"}


def warn_of_lattice(name: str, value: Array, mask: Array | None, support: object) -> None:
    """Warn of real coordinates whose rows are whole numbers that repeat: the density there is without limit.

    Warns:
        UserWarning: naming the values, and the support that they have; at once, for values that are known.
    """
    if len(value) < FEWEST_ROWS or not is_real(support) or not is_concrete(value, mask):
        return
    rows = np.asarray(value)[:MOST_ROWS].reshape(min(len(value), MOST_ROWS), -1)
    rows = rows if mask is None else rows[np.asarray(mask)[:MOST_ROWS]]
    if len(rows) < FEWEST_ROWS:
        return
    low, high = rows.min(axis=0, initial=np.inf), rows.max(axis=0, initial=-np.inf)
    is_whole = np.all(rows == np.round(rows), axis=0) & (low < high) & (REPEATS * (high - low + 1) <= len(rows))
    if not is_whole.any():
        return
    ends = int(low[is_whole].min()), int(high[is_whole].max())
    where = "all values" if is_whole.all() else f"the values of {is_whole.sum()} of {is_whole.size} coordinates"
    if ends in UNITS and is_whole.all() and np.all(np.isin(rows, ends)):
        what, fix = f"are {ends[0]} and {ends[1]} only", f"{UNITS[ends]}; estimate(model, 'mpf') trains it."
    else:
        what = f"are whole numbers from {ends[0]} to {ends[1]}, which repeat"
        fix = (
            "Spread them evenly, x + jax.random.uniform(rng_key, x.shape), or take a method that smooths ('dsm' with sigma "
            f"of half a unit or more); constraints.integer_interval({ends[0]}, {ends[1]}) is the support of such numbers."
        )
    warnings.warn(
        f"At site '{name}': {where} {what}, and the support is the real line. A density there is fitted best by spikes on "
        f"these points, without limit. {fix}",
        stacklevel=2,
    )
