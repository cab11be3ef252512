"""How fast a process may ask: so many at once, at an even pace, after a word from above before each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

before_request: ContextVar[Callable[[str], None] | None] = ContextVar("before_request", default=None)
"""Called with the provider's name before each attempt; may wait. Flows set it to what holds for all."""


class Pace:
    """Lets one request pass at a time, evenly: a token bucket that holds one token."""

    def __init__(self) -> None:
        self._lock, self._free = threading.Lock(), 0.0

    def delay(self, now: float, per_minute: float) -> float:
        """Take the next free moment and return how many seconds it lies ahead.

        Args:
            now: seconds of any clock that does not jump.
            per_minute: requests.
        """
        with self._lock:
            moment = max(now, self._free)
            self._free = moment + 60.0 / per_minute
            return moment - now


class Gate:
    """Lets so many requests of this process be under way at the same time, whoever sends them."""

    def __init__(self) -> None:
        self._change, self._inside = threading.Condition(), 0

    @contextmanager
    def passed(self, limit: int) -> Iterator[None]:
        """Wait until fewer than ``limit`` are inside, and be inside for the block."""
        with self._change:
            self._change.wait_for(lambda: self._inside < limit)
            self._inside += 1
        try:
            yield
        finally:
            with self._change:
                self._inside -= 1
                self._change.notify_all()


class Paces:
    """The paces of a process towards the servers that it asks."""

    def __init__(self) -> None:
        self._lock, self._paces = threading.Lock(), dict[tuple[str, str | None], Pace]()

    def of(self, provider: str, endpoint: str | None) -> Pace:
        """Return the pace towards a server."""
        with self._lock:
            return self._paces.setdefault((provider, endpoint), Pace())
