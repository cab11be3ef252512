"""Who may begin while somebody waits for the room of an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from PIL import Image

from serving.blocked import PATIENCE, Blocked
from serving.schema import SweepRequest
from serving.tickets import Part, Ticket


@dataclass
class Slots:
    """How many uses keep the adapters that are on the device."""

    kept: dict[Any, int] = field(default_factory=dict)

    def pins(self) -> Mapping[Any, int]:
        return self.kept


@pytest.fixture
def slots() -> Slots:
    return Slots()


@pytest.fixture
def blocked(slots: Slots) -> Blocked:
    return Blocked(slots)  # type: ignore[arg-type]


@pytest.fixture
def request_of(slots: Slots, portrait: Image.Image) -> Any:
    """Makes a request with some adapters, which runs or waits."""

    def make(*adapters: Any, runs: bool = False) -> Ticket:
        ticket = Ticket(
            request=SweepRequest.make(image=portrait, rows=({},)),
            steps=4, key="me", previews=0, listener=lambda event: None, taken=0.0, size=0,
            stack=tuple((adapter, 1.0) for adapter in adapters),
        )  # fmt: skip
        if runs:
            ticket.parts.append(Part(run=None, first=0, began=0.0))  # type: ignore[arg-type]
            for adapter in adapters:
                slots.kept[adapter.digest] = slots.kept.get(adapter.digest, 0) + 1
        return ticket

    return make


def test_it_is_tried_again_when_others_let_their_adapters_go(
    blocked: Blocked, request_of: Any, make_adapter: Any
) -> None:
    one, other = make_adapter(1), make_adapter(2)
    ticket, tickets = request_of(one), [request_of(other, runs=True)]
    assert blocked.may_begin(ticket, 1, tickets)
    assert blocked.wait(ticket, 1, tickets)
    assert not blocked.may_begin(ticket, 2, tickets)
    blocked.freed()
    assert blocked.may_begin(ticket, 3, tickets)


def test_after_some_turns_only_what_takes_no_room_from_the_one_that_waits_longest_begins(
    blocked: Blocked, slots: Slots, request_of: Any, make_adapter: Any
) -> None:
    wanted, under, popular, followed = (make_adapter(n) for n in range(4))
    slots.kept[followed.digest] = 1
    tickets = [request_of(popular, runs=True), request_of(under, runs=True)]
    longest, second = request_of(wanted, under), request_of(make_adapter(5))
    assert blocked.wait(longest, 1, tickets)
    assert blocked.wait(second, 2, tickets)
    blocked.freed()
    assert blocked.wait(longest, 20, tickets), "that it was tried again does not make it wait anew"
    blocked.freed()
    last, late = 1 + PATIENCE, 2 + PATIENCE
    assert blocked.may_begin(request_of(popular), last, tickets)
    assert not blocked.may_begin(request_of(popular), late, tickets)
    assert not blocked.may_begin(request_of(under, popular), late, tickets)
    assert not blocked.may_begin(second, late, tickets)
    assert blocked.may_begin(longest, late, tickets)
    assert blocked.may_begin(request_of(under), late, tickets), "it keeps no room from the other"
    assert blocked.may_begin(request_of(followed, under), late, tickets), "it stays there in any case"
    blocked.forget(longest)
    assert blocked.may_begin(second, late, tickets)
    blocked.forget(second)
    assert blocked.may_begin(request_of(popular), late, tickets)


def test_nobody_waits_for_room_that_will_never_be_there(
    blocked: Blocked, slots: Slots, request_of: Any, make_adapter: Any
) -> None:
    one, under, followed = (make_adapter(n) for n in range(3))
    slots.kept[followed.digest] = 1
    assert not blocked.wait(request_of(one), 1, [])
    tickets = [request_of(under, runs=True), request_of(followed, runs=True)]
    assert not blocked.wait(request_of(one, under), 1, tickets)
    assert blocked.wait(request_of(one), 1, tickets)
