"""Requests whose adapters have no room on the device, and what may begin while they wait.

They are tried again whenever others let their adapters go. But others could take turns in keeping the room,
each beginning before the last one has ended. So after some turns nothing begins any more that holds what has
to go for the one that waits longest: those that run end, and it begins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from registry.digest import Digest
    from serving.adapters import AdapterSlots
    from serving.tickets import Ticket

PATIENCE = 32
"""Turns for which a request waits for room while others begin that keep it."""


class Blocked:
    """Knows who waits for room; whoever uses it holds a lock around it.

    Args:
        slots: the adapters on the device.
    """

    def __init__(self, slots: AdapterSlots) -> None:
        self._slots = slots
        # Turn of the first try, and how much had been freed at the last.
        self._waiting: dict[Ticket, tuple[int, int]] = {}
        self._freed = 0

    def freed(self) -> None:
        """Say that a run let its adapters go."""
        self._freed += 1

    def forget(self, ticket: Ticket) -> None:
        """Say that a request has begun, or is over."""
        self._waiting.pop(ticket, None)

    def may_begin(self, ticket: Ticket, turn: int, tickets: Iterable[Ticket]) -> bool:
        """Whether rows of a request may be tried now.

        Args:
            turn: number of the turn.
            tickets: all that were taken.
        """
        if ticket in self._waiting and self._waiting[ticket][1] == self._freed:
            return False
        longest = next(iter(self._waiting), None)
        if longest is None or turn - self._waiting[longest][0] <= PATIENCE:
            return True
        return ticket.needs <= longest.needs | self._staying(tickets)

    def wait(self, ticket: Ticket, turn: int, tickets: Iterable[Ticket]) -> bool:
        """Let a request wait for room; returns False where nothing would leave for it however long it waits.

        Args:
            turn, tickets: as for `may_begin`.
        """
        stay = ticket.needs | self._staying(tickets)
        if all(other.needs <= stay for other in tickets if other.parts):
            return False
        first, _ = self._waiting.get(ticket, (turn, 0))
        self._waiting[ticket] = first, self._freed
        return True

    def _staying(self, tickets: Iterable[Ticket]) -> set[Digest]:
        """The adapters that stay whoever runs, for more keep them than the runs."""
        runs = Counter(digest for ticket in tickets for _ in ticket.parts for digest in ticket.needs)
        return {digest for digest, pins in self._slots.pins().items() if pins > runs[digest]}
