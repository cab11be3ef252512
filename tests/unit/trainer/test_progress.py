"""Progress for people: how much is done and how long the rest takes."""

from __future__ import annotations

import io
import time

import pytest

from trainer.progress import ConsoleProgress, eta


@pytest.mark.parametrize(
    ("elapsed", "done", "total", "expected"),
    [
        (0.0, 0, 10, "starting"),
        (10.0, 5, 10, "10 s to go"),
        (60.0, 1, 11, "10 min to go"),
        (12.4, 10, 10, "done in 12 s"),
    ],
)
def test_the_time_to_go(elapsed: float, done: int, total: int, expected: str) -> None:
    assert eta(elapsed, done, total) == expected


def test_lines_are_few_where_nobody_watches_and_the_end_is_always_told() -> None:
    stream = io.StringIO()
    progress = ConsoleProgress(stream, seconds=3600)
    for done in range(1, 101):
        progress("train", done, 100, "loss 0.5")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[-1].startswith("train        100/100")
    assert lines[-1].endswith("loss 0.5")


def test_who_waits_says_so_at_once_and_has_no_time_to_go() -> None:
    stream = io.StringIO()
    progress = ConsoleProgress(stream, seconds=3600)
    progress("score", 0, 0, "another run is at it")
    progress("score", 1, 4)
    waits, begins = stream.getvalue().splitlines()
    assert waits == "score        another run is at it"
    assert begins.split() == ["score", "1/4", "starting"], "the wait says nothing about the speed"


def test_what_was_done_before_says_nothing_about_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training resumed at 900 of 1000 that does 10 in 10 s has 90 s to go."""
    clock = iter([0.0, 100.0, 110.0, 200.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    progress = ConsoleProgress(stream, seconds=0)
    progress("train", 900, 1000, "resumed")
    progress("train", 910, 1000)
    progress("train", 1000, 1000)
    lines = stream.getvalue().splitlines()
    assert lines[0].split("  ")[-2:] == ["starting", "resumed"]
    assert lines[1].endswith("90 s to go")
    assert lines[2].endswith("done in 200 s")
