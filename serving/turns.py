"""Turns of several keys at one device.

Each key has a counter of what it got. Whoever got least is offered room first, and what it takes is counted
at once, so that nobody's share depends on how much the others ask for. The counters are those of the Virtual
Token Counter (Sheng et al., Fairness in Serving Large Language Models, OSDI 2024), counted in rows and steps
instead of tokens.
"""

from __future__ import annotations

import heapq
import threading
from collections import deque
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """Items of several keys, first come first served within a key; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: dict[str, dict[int, tuple[T, float]]] = {}
        self._counters: dict[str, float] = {}

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._queues.values()))

    def add(self, key: str, item: T, weight: float = 1.0) -> None:
        """Put an item behind the others of its key.

        A key that had nothing here begins at the counter of who got least: it need not wait for what others
        got before it came, and it saved nothing up while it was away.

        Args:
            weight: what one row of it counts.
        """
        with self._lock:
            if key not in self._queues:
                # Who leaves and comes back keeps what it owes.
                self._counters[key] = max(self._counters.get(key, 0.0), self._least())
                self._queues[key] = {}
            self._queues[key][id(item)] = item, weight

    def remove(self, key: str, item: T) -> None:
        """Take an item out; nothing happens where it is not there."""
        with self._lock:
            queue = self._queues.get(key, {})
            queue.pop(id(item), None)
            if queue:
                return
            self._queues.pop(key, None)
            least = self._least()
            self._counters = {
                one: counter
                for one, counter in self._counters.items()
                if one in self._queues or (self._queues and counter > least)
            }

    def fill(self, room: int, offer: Callable[[T, int], int]) -> int:
        """Give room to the keys, in turns, until it is used up or nobody takes more.

        Args:
            room: rows.
            offer: called with an item and the room that is left; returns the rows that it took now, at most
                that many. It is called again until it takes none, then the next item of the key is asked.

        Returns:
            The rows that were taken.
        """
        with self._lock:
            queues = {key: deque(queue.values()) for key, queue in self._queues.items()}
            turns = [(self._counters[key], place, key) for place, key in enumerate(queues)]
        heapq.heapify(turns)
        left = room
        while left > 0 and turns:
            counter, place, key = turns[0]
            item, weight = queues[key][0]
            taken = offer(item, left)
            assert 0 <= taken <= left, "an item took more than there was"
            left -= taken
            if taken:
                self._count(key, taken * weight)
                heapq.heapreplace(turns, (counter + taken * weight, place, key))
                continue
            queues[key].popleft()
            if not queues[key]:
                heapq.heappop(turns)
        return room - left

    def upcoming(self) -> Iterator[T]:
        """Return the items about in the order in which they will be served: the first of each key, then the
        second of each."""
        with self._lock:
            keys = sorted(self._queues, key=self._counters.__getitem__)
            queues = [[item for item, _ in self._queues[key].values()] for key in keys]
        for column in zip_longest(*queues):
            yield from (item for item in column if item is not None)

    def _count(self, key: str, amount: float) -> None:
        with self._lock:
            if key in self._counters:
                self._counters[key] += amount

    def _least(self) -> float:
        return min((self._counters[key] for key in self._queues), default=0.0)
