"""Several requests under way at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(function: Callable[[Item], Result], items: Sequence[Item], threads: int) -> list[Result]:
    """Return ``function(item)`` for each item, in order, with so many calls at a time.

    After the first error nothing new begins; what is under way ends, so that no answer that is being paid is
    thrown away. Each call sees the caller's context variables.

    Raises:
        Exception: what the first call that failed raised.
    """
    stopped = threading.Event()

    def call(item: Item) -> list[Result]:
        if stopped.is_set():
            return []
        try:
            return [function(item)]
        except BaseException:
            stopped.set()
            raise

    with ThreadPoolExecutor(max_workers=max(1, min(threads, len(items)))) as pool:
        futures = [pool.submit(copy_context().run, call, item) for item in items]
    # Those that did not begin have no result, and then another one has an error.
    return [result for future in futures for result in future.result()]
