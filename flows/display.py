"""What a run shows while it works: each stage with its progress and the time to go, on stderr.

A terminal gets a bar that moves, anything else gets a line now and then. The last word, the table, goes to
stdout.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from trainer.progress import eta

if TYPE_CHECKING:
    from rich.progress import TaskID


class Display:
    """Shows stages one after the other; is itself the ``progress`` that the stages call.

    Args:
        total: number of stages of the run.
        stream: where to write; stderr by default, because stdout is for data.
        seconds: at least that long between two lines when the stream is no terminal.
        log: takes every line, too, such as the log of a flow run.
    """

    def __init__(
        self,
        total: int,
        stream: TextIO | None = None,
        seconds: float = 10.0,
        log: Callable[[str], None] | None = None,
    ) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._live = self._console.is_terminal
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            Remaining(),
            TextColumn("{task.fields[note]}", style="dim"),
            console=self._console,
            transient=True,
            disable=not self._live,
        )
        self._total, self._number, self._seconds, self._log = total, 0, seconds, log
        self._stage = ""
        self._task: TaskID | None = None
        self._shown = 0.0
        self._first: tuple[str, float, int] | None = None

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        """Announce a stage, and take its progress until the block ends."""
        self._number += 1
        self._stage, self._shown, self._first = name, time.monotonic(), None
        self.say(f"[{self._number}/{self._total}] {name}: {title}")
        self._task = self._bar.add_task(name, total=None, note="") if self._live else None
        try:
            with self._bar:
                yield
        finally:
            if self._task is not None:
                self._bar.remove_task(self._task)

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Show ``done`` of ``total`` pieces of the stage that was announced, or of a part of it."""
        if not total:
            self.say(f"      {self._stage}: {note}")  # at once: there may be no other news for long
            return
        if self._task is not None:
            label = self._stage if stage == self._stage else f"{self._stage}: {stage}"
            self._bar.update(self._task, description=label, completed=done, total=total, note=note)
            return
        now = time.monotonic()
        if self._first is None or self._first[0] != stage:
            # What came before the first news, such as loading a model, says nothing about the speed.
            self._first = (stage, now, done)
        if now - self._shown < self._seconds or done >= total:
            return
        self._shown = now
        part = "" if stage == self._stage else f" {stage}"
        _, begun, before = self._first
        left = eta(now - begun, done - before, total - before)
        self.say(f"      {self._stage}{part}: {done}/{total}, {left} {note}".rstrip())

    def done(self, seconds: float, reused: bool, key_facts: str) -> None:
        """Say how the announced stage went."""
        how = "reused" if reused else f"{seconds:.1f} s"
        self.say(f"      {how}{': ' if key_facts else ''}{key_facts}")

    def say(self, text: str) -> None:
        """Write a line."""
        self._console.print(text, markup=False)
        if self._log is not None:
            self._log(text.strip())


def table(rows: Sequence[tuple[str, str, str, str]], notes: Sequence[tuple[str, str]]) -> str:
    """Return the closing table (stage, time, metrics, where to look) and notes below it as plain text."""
    from io import StringIO

    from rich import box
    from rich.console import Console
    from rich.table import Table

    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("stage", "time", "what came out", "where to look"):
        out.add_column(heading, justify="right" if heading == "time" else "left", overflow="fold")
    for row in rows:
        out.add_row(*row)
    below = Table(box=None, show_header=False, pad_edge=False)
    for name, value in notes:
        below.add_row(name, value)
    width = min(160, Console().width) if sys.stdout.isatty() else 160
    text = StringIO()
    console = Console(file=text, width=max(width, 80), highlight=False, markup=False)
    console.print(out)
    console.print(below)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"
