"""How stages tell how far they are.

A stage calls ``progress(stage, done, total, note)`` now and then; a total of 0 says that it waits, and the
note what for. The flow turns that into its own display; `ConsoleProgress` prints it for the command line,
`silent` drops it.
"""

from __future__ import annotations

import sys
import time
from typing import Protocol, TextIO


class Progress(Protocol):
    """Takes notice of ``done`` of ``total`` pieces of ``stage``; of 0 while it waits for others."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None: ...


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """Drop the news."""


class Whole:
    """One measure of progress over several stages, which come one after the other.

    Args:
        progress: is told of the whole.
        stage: what the whole is called.
        total: of pieces.
    """

    def __init__(self, progress: Progress, stage: str, total: int) -> None:
        self._progress, self._stage, self._total, self._begun = progress, stage, total, 0

    def part(self, name: str, size: int) -> Progress:
        """The progress of the next stage, which is ``size`` of the pieces however it counts itself."""
        begun = self._begun
        self._begun += size

        def part(stage: str, done: int, total: int, note: str = "") -> None:
            # The end is told once, by `end`: a stage that is done does not mean that all is.
            reached = min(begun + size * done // max(1, total), self._total - 1)
            self._progress(self._stage, reached, self._total, f"{name}, {note}" if note else name)

        return part

    def end(self, note: str) -> None:
        """Say that all is done."""
        self._progress(self._stage, self._total, self._total, note)


class ConsoleProgress:
    """Prints progress with the estimated time to go; one rewritten line on a terminal, few lines elsewhere.

    Args:
        stream: where to write; stderr by default, because stdout is for data.
        seconds: at least that long between two lines when the stream is not a terminal.
    """

    def __init__(self, stream: TextIO | None = None, seconds: float = 15.0) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._seconds = 0.1 if self._live else seconds
        self._stage = ""
        self._shown = 0.0
        self._started = self._heard = time.monotonic()
        self._first = (0.0, 0)

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Show ``done`` of ``total`` pieces of ``stage``."""
        now = time.monotonic()
        if not total:
            self._stage, self._heard = "", now  # nothing is known of the speed yet
            self._write(f"{stage:<12} {note}", ends=True)
            return
        if stage != self._stage:
            # A stage begins where the one before it ended, not with its first news.
            self._stage, self._started, self._shown = stage, self._heard, 0.0
            self._first = (now, done)
        self._heard = now
        finished = done >= total
        if not finished and now - self._shown < self._seconds:
            return
        self._shown = now
        # What was done before, as in a training that goes on, says nothing about the speed of this one.
        begun, before = (self._started, 0) if finished else self._first
        left = eta(now - begun, done - before, total - before)
        self._write(f"{stage:<12} {done}/{total}  {left}  {note}".rstrip(), ends=finished)

    def _write(self, line: str, *, ends: bool) -> None:
        if self._live:
            self._stream.write("\r\x1b[2K" + line + ("\n" if ends else ""))
        else:
            self._stream.write(line + "\n")
        self._stream.flush()


def eta(elapsed: float, done: int, total: int) -> str:
    """Return the time to go as text, from ``elapsed`` seconds for ``done`` of ``total`` equal pieces."""
    if done >= total:
        return f"done in {elapsed:.0f} s"
    if done <= 0:
        return "starting"
    left = elapsed / done * (total - done)
    return f"{left:.0f} s to go" if left < 120 else f"{left / 60:.0f} min to go"
