"""Paid APIs without a vendor: what is asked, kept, counted, limited and asked again."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.apis import Failed, Paid, Reply, Request, Usage, before_request, retry
from trainer.apis.answers import Answers
from trainer.apis.command import apis
from trainer.apis.ledger import Ledger, Line, Total, totals
from trainer.apis.paid import Clock
from trainer.apis.parallel import Stop, Stopped, in_threads
from trainer.apis.prices import Prices, listed, usd_of
from trainer.apis.rate import Pace
from trainer.apis.request import count_of
from trainer.apis.transport import unreadable
from trainer.errors import ApiError, ApiUnavailable, BudgetSpent
from trainer.sections import ApiSection, PriceSection

CENTS = PriceSection(image=0.1)
EDIT = Request(
    provider="openai", kind="edit", model="m", endpoint="http://h", content={"n": 0}, expected=Usage(images=1)
)


def asking(number: int) -> Request:
    return dataclasses.replace(EDIT, content={"n": number})


class Stopwatch:
    """A clock that nobody waits for."""

    def __init__(self, chance: float = 0.5) -> None:
        self.slept: list[float] = []
        self.clock = Clock(
            sleep=self.slept.append, ticks=lambda: 1e9 + sum(self.slept), chance=lambda: chance
        )

    @property
    def waits(self) -> list[float]:
        """What was waited after failures; the pace of requests takes less than a millisecond here."""
        return [one for one in self.slept if one > 0.01]


def paid(folder: Path, watch: Stopwatch | None = None, run: str = "r", **limits: object) -> Paid:
    settings = ApiSection(per_minute=1e6, prices={"m": CENTS}, **limits)  # type: ignore[arg-type]
    return Paid(settings, folder, run=run, clock=(watch or Stopwatch()).clock)


class Script:
    """Plays what a vendor says, one thing after the other."""

    def __init__(self, *says: Failed | Reply) -> None:
        self.says, self.asked = list(says), 0

    def __call__(self) -> Reply:
        self.asked += 1
        said = self.says.pop(0)
        if isinstance(said, Failed):
            raise said
        return said


PICTURE = Reply(body=b"picture\nwith lines\n\x00", media_type="image/png", input_tokens=7, images=1)
BUSY = Failed(status="429", message="slow down")
LATE = Failed(status="timeout", message="late", billed="unsure")
PROSE = Failed(status="malformed", message="prose", delivered=True, billed="yes", usage=Usage(images=1))


def lines(folder: Path) -> list[Line]:
    return list(Ledger(folder).lines())


# -- answers --


def test_an_answer_is_kept_and_not_paid_again(tmp_path: Path) -> None:
    script = Script(PICTURE)
    first = paid(tmp_path).ask(EDIT, script)
    again = paid(tmp_path, run="another").ask(EDIT, script)
    assert (first.reused, again.reused, script.asked) == (False, True, 1)
    assert (again.body, again.media_type, again.reply) == (PICTURE.body, "image/png", PICTURE)
    assert (first.usd, again.usd) == (0.1, 0.0)
    assert [line.status for line in lines(tmp_path)] == ["ok"]


def test_a_refusal_is_an_answer_too(tmp_path: Path) -> None:
    script = Script(Reply(refused="SAFETY"))
    assert paid(tmp_path).ask(EDIT, script).refused == "SAFETY"
    assert paid(tmp_path).ask(EDIT, script).refused == "SAFETY"
    assert script.asked == 1
    assert [line.status for line in lines(tmp_path)] == ["refused"]


OTHERS = {
    "provider": dataclasses.replace(EDIT, provider="gemini"),
    "kind": dataclasses.replace(EDIT, kind="score"),
    "model": dataclasses.replace(EDIT, model="m2"),
    "endpoint": dataclasses.replace(EDIT, endpoint=None),
    "content": asking(1),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_decides_the_answer_decides_its_address(what: str) -> None:
    assert OTHERS[what].digest != EDIT.digest


def test_what_does_not_decide_the_answer_does_not_change_its_address() -> None:
    assert dataclasses.replace(EDIT, expected=Usage(), resolution="4K").digest == EDIT.digest


@pytest.mark.parametrize("count", [-1, None, True, 1.5, "3"])
@pytest.mark.parametrize("name", ["input_tokens", "output_tokens", "images"])
def test_what_is_no_count_is_in_no_usage_and_no_reply(name: str, count: Any) -> None:
    for kind in (Usage, Reply):
        with pytest.raises(ValueError, match="no count"):
            kind(**{name: count})
    assert count_of(count) is None
    assert (count_of(0), count_of(10**30)) == (0, None)


@pytest.mark.parametrize("damage", [b"", b"{}", b"no json\n", None])
def test_a_damaged_answer_is_asked_again(tmp_path: Path, damage: bytes | None) -> None:
    paid(tmp_path).ask(EDIT, Script(PICTURE))
    path = Answers(tmp_path).path(EDIT.digest)
    path.write_bytes(path.read_bytes()[:-1] if damage is None else damage)
    assert paid(tmp_path).ask(EDIT, Script(PICTURE)).body == PICTURE.body
    assert Answers(tmp_path).get(EDIT.digest) == PICTURE


@settings(deadline=None)
@given(
    body=st.binary(max_size=200),
    refused=st.none() | st.text(max_size=20),
    tokens=st.integers(0, 10**9),
    counted=st.booleans(),
)
def test_any_reply_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, body: bytes, refused: str | None, tokens: int, counted: bool
) -> None:
    answers = Answers(tmp_path_factory.mktemp("a"))
    reply = Reply(body=body, media_type="x/y", output_tokens=tokens, refused=refused, counted=counted)
    answers.put(EDIT, reply)
    assert answers.get(EDIT.digest) == reply


@pytest.mark.parametrize("tokens", [0, 7])
def test_answers_from_before_it_was_kept_who_counts_are_read(tmp_path: Path, tokens: int) -> None:
    reply = dataclasses.replace(PICTURE, input_tokens=tokens)
    Answers(tmp_path).put(EDIT, reply)
    path = Answers(tmp_path).path(EDIT.digest)
    before = path.read_bytes()
    path.write_bytes(before.replace(b'"counted":true,', b""))
    assert path.read_bytes() != before
    assert Answers(tmp_path).get(EDIT.digest) == dataclasses.replace(reply, counted=tokens > 0)


# -- asking again --


def test_a_busy_server_is_asked_again_after_what_it_wants(tmp_path: Path) -> None:
    watch = Stopwatch()
    answer = paid(tmp_path, watch).ask(EDIT, Script(dataclasses.replace(BUSY, after=20.0), LATE, PICTURE))
    # What is asked for, and half (the chance) of 1 and of 2 seconds.
    assert watch.waits == [20.5, 1.0]
    assert (answer.attempts, answer.usd) == (3, 0.2)
    told = [(line.attempt, line.status, line.billed, line.usd, line.usage.images) for line in lines(tmp_path)]
    assert told == [(1, "429", "no", 0.0, 0), (2, "timeout", "unsure", 0.1, 0), (3, "ok", "yes", 0.1, 1)]


def test_a_server_that_never_answers_is_left_alone(tmp_path: Path) -> None:
    script = Script(*[BUSY] * 20)
    with pytest.raises(ApiUnavailable, match=r"did not answer after 6 attempts.*slow down") as caught:
        paid(tmp_path).ask(EDIT, script)
    assert (script.asked, caught.value.exit_code) == (retry.TRIES, 20)
    assert paid(tmp_path).kept(EDIT) is None


def test_a_server_that_wants_an_hour_is_not_waited_for(tmp_path: Path) -> None:
    watch = Stopwatch()
    with pytest.raises(ApiUnavailable, match="after 1 attempt and asks to wait 3600 seconds"):
        paid(tmp_path, watch).ask(EDIT, Script(dataclasses.replace(BUSY, after=3600.0)))
    assert watch.waits == []


def test_what_no_repetition_mends_is_not_repeated(tmp_path: Path) -> None:
    script = Script(Failed(status="404", message="no such model", mend="look it up", repeat=False))
    with pytest.raises(ApiError, match="no such model") as caught:
        paid(tmp_path).ask(EDIT, script)
    assert (script.asked, caught.value.mend, caught.value.exit_code) == (1, "look it up", 1)


def test_answers_that_nobody_can_read_are_asked_for_three_times_and_then_recorded(tmp_path: Path) -> None:
    script = Script(PROSE, BUSY, PROSE, PROSE)
    answer = paid(tmp_path).ask(EDIT, script)
    assert answer.refused == "malformed: prose"
    assert (answer.attempts, answer.usd) == (4, pytest.approx(0.3))
    assert paid(tmp_path).ask(EDIT, script).reused


def test_what_a_server_in_trouble_says_is_not_recorded(tmp_path: Path) -> None:
    script = Script(*[unreadable("a page")] * retry.TRIES, PICTURE)
    with pytest.raises(ApiUnavailable, match=r"after 6 attempts; .*malformed: a page") as caught:
        paid(tmp_path).ask(EDIT, script)
    assert "look what that server sends" in caught.value.mend
    assert paid(tmp_path).ask(EDIT, script).body == PICTURE.body
    assert {(line.status, line.billed) for line in lines(tmp_path)} == {
        ("malformed", "unsure"),
        ("ok", "yes"),
    }


def test_an_interrupt_is_in_the_ledger_and_leaves_no_reservation(tmp_path: Path) -> None:
    def interrupted() -> Reply:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        paid(tmp_path).ask(EDIT, interrupted)
    assert [(line.status, line.billed, line.usd) for line in lines(tmp_path)] == [("lost", "unsure", 0.1)]
    assert not list((tmp_path / "open").iterdir())


def test_what_could_not_even_be_sent_is_not_billed(tmp_path: Path) -> None:
    def without_a_key() -> Reply:
        raise ApiError("no key", "give one")

    with pytest.raises(ApiError, match="no key"):
        paid(tmp_path).ask(EDIT, without_a_key)
    assert [(line.status, line.billed, line.usd) for line in lines(tmp_path)] == [("not sent", "no", 0.0)]


@settings(deadline=None)
@given(st.integers(1, 40), st.none() | st.floats(0, 600), st.floats(0, 1, exclude_max=True))
def test_waits_stay_within_their_bounds(attempt: int, after: float | None, chance: float) -> None:
    waited = retry.wait(attempt, after, chance)
    assert (after or 0.0) <= waited <= (after or 0.0) + min(60.0, 2.0 ** (attempt - 1))


NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
HEADERS = {
    "seconds": ({"Retry-After": "7"}, 7.0),
    "other case": ({"retry-after": " 7 "}, 7.0),
    "a date": ({"Retry-After": format_datetime(NOW + timedelta(seconds=90), usegmt=True)}, 90.0),
    "a date that is over": ({"Retry-After": format_datetime(NOW - timedelta(days=1), usegmt=True)}, 0.0),
    "another zone": ({"Retry-After": "Sun, 01 Mar 2026 14:00:05 +0200"}, 5.0),
    "none": ({}, None),
    "nonsense": ({"Retry-After": "soon"}, None),
    "negative": ({"Retry-After": "-5"}, None),
    "huge": ({"Retry-After": "9" * 400}, None),
}


@pytest.mark.parametrize("case", HEADERS)
def test_retry_after(case: str) -> None:
    headers, expected = HEADERS[case]
    assert retry.retry_after(headers, NOW.timestamp()) == expected


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_retry_after_is_a_number_of_seconds_or_nothing(text: str) -> None:
    found = retry.retry_after({"Retry-After": text}, NOW.timestamp())
    assert found is None or found >= 0


# -- budgets --


def test_the_budget_in_requests_stops_hard_and_goes_on_with_a_larger_one(tmp_path: Path) -> None:
    script = Script(BUSY, *[PICTURE] * 10)
    small = paid(tmp_path, requests=3)
    small.ask(asking(1), script)
    small.ask(asking(2), script)
    with pytest.raises(BudgetSpent, match=r"r is spent: 3 requests of 3 and 0\.2000 US dollars") as caught:
        small.ask(asking(3), script)
    assert "running.api.requests" in caught.value.mend
    assert script.asked == 3
    larger = paid(tmp_path, requests=4)
    assert [larger.ask(asking(number), script).reused for number in (1, 2, 3)] == [True, True, False]


def test_the_budget_in_money_stops_before_it_is_exceeded(tmp_path: Path) -> None:
    limited, script = paid(tmp_path, money=0.35), Script(*[PICTURE] * 10)
    for number in range(3):
        limited.ask(asking(number), script)
    with pytest.raises(BudgetSpent, match=r"0\.3000 US dollars of 0\.3500.*up to 0\.1000") as caught:
        limited.ask(asking(3), script)
    assert "running.api.money" in caught.value.mend
    assert limited.spent().usd == pytest.approx(0.3)
    assert not paid(tmp_path, money=0.4).ask(asking(3), script).reused


def test_a_price_that_was_announced_too_low_is_not_believed_twice(tmp_path: Path) -> None:
    dear = dataclasses.replace(PICTURE, images=3)
    limited = paid(tmp_path, money=0.65)
    limited.ask(asking(1), Script(dear))
    limited.ask(asking(2), Script(dear))
    with pytest.raises(BudgetSpent, match=r"up to 0\.3000"):
        limited.ask(asking(3), Script(PICTURE))


def test_runs_have_budgets_of_their_own(tmp_path: Path) -> None:
    paid(tmp_path, requests=1, run="a").ask(asking(1), Script(PICTURE))
    paid(tmp_path, requests=1, run="ab").ask(asking(2), Script(PICTURE))
    with pytest.raises(BudgetSpent):
        paid(tmp_path, requests=1, run="a").ask(asking(3), Script(PICTURE))


def test_a_run_that_is_called_like_a_provider_has_its_own_budget(tmp_path: Path) -> None:
    paid(tmp_path, run="another").ask(asking(1), Script(PICTURE))
    assert paid(tmp_path, run="openai").spent() == Total()


def test_money_needs_a_price(tmp_path: Path) -> None:
    unknown = dataclasses.replace(EDIT, model="who-knows")
    with pytest.raises(BudgetSpent, match="price of who-knows at http://h is not known") as caught:
        paid(tmp_path, money=5).ask(unknown, Script(PICTURE))
    assert "running.api.prices" in caught.value.mend
    answer = paid(tmp_path, requests=5).ask(unknown, Script(PICTURE))
    assert answer.usd is None
    assert totals(lines(tmp_path))["r", "openai", "who-knows", "edit"].unpriced == 1


def test_prices_of_vendors_hold_at_their_own_addresses_only() -> None:
    own = dataclasses.replace(EDIT, model="gemini-3-pro-image", endpoint=None)
    prices = Prices({})
    assert prices.of(own) == listed()["gemini-3-pro-image"]
    assert prices.of(dataclasses.replace(own, resolution="4K")) == listed()["gemini-3-pro-image@4K"]
    assert prices.of(dataclasses.replace(own, endpoint="http://h")) is None
    assert Prices({"gemini-3-pro-image": CENTS}).of(own) == CENTS


def test_the_shipped_prices_say_when_and_where_they_were_read() -> None:
    table = json.loads((Path(retry.__file__).parent / "prices.json").read_text())
    assert datetime.fromisoformat(table["read"])
    assert all(model["source"].startswith("https://") for model in table["models"].values())
    assert set(table["models"]) == set(listed())


def test_a_usage_is_priced_by_images_and_tokens() -> None:
    price = PriceSection(image=0.1, input=2, output=10)
    usage = Usage(input_tokens=500_000, output_tokens=100_000, images=2)
    assert usd_of(price, usage) == pytest.approx(0.2 + 1.0 + 1.0)


# -- several processes --

CHILD = """
import sys, time
from pathlib import Path
from trainer.apis import Paid, Reply, Request, Usage
from trainer.sections import ApiSection, PriceSection
from trainer.errors import BudgetSpent

folder, numbers, limit = Path(sys.argv[1]), range(*map(int, sys.argv[2].split(":"))), float(sys.argv[3])
settings = ApiSection(per_minute=1e6, money=limit, prices={"m": PriceSection(image=0.1)})
paid = Paid(settings, folder, run="r")
def send():
    with (folder / "sent").open("a") as log:
        log.write("x\\n")
    time.sleep(0.05)
    return Reply(body=b"x", media_type="image/png", images=1)
while not (folder / "go").exists():
    time.sleep(0.01)
try:
    for number in numbers:
        paid.ask(Request(provider="openai", kind="edit", model="m", endpoint="http://h",
                         content={"n": number}, expected=Usage(images=1)), send)
except BudgetSpent:
    sys.exit(3)
"""


def start(program: str, *arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)])


def sent(folder: Path) -> int:
    return len((folder / "sent").read_text().splitlines())


def test_processes_that_ask_the_same_pay_once(tmp_path: Path) -> None:
    children = [start(CHILD, tmp_path, "0:8", 100) for _ in range(2)]
    (tmp_path / "go").touch()
    assert [child.wait(300) for child in children] == [0, 0]
    assert sent(tmp_path) == 8
    assert len(lines(tmp_path)) == 8


def test_processes_together_do_not_exceed_a_budget(tmp_path: Path) -> None:
    children = [start(CHILD, tmp_path, f"{100 * at}:{100 * at + 50}", 0.75) for at in range(3)]
    (tmp_path / "go").touch()
    assert [child.wait(300) for child in children] == [3, 3, 3]
    assert sent(tmp_path) == 7
    assert sum(line.usd or 0 for line in lines(tmp_path)) == pytest.approx(0.7)


KILLED = """
import sys, time
from pathlib import Path
from trainer.apis import Paid, Reply, Request, Usage
from trainer.sections import ApiSection, PriceSection

folder, when, counted = Path(sys.argv[1]), sys.argv[2], sys.argv[3:] != ["uncounted"]
def send():
    (folder / "sending").touch()
    while not (folder / "locked").exists() or when == "before":
        time.sleep(0.01)
    return Reply(body=b"x", media_type="image/png", images=1, input_tokens=9 * counted, counted=counted)
settings = ApiSection(per_minute=1e6, prices={"m": PriceSection(image=0.1, output=2000.0)})
Paid(settings, folder, run="r").ask(
    Request(provider="openai", kind="edit", model="m", endpoint="http://h", content={"n": 0},
            expected=Usage(images=1, output_tokens=50)), send)
"""


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_process_that_dies_before_the_answer_leaves_an_attempt_that_may_be_billed(tmp_path: Path) -> None:
    child = start(KILLED, tmp_path, "before")
    wait_until((tmp_path / "sending").exists)
    with pytest.raises(BudgetSpent):  # as long as it lives its reservation counts
        paid(tmp_path, requests=1).ask(asking(1), Script(PICTURE))
    os.kill(child.pid, signal.SIGKILL)
    child.wait(120)
    with pytest.raises(BudgetSpent):  # and afterwards the attempt does
        paid(tmp_path, requests=1).ask(asking(1), Script(PICTURE))
    assert [(line.status, line.billed, line.usd) for line in lines(tmp_path)] == [("lost", "unsure", 0.2)]
    assert not paid(tmp_path).ask(EDIT, Script(PICTURE)).reused


TAKEN = {  # the image, or all that was reserved
    "counted": (Total(requests=1, answers=1, input_tokens=9, images=1, usd=0.1), "yes"),
    "uncounted": (Total(requests=1, answers=1, images=1, usd=0.2, unsure_usd=0.2), "unsure"),
}


@pytest.mark.parametrize("how", TAKEN)
def test_a_process_that_dies_after_the_answer_loses_nothing_that_was_paid(tmp_path: Path, how: str) -> None:
    taken, billed = TAKEN[how]
    child = start(KILLED, tmp_path, "after", how)
    wait_until((tmp_path / "sending").exists)
    with Ledger(tmp_path).locked():  # so that it keeps the answer and comes no further
        (tmp_path / "locked").touch()
        wait_until(lambda: Answers(tmp_path).get(EDIT.digest) is not None)
        os.kill(child.pid, signal.SIGKILL)
        child.wait(120)
    assert lines(tmp_path) == []
    answer = paid(tmp_path).ask(EDIT, Script())
    assert (answer.reused, answer.body) == (True, b"x")
    assert paid(tmp_path).spent() == taken
    assert [(line.status, line.billed) for line in lines(tmp_path)] == [("ok", billed)]


# -- the ledger --


def test_a_torn_line_takes_no_other_with_it(tmp_path: Path) -> None:
    paid(tmp_path).ask(asking(1), Script(PICTURE))
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(path.read_bytes() + b'{"id":"torn')
    assert paid(tmp_path).spent().requests == 1
    paid(tmp_path).ask(asking(2), Script(PICTURE))
    path.write_bytes(path.read_bytes() + b'[1]\n{"run":"r"}\nnothing\n')
    assert paid(tmp_path).spent().requests == 2


def test_the_command_shows_runs_and_models(tmp_path: Path) -> None:
    folder = tmp_path / "apis"
    paid(folder, run="one").ask(asking(1), Script(BUSY, PICTURE))
    paid(folder, run="two").ask(asking(2), Script(LATE, Reply(refused="no", input_tokens=5)))
    told = CliRunner().invoke(apis, ["ledger", "--home", str(tmp_path), "--json"], catch_exceptions=False)
    value = json.loads(told.stdout)
    assert [(row["run"], row["requests"], row["retries"], row["refusals"]) for row in value["rows"]] == [
        ("one", 2, 1, 0),
        ("two", 2, 1, 1),
    ]
    assert (value["total"]["usd"], value["total"]["unsure_usd"]) == (0.2, 0.1)
    assert (value["total"]["images"], value["total"]["input_tokens"]) == (1, 12)
    table = CliRunner().invoke(apis, ["ledger", "--home", str(tmp_path), "--run", "two"])
    assert "two" in table.stdout
    assert "one" not in table.stdout
    empty = CliRunner().invoke(apis, ["ledger", "--home", str(tmp_path / "nowhere"), "--json"])
    assert json.loads(empty.stdout)["rows"] == []
    assert not (tmp_path / "nowhere").exists()


# -- pace and threads --


def test_requests_keep_an_even_pace() -> None:
    pace = Pace()
    assert [pace.delay(100.0, 30) for _ in range(4)] == [0.0, 2.0, 4.0, 6.0]
    assert pace.delay(200.0, 30) == 0.0


def test_requests_under_way_are_limited_over_all_parts_of_a_process(tmp_path: Path) -> None:
    lock, inside, most, three = threading.Lock(), 0, 0, threading.Barrier(3, timeout=120)

    def send() -> Reply:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        three.wait()  # so many there may be, and a fourth would now have the time to come
        time.sleep(0.02)
        with lock:
            inside -= 1
        return PICTURE

    in_threads(lambda number: paid(tmp_path, parallel=3).ask(asking(number), send), range(24), 12)
    assert most == 3


def test_who_asks_before_each_attempt_is_told_the_provider(tmp_path: Path) -> None:
    told: list[str] = []
    token = before_request.set(told.append)
    try:
        in_threads(lambda number: paid(tmp_path).ask(asking(number), Script(BUSY, PICTURE)), [1, 2, 3], 3)
    finally:
        before_request.reset(token)
    assert told == ["openai"] * 6


def test_threads_return_results_in_order_and_stop_at_the_first_error() -> None:
    assert in_threads(lambda number: number * 2, range(50), 8) == [number * 2 for number in range(50)]
    begun, gate = [], threading.Event()

    def work(number: int) -> int:
        begun.append(number)
        if number == 0:
            gate.wait(120)
            raise ValueError("first")
        gate.set()
        time.sleep(0.05)
        return number

    with pytest.raises(ValueError, match="first"):
        in_threads(work, range(1000), 2)
    assert len(begun) < 100


def test_who_stops_a_context_stops_its_threads_and_gets_no_half_of_the_results(tmp_path: Path) -> None:
    stop, script = Stop(), Script(PICTURE, PICTURE, PICTURE, PICTURE)

    def work(number: int) -> None:
        paid(tmp_path).ask(asking(number), script)
        stop.set()

    context = copy_context()
    context.run(stop.obeyed)
    with pytest.raises(Stopped):
        context.run(in_threads, lambda _: in_threads(work, range(4), 1), [0], 1)
    with pytest.raises(Stopped):
        context.run(in_threads, work, range(4), 1)
    assert script.asked == 1
    in_threads(work, range(4), 1)
    assert script.asked == 4, "others go on, and what was answered is kept"


INTERRUPTED = """
import signal, sys, threading, time
from pathlib import Path
from trainer.apis.parallel import Stopped, in_threads, pause

signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs inherit that it is ignored
folder, submitted = Path(sys.argv[1]), threading.Event()
class Items(list):
    def __iter__(self):
        yield from super().__iter__()
        submitted.set()
def work(number):
    submitted.wait()  # what an interrupt does to a pool's own locks is up to Python
    (folder / f"begun-{number}").touch()
    try:
        pause(600)
    except Stopped:
        (folder / f"stopped-{number}").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    (folder / f"ended-{number}").touch()
try:
    in_threads(work, Items(range(60)), int(sys.argv[2]))
except BaseException as error:
    (folder / type(error).__name__).touch()
    raise
"""


@pytest.mark.parametrize("threads", [1, 4])
def test_after_ctrl_c_nothing_new_begins_and_what_is_under_way_ends(tmp_path: Path, threads: int) -> None:
    def count(what: str) -> int:
        return len(list(tmp_path.glob(f"{what}-*")))

    child = start(INTERRUPTED, tmp_path, threads)
    try:
        wait_until(lambda: count("begun") == threads)
        os.kill(child.pid, signal.SIGINT)
        wait_until(lambda: count("stopped") == threads)
    finally:
        (tmp_path / "go").touch()
    assert child.wait(300) != 0
    assert (tmp_path / "KeyboardInterrupt").exists()
    assert (count("begun"), count("ended")) == (threads, threads)


def test_who_waits_to_ask_again_stops_with_the_others(tmp_path: Path) -> None:
    script, failed = Script(dataclasses.replace(BUSY, after=300.0), PICTURE), threading.Event()
    asker = Paid(ApiSection(per_minute=1e6), tmp_path, run="r")  # with the clock that everybody has

    def busy() -> Reply:
        failed.set()
        return script()

    def work(number: int) -> None:
        if number == 0:
            asker.ask(EDIT, busy)
        else:
            failed.wait(120)
            raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        in_threads(work, range(2), 2)
    assert script.asked == 1
    assert [line.status for line in lines(tmp_path)] == ["429"]
