"""What a training tells: read back as it was told, and nothing else is taken for it."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import Explained, LicenseRefused
from trainer import news
from trainer.errors import Interrupted, TrainerError


def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Everything that is written to stdout's descriptor from now on."""
    lines: list[str] = []
    monkeypatch.setattr(os, "write", lambda number, data: lines.append(data.decode()) or len(data))
    return lines


@pytest.mark.parametrize(
    "error",
    [Interrupted("stopped", "again"), LicenseRefused("wrong", "another key"), TrainerError("bad")],
)
def test_errors_come_back_as_they_were(error: Explained, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = told(monkeypatch)
    news.tell_error(error)
    (line,) = lines
    assert line.endswith("\n")
    read = news.read(line)
    assert read is not None
    back = news.error_of(read)
    assert (type(back), back.message, back.mend) == (type(error), error.message, error.mend)


def test_an_error_that_no_floor_knows_keeps_its_name() -> None:
    back = news.error_of({"error": "os", "message": "m", "mend": "n"})
    assert type(back) is TrainerError
    assert back.message == "os: m"


def test_progress_comes_back_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = told(monkeypatch)
    news.progress("train", 3, 10, "loss 0.5 …")
    assert news.read(lines[0]) == {"stage": "train", "done": 3, "total": 10, "note": "loss 0.5 …"}


@pytest.mark.parametrize(
    "line",
    [
        "", "hello", "[]", "3", "null", '{"stage": "train"}', '{"run": 5}',
        '{"stage": "train", "done": true, "total": 2, "note": ""}',
        '{"stage": "train", "done": 1, "total": 2, "note": "", "error": "x"}',
    ],
)  # fmt: skip
def test_other_lines_are_for_people(line: str) -> None:
    assert news.read(line) is None


@given(st.text() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_no_line_breaks_the_reader(line: str) -> None:
    assert news.read(line) is None
