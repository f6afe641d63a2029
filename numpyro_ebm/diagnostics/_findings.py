"""`Diagnosis` and `Finding`: what was measured, its bound, and what to try."""

import dataclasses
import html
from typing import Any, Literal

Status = Literal["ok", "warning", "not checked"]
MARKS = {"ok": "ok", "warning": "!!", "not checked": "--"}
COLOURS = {"ok": "#1a7f37", "warning": "#b42318", "not checked": "#6b7280"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        name: name of the check.
        status: "ok", "warning", or "not checked" where an input of the check is missing.
        measured: what was measured.
        bound: what it should be.
        advice: what to try after a warning, or what to pass for a check that was not made.
    """

    name: str
    status: Status
    measured: str
    bound: str = ""
    advice: str = ""

    def __str__(self) -> str:
        """Return one line of text, and a second one for the advice."""
        bound = f" ({self.bound})" if self.bound else ""
        line = f"[{MARKS[self.status]}] {self.name}: {self.measured}{bound}"
        return f"{line}\n     {self.advice}" if self.advice else line


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Result of `diagnose`: ``str`` gives text, and notebooks show a table.

    Attributes:
        findings: one per check.
    """

    findings: tuple[Finding, ...]

    @property
    def is_healthy(self) -> bool:
        """Whether no check gave a warning; checks that were not made do not count."""
        return not self.warnings

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings to act on."""
        return tuple(finding for finding in self.findings if finding.status == "warning")

    def __getitem__(self, name: str) -> Finding:
        """Return the finding of this name."""
        return {finding.name: finding for finding in self.findings}[name]

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return the findings as plain dicts, by name."""
        return {finding.name: dataclasses.asdict(finding) for finding in self.findings}

    def __str__(self) -> str:
        """Return text, with the warnings first."""
        order = sorted(self.findings, key=lambda finding: list(COLOURS).index(finding.status) != 1)
        return "\n".join([self._headline(), *map(str, order)])

    def _repr_html_(self) -> str:
        """Return an HTML table without external resources."""
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


def judge(name: str, measured: str, bound: str, advice: str, *, is_bad: object) -> Finding:
    """Return a warning with its advice where ``is_bad``, otherwise a finding that is ok."""
    return Finding(name, "warning" if is_bad else "ok", measured, bound, advice if is_bad else "")


def unchecked(name: str, why: str, advice: str = "") -> Finding:
    """Return a finding of a check that could not be made."""
    return Finding(name, "not checked", why, "", advice)
