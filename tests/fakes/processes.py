"""What tests do to processes and want to be done when they go on."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path


def stand_still(pid: int, seconds: float = 120.0) -> None:
    """Stop a process, and wait until it has stopped with all its threads.

    The signal alone is only a word to it: a thread that is at work goes on for a moment, and of two signals
    that wait for it the kernel may deliver the later one first.
    """
    os.kill(pid, signal.SIGSTOP)
    end = time.monotonic() + seconds
    while not _all(pid, "T"):
        assert time.monotonic() < end, f"process {pid} does not stop"
        time.sleep(0.01)


def kill(pid: int, seconds: float = 120.0) -> None:
    """Kill a process, and wait until it has ended with all its threads; who started it still asks how."""
    os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + seconds
    while Path(f"/proc/{pid}").exists() and not _all(pid, "Z"):
        assert time.monotonic() < end, f"process {pid} does not end"
        time.sleep(0.01)


def _all(pid: int, state: str) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):  # a thread that ends meanwhile
        threads = Path(f"/proc/{pid}/task").glob("*/status")
        return all(f"\nState:\t{state}" in one.read_text() for one in threads)
    return False
