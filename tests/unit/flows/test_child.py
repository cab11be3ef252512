"""A program beside a flow: heard line by line, stopped however the flow ends, and nobody stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.child import LINE_LIMIT, Lines, run

#: Starts a process in a session of its own, as torch's launcher does, which starts one more. Each writes its
#: number into the folder; the last one saves when it is told to stop.
FAMILY = """
import os, pathlib, signal, subprocess, sys, time
folder, generation, stubborn = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "stubborn"
if sys.argv[3] == "listening" and generation < 2:  # the first one has the keeper for that
    from trainer.parent import end_with_parent
    end_with_parent()
def save(*_):
    if not stubborn:
        (folder / "saved").write_text("all of it")
        sys.exit(143)
if generation == 0 or stubborn:
    signal.signal(signal.SIGTERM, save)
(folder / f"pid-{generation}").write_text(str(os.getpid()))  # before the next one starts and is heard
child = None
if generation:
    command = [sys.executable, __file__, sys.argv[1], str(generation - 1), sys.argv[3]]
    child = subprocess.Popen(command, start_new_session=generation == 2)
if generation == 0:
    print("at work", flush=True)
time.sleep(600)
"""

FLOW = """
import sys
from flows.child import run
run(sys.argv[2:], lambda stream, line: print(line, flush=True), grace=float(sys.argv[1]))
"""


@pytest.fixture
def family(tmp_path: Path) -> Callable[[str], list[str]]:
    """The command of a program of three generations."""
    program = tmp_path / "family.py"
    program.write_text(FAMILY)
    return lambda how: [sys.executable, str(program), str(tmp_path), "2", how]


def members(folder: Path) -> list[psutil.Process]:
    found = []
    for generation in range(3):
        pid = int((folder / f"pid-{generation}").read_text())
        if psutil.pid_exists(pid):
            found.append(psutil.Process(pid))
    return found


def gone(processes: list[psutil.Process], seconds: float = 120.0) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not alive


class Cancelled(BaseException):
    """As Prefect raises it in the middle of a task."""


def test_both_streams_are_heard_line_by_line_and_the_exit_code_comes_back() -> None:
    program = "import sys; print('out'); print('err', file=sys.stderr); print('no end', end=''); sys.exit(5)"
    heard: list[tuple[str, str]] = []
    code = run([sys.executable, "-c", program], lambda *words: heard.append(words), grace=60)
    assert code == 5
    assert sorted(heard) == [("stderr", "err"), ("stdout", "no end"), ("stdout", "out")]


def test_a_program_that_a_signal_ends_says_which() -> None:
    program = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert run([sys.executable, "-c", program], lambda *_: None, grace=60) == 128 + signal.SIGKILL


def test_a_program_that_does_not_exist_ends_with_an_explanation() -> None:
    heard: list[str] = []
    assert run(["/no/such/program"], lambda _, line: heard.append(line), grace=60) != 0
    assert any("/no/such/program" in line for line in heard)


def test_an_interrupted_flow_asks_every_generation_to_save_and_waits(
    family: Callable[[str], list[str]], tmp_path: Path
) -> None:
    alive: list[psutil.Process] = []

    def hear(stream: str, line: str) -> None:
        alive.extend(members(tmp_path))
        raise Cancelled

    with pytest.raises(Cancelled):
        run(family("gentle"), hear, grace=120)
    assert len(alive) == 3
    assert (tmp_path / "saved").exists()
    assert [one for one in alive if one.is_running()] == [], "nobody may be left when the exception arrives"


def test_a_listener_that_hears_no_more_lets_the_program_save_and_a_second_ctrl_c_does_not(
    tmp_path: Path,
) -> None:
    saves = (
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n"
        "    print('saving', flush=True)\n"
        "    time.sleep(float(sys.argv[2]))\n"
        "    pathlib.Path(sys.argv[1]).touch()\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "print('at work', flush=True)\n"
        "time.sleep(600)\n"
    )

    def deaf(stream: str, line: str) -> None:
        raise BrokenPipeError(32, line)

    def hurried(stream: str, line: str) -> None:
        raise KeyboardInterrupt(line)

    with pytest.raises(BrokenPipeError, match="at work"):
        run([sys.executable, "-c", saves, str(tmp_path / "saved"), "1"], deaf, grace=120)
    assert (tmp_path / "saved").exists()
    with pytest.raises(KeyboardInterrupt, match="saving"):
        run([sys.executable, "-c", saves, str(tmp_path / "never"), "600"], hurried, grace=120)
    assert not (tmp_path / "never").exists()


def test_who_does_not_stop_is_killed_when_the_time_is_over(
    family: Callable[[str], list[str]], tmp_path: Path
) -> None:
    def hear(stream: str, line: str) -> None:
        raise Cancelled

    begun = time.monotonic()
    with pytest.raises(Cancelled):
        run(family("stubborn"), hear, grace=1.5)
    assert time.monotonic() - begun >= 1.5
    assert gone(members(tmp_path))


@pytest.mark.parametrize(("victim", "how"), [("flow", "gentle"), ("keeper", "listening")])
def test_sigkill_of_the_flow_or_of_its_keeper_still_lets_the_program_save(
    victim: str, how: str, family: Callable[[str], list[str]], tmp_path: Path
) -> None:
    """Without the keeper only those stop that listen for their parent, as a training does."""
    flow = subprocess.Popen(
        [sys.executable, "-c", FLOW, "120", *family(how)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert flow.stdout is not None
        assert flow.stdout.readline() == "at work\n"
        (keeper,) = psutil.Process(flow.pid).children()
        alive = [keeper, *members(tmp_path)]
        assert len(alive) == 4
        (flow if victim == "flow" else keeper).kill()
        assert gone(alive)
        assert (tmp_path / "saved").exists()
    finally:
        for process in members(tmp_path):
            process.kill()
        flow.kill()
        flow.communicate()


def test_whom_a_finished_program_leaves_behind_is_stopped(tmp_path: Path) -> None:
    left = tmp_path / "left"
    program = (
        "import subprocess, sys; command = [sys.executable, '-c', 'import time; time.sleep(600)'];"
        " nothing = subprocess.DEVNULL;"
        " daemon = subprocess.Popen(command, start_new_session=True, stdout=nothing, stderr=nothing);"
        f" open({str(left)!r}, 'w').write(str(daemon.pid))"
    )
    assert run([sys.executable, "-c", program], lambda *_: None, grace=60) == 0
    assert not psutil.pid_exists(int(left.read_text()))


def test_the_program_gets_no_signal_of_the_terminal_and_none_of_our_input() -> None:
    heard: list[str] = []
    program = "import os, sys; print(os.getsid(0) != int(sys.argv[1]), sys.stdin.read() == '')"
    own = str(os.getsid(0))
    assert run([sys.executable, "-c", program, own], lambda _, line: heard.append(line), grace=60) == 0
    assert heard == ["True True"]


def test_long_lines_are_cut_and_a_progress_bar_shows_its_last_word() -> None:
    lines = Lines()
    long = b"x" * (LINE_LIMIT * 100)
    assert list(lines.add(long)) == []
    (cut,) = lines.add(b"\n")
    assert cut == f"{'x' * LINE_LIMIT} … (cut)"
    assert list(lines.add(b"short\n10%\r50%\r99%\n\n\xff\n")) == ["short", "99%", "�"]


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=5))
def test_lines_do_not_depend_on_how_the_bytes_arrive(data: bytes, cuts: list[int]) -> None:
    whole, pieces = Lines(), Lines()
    expected = [*whole.add(data), *whole.rest()]
    places = [0, *sorted(cuts), len(data)]
    found = [line for begin, end in pairwise(places) for line in pieces.add(data[begin:end])]
    assert [*found, *pieces.rest()] == expected
