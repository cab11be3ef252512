"""Progress for people: how much is done and how long the rest takes."""

from __future__ import annotations

import io

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
