"""A program that a flow runs beside itself, none of whose processes outlives it.

A crash of CUDA or the OOM killer then takes the program and not the flow, and memory is given back. Between
the two stands a keeper: this module as a small process of its own, which starts the program in a session of
its own and adopts whoever loses his parent in it (torch's launcher gives each of its processes a session, so
a signal to one group does not reach them). The keeper asks all of them to stop - SIGTERM, time to save,
SIGKILL - when it is asked to itself, when the flow is gone, and when the program ended and left somebody
behind. Should the keeper be killed, the kernel passes that on to the program (`trainer.parent`).
"""

from __future__ import annotations

import os
import select
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress

from trainer.parent import adopt_orphans, end_with_parent

#: Characters of a line that are kept; Prefect refuses log lines of a megabyte.
LINE_LIMIT = 4000
_LOOK_SECONDS = 0.5
_KEEPER_SECONDS = 5.0  # what the keeper may need beyond what it grants


def run(
    command: Sequence[str],
    heard: Callable[[str, str], None],
    *,
    grace: float,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run a program until none of its processes is left, and hand on what they say.

    An exception in this process (a cancelled run, Ctrl-C, one of ``heard``) asks them to stop, and is raised
    again when they have; a second Ctrl-C kills them.

    Args:
        command: the program and its arguments.
        heard: is called with "stdout" or "stderr" and a line without its end; one that is longer than
            `LINE_LIMIT` is cut and says so.
        grace: seconds between SIGTERM and SIGKILL.
        environment: of the program; None takes this process's.

    Returns:
        the exit code; 128 + n when signal n ended the program.
    """
    keeper = subprocess.Popen(
        [sys.executable, "-P", "-m", "flows.child", str(os.getpid()), str(grace), *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    seconds = grace + _KEEPER_SECONDS
    try:
        for stream, line in _lines(keeper, seconds):
            heard(stream, line)
        code = keeper.wait()
        return code if code >= 0 else 128 - code
    except BaseException:
        keeper.terminate()
        for stream, line in _lines(keeper, seconds, asked=True):  # their last words
            with suppress(Exception):  # who cannot hear them still lets them save
                heard(stream, line)
        raise
    finally:
        _leave_nobody(keeper)


def _leave_nobody(keeper: subprocess.Popen[bytes]) -> None:
    """Kill what should have ended: the keeper with all below it, or the program whose keeper was killed."""
    if keeper.poll() is None:
        _send(keeper.pid, signal.SIGKILL)
        keeper.kill()
    with suppress(ProcessLookupError):
        os.killpg(keeper.pid, signal.SIGKILL)
    keeper.wait()
    for stream in (keeper.stdout, keeper.stderr):
        if stream is not None:
            stream.close()


def _lines(
    process: subprocess.Popen[bytes], seconds: float, asked: bool = False
) -> Iterator[tuple[str, str]]:
    """Yield the lines of both streams as they come, until all writers are gone.

    Whoever still has a stream ``seconds`` after the process ended, or was ``asked`` to, is not waited for.
    """
    end = time.monotonic() + seconds if asked else None
    assert process.stdout is not None
    assert process.stderr is not None
    with selectors.DefaultSelector() as selector:
        for name, stream in (("stdout", process.stdout), ("stderr", process.stderr)):
            selector.register(stream, selectors.EVENT_READ, (name, Lines()))
        while selector.get_map() and (end is None or time.monotonic() < end):
            # Not for ever: what Prefect raises in this thread arrives between two instructions only.
            for key, _ in selector.select(_LOOK_SECONDS):
                name, lines = key.data
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fileobj)
                for line in lines.add(data) if data else lines.rest():
                    yield name, line
            if end is None and process.poll() is not None:
                end = time.monotonic() + seconds


class Lines:
    """Cuts a stream of bytes into lines of bounded length and keeps no more of it than one line."""

    def __init__(self) -> None:
        self._head, self._length = b"", 0

    def add(self, data: bytes) -> Iterator[str]:
        """Take the next bytes and yield the lines that they complete."""
        *whole, begun = data.split(b"\n")
        for part in whole:
            self._take(part)
            yield from self.rest()
        self._take(begun)

    def rest(self) -> Iterator[str]:
        """Yield the line that was begun, if there is one, and begin another."""
        # A character has four bytes at most; a progress bar's last word stands behind the last return.
        text = self._head.decode("utf-8", "replace").rstrip().rpartition("\r")[2]
        missing = self._length - len(self._head)
        self._head, self._length = b"", 0
        if len(text) > LINE_LIMIT or missing:
            text = f"{text[:LINE_LIMIT]} … (cut)"
        if text:
            yield text

    def _take(self, part: bytes) -> None:
        self._head += part[: max(0, 4 * LINE_LIMIT - len(self._head))]
        self._length += len(part)


def keep(parent: int, grace: float, command: Sequence[str]) -> int:
    """Be the keeper of a program; return its exit code when nobody is left.

    Args:
        parent: the process to which the program belongs.
        grace: seconds between SIGTERM and SIGKILL.
        command: the program and its arguments.
    """
    bell = _bell()
    adopt_orphans()
    if os.getppid() != parent:
        return 128 + signal.SIGTERM
    # This process has one thread, so Python may run between fork and exec.
    program = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=end_with_parent)
    code: int | None = None
    end: float | None = None
    while True:
        rung, _, _ = select.select([bell], [], [], _LOOK_SECONDS)
        heard = os.read(bell, 64) if rung else b""
        ended, nobody = _reap()
        code = ended.get(program.pid, code)
        if nobody:
            return 128 + signal.SIGKILL if code is None else code
        asked = bool(set(heard) & {signal.SIGTERM, signal.SIGINT})
        if end is None and (asked or os.getppid() != parent or code is not None):
            end = time.monotonic() + grace
            _send(os.getpid(), signal.SIGTERM)
        if end is not None and time.monotonic() > end:
            _send(os.getpid(), signal.SIGKILL)


def _bell() -> int:
    """Return a descriptor from which the numbers of the signals can be read that come from now on."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    return read


def _reap() -> tuple[dict[int, int], bool]:
    """Return the exit codes of all that have ended by process, and whether nobody is left."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended, True
        if pid == 0:
            return ended, False
        code = os.waitstatus_to_exitcode(status)
        ended[pid] = code if code >= 0 else 128 - code


def _send(pid: int, number: signal.Signals) -> None:
    """Send a signal to all descendants of a process."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


if __name__ == "__main__":
    sys.exit(keep(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
