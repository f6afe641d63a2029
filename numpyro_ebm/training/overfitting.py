"""Signs of overfitting in loss curves. Plain NumPy, on curves that are already on the host."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

TAIL = 5
"""Last checks whose median stands for the end of the run: more average out fluctuations, fewer see a late rise sooner."""
MIN_TAIL = 3
"""Fewest checks after the best one: two would show no spread about their own line, since it passes through both."""
PART_OF_FALL = 0.1
"""Least rise as a share of the fall to the best check: the optima of two finite sets of rows also differ by a small rise."""
PART_OF_LOSS = 0.05
"""Least rise as a share of the best loss, for the same reason; it decides where the fall is small."""
STANDARD_ERRORS = 3.5
"""Least total rise of the held-out rows in standard errors; a normal variable exceeds 3.5 with probability 2e-4."""
RUNAWAY_GROWTH = 100.0
"""Least final size of the loss in units of its first tenth: lower warns of losses that later settle, higher warns late."""
MIN_UPDATES = 60
"""Fewest updates to judge, so that each mean over a twentieth of the run has at least three losses."""


def held_out_rise(
    held_out: Float[np.ndarray, " checks"], check_steps: Int[np.ndarray, " checks"], losses: Float[np.ndarray, " updates"]
) -> str | None:
    """Describe a held-out loss that ends well above its best although the training loss fell; None for any other.

    The rise is that of the median of the last checks after the best one, at least three. It has to exceed the spread of
    these checks about their own line, so that parameters that fluctuate about an optimum do not count. It also has to exceed
    a tenth of the whole fall and a twentieth of the loss itself, so that the small distance between the optima of two finite
    sets of rows does not count.

    Args:
        held_out: loss at each check, the first before any update.
        check_steps: number of updates before each check.
        losses: loss of every update.
    """
    best = int(np.nanargmin(held_out))
    tail = held_out[best + 1 :][-TAIL:]
    if len(tail) < MIN_TAIL:
        return None
    is_finite = np.isfinite(tail).all()
    rise, spread = (np.median(tail) - held_out[best], _spread(tail)) if is_finite else (np.inf, 0.0)
    fall = np.max(held_out[: best + 1]) - held_out[best]
    needed = max(spread, PART_OF_FALL * fall, PART_OF_LOSS * abs(held_out[best]))
    at_best = losses[check_steps[best - 1] : check_steps[best]].mean(dtype=float) if best else losses[0]
    at_end = losses[check_steps[-len(tail) - 1] :].mean(dtype=float)
    if not (rise > needed and at_end < at_best):
        return None
    return (
        f"the loss of the held-out rows was {held_out[best]:.5g} after {check_steps[best]} updates and is "
        f"{held_out[-1]:.5g} after {check_steps[-1]}, while that of training went from {at_best:.5g} to {at_end:.5g}"
    )


def _spread(values: Float[np.ndarray, " checks"]) -> float:
    at = np.arange(len(values))
    return float(np.ptp(values - np.polyval(np.polyfit(at, values, 1), at)))


def is_significant(differences: Sequence[Float[np.ndarray, "..."]]) -> bool:
    """Return whether the losses of the rows rose in total by more than 3.5 standard errors of the sum of their differences.

    A small set of held-out rows may have its optimum far from that of the training rows without any fault of the energy.

    Args:
        differences: arrays of increases in loss, each of rows of one kind.
    """
    variance = sum(each.size * np.var(each.astype(float)) for each in differences)
    lost = sum(each.astype(float).sum() for each in differences)
    return not lost < STANDARD_ERRORS * np.sqrt(variance)  # NaN counts as a rise


def runaway(losses: Float[np.ndarray, " updates"]) -> str | None:
    """Describe a training loss that falls ever faster, to a hundred times its initial size; None for any other.

    The loss of a run that settles falls ever slower. Means over a twentieth of the run stand for its start, its thirds and
    its end.
    """
    size = len(losses)
    if size < MIN_UPDATES or not np.isfinite(losses).all():
        return None
    width = size // 20
    start, first, second, end = (
        losses[i : i + width].mean(dtype=float) for i in np.linspace(0, size - width, 4).astype(int)
    )
    scale = np.abs(losses[: size // 10]).max()
    if not (0 < start - first < first - second < second - end and -end > RUNAWAY_GROWTH * scale):
        return None
    return (
        f"the training loss falls ever faster, from {start:.5g} to {first:.5g}, {second:.5g} and {end:.5g} at the thirds of "
        f"{size} updates, as a loss without a lower bound does"
    )
