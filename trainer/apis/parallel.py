"""Several requests under way at once, and how they learn that no more are wanted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_stop: ContextVar[threading.Event | None] = ContextVar("stop", default=None)


class Stopped(Exception):
    """Nothing new is to begin: another call of `in_threads` failed, or a person ended the run."""


def pause(seconds: float) -> None:
    """Sleep; a call of `in_threads` no longer than until nothing new is to begin.

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

    After the first error, and when this thread is interrupted (Ctrl-C), nothing new begins; what is under way
    ends, so that no answer that is being paid is thrown away. Each call sees the caller's context variables.

    Raises:
        Exception: what the first call that failed raised.
    """
    stop = threading.Event()

    def call(item: Item) -> list[Result]:
        _stop.set(stop)
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
        pool.shutdown()
    except BaseException:
        # The interpreter does not end before the pool's queue is empty.
        stop.set()
        pool.shutdown(cancel_futures=True)
        raise
    # Those that did not begin have no result, and then another one has an error.
    return [result for future in futures for result in future.result()]
