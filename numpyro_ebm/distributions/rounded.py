"""Warning about data on a lattice, where a density on the real line is degenerate."""

import warnings

import numpy as np
from jaxtyping import Bool, Shaped
from numpyro.distributions import constraints

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.typing import Array
from numpyro_ebm.distributions.blocks import is_real

FEWEST_ROWS, MOST_ROWS = 20, 5000
"""Rows needed for a warning, since fewer may repeat by chance; rows inspected at most, to bound the time of the check."""
REPEATS = 2
"""Rows per whole number of the range that count as repeats: higher misses wide lattices, lower warns of sparse counts."""
BOOLEAN = "Write support=numpyro.distributions.constraints.boolean in the EnergyDistribution"
UNITS = {(0, 1): BOOLEAN, (-1, 1): f"{BOOLEAN}, (x + 1) / 2 for the data, and s = 2 * x - 1 in the energy"}


def warn_of_lattice(
    name: str, value: Shaped[Array, " rows *event"], mask: Bool[Array, " rows"] | None, support: constraints.Constraint
) -> None:
    """Warn if real coordinates hold whole numbers that repeat, on which a fitted density grows without bound.

    Warns:
        UserWarning: with the values and the support that fits them; only for concrete values.
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
            "Add uniform noise, x + jax.random.uniform(rng_key, x.shape), or use a method that smooths ('dsm' with sigma "
            f"of half a unit or more); constraints.integer_interval({ends[0]}, {ends[1]}) is the support of such numbers."
        )
    warnings.warn(
        f"At site '{name}': {where} {what}, and the support is the real line. The best fit of a density there is a spike "
        f"of unbounded height at each of these points. {fix}",
        stacklevel=2,
    )
