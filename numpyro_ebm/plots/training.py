"""`plot_training`: losses, held-out losses and the health of chains over the updates."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from numpyro.infer.svi import SVIRunResult

from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import ArrayLike
from numpyro_ebm.estimators import NegativePhaseHealth
from numpyro_ebm.plots._style import DARK, FAINT, MODEL, SECOND, numbers, several_axes
from numpyro_ebm.training import FitResult, RecordedHealth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OWNER = "plot_training"
FIGURES = {"energy_gap": "energy gap (nats)", "acceptance_rate": "acceptance rate"}


def plot_training(
    result: Any,
    axes: "Axes | Sequence[Any] | np.ndarray | None" = None,
    *,
    health: Sequence[NegativePhaseHealth] | NegativePhaseHealth | Mapping[str, ArrayLike] | None = None,
    health_steps: ArrayLike | None = None,
    window: int | None = None,
    num_rows: tuple[int, int] | None = None,
    site: str | None = None,
) -> np.ndarray:
    """Plot losses with their running mean, held-out losses with the best check, and the health of the chains.

    The panels share their steps. From the top they show the loss of each update (faint) and its running mean; the held-out
    losses at each check, if any, with the best one marked; and, for estimators with chains, the energy gap (mean energy of
    the data minus that of the negatives, near 0 for a model that fits) and the acceptance rate. Losses are sums over rows,
    so training and held-out losses have separate panels, unless ``num_rows`` converts both to losses per row. Non-finite
    values leave gaps. The surrogate values of "gradient" estimators (cd, pcd, mle, ...) do not measure the fit: look at the
    health instead.

    Args:
        result: the result of `fit` or ``svi.run``.
        axes: one matplotlib axes per panel, in this order; None for a new figure.
        health: records of the chains over training: a sequence of `NegativePhaseHealth`, one of them with stacked arrays, or
            a dict of arrays ``energy_gap`` (nats) and ``acceptance_rate``, either or both, ``(num_records,)``. None for the
            records that `fit` kept, one per check.
        health_steps: number of updates before each record; None where there is one record per update or per check.
        window: number of updates in the running mean; None for a fiftieth of all updates.
        num_rows: numbers of rows of a training update and of the held-out set, by which the losses are divided.
        site: name of the energy site, where `fit` kept the health of several.

    Returns:
        The axes, ``(num_panels,)``.

    Raises:
        EnergyError: (a ValueError) for different numbers of records and steps, and for the wrong number of axes.
        TypeError: for a result without losses, and for health of any other type.
        ImportError: without matplotlib.

    Example:
        ``plot_training(fit(key, svi, 5000, x_train, held_out=(x_test,)), num_rows=(len(x_train), len(x_test)))``
    """
    losses, held_out, checks = _losses(result)
    window = max(1, len(losses) // 50) if window is None else window
    check_count(OWNER, "window", window)
    if window > len(losses):
        raise EnergyError(
            f"{OWNER} got window={window} for {len(losses)} updates. Write window={max(1, len(losses) // 10)}."
        )
    per_row, unit = _units(num_rows)
    if health is None and getattr(result, "health", None) is not None:
        health, health_steps = _kept(result.health, site)
    records = _records(health)
    steps = _steps(records, health_steps, len(losses), checks)
    is_joined = num_rows is not None or not len(held_out)
    num = 2 - is_joined + len(records)
    panels = several_axes(OWNER, axes, (num, 1), (6.0, 1.9 * num + 1.2), sharex=True).reshape(-1)
    _draw_losses(panels[0], losses / per_row[0], window)
    if len(held_out):
        _draw_held_out(panels[1 - is_joined], held_out / per_row[1], checks, result.best_step)
    for ax in panels[: 2 - is_joined]:
        ax.set_ylabel(f"loss ({unit})")
    for ax, (name, values) in zip(panels[2 - is_joined :], records.items(), strict=True):
        _draw_record(ax, name, steps, values)
    panels[-1].set_xlabel("updates (steps)")
    stopped = getattr(result, "stopped", "end")
    if stopped != "end":
        panels[0].set_title(f"stopped: {stopped}", fontsize="medium", loc="left")
    return panels


def _losses(
    result: FitResult | SVIRunResult,
) -> tuple[Float[np.ndarray, " updates"], Float[np.ndarray, " checks"], Float[np.ndarray, " checks"]]:
    """Return losses, held-out losses and the steps of the latter."""
    if getattr(result, "losses", None) is None:
        raise TypeError(f"{OWNER} needs the result of fit or of svi.run; got {type(result).__name__}.")
    losses = numbers(OWNER, "losses", result.losses).reshape(-1)
    held_out = np.asarray(getattr(result, "held_out_losses", ()), float)
    return losses, held_out, np.asarray(getattr(result, "check_steps", ()), float)


def _units(num_rows: tuple[int, int] | None) -> tuple[tuple[int, int], str]:
    if num_rows is None:
        return (1, 1), "sum over rows"
    if not isinstance(num_rows, tuple | list) or len(num_rows) != 2:
        raise EnergyError(f"{OWNER} needs num_rows as two counts; got {num_rows!r}. Write num_rows=(len(x), len(x_test)).")
    for each in num_rows:
        check_count(OWNER, "num_rows", each)
    return (num_rows[0], num_rows[1]), "per row"


def _kept(recorded: RecordedHealth, site: str | None) -> tuple[NegativePhaseHealth, Int[np.ndarray, " checks"]]:
    """Return the health that `fit` kept of a site, and its steps."""
    names = sorted(recorded.sites)
    if site is None and len(names) > 1:
        raise EnergyError(f"The result has the health of the sites {names}. Write {OWNER}(result, site='{names[0]}').")
    if site is not None and site not in names:
        raise EnergyError(f"There is no health of a site '{site}'. {nearest(site, names)}")
    return recorded.sites[site or names[0]], recorded.steps


def _records(health: object) -> dict[str, np.ndarray]:
    """Return the available figures, each ``(num_records,)``."""
    if health is None:
        return {}
    if isinstance(health, Mapping):
        given = {name: health[name] for name in FIGURES if health.get(name) is not None}
    elif hasattr(health, "energy_gap"):
        given = {name: getattr(health, name) for name in FIGURES}
    elif isinstance(health, Sequence) and health and all(hasattr(each, "energy_gap") for each in health):
        given = {name: [float(getattr(each, name)) for each in health] for name in FIGURES}
    else:
        given = {}
    if not given:
        raise TypeError(
            f"{OWNER} needs health as records of NegativePhaseHealth or a dict with 'energy_gap' or 'acceptance_rate'; got "
            f"{type(health).__name__}{' of ' + str(sorted(health)) if isinstance(health, Mapping) else ''}."
        )
    return {name: np.atleast_1d(numbers(OWNER, name, values)) for name, values in given.items()}


def _steps(
    records: dict[str, np.ndarray], given: ArrayLike | None, num_updates: int, checks: Float[np.ndarray, " checks"]
) -> Shaped[np.ndarray, " records"]:
    """Return the number of updates before each record."""
    shapes = {name: values.shape for name, values in records.items()}
    if not records:
        if given is not None:
            raise EnergyError(f"{OWNER} got health_steps without health. Write health={{'energy_gap': gaps}}.")
        return np.zeros(0)
    steps = (
        next((s for s in (np.arange(1, num_updates + 1), checks) if {s.shape} == set(shapes.values())), None)
        if given is None
        else numbers(OWNER, "health_steps", given)
    )
    if steps is None or {steps.shape} != set(shapes.values()):
        raise EnergyError(
            f"{OWNER} needs a record for each of {num_updates} updates or {len(checks)} checks, or health_steps as long as "
            f"the records; got {shapes}{'' if given is None else f' and health_steps of shape {np.shape(given)}'}. Write "
            "health_steps=steps."
        )
    return steps


def _draw_losses(ax: "Axes", losses: Float[np.ndarray, " updates"], window: int) -> None:
    steps = np.arange(1, len(losses) + 1)
    ax.plot(steps, np.where(np.isfinite(losses), losses, np.nan), color=FAINT, lw=0.8, label="each update")
    if window > 1:
        label = f"mean of {window} updates"
        ax.plot(steps[window - 1 :], _running_mean(losses, window), color=MODEL, lw=1.8, label=label)
    ax.legend(fontsize="small")


def _running_mean(losses: Float[np.ndarray, " updates"], window: int) -> Float[np.ndarray, " windows"]:
    """Return the mean of the last ``window`` losses; NaN where one of them is not finite."""
    windows = np.lib.stride_tricks.sliding_window_view(np.where(np.isfinite(losses), losses, np.nan), window)
    return windows.mean(axis=1)


def _draw_held_out(
    ax: "Axes", losses: Float[np.ndarray, " checks"], checks: Float[np.ndarray, " checks"], best_step: int
) -> None:
    finite = np.where(np.isfinite(losses), losses, np.nan)
    ax.plot(checks, finite, color=SECOND, ls="--", marker="o", ms=3.5, lw=1.4, label="held-out rows")
    ax.axvline(best_step, color=DARK, ls=":", lw=1.2, label=f"best: step {best_step}")
    ax.legend(fontsize="small")


def _draw_record(
    ax: "Axes", name: str, steps: Shaped[np.ndarray, " records"], values: Float[np.ndarray, " records"]
) -> None:
    is_sparse = len(steps) <= 50
    ax.plot(steps, np.where(np.isfinite(values), values, np.nan), color=MODEL, lw=1.0, marker="o" if is_sparse else "", ms=3)
    ax.set_ylabel(FIGURES[name])
    if name == "energy_gap":
        ax.axhline(0.0, color=DARK, ls="--", lw=1.0)
    else:
        ax.set_ylim(-0.02, 1.02)
