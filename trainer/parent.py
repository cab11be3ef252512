"""A process and the one that started it: when that one dies, however it dies, this one is asked to stop."""

from __future__ import annotations

import ctypes
import signal
import sys

# linux/prctl.h
_PARENT_DEATH_SIGNAL = 1
_CHILD_SUBREAPER = 36


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Have a signal sent to this process when its parent ends, even by SIGKILL; on Linux, elsewhere nothing.

    It survives an exec, not a fork. What counts is the thread that started this process: it has to live as
    long as this process shall.
    """
    _prctl(_PARENT_DEATH_SIGNAL, number)


def adopt_orphans() -> None:
    """Become the parent of all descendants whose own parent ends; on Linux, elsewhere nothing."""
    _prctl(_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
