"""What a scan of a target says: its adapters, each with a report, and the worst of them decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from registry.errors import NeedsReview, RegistryError, ScanRefused
from registry.scanning.report import ScanReport

Outcome = Literal["pass", "review", "block", "not finished"]

EXIT_CODES: Final[Mapping[Outcome, int]] = {
    "pass": 0,
    "review": NeedsReview.exit_code,
    "block": ScanRefused.exit_code,
    "not finished": RegistryError.exit_code,
}
_GRAVITY: Final[tuple[Outcome, ...]] = ("pass", "review", "not finished", "block")


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """One adapter that was scanned.

    Attributes:
        name: where it is, as the user named it; escaped.
        report: of its scan; None if it could not be read.
        problem: why it could not be read; empty otherwise.
    """

    name: str
    report: ScanReport | None
    problem: str = ""

    @property
    def outcome(self) -> Outcome:
        """The verdict; a scan that did not finish has none."""
        if self.report is None or not self.report.finished:
            return "not finished"
        return self.report.verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class Scanned:
    """A target and everything that was found in it.

    Attributes:
        target: as the user named it; escaped.
        subjects: the adapters in it, at least one.
        many: whether it may hold several, so that people see a table.
    """

    target: str
    subjects: tuple[Subject, ...]
    many: bool = False

    @property
    def outcome(self) -> Outcome:
        """The worst outcome; a file that certainly is bad counts more than one that could not be judged."""
        return max((subject.outcome for subject in self.subjects), key=_GRAVITY.index)

    @property
    def exit_code(self) -> int:
        """What the command line returns."""
        return EXIT_CODES[self.outcome]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values: the report of a single adapter, or a list of them."""
        rows = [
            {"name": one.name, "outcome": one.outcome, "problem": one.problem}
            | ({} if one.report is None else one.report.to_json())
            for one in self.subjects
        ]
        if not self.many:
            return {"target": self.target, **rows[0], "outcome": self.outcome}
        return {"target": self.target, "outcome": self.outcome, "adapters": rows}
