"""Turns of keys at one device: nobody starves, no room is wasted, and nobody gets much more than others."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from serving.turns import Turns
from serving.waiting import LONGEST_RETRY, MAX_WAITING_BYTES, WaitingRoom

KEYS = "abcd"


@dataclass(eq=False)
class Work:
    """Rows that want so many steps each."""

    key: str
    rows: int
    steps: int
    left: int = 0

    def __post_init__(self) -> None:
        self.left = self.steps


class Device:
    """Takes a step with what fits of the work whose turn it is."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.turns: Turns[Work] = Turns()
        self.got: dict[str, int] = {}
        self.waits: dict[Work, int] = {}

    def add(self, work: Work) -> None:
        self.turns.add(work.key, work)
        self.waits[work] = 0

    def step(self) -> int:
        chosen: list[Work] = []

        def offer(work: Work, left: int) -> int:
            if work in chosen or work.rows > left:
                return 0
            chosen.append(work)
            return work.rows

        taken = self.turns.fill(self.room, offer)
        for work in self.waits:
            self.waits[work] += 1
        for work in chosen:
            self.got[work.key] = self.got.get(work.key, 0) + work.rows
            self.waits[work] = 0
            work.left -= 1
            if not work.left:
                self.turns.remove(work.key, work)
                del self.waits[work]
        return taken


works = st.builds(Work, key=st.sampled_from(KEYS), rows=st.integers(1, 4), steps=st.integers(1, 6))


@given(st.lists(works, max_size=30), st.lists(works, max_size=30), st.integers(4, 9))
def test_all_work_is_done_and_no_step_leaves_room_that_somebody_could_use(
    first: list[Work], then: list[Work], room: int
) -> None:
    device = Device(room)
    for work in first:
        device.add(work)
    bound = sum(work.rows * work.steps for work in first + then) + len(first + then)
    for number in range(bound + 1):
        if number < len(then):
            device.add(then[number])
        elif not len(device.turns):
            return
        waiting = [work.rows for work in device.waits]
        smallest, total = min(waiting), sum(waiting)
        taken = device.step()
        assert taken == total or room - taken < max(waiting)
        assert taken == total or taken > 0
        assert smallest <= 4
    raise AssertionError("some work was never done")


@given(st.integers(2, 4), st.integers(4, 9), st.lists(st.integers(1, 4), min_size=4, max_size=4))
def test_keys_that_always_want_something_get_the_same(count: int, room: int, rows: list[int]) -> None:
    device = Device(room)
    for key, size in zip(KEYS[:count], rows, strict=False):
        for _ in range(room):
            device.add(Work(key, size, 10_000))
    for _ in range(60):
        device.step()
        got = [device.got.get(key, 0) for key in KEYS[:count]]
        assert max(got) - min(got) <= room + max(rows), got


@given(st.integers(1, 40), st.integers(4, 9))
def test_one_that_comes_late_is_served_at_the_next_step(steps: int, room: int) -> None:
    device = Device(room)
    for _ in range(64):
        device.add(Work("sweep", 1, 10_000))
    for _ in range(steps):
        device.step()
    single = Work("single", 1, 5)
    device.add(single)
    for _ in range(5):
        device.step()
        assert device.waits.get(single, 0) == 0
    assert single.left == 0


def test_who_was_away_saved_nothing_up_and_who_owes_still_does() -> None:
    device = Device(4)
    for key in "ab":
        for _ in range(4):
            device.add(Work(key, 1, 1000))
    for _ in range(50):
        device.step()
    late = [Work("late", 1, 1000) for _ in range(4)]
    for work in late:
        device.add(work)
    before = dict(device.got)
    for _ in range(30):
        device.step()
    grown = {key: device.got[key] - before.get(key, 0) for key in device.got}
    assert max(grown.values()) - min(grown.values()) <= 4, "it was served for the time that it was away"
    # Leaving and coming back at once does not help either.
    mine = device.got["late"]
    for work in late:
        device.turns.remove("late", work)
        device.turns.add("late", work)
    for _ in range(30):
        device.step()
    assert device.got["late"] - mine <= 30 * 4 / 3 + 4


def test_heavier_rows_count_for_more() -> None:
    turns: Turns[str] = Turns()
    turns.add("large", "large", 4.0)
    turns.add("small", "small", 1.0)
    got = {"large": 0, "small": 0}

    def offer(item: str, left: int) -> int:
        got[item] += 1
        return 1

    for _ in range(100):
        turns.fill(1, offer)
    assert got == {"large": 20, "small": 80}


def test_upcoming_is_one_of_each_key_before_the_second_of_any() -> None:
    turns: Turns[str] = Turns()
    for item in ("a1", "a2", "a3", "b1", "c1", "c2"):
        turns.add(item[0], item)
    turns.fill(1, lambda item, left: 1)
    assert list(turns.upcoming()) == ["b1", "c1", "a1", "c2", "a2", "a3"]
    turns.remove("b", "b1")
    turns.remove("b", "b1")
    assert len(turns) == 5


# -- the waiting room --


def test_the_last_eighth_is_for_keys_that_have_nothing_there() -> None:
    room = WaitingRoom(16)
    taken = 0
    while room.has_room("one", 1, 0):
        room.enter("one", 1, 8, 0)
        taken += 1
    assert taken == 14
    assert room.has_room("two", 2, 0)
    assert not room.has_room("two", 3, 0)
    room.enter("two", 2, 8, 0)
    assert not room.has_room("three", 1, 0)


def test_pictures_that_wait_have_a_bound_in_bytes_and_nothing_is_forgotten() -> None:
    room = WaitingRoom(100)
    assert room.has_room("one", 101, 2 * MAX_WAITING_BYTES), "where nothing waits, anything may"
    room.enter("one", 3, 8, MAX_WAITING_BYTES)
    assert not room.has_room("two", 1, 1)
    room.leave("one", 2, 8, 0)
    assert not room.has_room("two", 1, 1)
    room.leave("one", 1, 8, MAX_WAITING_BYTES)
    assert (room.rows, room.has_room("two", 1, 1)) == (0, True)


def test_the_time_until_there_is_room_is_that_of_the_work_which_leaves_first() -> None:
    room = WaitingRoom(10)
    assert room.seconds(1, 5.0) == 1.0, "nothing waits"
    room.enter("one", 10, 20, 0)
    assert room.seconds(1, None) == 1.0, "nothing is known yet"
    assert room.seconds(1, 5.0) == 20 / 5
    assert room.seconds(4, 5.0) == 4 * 20 / 5
    assert room.seconds(64, 5.0) == 10 * 20 / 5, "all that waits"
    assert room.seconds(1, 1e-6) == LONGEST_RETRY
