"""What the doctor says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """One finding.

    Attributes:
        rule: its name.
        level: an "error" spoils the training or its judgement, a "warning" may be meant so.
        seen: what was found, with numbers.
        why: why that matters, with the source of a rule of thumb.
        mend: what to do.
    """

    rule: str
    level: Literal["error", "warning"]
    seen: str
    why: str
    mend: str

    def as_json(self) -> dict[str, str]:
        """Return plain JSON values."""
        return asdict(self)


Findings = Iterator[Advice]


def some(names: Sequence[str], most: int = 4) -> str:
    """Return a few of the names as text."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
