"""How fast a process may ask: an even pace for each server, and a word from above before each request."""

from __future__ import annotations

import threading
from collections.abc import Callable
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


_PACES: dict[tuple[str, str | None], Pace] = {}
_LOCK = threading.Lock()


def pace_of(provider: str, endpoint: str | None) -> Pace:
    """Return the pace of this process towards a server."""
    with _LOCK:
        return _PACES.setdefault((provider, endpoint), Pace())
