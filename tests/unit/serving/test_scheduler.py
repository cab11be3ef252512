"""The scheduler on the real engine and a tiny base: who runs when, and what never happens to whom."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from PIL import Image

from registry.errors import Revoked
from serving.backend import Progress
from serving.engine import EditEngine
from serving.errors import Cancelled, Draining, Overloaded, ServingError, UnknownExpression
from serving.metrics import Metrics
from serving.scheduler import Scheduler
from serving.schema import EditResult, SweepRequest
from serving.stepping import step
from serving.tickets import Event, Ticket

TIMEOUT = 300.0
"""Whatever has to happen happens in these seconds, also on a machine that is busy."""


@dataclass
class Heard:
    """What a request heard."""

    events: queue.Queue[Event] = field(default_factory=queue.Queue)
    steps: list[Progress] = field(default_factory=list)
    ticket: Ticket | None = None

    def __call__(self, event: Event) -> None:
        self.events.put(event)

    def next(self) -> Event:
        return self.events.get(timeout=TIMEOUT)

    def results(self) -> list[EditResult]:
        while True:
            event = self.next()
            if isinstance(event, Exception):
                raise event
            if isinstance(event, list):
                return event
            self.steps.append(event)


def ask(image: Image.Image | bytes, *rows: dict[str, float], **more: Any) -> SweepRequest:
    return SweepRequest.make(image=image, rows=rows or ({"happy": 0.7},), **{"steps": 4, **more})


def pixels(result: EditResult) -> np.ndarray:
    return np.asarray(result.image, dtype=np.int16)


def same(one: EditResult, other: EditResult) -> bool:
    return int(np.abs(pixels(one) - pixels(other)).max()) <= 1


@pytest.fixture
def engine(pipeline: Any, make_adapter: Any) -> EditEngine:
    return EditEngine(pipeline, base=make_adapter().card.base, allow_candidates=True)


class Watched:
    """An engine whose steps can be held, watched and broken; everything else is the engine's own."""

    def __init__(self, engine: EditEngine) -> None:
        self._engine = engine
        self.batches: list[list[Any]] = []
        self.gate: threading.Semaphore | None = None
        self.break_step: Callable[[Sequence[Any]], Exception | None] = lambda runs: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def advance(self, runs: Sequence[Any]) -> None:
        if self.gate is not None:
            assert self.gate.acquire(timeout=TIMEOUT)
        self.batches.append(list(runs))
        if error := self.break_step(runs):
            raise error
        self._engine.advance(runs)

    @property
    def rows(self) -> list[int]:
        return [sum(run.rows for run in batch) for batch in self.batches]


@pytest.fixture
def watched(engine: EditEngine) -> Watched:
    return Watched(engine)


@pytest.fixture
def schedule(watched: Watched) -> Iterator[Callable[..., Scheduler]]:
    made: list[Scheduler] = []

    def make(**more: Any) -> Scheduler:
        scheduler = Scheduler(watched, **{"max_rows": 8, "max_waiting": 64, **more})  # type: ignore[arg-type]
        made.append(scheduler)
        scheduler.start()
        return scheduler

    yield make
    for scheduler in made:
        if watched.gate is not None:
            watched.gate.release(10_000)
        scheduler.drain(0)


def send(scheduler: Scheduler, request: SweepRequest, stack: Any, *, key: str = "me", **more: Any) -> Heard:
    heard = Heard()
    heard.ticket = scheduler.take(request, key=key, listener=heard, **more)
    scheduler.enter(heard.ticket, stack)
    return heard


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT
    while not true():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


# -- batches --


def test_an_edit_that_joins_those_that_run_looks_as_it_does_alone(
    engine: EditEngine, watched: Watched, schedule: Any, make_adapter: Any, portrait: Image.Image
) -> None:
    adapter = make_adapter(1)
    stack = ((adapter, 1.0),)
    requests = [ask(portrait, {"happy": 0.2 * n}, seed=n, steps=3 + n) for n in range(4)]
    alone = []
    for request in requests:
        run = engine.begin(request, stack)
        while not run.done:
            engine.advance([run])
        alone.append((run.denoising.latents.clone(), engine.finish(run)[0]))
    watched.gate = threading.Semaphore(0)
    scheduler = schedule()
    heard = []
    for request in requests:
        heard.append(send(scheduler, request, stack))
        wait_until(lambda: heard[-1].ticket.portrait)  # it joins the next step but one at the latest
        before = len(watched.batches)
        watched.gate.release()
        wait_until(lambda before=before: len(watched.batches) > before)
    watched.gate.release(100)
    results = [one.results()[0] for one in heard]
    assert max(watched.rows) >= 3, "no two edits shared a step"
    assert (
        len({run.step for run in watched.batches[3]}) == len(watched.batches[3])
        or len(watched.batches[3]) < 2
    )
    for result, (_, expected) in zip(results, alone, strict=True):
        assert same(result, expected)
    ended = {run.request.seed: run for batch in watched.batches for run in batch}
    for request, (latents, _) in zip(requests, alone, strict=True):
        assert float((ended[request.seed].denoising.latents - latents).abs().max()) <= 1e-5


def test_different_adapters_in_one_batch_equal_single_runs(
    engine: EditEngine, watched: Watched, schedule: Any, make_adapter: Any, portrait: Image.Image
) -> None:
    adapters = [make_adapter(seed, rank=rank) for seed, rank in ((1, 4), (2, 8), (3, 2))]
    stacks = [((one, share),) for one, share in zip(adapters, (1.0, 0.5, 0.8), strict=True)]
    stacks.append(((adapters[0], 0.6), (adapters[1], 0.4)))
    requests = [ask(portrait, seed=n) for n in range(4)]
    alone = []
    for request, stack in zip(requests, stacks, strict=True):
        run = engine.begin(request, stack)
        while not run.done:
            engine.advance([run])
        alone.append(engine.finish(run)[0])
    assert not same(alone[0], alone[1]), "the adapters make no difference"
    watched.gate = threading.Semaphore(0)
    scheduler = schedule()
    heard = [send(scheduler, ask(portrait, steps=1), stacks[0])]
    wait_until(lambda: scheduler.load() == (0, 1))
    heard = [send(scheduler, request, stack) for request, stack in zip(requests, stacks, strict=True)]
    wait_until(lambda: all(one.ticket.portrait for one in heard))
    watched.gate.release(100)
    results = [one.results()[0] for one in heard]
    assert max(len(batch) for batch in watched.batches) == 4
    for result, expected, stack in zip(results, alone, stacks, strict=True):
        assert same(result, expected)
        assert result.adapter_digest == stack[0][0].digest
        assert [used.digest for used in result.stacked] == [one.digest for one, _ in stack[1:]]


def test_a_sweep_larger_than_a_batch_comes_back_whole_and_in_order(
    engine: EditEngine, watched: Watched, schedule: Any, make_adapter: Any, portrait: Image.Image
) -> None:
    stack = ((make_adapter(1), 1.0),)
    rows = [{"happy": n / 10} for n in range(10)]
    request = ask(portrait, *rows, seeds=tuple(range(10)))
    run = engine.begin(request, stack)
    while not run.done:
        engine.advance([run])
    expected = engine.finish(run)
    heard = send(schedule(max_rows=4), request, stack, previews=2)
    results = heard.results()
    assert max(watched.rows) == 4
    assert [dict(one.expressions) for one in results] == rows
    assert [one.seed for one in results] == list(range(10))
    assert all(same(one, other) for one, other in zip(results, expected, strict=True))
    assert [one.step for one in heard.steps] == [1, 2, 3, 4]
    assert [one.step for one in heard.steps if one.pictures] == [1, 3]
    assert all(len(one.pictures) == 10 for one in heard.steps if one.pictures)
    # Of the last row nothing was done at the first preview: it looks like what it starts from.
    first = next(one.pictures for one in heard.steps if one.pictures)
    assert np.array_equal(np.asarray(first[-1]), np.asarray(portrait.resize(first[-1].size)))


def test_an_exact_picture_is_the_same_to_the_byte_whatever_else_runs(
    engine: EditEngine, watched: Watched, schedule: Any, make_adapter: Any, portrait: Image.Image
) -> None:
    stack = ((make_adapter(1), 1.0),)
    rows = [{"happy": 0.3}, {"happy": 0.9}]
    request = ask(portrait, *rows, exact=True)
    expected = [engine.finish(_ended(engine, ask(portrait, row, exact=True), stack))[0] for row in rows]
    watched.gate = threading.Semaphore(0)
    scheduler = schedule()
    others = [send(scheduler, ask(portrait, seed=n, steps=9), stack, key=str(n)) for n in range(5)]
    exact = send(scheduler, request, stack)
    wait_until(lambda: all(one.ticket.portrait for one in (exact, *others)))
    watched.gate.release(1000)
    for result, other in zip(exact.results(), expected, strict=True):
        assert result.image.tobytes() == other.image.tobytes()
    assert all(one.results() for one in others)
    assert all(len(batch) == 1 for batch in watched.batches if any(run.request.exact for run in batch))
    assert max(watched.rows) > 1


def test_sizes_take_turns(watched: Watched, schedule: Any, make_adapter: Any, portrait: Image.Image) -> None:
    stack = ((make_adapter(1), 1.0),)
    scheduler = schedule()
    watched.gate = threading.Semaphore(0)
    large = [send(scheduler, ask(portrait, steps=6, size=(96, 64)), stack, key="large") for _ in range(2)]
    small = [send(scheduler, ask(portrait, steps=6), stack, key="small") for _ in range(2)]
    wait_until(lambda: all(one.ticket.portrait for one in large + small))
    watched.gate.release(1000)
    for one in large + small:
        assert one.results()[0].size in ((96, 64), (64, 64))
    shapes = [batch[0].shape for batch in watched.batches]
    assert all(len({run.shape for run in batch}) == 1 for batch in watched.batches)
    # Neither shape waits for the other to end.
    assert shapes.index(shapes[-1]) < len(shapes) // 2


# -- turns --


def test_a_single_edit_does_not_wait_for_a_sweep(
    watched: Watched, schedule: Any, make_adapter: Any, portrait: Image.Image
) -> None:
    stack = ((make_adapter(1), 1.0),)
    watched.gate = threading.Semaphore(0)
    scheduler = schedule(max_rows=4)
    sweep = send(
        scheduler, ask(portrait, *[{"happy": n / 64} for n in range(64)], steps=20), stack, key="big"
    )
    wait_until(lambda: scheduler.load() == (0, 1))
    watched.gate.release(3)
    wait_until(lambda: len(watched.batches) >= 3)
    single = send(scheduler, ask(portrait, steps=4), stack, key="small")
    wait_until(lambda: single.ticket.portrait)
    before = len(watched.batches)
    watched.gate.release(1000)
    single.results()
    steps = next(
        n for n, batch in enumerate(watched.batches) if any(run.steps == 4 and run.step == 4 for run in batch)
    )
    assert steps - before <= 6, "four steps took more than four turns and the one under way"
    scheduler.cancel(sweep.ticket)


def test_previews_are_spread_evenly(schedule: Any, make_adapter: Any, portrait: Image.Image) -> None:
    heard = send(schedule(), ask(portrait, steps=8), ((make_adapter(1), 1.0),), previews=3)
    heard.results()
    assert [one.step for one in heard.steps] == list(range(1, 9))
    assert [one.step for one in heard.steps if one.pictures] == [2, 4, 6]


# -- leaving --


def test_a_request_that_is_given_up_leaves_before_the_next_step(
    engine: EditEngine, watched: Watched, schedule: Any, make_adapter: Any, portrait: Image.Image
) -> None:
    adapter = make_adapter(1)
    watched.gate = threading.Semaphore(0)
    scheduler = schedule()
    heard = send(scheduler, ask(portrait, steps=50), ((adapter, 1.0),))
    watched.gate.release(2)
    assert isinstance(heard.next(), Progress)
    assert isinstance(heard.next(), Progress)
    scheduler.cancel(heard.ticket)
    watched.gate.release(1)
    with pytest.raises(Cancelled):
        heard.results()
    wait_until(lambda: scheduler.load() == (0, 0))
    assert len(watched.batches) <= 3
    assert engine.slots.evict(adapter), "its adapter is still pinned"


def test_one_that_waits_leaves_at_once_and_its_place_is_free(
    watched: Watched, schedule: Any, make_adapter: Any, portrait: Image.Image
) -> None:
    stack = ((make_adapter(1), 1.0),)
    watched.gate = threading.Semaphore(0)
    scheduler = schedule(max_rows=1, max_waiting=1)
    first = send(scheduler, ask(portrait), stack)
    wait_until(lambda: scheduler.load() == (0, 1))
    second = send(scheduler, ask(portrait), stack)
    with pytest.raises(Overloaded):
        send(scheduler, ask(portrait), stack)
    scheduler.cancel(second.ticket)
    assert isinstance(second.next(), Cancelled), "it waited for the device"
    third = send(scheduler, ask(portrait), stack)
    watched.gate.release(100)
    assert first.results()
    assert third.results()


def test_a_revoked_adapter_is_refused_while_it_waits_and_while_it_runs(
    watched: Watched, schedule: Any, make_adapter: Any, portrait: Image.Image
) -> None:
    good, bad = make_adapter(1), make_adapter(2)
    revoked: set[Any] = set()

    def check(adapter: Any) -> None:
        if adapter.digest in revoked:
            raise Revoked("it was withdrawn", "use another version")

    watched.gate = threading.Semaphore(0)
    scheduler = schedule(max_rows=2, check=check)
    fine = send(scheduler, ask(portrait), ((good, 1.0),))
    runs = send(scheduler, ask(portrait), ((bad, 1.0),))
    wait_until(lambda: runs.ticket.portrait)
    watched.gate.release(2)
    assert isinstance(runs.next(), Progress)
    waits = send(scheduler, ask(portrait), ((good, 1.0), (bad, 0.5)))
    revoked.add(bad.digest)
    watched.gate.release(100)
    for heard in (waits, runs):
        with pytest.raises(Revoked):
            heard.results()
    assert fine.results()[0].adapter_digest == good.digest


def test_a_request_that_was_given_up_is_counted_before_its_place_is_free(
    watched: Watched, schedule: Any, make_adapter: Any, portrait: Image.Image
) -> None:
    metrics = Metrics()
    watched.gate = threading.Semaphore(1)
    scheduler = schedule(metrics=metrics)
    seen: list[tuple[tuple[int, int], bool]] = []

    def drop(run: Any) -> None:
        counted = b"foundry_serving_cancelled_total 1.0" in metrics.exposition()[0]
        seen.append((scheduler.load(), counted))

    watched.drop = drop  # type: ignore[attr-defined]
    heard = send(scheduler, ask(portrait), ((make_adapter(1), 1.0),))
    wait_until(lambda: len(watched.batches) == 1)
    scheduler.cancel(heard.ticket)
    watched.gate.release()
    with pytest.raises(Cancelled):
        heard.results()
    assert seen == [((0, 0), True)]


# -- limits --


def test_a_full_queue_refuses_before_the_picture_is_read(
    watched: Watched, schedule: Any, make_adapter: Any, portrait: Image.Image
) -> None:
    stack = ((make_adapter(1), 1.0),)
    metrics = Metrics()
    watched.gate = threading.Semaphore(0)
    scheduler = schedule(max_rows=2, max_waiting=8, metrics=metrics)
    runs = send(scheduler, ask(portrait, {}, {}), stack)
    wait_until(lambda: not runs.ticket.counted)
    waits = [send(scheduler, ask(portrait), stack) for _ in range(7)]
    with pytest.raises(Overloaded) as full:
        send(scheduler, ask(b"no picture at all"), stack)
    assert 1 <= full.value.retry_after <= 600
    assert "try again in" in full.value.mend
    assert scheduler.retry_after() is None, "the last eighth is for others"
    other = send(scheduler, ask(portrait), stack, key="another")
    assert scheduler.retry_after() is not None
    with pytest.raises(Overloaded):
        send(scheduler, ask(portrait), stack, key="a third")
    ours = send(scheduler, ask(portrait), stack, key="warm-up", ours=True)
    watched.gate.release(1000)
    assert all(one.results() for one in (runs, other, ours, *waits))
    assert b'rejected_total{reason="overloaded"} 2.0' in metrics.exposition()[0]


def test_where_nothing_waits_any_request_is_taken(
    schedule: Any, make_adapter: Any, portrait: Image.Image
) -> None:
    rows = [{"happy": n / 8} for n in range(8)]
    assert len(send(schedule(max_waiting=1), ask(portrait, *rows), ((make_adapter(1), 1.0),)).results()) == 8


def test_a_draining_scheduler_finishes_what_it_has_and_takes_nothing_new(
    watched: Watched, schedule: Any, make_adapter: Any, portrait: Image.Image
) -> None:
    stack = ((make_adapter(1), 1.0),)
    watched.gate = threading.Semaphore(0)
    scheduler = schedule(max_rows=1)
    taken = [send(scheduler, ask(portrait), stack) for _ in range(3)]
    drains = threading.Thread(target=scheduler.drain, args=(TIMEOUT,))
    drains.start()
    wait_until(lambda: scheduler.draining)
    with pytest.raises(Draining):
        send(scheduler, ask(portrait), stack)
    watched.gate.release(100)
    assert all(one.results() for one in taken)
    drains.join(TIMEOUT)
    assert not drains.is_alive()


def test_what_is_not_done_after_the_grace_is_for_another_server(
    watched: Watched, schedule: Any, make_adapter: Any, portrait: Image.Image
) -> None:
    stack = ((make_adapter(1), 1.0),)
    watched.gate = threading.Semaphore(0)
    scheduler = schedule(max_rows=1)
    taken = [send(scheduler, ask(portrait, steps=90), stack) for _ in range(2)]
    wait_until(lambda: scheduler.load() == (1, 1))

    def let_go() -> None:
        """The step that is under way ends when the grace is over, and not before."""
        wait_until(lambda: all(one.ticket.stopped for one in taken))
        watched.gate.release()

    lets_go = threading.Thread(target=let_go)
    lets_go.start()
    scheduler.drain(0.1)
    lets_go.join(TIMEOUT)
    for one in taken:
        with pytest.raises(Draining, match="stopped before"):
            one.results()
    assert len(watched.batches) <= 2


# -- failures --


def test_a_run_that_breaks_a_batch_fails_alone(
    engine: EditEngine, watched: Watched, schedule: Any, make_adapter: Any, portrait: Image.Image
) -> None:
    adapter = make_adapter(1)
    stack = ((adapter, 1.0),)
    expected = [engine.finish(_ended(engine, ask(portrait, seed=n), stack))[0] for n in range(4)]

    def break_step(runs: Sequence[Any]) -> Exception | None:
        return RuntimeError("no") if any(run.request.seed == 2 and run.step == 1 for run in runs) else None

    watched.break_step = break_step
    watched.gate = threading.Semaphore(0)
    scheduler = schedule()
    heard = [send(scheduler, ask(portrait, seed=n), stack) for n in range(4)]
    wait_until(lambda: all(one.ticket.portrait for one in heard))
    watched.gate.release(1000)
    with pytest.raises(ServingError, match="RuntimeError") as failed:
        heard[2].results()
    assert failed.value.mend
    for n in (0, 1, 3):
        result = heard[n].results()[0]
        assert same(result, expected[n])
    assert engine.slots.evict(adapter), "the run that failed left its adapter pinned"


def _ended(engine: EditEngine, request: SweepRequest, stack: Any) -> Any:
    run = engine.begin(request, stack)
    while not run.done:
        engine.advance([run])
    return run


def test_requests_that_cannot_be_prepared_or_begun_fail_alone(
    schedule: Any, make_adapter: Any, portrait: Image.Image
) -> None:
    stack = ((make_adapter(1), 1.0),)
    scheduler = schedule()
    fine = send(scheduler, ask(portrait), stack)
    with pytest.raises(ServingError, match="not a readable"):
        send(scheduler, ask(b"GIF89a"), stack).results()
    with pytest.raises(UnknownExpression):
        send(scheduler, ask(portrait, {"hapy": 1.0}), stack).results()
    assert fine.results()
    assert scheduler.load() == (0, 0)


def test_a_listener_that_fails_ends_its_own_request_only(
    schedule: Any, make_adapter: Any, portrait: Image.Image
) -> None:
    stack = ((make_adapter(1), 1.0),)
    scheduler = schedule()

    def gone(event: Event) -> None:
        raise RuntimeError("nobody is here")

    scheduler.enter(scheduler.take(ask(portrait, steps=90), key="gone", listener=gone), stack)
    assert send(scheduler, ask(portrait), stack).results()
    wait_until(lambda: scheduler.load() == (0, 0))


def test_a_device_that_fails_every_step_is_said_to_be_broken_until_it_works_again(
    watched: Watched, schedule: Any, make_adapter: Any, portrait: Image.Image
) -> None:
    stack = ((make_adapter(1), 1.0),)
    scheduler = schedule()
    watched.break_step = lambda runs: RuntimeError("the device is gone")
    for _ in range(3):
        assert scheduler.problem is None
        with pytest.raises(ServingError):
            send(scheduler, ask(portrait), stack).results()
    assert "3 steps" in scheduler.problem
    watched.break_step = lambda runs: None
    assert send(scheduler, ask(portrait), stack).results()
    assert scheduler.problem is None


def test_whoever_hears_that_the_device_failed_can_ask_what_is_wrong(
    watched: Watched, schedule: Any, make_adapter: Any, portrait: Image.Image
) -> None:
    stack = ((make_adapter(1), 1.0),)
    scheduler = schedule()
    watched.break_step = lambda runs: RuntimeError("the device is gone")
    told: queue.Queue[str | None] = queue.Queue()
    heard = []
    for _ in range(3):
        ticket = scheduler.take(ask(portrait), key="me", listener=lambda event: told.put(scheduler.problem))
        scheduler.enter(ticket, stack)
        heard.append(told.get(timeout=TIMEOUT))
    assert heard[:2] == [None, None]
    assert "3 steps" in str(heard[2])


def test_a_request_too_large_for_the_memory_says_nothing_against_the_device(
    watched: Watched, schedule: Any, make_adapter: Any, portrait: Image.Image
) -> None:
    stack = ((make_adapter(1), 1.0),)
    scheduler = schedule()
    watched.break_step = lambda runs: MemoryError() if runs[0].denoising.size == (128, 128) else None
    for _ in range(4):
        with pytest.raises(ServingError, match="MemoryError"):
            send(scheduler, ask(portrait, size=(128, 128)), stack).results()
    assert scheduler.problem is None
    assert send(scheduler, ask(portrait), stack).results()


@pytest.mark.parametrize("error", [RuntimeError("the device is gone"), MemoryError()])
def test_a_device_to_which_nobody_is_sent_any_more_is_tried_by_ourselves(
    watched: Watched,
    schedule: Any,
    make_adapter: Any,
    portrait: Image.Image,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    monkeypatch.setattr("serving.pulse.TRY_SECONDS", 0.01)
    # Signed for less than 1, and withdrawn meanwhile: neither may keep us from finding out.
    weak, gone = make_adapter(1, conditioning={"strength_max": 0.8}), make_adapter(2)
    withdrawn: list[Any] = []

    def check(adapter: Any) -> None:
        if adapter in withdrawn:
            raise Revoked("it was withdrawn", "use another version")

    scheduler = schedule(check=check)
    assert send(scheduler, ask(portrait, strength=0.5), ((weak, 0.5),)).results()
    watched.break_step = lambda runs: error
    for _ in range(3):
        with pytest.raises(ServingError):
            send(scheduler, ask(portrait), ((gone, 1.0),)).results()
    withdrawn.append(gone)
    wait_until(lambda: scheduler.problem is not None)
    tried = len(watched.batches)
    wait_until(lambda: len(watched.batches) >= tried + 3)
    assert scheduler.problem is not None
    watched.break_step = lambda runs: None
    wait_until(lambda: scheduler.problem is None)
    assert {len(batch) for batch in watched.batches} == {1}
    wait_until(lambda: scheduler.load() == (0, 0))


def test_a_device_on_which_nothing_begins_any_more_is_broken(
    watched: Watched, schedule: Any, make_adapter: Any, portrait: Image.Image
) -> None:
    stack = ((make_adapter(1), 1.0),)
    metrics = Metrics()
    scheduler = schedule(metrics=metrics)
    assert send(scheduler, ask(portrait), stack).results()

    def fails(*given: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    watched.begin = fails  # type: ignore[attr-defined]
    for _ in range(3):
        assert scheduler.device == "works"
        with pytest.raises(ServingError, match="could not begin"):
            send(scheduler, ask(portrait), stack).results()
    assert scheduler.device == "broken"
    assert metrics.registry.get_sample_value("foundry_serving_device_broken") == 1
    del watched.begin  # type: ignore[attr-defined]
    assert send(scheduler, ask(portrait), stack).results()
    assert scheduler.device == "works"
    assert metrics.registry.get_sample_value("foundry_serving_device_broken") == 0


def test_an_adapter_that_never_worked_does_not_speak_for_the_device(
    watched: Watched, schedule: Any, make_adapter: Any, portrait: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.pulse.TRY_SECONDS", 0.01)
    good, bad = make_adapter(1), make_adapter(2)
    scheduler = schedule()
    assert send(scheduler, ask(portrait), ((good, 1.0),)).results()
    watched.break_step = lambda runs: RuntimeError("no") if runs[0].stack[0][0] is bad else None
    for _ in range(3):
        with pytest.raises(ServingError):
            send(scheduler, ask(portrait), ((bad, 1.0),)).results()
    wait_until(lambda: scheduler.device == "works")


def test_a_mistake_of_our_own_leaves_nobody_waiting(
    watched: Watched, schedule: Any, make_adapter: Any, portrait: Image.Image
) -> None:
    stack = ((make_adapter(1), 1.0),)
    metrics = Metrics()
    works, metrics.step_seconds = metrics.step_seconds, None  # type: ignore[assignment]
    scheduler = schedule(metrics=metrics)
    with pytest.raises(ServingError, match="the scheduler failed"):
        send(scheduler, ask(portrait), stack).results()
    metrics.step_seconds = works
    watched.drop = lambda run: 1 / 0  # type: ignore[attr-defined]
    watched.break_step = lambda runs: RuntimeError("no") if runs[0].request.seed else None
    with pytest.raises(ServingError, match="RuntimeError"):
        send(scheduler, ask(portrait, seed=1), stack).results()
    assert send(scheduler, ask(portrait), stack).results()
    assert scheduler.load() == (0, 0)


@dataclass
class Stepping:
    """A run without pictures."""

    step: int = 0


def test_a_batch_that_is_too_large_for_the_memory_makes_the_next_ones_smaller() -> None:
    runs = [Stepping(), Stepping()]

    def advance(some: Sequence[Any]) -> None:
        if len(some) > 1:
            raise MemoryError
        some[0].step += 1

    outcome = step(advance, runs)  # type: ignore[arg-type]
    assert outcome.too_large
    assert list(outcome.errors) == [None, None]
    assert [run.step for run in runs] == [1, 1]


def test_edits_go_on_in_smaller_batches_where_memory_is_short(
    watched: Watched, schedule: Any, make_adapter: Any, portrait: Image.Image
) -> None:
    watched.break_step = lambda runs: MemoryError() if sum(run.rows for run in runs) > 4 else None
    results = send(
        schedule(), ask(portrait, *[{"happy": n / 8} for n in range(8)]), ((make_adapter(1), 1.0),)
    ).results()
    assert len(results) == 8
    assert watched.rows[-1] <= 4


# -- adapters --


def room_for_one(pipeline: Any, adapter: Any) -> EditEngine:
    """An engine on which two adapters like this one do not fit."""
    probe = EditEngine(pipeline, base=adapter.card.base, allow_candidates=True)
    probe.prefetch(adapter)
    memory = probe.slots.memory * 3 // 2
    probe.detach()
    return EditEngine(pipeline, base=adapter.card.base, allow_candidates=True, adapter_memory=memory)


def test_adapters_that_do_not_fit_beside_those_in_use_wait_for_them(
    pipeline: Any, make_adapter: Any, portrait: Image.Image
) -> None:
    adapters = [make_adapter(n) for n in range(3)]
    engine = room_for_one(pipeline, adapters[0])
    scheduler = Scheduler(engine, max_rows=8, max_waiting=64)
    scheduler.start()
    heard = [send(scheduler, ask(portrait), ((adapters[n % 3], 1.0),), key=str(n)) for n in range(9)]
    results = [one.results()[0] for one in heard]
    assert [one.adapter_digest for one in results] == [adapters[n % 3].digest for n in range(9)]
    assert len(engine.slots.residents) == 1
    scheduler.drain(0)


def test_one_whose_adapter_has_no_room_is_not_passed_by_for_ever(
    pipeline: Any, make_adapter: Any, portrait: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.blocked.PATIENCE", 5)
    popular, rare, most = make_adapter(0), make_adapter(1), 400
    watched = Watched(room_for_one(pipeline, popular))
    scheduler = Scheduler(watched, max_rows=8, max_waiting=64)  # type: ignore[arg-type]
    chain: list[Heard] = []
    waits = Heard()

    def follow(runs: Sequence[Any]) -> None:
        """Whenever the last request has begun the next one is there: the popular adapter is never let go."""
        if chain[-1].ticket.begun and len(chain) < most and waits.events.empty():
            chain.append(send(scheduler, ask(portrait), ((popular, 1.0),), key="popular"))
            wait_until(lambda: chain[-1].ticket.portrait)

    chain.append(send(scheduler, ask(portrait), ((popular, 1.0),), key="popular"))
    watched.break_step = follow
    scheduler.start()
    wait_until(lambda: len(chain) > 4)
    scheduler.enter(scheduler.take(ask(portrait), key="rare", listener=waits), ((rare, 1.0),))
    assert waits.results()[0].adapter_digest == rare.digest
    assert len(chain) < most, "it had to wait until nobody wanted the other adapter any more"
    assert all(one.results()[0].adapter_digest == popular.digest for one in chain)
    scheduler.drain(0)


def test_many_threads_get_what_they_asked_for(
    engine: EditEngine, schedule: Any, make_adapter: Any, portrait: Image.Image
) -> None:
    adapters = [make_adapter(n) for n in range(3)]
    expected = {
        (n, seed): engine.finish(_ended(engine, ask(portrait, seed=seed), ((adapters[n], 1.0),)))[0]
        for n in range(3)
        for seed in range(2)
    }
    scheduler = schedule(max_waiting=1000)
    wrong: list[Any] = []

    def caller(number: int) -> None:
        for turn in range(4):
            which = (number + turn) % 3, turn % 2
            heard = send(
                scheduler, ask(portrait, seed=which[1]), ((adapters[which[0]], 1.0),), key=str(number)
            )
            if turn == 3 and number % 2:
                scheduler.cancel(heard.ticket)
                continue
            result = heard.results()[0]
            if not same(result, expected[which]) or result.adapter_digest != adapters[which[0]].digest:
                wrong.append(which)

    threads = [threading.Thread(target=caller, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert not wrong
    wait_until(lambda: scheduler.load() == (0, 0))
    assert all(engine.slots.evict(adapter) for adapter in adapters)
