"""What a run shows: plain lines where there is no terminal, and the closing table."""

from __future__ import annotations

import io

from flows.display import Display, table


def test_plain_lines_tell_stage_progress_and_time_to_go() -> None:
    stream = io.StringIO()
    display = Display(2, stream, seconds=0.0)
    with display.stage("train", "LoRA"):
        display("train", 1, 10)
        display("train", 2, 10, "loss 0.5")
        display("encode", 2, 4)
        display("train", 10, 10)
    display.done(12.34, False, "steps 10")
    with display.stage("scan", "container"):
        pass
    display.done(0.01, True, "")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[1/2] train: LoRA"
    assert lines[1] == "      train: 1/10, starting", "what came before the first news is no speed"
    assert lines[2].startswith("      train: 2/10, ")
    assert lines[2].endswith("to go loss 0.5")
    assert lines[3].startswith("      train encode: 2/4, ")
    assert lines[4:] == ["      12.3 s: steps 10", "[2/2] scan: container", "      reused"]
    assert "\x1b" not in stream.getvalue()


def test_lines_come_no_more_often_than_asked() -> None:
    stream = io.StringIO()
    display = Display(1, stream, seconds=3600)
    with display.stage("train", "LoRA"):
        for step in range(100):
            display("train", step, 100)
    assert len(stream.getvalue().splitlines()) == 1


def test_who_waits_says_so_at_once() -> None:
    stream, log = io.StringIO(), []
    display = Display(1, stream, seconds=3600, log=log.append)
    with display.stage("score", "judged"):
        display("score", 0, 0, "another run is at it")
    assert stream.getvalue().splitlines()[1:] == ["      score: another run is at it"]
    assert log[1:] == ["score: another run is at it"]


def test_the_table_names_every_stage_and_where_to_look() -> None:
    text = table(
        [("train", "reused", "steps 450", "/runs/train-1"), ("scan", "0.1 s", "pass", "/runs/a")],
        [("try", "it")],
    )
    for word in ("train", "reused", "steps 450", "/runs/train-1", "0.1 s", "try"):
        assert word in text
