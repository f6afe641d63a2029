"""What a diagnosis is: findings, each with what was measured, the bound and what to try."""

import dataclasses
import html
from typing import Any, Literal

Status = Literal["ok", "warning", "not checked"]
MARKS = {"ok": "ok", "warning": "!!", "not checked": "--"}
COLOURS = {"ok": "#1a7f37", "warning": "#b42318", "not checked": "#6b7280"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        name: what was looked at.
        status: "ok", "warning", or "not checked" where what it takes was not there.
        measured: what was found.
        bound: what it should be.
        advice: what to try where it is not, or what to pass where it was not checked.
    """

    name: str
    status: Status
    measured: str
    bound: str = ""
    advice: str = ""

    def __str__(self) -> str:
        """A line, and one of advice where there is any."""
        bound = f" ({self.bound})" if self.bound else ""
        line = f"[{MARKS[self.status]}] {self.name}: {self.measured}{bound}"
        return f"{line}\n     {self.advice}" if self.advice else line


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found; ``str`` gives text, notebooks show a table.

    Attributes:
        findings: one per check.
    """

    findings: tuple[Finding, ...]

    @property
    def is_healthy(self) -> bool:
        """Whether no check gave a warning; what was not checked is no warning."""
        return not self.warnings

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings to act on."""
        return tuple(finding for finding in self.findings if finding.status == "warning")

    def __getitem__(self, name: str) -> Finding:
        """The finding of this name."""
        return {finding.name: finding for finding in self.findings}[name]

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """The same as plain dicts, by name."""
        return {finding.name: dataclasses.asdict(finding) for finding in self.findings}

    def __str__(self) -> str:
        """Text, warnings first."""
        order = sorted(self.findings, key=lambda finding: list(COLOURS).index(finding.status) != 1)
        return "\n".join([self._headline(), *map(str, order)])

    def _repr_html_(self) -> str:
        """A table without anything from outside."""
        rows = "".join(
            f"<tr><td style='color:{COLOURS[f.status]};white-space:nowrap'><b>{html.escape(f.status)}</b></td>"
            + "".join(f"<td style='text-align:left'>{html.escape(t)}</td>" for t in (f.name, f.measured, f.bound, f.advice))
            + "</tr>"
            for f in self.findings
        )
        head = "".join(f"<th style='text-align:left'>{t}</th>" for t in ("", "check", "measured", "bound", "what to try"))
        return f"<div><p><b>{html.escape(self._headline())}</b></p><table><tr>{head}</tr>{rows}</table></div>"

    def _headline(self) -> str:
        counts = {status: sum(f.status == status for f in self.findings) for status in MARKS}
        return f"{counts['warning']} warnings, {counts['ok']} checks ok, {counts['not checked']} not checked"


def judge(name: str, measured: str, bound: str, advice: str, *, is_bad: Any) -> Finding:
    """A finding whose advice is there where it is needed."""
    return Finding(name, "warning" if is_bad else "ok", measured, bound, advice if is_bad else "")


def unchecked(name: str, why: str, advice: str = "") -> Finding:
    """A finding of what could not be looked at."""
    return Finding(name, "not checked", why, "", advice)
