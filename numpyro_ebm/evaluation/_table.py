"""`Evaluation`: a table of the models' figures on held-out rows."""

import dataclasses
import html
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.typing import Scalar
from numpyro_ebm.evaluation.likelihood import Difference, paired_difference

BLANK = "-"


class Column(NamedTuple):
    """Display of one measure.

    Attributes:
        legend: what the measure is, and which direction is better.
        cell: function from the measure's result to the text of a cell.
        figures: function from the measure's result to numbers by name.
    """

    legend: str
    cell: Callable[[Any], str]
    figures: Callable[[Any], dict[str, Any]]


def _with_error(value: float, error: float) -> str:
    """Format a value and its error, both to two digits of the error."""
    if not (math.isfinite(value) and math.isfinite(error) and error > 1e-6):
        return f"{value:.6g} +- {error:.1g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f} +- {error:.{decimals}f}"


def _with_p(value: Scalar | float, error: Scalar | float, p_value: Scalar | float) -> str:
    return f"{_with_error(float(value), float(error))}, p={float(p_value):.2g}"


def _numbers(*names: str) -> Callable[[Any], dict[str, Any]]:
    """Return a function that reads these attributes of a result as plain numbers and lists, by name."""
    return lambda result: {name: _plain(getattr(result, name)) for name in names}


def _plain(value: object) -> Any:
    return np.asarray(value, float).tolist() if hasattr(value, "dtype") else value


COLUMNS = {
    "log_likelihood": Column(
        "nats per row, with an error that includes that of log Z; higher is better",
        lambda r: _with_error(r.mean, r.standard_error) + ("" if r.is_reliable else " (see note)"),
        _numbers("mean", "standard_error", "bits_per_dim", "bits_per_dim_error", "interval", "bound", "ess"),
    ),
    "sm": Column(
        "exact score matching loss per row; lower is better, and only differences between models are meaningful",
        lambda r: _with_error(r.mean, r.standard_error),
        _numbers("mean", "standard_error"),
    ),
    "ksd": Column(
        "squared kernel Stein discrepancy, 0 for a true model; lower is better, a small p is evidence against the model",
        lambda r: _with_p(*r[:3]),
        _numbers("statistic", "standard_error", "p_value"),
    ),
    "mmd": Column(
        "squared maximum mean discrepancy of draws and rows, 0 for a true model; lower is better, a small p is evidence "
        "against the model",
        lambda r: _with_p(*r[:3]),
        _numbers("statistic", "standard_error", "p_value", "bandwidth"),
    ),
    "c2st": Column(
        "accuracy of a classifier that separates draws from rows; 0.5 is best, a small p is evidence against the model",
        lambda r: _with_p(r.accuracy, r.standard_error, r.p_value),
        _numbers("accuracy", "standard_error", "auc", "p_value", "num_events"),
    ),
    "modes": Column(
        "total variation distance of the modes' weights (about its value by chance), modes without a draw; lower is better",
        lambda r: f"{r.total_variation:.3f} ({r.by_chance:.3f}), {r.num_missed} missed",
        _numbers("total_variation", "by_chance", "num_missed", "draws", "draws_error", "rows", "rows_error"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`: ``str`` gives a table with a legend, and notebooks show it as HTML.

    Attributes:
        results: by model and measure, the result of the measure (`LogLikelihood`, `SMLoss`, `KSDTest`, `MMDTest`, `C2ST`,
            `ModeWeights`), or None where the measure does not exist for the model.
        notes: by model, remarks on its figures.
        draws: by model, the independent draws that were compared; None where no measure needed them.
        num_rows: number of held-out rows.
    """

    results: Mapping[str, Mapping[str, Any]]
    notes: Mapping[str, tuple[str, ...]]
    draws: Mapping[str, Any]
    num_rows: int

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of the measures."""
        return tuple(next(iter(self.results.values())))

    def difference(self, first: str, second: str, measure: str = "log_likelihood") -> Difference:
        """Return the first model's mean minus the second's, with the standard error of the paired difference.

        Variation between rows that both models share cancels, so the error is often far below those in the table.

        Args:
            first: name of a model.
            second: name of another model.
            measure: "log_likelihood" (positive: the first is better) or "sm" (negative: the first is better).

        Raises:
            EnergyError: for unknown names, another measure, or a measure that does not exist for both models.
        """
        for name in (first, second):
            if name not in self.results:
                raise EnergyError(f"There is no model '{name}'. {nearest(name, self.results)}")
        if measure not in ("log_likelihood", "sm") or measure not in self.measures:
            known = [name for name in ("log_likelihood", "sm") if name in self.measures]
            raise EnergyError(f"There is no row-by-row difference of '{measure}'. {nearest(measure, known)}")
        a, b = self.results[first][measure], self.results[second][measure]
        if a is None or b is None:
            raise EnergyError(f"The measure '{measure}' does not exist for '{first if a is None else second}'.")
        return paired_difference(a, b)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return figures by model and measure (None where there are none) and "notes", as plain numbers and lists."""
        return {
            name: {
                **{m: None if each is None else COLUMNS[m].figures(each) for m, each in results.items()},
                "notes": list(self.notes[name]),
            }
            for name, results in self.results.items()
        }

    def __str__(self) -> str:
        """Return an aligned table, its legend and its notes."""
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
        lines.insert(1, "-" * len(lines[0].ljust(sum(widths) + 2 * (len(widths) - 1))))
        return "\n".join([f"{self.num_rows} held-out rows", *lines, *self._legend()])

    def _repr_html_(self) -> str:
        head, *rows = ([html.escape(cell) for cell in row] for row in self._cells())
        body = "".join(f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for name, *row in rows)
        legend = "<br>".join(html.escape(line) for line in self._legend())
        return (
            f"<table><caption>{self.num_rows} held-out rows</caption><thead><tr>"
            f"{''.join(f'<th>{cell}</th>' for cell in head)}</tr></thead><tbody>{body}</tbody></table><p>{legend}</p>"
        )

    def _cells(self) -> list[list[str]]:
        rows = [
            [name, *(BLANK if each is None else COLUMNS[m].cell(each) for m, each in results.items())]
            for name, results in self.results.items()
        ]
        return [["model", *self.measures], *rows]

    def _legend(self) -> list[str]:
        lines = [f"{measure}: {COLUMNS[measure].legend}" for measure in self.measures]
        if any(each is None for results in self.results.values() for each in results.values()):
            lines.append(f"{BLANK}: the measure does not exist for this model")
        return lines + [f"note on {name}: {text}" for name, texts in self.notes.items() for text in texts]
