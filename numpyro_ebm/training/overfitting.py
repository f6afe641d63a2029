"""What loss curves say of a training that went too far. Plain NumPy, on curves that are already on the host."""

from collections.abc import Sequence

import numpy as np

TAIL = 5  # checks that stand for the end
MIN_TAIL = 3
PART_OF_FALL = 0.1
PART_OF_LOSS = 0.05
STANDARD_ERRORS = 3.5
RUNAWAY_GROWTH = 100.0
MIN_UPDATES = 60


def held_out_rise(held_out: np.ndarray, check_steps: np.ndarray, losses: np.ndarray) -> str | None:
    """Words where the held-out loss ends well above its best though the training loss fell; None elsewhere.

    The median of the last checks after the best one, at least three, has to be above the best by more than these spread
    about their own line, so that parameters that jitter about an optimum do not count, and by a tenth of the whole fall and
    a twentieth of the loss itself, so that the small step between the optima of two finite sets of rows does not.

    Args:
        held_out: loss at each check, the first before any update.
        check_steps: how many updates had been made.
        losses: of every update.
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


def _spread(values: np.ndarray) -> float:
    at = np.arange(len(values))
    return float(np.ptp(values - np.polyval(np.polyfit(at, values, 1), at)))


def is_significant(differences: Sequence[np.ndarray]) -> bool:
    """Whether rows lost more, all in all, than 3.5 standard errors of the sum of their differences.

    Few held-out rows have an optimum of their own far from that of the training rows, without any fault of the energy.

    Args:
        differences: arrays of differences; those of one array are of one kind.
    """
    variance = sum(each.size * np.var(each.astype(float)) for each in differences)
    lost = sum(each.astype(float).sum() for each in differences)
    return not lost < STANDARD_ERRORS * np.sqrt(variance)  # NaN is lost


def runaway(losses: np.ndarray) -> str | None:
    """Words where the training loss falls ever faster, to a hundred times the size that it had at first; None elsewhere.

    A run that settles falls ever slower. Means over a twentieth of the run stand for its start, its thirds and its end.
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
