"""Several requests under way at once, and how they learn that no more are wanted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import ContextVar, copy_context
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_stop: ContextVar[Stop | None] = ContextVar("stop", default=None)
#: Of any stop in this process; who waits for one waits for all around it, too.
_said = threading.Condition()
#: Seconds until an interrupt that came at a bad moment is noticed.
_HEARD_AFTER = 1.0


class Stopped(Exception):
    """Nothing new is to begin: another call of `in_threads` failed, or a person ended the run."""


class Stop:
    """Word to everybody in a context that nothing new is to begin.

    It holds for the calls of `in_threads` in that context, too, on whatever thread they run.
    """

    def __init__(self) -> None:
        self._outer, self._set = _stop.get(), False

    def obeyed(self) -> None:
        """Have the current context obey this, and what was obeyed where this was made."""
        _stop.set(self)

    def set(self) -> None:
        """Let nothing new begin from now on; does not wait for what is under way."""
        with _said:
            self._set = True
            _said.notify_all()

    def is_set(self) -> bool:
        """Return whether nothing new is to begin."""
        return self._set or (self._outer is not None and self._outer.is_set())

    def wait(self, seconds: float) -> bool:
        """Wait so long or until nothing new is to begin, and return whether that is so."""
        with _said:
            return _said.wait_for(self.is_set, seconds)


def pause(seconds: float) -> None:
    """Sleep; in a context that obeys a `Stop` no longer than until nothing new is to begin.

    Raises:
        Stopped: nothing is.
    """
    stop = _stop.get()
    if stop is None:
        time.sleep(seconds)
    elif stop.wait(seconds):
        raise Stopped


def in_threads(function: Callable[[Item], Result], items: Sequence[Item], threads: int) -> list[Result]:
    """Return ``function(item)`` for each item, in order, with so many calls at a time.

    After the first error, when this thread is interrupted (Ctrl-C), and when the `Stop` that this context
    obeys is set, nothing new begins; what is under way ends, so that no answer that is being paid is thrown
    away. Each call sees the caller's context variables.

    Raises:
        Exception: what the first call that failed raised.
        Stopped: this context was stopped before all was done.
    """
    stop = Stop()

    def call(item: Item) -> list[Result]:
        stop.obeyed()
        try:
            pause(0)
            return [function(item)]
        except Stopped:
            return []
        except BaseException:
            stop.set()
            raise

    pool = ThreadPoolExecutor(max_workers=max(1, min(threads, len(items))))
    try:
        futures = [pool.submit(copy_context().run, call, item) for item in items]
        # Not for the pool's threads: Python takes one for ended whose `join` was interrupted, and then the
        # process can end before that thread has kept its answer. And only so long at a time: an interrupt at
        # the moment at which a wait begins is heard when it ends.
        for future in futures:
            while wait([future], _HEARD_AFTER).not_done:
                pass
    except BaseException:
        stop.set()
        raise
    finally:
        # The interpreter does not end before the pool's queue is empty.
        pool.shutdown(cancel_futures=True)
    results = [result for future in futures for result in future.result()]
    if len(results) < len(items):
        raise Stopped  # none of them failed, so who stopped them is outside
    return results
