"""The backend in this process, over a real registry and the shipped base."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fakes.adapters import clean_adapter
from fakes.followed import PROD, three_versions
from fakes.followed import wait_until as stand_until
from fakes.registries import NAME, PASSING, objects
from registry.admission import VerifiedAdapter
from registry.client import Registry
from registry.errors import NotFound, Revoked
from registry.families import KNOWN_BASES
from registry.manifest import CARD_NAME, BaseModelRef
from registry.reference import Reference
from servers.served import local_client
from serving import local
from serving.backend import AdapterStatus, Progress
from serving.bases import register
from serving.engine import EditEngine
from serving.errors import (
    BaseNotFound,
    Draining,
    NotServed,
    Overloaded,
    UnknownExpression,
    UsageError,
    WrongBase,
)
from serving.following import Follower
from serving.http.app import service_app
from serving.images import TEXT_KEY, png_bytes
from serving.local import LocalBackend
from serving.metrics import Metrics
from serving.schema import EditResult, StackedAdapter, SweepRequest
from serving.settings import ServingSettings
from trainer.portraits.base import base_path

BASE_ID = "adapter-foundry/portraits-base"
SOON = 300.0
"""Whatever has to happen happens in these, also on a machine that is busy."""


class Steps:
    """The steps of the device: it takes them as they come, and one by one while it is held.

    Attributes:
        held: it waits for `let` before each.
    """

    def __init__(self) -> None:
        self.held = False
        self._let = threading.Semaphore(0)

    def let(self, number: int) -> None:
        """Let it take so many."""
        self._let.release(number)

    def free(self) -> None:
        """Let it take all that come."""
        self.held = False
        self.let(1000)  # one of them is waited for already

    def wait(self) -> None:
        """Wait for the next one."""
        assert not self.held or self._let.acquire(timeout=2 * SOON)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Steps]:
    """Holds the device, so that what a test does meanwhile may take as long as it likes."""
    found, advance = Steps(), EditEngine.advance

    def held(engine: EditEngine, runs: Sequence[Any]) -> None:
        found.wait()
        advance(engine, runs)

    monkeypatch.setattr(EditEngine, "advance", held)
    yield found
    found.free()


@pytest.fixture
def registry(home: Path) -> Registry:
    base = KNOWN_BASES[BASE_ID]
    reference = BaseModelRef(id=base.id, revision=base.revision, family=base.family, license=base.license)
    register(base_path(), reference, home)
    return three_versions(home)


@asynccontextmanager
async def serving(
    registry: Registry, metrics: Metrics | None = None, **settings: Any
) -> AsyncIterator[LocalBackend]:
    """A backend that is started, and closed in the end."""
    given = {"adapters": (PROD,), "follow_seconds": 0.1, **settings}
    backend = LocalBackend(ServingSettings(**given), registry=registry, metrics=metrics)
    try:
        await backend.start()
        yield backend
    finally:
        await backend.close(0)


def ask(portrait: Image.Image, *rows: dict[str, float], **more: Any) -> SweepRequest:
    return SweepRequest.make(image=portrait, rows=rows or ({"happy": 0.8},), **{"steps": 2, **more})


async def heard(backend: LocalBackend, request: SweepRequest, **more: Any) -> list[Any]:
    return [event async for event in backend.stream(request, **{"key": "me", **more})]


async def answer(backend: LocalBackend, request: SweepRequest, **more: Any) -> EditResult:
    (result,) = (await heard(backend, request, **more))[-1]
    return result


async def wait_until(true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(SOON):
        while not await true():
            await asyncio.sleep(0.02)


def same(one: EditResult, other: EditResult) -> bool:
    first, second = (np.asarray(result.image, dtype=np.int16) for result in (one, other))
    return int(np.abs(first - second).max()) <= 1


def test_an_edit_says_at_once_what_answers_and_then_how_far_it_is(
    registry: Registry, portrait: Image.Image
) -> None:
    async def run() -> None:
        metrics = Metrics()
        async with serving(registry, metrics) as backend:
            assert b"step_seconds_count 1.0" in metrics.exposition()[0], "it is not warm"
            health = await backend.health()
            assert (health.ready, health.problem, health.retry_after) == (True, None, None)
            first, *steps, results = await heard(
                backend, ask(portrait, {}, {"surprised": 1.0}, steps=3), previews=1
            )
            assert (first.step, first.steps, first.adapter) == (0, 3, f"{NAME}:1")
            assert [one.step for one in steps] == [1, 2, 3]
            assert [len(one.pictures or ()) for one in steps] == [0, 2, 0]
            assert [one.adapter_digest for one in results] == [first.adapter_digest] * 2
            (status,) = await backend.adapters()
            assert (status.reference, status.digest) == (PROD, first.adapter_digest)
            text = metrics.exposition()[0].decode()
            assert f'e2e_request_latency_seconds_count{{adapter="{NAME}",version="1"}} 1.0' in text
            assert "foundry_serving_request_queue_seconds_count 1.0" in text
            assert "foundry_serving_adapters_resident 1.0" in text

    asyncio.run(run())


def test_a_device_that_makes_no_picture_in_time_is_tried_again(
    registry: Registry, portrait: Image.Image, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        monkeypatch.setattr(local, "WARM_SECONDS", 0.0)
        steps.held = True
        async with serving(registry) as backend:
            health = await backend.health()
            assert (health.ready, "made no picture within" in (health.problem or "")) == (False, True)
            monkeypatch.setattr(local, "WARM_SECONDS", SOON)
            steps.free()
            await wait_until(lambda: _serves(backend, 1))
            assert (await answer(backend, ask(portrait))).adapter == f"{NAME}:1"
            assert (await backend.health()).ready

    asyncio.run(run())


def test_promotions_beneath_many_requests_mix_nothing_and_fail_nobody(
    registry: Registry, portrait: Image.Image
) -> None:
    async def run() -> None:
        async with serving(registry, max_waiting=1000) as backend:
            expected = {
                number: await answer(backend, ask(portrait, adapter=f"{NAME}:{number}"))
                for number in (1, 2, 3)
            }
            assert not same(expected[1], expected[2])
            seen: list[str] = []
            stop = asyncio.Event()

            async def caller(number: int) -> None:
                while not stop.is_set():
                    first, *_, results = await heard(backend, ask(portrait), key=str(number))
                    assert isinstance(first, Progress)
                    assert first.adapter == results[0].adapter
                    assert first.adapter_digest == results[0].adapter_digest
                    version = int(results[0].adapter.rpartition(":")[2])
                    assert results[0].adapter_digest == expected[version].adapter_digest
                    assert same(results[0], expected[version]), "the picture is of another version"
                    seen.append(results[0].adapter)

            callers = [asyncio.create_task(caller(n)) for n in range(6)]
            for number in (2, 3, 1, 2):
                await asyncio.to_thread(registry.promote, f"{NAME}:{number}", "prod")
                await wait_until(lambda number=number: _serves(backend, number))
                before = len(seen)
                await wait_until(lambda number=number, before=before: _answers(seen[before:], number))
            stop.set()
            await asyncio.gather(*callers)
            assert set(seen) == {f"{NAME}:{number}" for number in (1, 2, 3)}

    asyncio.run(run())


async def _serves(backend: LocalBackend, number: int) -> bool:
    status = await backend.adapter(PROD)
    return (status.state, status.version) == ("ready", number)


async def _answers(seen: Sequence[str], number: int) -> bool:
    return f"{NAME}:{number}" in seen


def test_a_revocation_stops_requests_that_run_and_that_wait(
    registry: Registry, portrait: Image.Image, steps: Steps
) -> None:
    async def run() -> None:
        async with serving(registry, max_rows=1) as backend:
            steps.held = True
            long = [
                asyncio.create_task(heard(backend, ask(portrait, steps=100, seed=n), key=str(n)))
                for n in range(3)
            ]
            await wait_until(lambda: _has(backend, running=1, waiting=2))
            await asyncio.to_thread(registry.revoke, f"{NAME}:1", "it was found to be bad")
            await wait_until(lambda: _is_revoked(backend))
            steps.free()
            ended = await asyncio.wait_for(asyncio.gather(*long, return_exceptions=True), SOON)
            assert [type(one) for one in ended] == [Revoked] * 3
            with pytest.raises(Revoked, match="bad"):
                await answer(backend, ask(portrait))
            # It stays where it is asked, or nobody would hear why.
            assert (await backend.health()).ready
            assert "revoked" in ((await backend.adapters())[0].problem or "")
            # The next promotion heals it.
            await asyncio.to_thread(registry.promote, f"{NAME}:2", "prod")
            await wait_until(lambda: _serves(backend, 2))
            assert (await answer(backend, ask(portrait))).adapter == f"{NAME}:2"
            assert (await backend.health()).ready

    asyncio.run(run())


def _resident(metrics: Metrics) -> int:
    text = metrics.exposition()[0].decode()
    return int(float(text.rpartition("foundry_serving_adapter_memory_bytes ")[2].split()[0]))


def test_followed_adapters_stay_on_the_device_when_others_need_room(
    registry: Registry, portrait: Image.Image
) -> None:
    async def run() -> None:
        metrics = Metrics()
        async with serving(registry, metrics):
            size = _resident(metrics)
        async with serving(registry, metrics, adapter_memory=size * 5 // 2) as backend:
            for number in (2, 3, 2):
                result = await answer(backend, ask(portrait, adapter=f"{NAME}:{number}"))
                assert result.adapter == f"{NAME}:{number}"
                assert _resident(metrics) <= size * 5 // 2
        # Where there is room for one only, a new version takes that of the old one.
        async with serving(registry, metrics, adapter_memory=size * 3 // 2) as backend:
            assert (await answer(backend, ask(portrait))).adapter == f"{NAME}:1"
            await asyncio.to_thread(registry.promote, f"{NAME}:3", "prod")
            await wait_until(lambda: _serves(backend, 3))
            assert (await answer(backend, ask(portrait))).adapter == f"{NAME}:3"

    asyncio.run(run())


def test_what_a_reference_moves_to_while_the_adapters_of_all_are_held_is_not_held_twice(
    registry: Registry, portrait: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for one version. Held twice and released once, it would be the last that has it."""
    promoted, moves, goes = threading.Event(), threading.Event(), threading.Event()
    trial, statuses, metrics = local.trial, Follower.statuses, Metrics()

    def last_step_of_a_move(adapter: VerifiedAdapter) -> Any:
        if promoted.is_set() and not goes.is_set():
            moves.set()
            assert goes.wait(SOON)
        return trial(adapter)

    def overtaken(found: Follower) -> list[AdapterStatus]:
        seen = statuses(found)
        if moves.is_set() and not goes.is_set():
            goes.set()
            stand_until(lambda: found.resolve(PROD).digest == found.resolve(f"{NAME}@staging").digest, SOON)
        return seen

    async def settled(backend: LocalBackend) -> bool:
        status = await backend.adapter(PROD)
        return status.version == 3 or status.problem is not None

    monkeypatch.setattr(local, "trial", last_step_of_a_move)
    monkeypatch.setattr(Follower, "statuses", overtaken)

    async def run() -> None:
        async with serving(registry, metrics):
            room = _resident(metrics) * 3 // 2
        await asyncio.to_thread(registry.promote, f"{NAME}:2", "staging")
        async with serving(registry, adapters=(f"{NAME}@staging", PROD), adapter_memory=room) as backend:
            promoted.set()
            await asyncio.to_thread(registry.promote, f"{NAME}:2", "prod")
            assert await asyncio.to_thread(moves.wait, SOON)
            with pytest.raises(UnknownExpression):  # it had the adapters held before it was refused
                await answer(backend, ask(portrait, {"haughty": 1.0}, adapter=PROD))
            assert goes.is_set(), "the request had nothing held"
            await asyncio.to_thread(registry.promote, f"{NAME}:3", "prod")
            await wait_until(lambda: settled(backend))
            status = await backend.adapter(PROD)
            assert (status.version, status.problem) == (3, None)

    asyncio.run(run())


async def _busy(backend: LocalBackend) -> bool:
    return (await backend.health()).running > 0


async def _has(backend: LocalBackend, *, running: int, waiting: int) -> bool:
    health = await backend.health()
    return (health.running, health.waiting) == (running, waiting)


async def _idle(backend: LocalBackend) -> bool:
    return await _has(backend, running=0, waiting=0)


async def _is_revoked(backend: LocalBackend) -> bool:
    return (await backend.adapter(PROD)).state == "revoked"


def test_adapters_are_stacked_by_the_settings_or_by_the_request(
    registry: Registry, portrait: Image.Image
) -> None:
    async def run() -> None:
        async with serving(registry, stacked={PROD: (f"{NAME}:2",)}) as backend:
            more = StackedAdapter(adapter=f"{NAME}:3", strength=0.5)
            result = await answer(backend, ask(portrait, strength=0.7))
            assert (result.adapter, result.strength) == (f"{NAME}:1", 0.7)
            assert [(one.adapter, one.strength) for one in result.stacked] == [(f"{NAME}:2", 1.0)]
            other = await answer(backend, ask(portrait, stacked=(more,), strength=0.7))
            assert [(one.adapter, one.strength) for one in other.stacked] == [(f"{NAME}:3", 0.5)]
            nothing = await answer(backend, ask(portrait, stacked=(), strength=0.7))
            alone = await answer(backend, ask(portrait, adapter=f"{NAME}:1", strength=0.7))
            assert nothing.stacked == alone.stacked == ()
            assert same(alone, nothing)
            assert not same(alone, result)
            # What an answer names makes the same picture again, whatever the settings say by then.
            (used,) = result.stacked
            under = (StackedAdapter(adapter=f"{NAME}@{used.digest}", strength=used.strength),)
            again = await answer(backend, ask(portrait, adapter=f"{NAME}:1", stacked=under, strength=0.7))
            assert same(again, result)
            with pytest.raises(UsageError, match="stacked on itself"):
                await answer(backend, ask(portrait, stacked=(StackedAdapter(adapter=f"{NAME}:1"),)))

    asyncio.run(run())


@pytest.fixture
def gentle(registry: Registry, tmp_path: Path) -> str:
    """The reference of an adapter that is signed for less than its whole strength: 0 to 0.8."""
    files = clean_adapter(KNOWN_BASES[BASE_ID], seed=4)
    card = json.loads(files[CARD_NAME])
    card["conditioning"]["strength_max"] = 0.8
    folder = tmp_path / "gentle"
    folder.mkdir()
    for name, data in {**files, CARD_NAME: json.dumps(card).encode()}.items():
        (folder / name).write_bytes(data)
    registry.push(folder, "gentle", evaluation=PASSING)
    registry.approve("gentle:1", "a person", "looks right")
    return "gentle:1"


def test_an_adapter_signed_for_less_than_its_whole_strength_serves(
    registry: Registry, gentle: str, portrait: Image.Image
) -> None:
    async def run() -> None:
        async with serving(registry, adapters=(gentle, PROD), stacked={PROD: (gentle,)}) as backend:
            result = await answer(backend, ask(portrait, strength=0.5))
            assert (result.adapter, result.strength) == (gentle, 0.5)
            # Where nobody names its strength it has the one that is nearest to 1.
            usual = await answer(backend, ask(portrait))
            assert (usual.adapter, usual.strength) == (gentle, 0.8)
            assert same(usual, await answer(backend, ask(portrait, strength=0.8)))
            for stacked in (None, (StackedAdapter(adapter=gentle),)):
                over = await answer(backend, ask(portrait, adapter=PROD, stacked=stacked))
                assert over.strength == 1.0
                assert [(one.adapter, one.strength) for one in over.stacked] == [(gentle, 0.8)]

    asyncio.run(run())


def test_over_http_nobody_has_to_name_a_strength(
    registry: Registry, gentle: str, portrait: Image.Image
) -> None:
    """OpenAI's clients have no word for it: the adapter has the nearest to 1 that it is signed for."""
    settings = ServingSettings(adapters=(gentle,))
    app = service_app(LocalBackend(settings, registry=registry), settings, home=registry.place.home)
    picture = png_bytes(portrait, {})
    with local_client(app) as client:
        body = {"image": base64.b64encode(picture).decode(), "expressions": {"happy": 0.5}, "steps": 2}
        native = client.post("/v1/edits", json=body)
        assert native.status_code == 200, native.text
        (result,) = native.json()["results"]
        for prompt, intensity in (("happy=0.5", 0.5), ("happy", 0.8)):
            asked = {"prompt": prompt, "steps": "2"}
            openai = client.post("/v1/images/edits", data=asked, files={"image": picture})
            assert openai.status_code == 200, openai.text
            (made,) = openai.json()["data"]
            text = Image.open(io.BytesIO(base64.b64decode(made["b64_json"]))).info[TEXT_KEY]
            facts = json.loads(text)
            assert (facts["strength"], facts["expressions"]) == (0.8, {"happy": intensity})
        assert result["strength"] == 0.8
        refused = client.post("/v1/edits", json={**body, "strength": 1.0})
        assert refused.json()["error"]["code"] == "strength_out_of_range"


@pytest.mark.parametrize(("rows", "size"), [(3, None), (1, (64, 128))])
def test_an_answer_is_bounded_before_anything_is_made(
    registry: Registry, portrait: Image.Image, rows: int, size: tuple[int, int] | None
) -> None:
    async def run() -> None:
        async with serving(registry, max_output_pixels=2 * 64 * 64 - 1) as backend:
            asked = ask(portrait, *[{"happy": 0.1}] * rows, size=size)
            with pytest.raises(UsageError, match="one request may make"):
                await answer(backend, asked)
            assert (await answer(backend, ask(portrait))).steps == 2

    asyncio.run(run())


def test_a_caller_that_goes_away_frees_the_device(
    registry: Registry, portrait: Image.Image, steps: Steps
) -> None:
    async def run() -> None:
        metrics = Metrics()
        async with serving(registry, metrics) as backend:
            steps.held = True
            steps.let(2)
            async with aclosing(backend.stream(ask(portrait, steps=100), key="me")) as events:
                async for event in events:
                    assert isinstance(event, Progress)
                    if event.step == 2:
                        break
            steps.let(1)
            await wait_until(lambda: _idle(backend))
            task = asyncio.create_task(heard(backend, ask(portrait, steps=100)))
            await wait_until(lambda: _busy(backend))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            steps.let(1)
            await wait_until(lambda: _idle(backend))
            assert b"foundry_serving_cancelled_total 2.0" in metrics.exposition()[0]

    asyncio.run(run())


def test_what_cannot_be_answered_is_refused_before_it_waits(
    registry: Registry, portrait: Image.Image
) -> None:
    async def run() -> None:
        metrics = Metrics()
        async with serving(registry, metrics) as backend:
            with pytest.raises(UnknownExpression):
                await answer(backend, ask(portrait, {"hapy": 1.0}))
            with pytest.raises(UsageError, match="multiple of"):
                await answer(backend, ask(portrait, size=(63, 64)))
            with pytest.raises(NotFound):
                await answer(backend, ask(portrait, adapter="nobody@prod"))
            assert await _idle(backend)
            assert b"foundry_serving_cancelled_total 0.0" in metrics.exposition()[0]
            digest = (await backend.adapter(PROD)).digest
            for reference in (f"{NAME}:1", f"{NAME}@{digest}", str(digest)):
                assert (await answer(backend, ask(portrait, adapter=reference))).adapter_digest == digest

    asyncio.run(run())


def test_other_references_are_served_only_on_demand(registry: Registry, portrait: Image.Image) -> None:
    async def run() -> None:
        async with serving(registry, on_demand=False) as backend:
            assert (await answer(backend, ask(portrait))).adapter == f"{NAME}:1"
            with pytest.raises(NotServed):
                await answer(backend, ask(portrait, adapter=f"{NAME}:2"))
        async with serving(registry, adapters=()) as backend:
            with pytest.raises(UsageError, match="no default"):
                await answer(backend, ask(portrait))
            assert (await answer(backend, ask(portrait, adapter=f"{NAME}:2"))).adapter == f"{NAME}:2"

    asyncio.run(run())


def test_callers_that_wait_for_an_adapter_on_demand_hold_up_nobody(
    registry: Registry, portrait: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than asyncio has threads for everything that blocks."""
    load, begun, go = Registry.load, threading.Event(), threading.Event()

    def held(self: Registry, reference: Reference, **options: Any) -> VerifiedAdapter:
        if str(reference) == f"{NAME}:2":
            begun.set()
            go.wait(2 * SOON)
        return load(self, reference, **options)

    async def started() -> bool:
        return begun.is_set()

    async def run() -> None:
        async with serving(registry, stacked={PROD: (f"{NAME}:3",)}) as backend:
            asked = [asyncio.create_task(backend.adapter(f"{NAME}:2")) for _ in range(40)]
            edits = [
                asyncio.create_task(answer(backend, ask(portrait, adapter=f"{NAME}:2"))) for _ in range(2)
            ]
            try:
                await wait_until(started)
                async with asyncio.timeout(SOON):
                    assert (await answer(backend, ask(portrait))).adapter == f"{NAME}:1"
                assert not any(one.done() for one in (*asked, *edits))
                asked.pop().cancel()  # whoever gives up leaves the load to the others
            finally:
                go.set()
            assert {status.version for status in await asyncio.gather(*asked)} == {2}
            assert {result.adapter for result in await asyncio.gather(*edits)} == {f"{NAME}:2"}

    monkeypatch.setattr(Registry, "load", held)
    asyncio.run(run())


def test_a_full_or_closing_backend_says_so(registry: Registry, portrait: Image.Image, steps: Steps) -> None:
    async def run() -> None:
        async with serving(registry, max_rows=1, max_waiting=1) as backend:
            steps.held = True  # until the others were refused
            tasks = [asyncio.create_task(heard(backend, ask(portrait)))]
            await wait_until(lambda: _busy(backend))
            tasks.append(asyncio.create_task(heard(backend, ask(portrait))))
            await wait_until(lambda: _has(backend, running=1, waiting=1))
            with pytest.raises(Overloaded) as full:
                await answer(backend, SweepRequest.make(image=b"no picture", rows=({},)))
            assert full.value.retry_after >= 1
            closing = asyncio.create_task(backend.close(SOON))
            await wait_until(lambda: _draining(backend))
            with pytest.raises(Draining):
                await answer(backend, ask(portrait))
            steps.free()
            assert [len(events[-1]) for events in await asyncio.gather(*tasks)] == [1, 1]
            await closing

    asyncio.run(run())


def test_nothing_is_taken_from_the_moment_on_at_which_a_backend_says_that_it_drains(
    registry: Registry, portrait: Image.Image
) -> None:
    """However long the thread that drains it takes to begin: all that blocks waits for one thread here."""
    go = threading.Event()

    async def run() -> None:
        async with serving(registry) as backend:
            loop = asyncio.get_running_loop()
            loop.set_default_executor(ThreadPoolExecutor(1))
            busy = loop.run_in_executor(None, go.wait, 60)
            closing = asyncio.create_task(backend.close(0))
            try:
                await asyncio.sleep(0)
                assert (await backend.health()).draining
                with pytest.raises(Draining):
                    await answer(backend, ask(portrait))
                assert not busy.done(), "it was taken, and refused when the thread came to it"
            finally:
                go.set()
            await asyncio.gather(busy, closing)

    asyncio.run(run())


async def _draining(backend: LocalBackend) -> bool:
    return (await backend.health()).draining


def test_an_adapter_for_another_base_is_refused_and_its_status_says_why(
    registry: Registry, tmp_path: Path, portrait: Image.Image
) -> None:
    for name, data in clean_adapter(KNOWN_BASES["adapter-foundry/portraits-small-1"]).items():
        (tmp_path / name).write_bytes(data)
    registry.push(tmp_path, "small", evaluation=PASSING)
    registry.approve("small:1", "a person", "looks right")

    async def run() -> None:
        async with serving(registry, adapters=(PROD, "small:1")) as backend:
            status = await backend.adapter("small:1")
            assert status.state == "refused"
            assert "portraits-small-1" in (status.problem or "")
            with pytest.raises(WrongBase):
                await answer(backend, ask(portrait, adapter="small:1"))
            assert (await answer(backend, ask(portrait))).adapter == f"{NAME}:1"
            assert (await backend.health()).ready  # for the others

    asyncio.run(run())


def test_a_base_that_is_not_there_is_an_error_at_start(registry: Registry, tmp_path: Path) -> None:
    async def run() -> None:
        with pytest.raises(BaseNotFound):
            async with serving(registry, bases={BASE_ID: tmp_path}):
                raise AssertionError("it started")

    asyncio.run(run())


def test_a_registry_that_is_down_at_start_is_followed_once_it_is_back(
    registry: Registry, home: Path, portrait: Image.Image
) -> None:
    async def run() -> None:
        away = objects(home).rename(home / "away")
        async with serving(registry) as backend:
            health = await backend.health()
            assert not health.ready
            assert health.problem
            away.rename(objects(home))
            await wait_until(lambda: _ready(backend))
            assert (await answer(backend, ask(portrait))).adapter == f"{NAME}:1"

    asyncio.run(run())


async def _ready(backend: LocalBackend) -> bool:
    return (await backend.health()).ready
