"""The waiting room: how much waits, whether more has room, and how long it takes until it has."""

from __future__ import annotations

from collections import Counter

MAX_WAITING_BYTES = 1 << 30
"""Of pictures that wait, as they came."""
LONGEST_RETRY = 600.0
"""Seconds; who is told to try again is never sent away for longer."""


class WaitingRoom:
    """Counts the rows that wait; whoever uses it holds a lock around it.

    The last eighth of the places is for keys of which nothing waits yet, so that one key cannot fill the room
    for all. Where nothing waits any request is taken, however large.

    Args:
        places: rows that may wait.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self._rows: Counter[str] = Counter()
        self._work = 0
        self._bytes = 0

    @property
    def rows(self) -> int:
        """Rows that wait."""
        return self._rows.total()

    def has_room(self, key: str, rows: int, size: int) -> bool:
        """Whether a request of so many rows, with a picture of so many bytes, may wait."""
        if not self._rows:
            return True
        kept = self.places // 8 if self._rows[key] else 0
        return self.rows + rows <= self.places - kept and self._bytes + size <= MAX_WAITING_BYTES

    def enter(self, key: str, rows: int, steps: int, size: int) -> None:
        """Count a request of so many rows, of so many steps each."""
        self._rows[key] += rows
        self._work += rows * steps
        self._bytes += size

    def leave(self, key: str, rows: int, steps: int, size: int) -> None:
        """Count rows that wait no more; ``size`` is 0 while others of their request wait."""
        self._rows[key] -= rows
        if not self._rows[key]:
            del self._rows[key]
        self._work -= rows * steps
        self._bytes -= size

    def seconds(self, rows: int, rate: float | None) -> float:
        """Estimate the time until so many more rows have room.

        Args:
            rate: steps of a row that the device does in a second; None is not known yet.

        Returns:
            The time that the work of the rows takes that have to leave first; 1 second to ten minutes.
        """
        if rate is None or not self._rows:
            return 1.0
        excess = min(self.rows, max(1, self.rows + rows - self.places))
        return min(LONGEST_RETRY, max(1.0, excess * self._work / self.rows / rate))
