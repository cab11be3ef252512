"""The same work on many items in a few threads; the first error ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

WORKERS = 6
"""Threads of a transfer. More do not help: each holds a chunk, and the hashes need processors too."""

_T = TypeVar("_T")


def each(work: Callable[[_T], object], items: Sequence[_T], workers: int = WORKERS) -> None:
    """Call ``work`` with each item; not in order.

    Raises:
        Exception: whatever ``work`` raised first. No item is begun after it, and nothing runs any more.
    """
    if len(items) < 2 or workers < 2:
        for item in items:
            work(item)
        return
    from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

    pool = ThreadPoolExecutor(min(workers, len(items)), thread_name_prefix="registry")
    try:
        futures = [pool.submit(work, item) for item in items]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
