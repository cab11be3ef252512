"""Jobs: kept before they are promised, done once in effect, theirs who asked."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from fakes.backends import DrawingBackend, digest_of
from registry.errors import NetworkError
from servers.postgres import Postgres
from servers.served import local_client
from serving.errors import Draining, Overloaded, ServingError, UnknownExpression
from serving.http.answers import Invalid, NoSuchThing, RateLimited
from serving.http.app import service_app
from serving.http.job import MAX_ATTEMPTS, Job, facts
from serving.http.job_table import LEASE_SECONDS, JobTable
from serving.http.jobs import MAX_OPEN, AlreadyUsed, JobRunner, JobStore
from serving.http.keyring import Keys
from serving.http.keys import Caller
from serving.http.webhooks import Sender, Webhook
from serving.images import png_bytes
from serving.schema import EditResult, SweepRequest
from serving.settings import ServingSettings

STUDIO = Caller(name="studio", scopes=("edit", "read"))
OTHER = Caller(name="other", scopes=("edit", "read"))
ADMIN = Caller(name="boss", scopes=("admin",))


SECONDS = 120.0
"""Whatever has to happen happens in these, also on a machine that is busy."""


class Clock:
    """A clock that stands until somebody moves it."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def portrait() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(buffer, "PNG")
    return buffer.getvalue()


def sweep(**changes: object) -> SweepRequest:
    values: dict[str, object] = {"image": portrait(), "rows": ({"happy": 0.2}, {"happy": 0.9}), "steps": 3}
    return SweepRequest.make(**(values | changes))


def encode(request: SweepRequest, result: EditResult) -> bytes:
    return png_bytes(result.image, result.facts())


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> JobStore:
    keys = Keys.open(tmp_path)
    keys.add("studio", ["edit"])
    table = JobTable(f"sqlite:///{tmp_path / 'jobs.db'}", clock)
    return JobStore(table, Sender(keys, loopback=True), keep_seconds=3600, clock=clock)


async def until(condition: Callable[[], bool]) -> None:
    """Waits until something holds."""
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


def now(store: JobStore, job: Job) -> Job:
    """The job as it is kept."""
    found = store.table.get(job.id)
    assert found is not None
    return found


async def ended(store: JobStore, job: Job) -> Job:
    await until(lambda: now(store, job).ended is not None)
    return now(store, job)


async def run(store: JobStore, backend: DrawingBackend, job: Job) -> Job:
    runner = JobRunner(backend, store, encode=encode)
    runner.start()
    try:
        return await ended(store, job)
    finally:
        await runner.close()


# -- taking and answering --


async def accepted(store: JobStore, caller: Caller = STUDIO, **options: object) -> Job:
    return await store.accept(options.pop("request", None) or sweep(), caller=caller, **options)  # type: ignore[arg-type]


def test_a_job_is_answered_with_pictures_that_say_what_made_them(store: JobStore) -> None:
    async def body() -> None:
        job = await run(store, DrawingBackend(), await accepted(store))
        assert (job.state, job.step, job.steps, job.attempts) == ("succeeded", 3, 3, 1)
        assert [result["expressions"] for result in job.results] == [{"happy": 0.2}, {"happy": 0.9}]
        picture = store.table.picture(job.id, 1)
        assert picture is not None
        assert Image.open(io.BytesIO(picture)).size == (64, 64)
        assert store.table.picture(job.id, 2) is None
        assert facts(job)["results"][1]["image"] == f"/v1/jobs/{job.id}/results/1.png"

    asyncio.run(body())


def test_the_request_comes_back_as_it_was(store: JobStore) -> None:
    async def body() -> None:
        asked = sweep(size=(64, 32), seed=2**40, strength=0.5, adapter="pixelsmile@prod")
        assert store.request(await accepted(store, request=asked)) == asked

    asyncio.run(body())


def test_the_picture_of_a_person_is_forgotten_when_the_job_ends(store: JobStore) -> None:
    async def body() -> None:
        done = await run(store, DrawingBackend(), await accepted(store))
        dropped = await accepted(store)
        await store.cancel(dropped.id, STUDIO)
        assert store.table.source(done.id) is None
        assert store.table.source(dropped.id) is None

    asyncio.run(body())


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UnknownExpression("no such word", "try happy"), "unknown_expression"),
        (RuntimeError("x"), "internal_error"),
    ],
)
def test_an_edit_that_fails_says_why_and_faults_say_nothing(
    store: JobStore, error: Exception, code: str
) -> None:
    async def body() -> None:
        backend = DrawingBackend()
        backend.failure = error
        job = await run(store, backend, await accepted(store))
        assert job.state == "failed"
        assert facts(job)["error"]["code"] == code
        assert facts(job)["error"]["message"] != "x"

    asyncio.run(body())


@pytest.mark.parametrize("refusal", [Overloaded("full", "wait", 1.0), Draining("going", "wait")])
def test_a_full_or_stopping_backend_loses_no_job(store: JobStore, clock: Clock, refusal: Exception) -> None:
    async def body() -> None:
        backend = DrawingBackend()
        backend.refusal = refusal
        runner = JobRunner(backend, store, encode=encode)
        runner.start()
        job = await accepted(store)
        for number in range(1, 6):
            await until(lambda number=number: backend.refused == number)  # type: ignore[misc]
            await until(lambda: now(store, job).state == "queued")
            assert now(store, job).attempts <= 1, "waiting for room is no attempt"
            if number == 5:
                backend.refusal = None
            clock.now += 1.5
            store.news.set()
        assert (await ended(store, job)).state == "succeeded"
        await runner.close()

    asyncio.run(body())


@pytest.mark.parametrize(
    "error",
    [
        NetworkError("the registry does not answer", "try again"),
        ServingError("the edit failed (AcceleratorError)", "try again"),
    ],
)
def test_what_is_no_fault_of_the_request_fails_the_job_after_some_attempts(
    store: JobStore, clock: Clock, error: Exception
) -> None:
    async def body() -> None:
        backend = DrawingBackend()
        backend.refusal = error
        runner = JobRunner(backend, store, encode=encode)
        runner.start()
        job = await accepted(store)
        for number in range(1, MAX_ATTEMPTS):
            await until(lambda number=number: backend.refused == number)  # type: ignore[misc]
            await until(lambda: now(store, job).state == "queued")
            clock.now += 100
            store.news.set()
        found = await ended(store, job)
        assert (found.state, found.attempts) == ("failed", MAX_ATTEMPTS)
        await runner.close()

    asyncio.run(body())


# -- once in effect --


def test_the_same_idempotency_key_is_the_same_job(store: JobStore) -> None:
    async def body() -> None:
        first = await accepted(store, idempotency_key="k1")
        assert (await accepted(store, idempotency_key="k1")).id == first.id
        assert (await accepted(store, idempotency_key="k2")).id != first.id
        assert (await accepted(store, OTHER, idempotency_key="k1")).id != first.id
        for other in (sweep(seed=1), sweep(image=portrait() + b"\0")):
            with pytest.raises(AlreadyUsed):
                await accepted(store, request=other, idempotency_key="k1")
        with pytest.raises(AlreadyUsed):
            await accepted(store, idempotency_key="k1", webhook=Webhook(url="http://127.0.0.1:1/"))
        for wrong in ("", "a b", "x" * 256, "é", "a\n"):
            with pytest.raises(Invalid):
                await accepted(store, idempotency_key=wrong)

    asyncio.run(body())


def test_strangers_do_not_meet_under_one_idempotency_key(tmp_path: Path) -> None:
    app = service_app(DrawingBackend(), ServingSettings(public=True), home=tmp_path)
    asked = {"image": base64.b64encode(portrait()).decode(), "expressions": {"happy": 0.5}, "async": True}
    with TestClient(app) as client:
        refused = client.post("/v1/edits", json=asked, headers={"Idempotency-Key": "1"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "bad_request")
        assert "needs an API key" in refused.json()["error"]["message"]
        first, second = (client.post("/v1/edits", json=asked) for _ in range(2))
        assert (first.status_code, second.status_code) == (202, 202)
        assert first.json()["id"] != second.json()["id"]
        assert client.get("/v1/jobs").status_code == 403, "ids of strangers' jobs are told to nobody"
        assert client.get(first.headers["location"]).status_code == 200
        token, _ = app.state.service.keys.keys.add("studio", ["edit"])
        made = [
            client.post("/v1/edits", json=asked, headers={"Idempotency-Key": "1", "X-Api-Key": token})
            for _ in range(2)
        ]
        assert made[0].json()["id"] == made[1].json()["id"]


def test_many_at_once_under_one_idempotency_key_make_one_job(store: JobStore) -> None:
    async def body() -> None:
        jobs = await asyncio.gather(*(accepted(store, idempotency_key="k") for _ in range(20)))
        assert len({job.id for job in jobs}) == 1

    asyncio.run(body())


def test_a_job_is_held_by_one_and_taken_over_when_the_lease_is_over(store: JobStore, clock: Clock) -> None:
    async def body() -> None:
        job, table = await accepted(store), store.table
        assert table.claim("a") is not None
        assert table.claim("b") is None
        clock.now += LEASE_SECONDS - 1
        assert table.renew(job.id, "a", 1, 3)
        clock.now += LEASE_SECONDS - 1
        assert table.claim("b") is None
        clock.now += 2
        taken = table.claim("b")
        assert taken is not None
        assert taken.attempts == 2
        # The first holder was only slow. Whatever it does now has no effect.
        made = [{"steps": 3}]
        assert not table.renew(job.id, "a", 2, 3)
        assert not table.succeed(job.id, "a", [b"late"], made)
        assert not table.fail(job.id, "a", {"error": {}})
        table.give_back(job.id, "a", 0, counts=False)
        assert table.succeed(job.id, "b", [b"good"], made)
        assert not table.succeed(job.id, "b", [b"twice"], made)
        assert table.picture(job.id, 0) == b"good"

    asyncio.run(body())


def test_a_job_that_takes_its_process_with_it_is_given_up(store: JobStore, clock: Clock) -> None:
    async def body() -> None:
        job = await accepted(store)
        for _ in range(MAX_ATTEMPTS):
            assert store.table.claim("dies") is not None
            clock.now += LEASE_SECONDS + 1
        assert store.table.claim("careful") is None
        found = store.table.get(job.id)
        assert found is not None
        assert (found.state, facts(found)["error"]["code"]) == ("failed", "job_lost")

    asyncio.run(body())


def _work_and_hang(path: str, holding: str) -> None:
    """A process that takes a job and never finishes it."""

    async def body() -> None:
        backend = DrawingBackend()
        backend.go.clear()
        store = JobStore(JobTable(path), Sender(Keys(Path("none"))))
        JobRunner(backend, store, encode=encode).start()
        while not backend.running:
            await asyncio.sleep(0.02)
        Path(holding).touch()
        await asyncio.sleep(600)

    asyncio.run(body())


def test_a_killed_process_loses_no_job(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'jobs.db'}"

    async def body() -> None:
        store = JobStore(JobTable(uri), Sender(Keys.open(tmp_path)))
        job = await accepted(store)
        child = multiprocessing.get_context("spawn").Process(
            target=_work_and_hang, args=(uri, str(tmp_path / "holding"))
        )
        child.start()
        await until((tmp_path / "holding").exists)
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert now(store, job).state == "running"
        later = JobStore(JobTable(uri, lambda: time.time() + LEASE_SECONDS + 1), Sender(Keys.open(tmp_path)))
        again = await run(later, DrawingBackend(), job)
        assert (again.state, again.attempts) == ("succeeded", 2)

    asyncio.run(body())


def test_a_process_that_stops_properly_gives_its_jobs_back_at_once(store: JobStore) -> None:
    async def body() -> None:
        backend = DrawingBackend()
        backend.go.clear()
        runner = JobRunner(backend, store, encode=encode)
        runner.start()
        job = await accepted(store)
        await until(lambda: backend.running == 1)
        await runner.close(grace=0.05)
        found = now(store, job)
        assert (found.state, found.attempts, backend.cancelled) == ("queued", 0, 1)
        assert (await run(store, DrawingBackend(), job)).state == "succeeded"

    asyncio.run(body())


def two_stores(folder: Path, clock: Clock) -> list[JobStore]:
    """Of two processes; no lease runs out where the machine is busy, for the clock stands."""
    uri = f"sqlite:///{folder / 'jobs.db'}"
    return [JobStore(JobTable(uri, clock), Sender(Keys.open(folder)), clock=clock) for _ in range(2)]


def test_two_runners_do_each_job_once(tmp_path: Path, clock: Clock) -> None:
    async def body() -> None:
        stores = two_stores(tmp_path, clock)
        backends = [DrawingBackend() for _ in stores]
        for backend in backends:
            backend.go.clear()  # so that each gets some
        runners = [JobRunner(*pair, encode=encode, at_once=2) for pair in zip(backends, stores, strict=True)]
        for runner in runners:
            runner.start()
        jobs = [await accepted(stores[0]) for _ in range(12)]
        await until(lambda: [backend.running for backend in backends] == [2, 2])
        for backend in backends:
            backend.go.set()
        for job in jobs:
            assert (await ended(stores[0], job)).attempts == 1
        for runner in runners:
            await runner.close()
        assert sum(len(backend.asked) for backend in backends) == 12

    asyncio.run(body())


def test_a_process_that_is_not_ready_leaves_the_jobs_to_the_others(tmp_path: Path, clock: Clock) -> None:
    async def body() -> None:
        stores = two_stores(tmp_path, clock)
        broken, good = DrawingBackend(), DrawingBackend()
        broken.problem = "the last 3 steps on the device failed"
        broken.refusal = ServingError("the edit failed (AcceleratorError)", "try again")
        jobs = [await accepted(stores[0]) for _ in range(12)]
        runners = [
            JobRunner(backend, store, encode=encode)
            for backend, store in zip((broken, good), stores, strict=True)
        ]
        for runner in runners:  # the broken one asks first
            runner.start()
        for job in jobs:
            found = await ended(stores[0], job)
            assert (found.state, found.attempts) == ("succeeded", 1)
        assert (broken.refused, len(good.asked)) == (0, 12)
        broken.problem = broken.refusal = None
        await runners[1].close()
        assert (await ended(stores[0], await accepted(stores[0]))).state == "succeeded", "it is ready again"
        await runners[0].close()

    asyncio.run(body())


# -- theirs who asked --


def test_another_key_sees_no_job(store: JobStore) -> None:
    async def body() -> None:
        job = await accepted(store)
        assert (await store.get(job.id, STUDIO)).id == job.id
        assert (await store.get(job.id, ADMIN)).id == job.id
        for look in (store.get, store.cancel):
            with pytest.raises(NoSuchThing):
                await look(job.id, OTHER)
        assert store.table.list("other", 10) == []
        assert [one.id for one in store.table.list("studio", 10)] == [job.id]

    asyncio.run(body())


def test_cancelling_frees_the_device_and_stays(store: JobStore) -> None:
    async def body() -> None:
        backend = DrawingBackend()
        backend.go.clear()
        runner = JobRunner(backend, store, encode=encode)
        runner.start()
        job = await accepted(store)
        await until(lambda: backend.running == 1)
        assert (await store.cancel(job.id, STUDIO)).state == "cancelled"
        await until(lambda: (backend.running, backend.cancelled) == (0, 1))
        backend.go.set()
        assert (await store.cancel(job.id, STUDIO)).state == "cancelled"
        await runner.close()
        assert store.table.claim("x") is None

    asyncio.run(body())


def test_a_job_cancelled_by_another_process_is_given_up_at_the_next_beat(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.http.job_runner.BEAT_SECONDS", 0.05)

    async def body() -> None:
        backend = DrawingBackend()
        backend.go.clear()
        runner = JobRunner(backend, store, encode=encode)
        runner.start()
        job = await accepted(store)
        await until(lambda: backend.running == 1)
        store.table.cancel(job.id)  # as another process would, so that nobody tells this runner
        await until(lambda: backend.cancelled == 1)
        await runner.close()

    asyncio.run(body())


def test_a_runner_that_stalled_does_not_take_its_own_job_again(store: JobStore, clock: Clock) -> None:
    async def body() -> None:
        backend = DrawingBackend()
        backend.go.clear()
        runner = JobRunner(backend, store, encode=encode)
        runner.start()
        first = await accepted(store)
        await until(lambda: backend.running == 1)
        clock.now += LEASE_SECONDS + 1
        second = await accepted(store)
        await until(lambda: backend.running == 2)
        backend.go.set()
        for job in (first, second):
            done = await ended(store, job)
            assert (done.state, done.attempts) == ("succeeded", 1)
        assert len(backend.asked) == 2
        await runner.close()

    asyncio.run(body())


def test_a_key_has_so_many_open_jobs_and_no_more(store: JobStore) -> None:
    async def body() -> None:
        for _ in range(MAX_OPEN):
            await accepted(store)
        with pytest.raises(RateLimited):
            await accepted(store)
        await accepted(store, OTHER)

    asyncio.run(body())


def kept_bytes(store: JobStore, job: Job) -> int:
    """What counts as kept when the caller of a job asks for another one."""
    heard: list[int] = []

    def room(jobs: int, size: int) -> None:
        heard.append(size)
        raise RateLimited("full", "wait", 1.0)

    with pytest.raises(RateLimited):
        store.table.insert(dataclasses.replace(job, id="another"), b"", key=None, room=room)
    return heard[0]


def test_a_job_that_ended_without_pictures_keeps_none(store: JobStore, clock: Clock) -> None:
    async def body() -> None:
        running = await accepted(store)
        assert kept_bytes(store, running) == len(portrait())
        assert store.table.claim("a") is not None
        await store.cancel(running.id, STUDIO)
        await store.cancel((await accepted(store)).id, STUDIO)
        assert kept_bytes(store, running) == 0, "it was cancelled"
        lost = await accepted(store)
        for _ in range(MAX_ATTEMPTS):
            assert store.table.claim("dies") is not None
            clock.now += LEASE_SECONDS + 1
        assert store.table.claim("careful") is None
        assert (now(store, lost).state, kept_bytes(store, lost)) == ("failed", 0)
        expired = await accepted(store)
        clock.now += 3601
        store.remove_old()
        assert (now(store, expired).state, kept_bytes(store, expired)) == ("failed", 0)
        done = await run(store, DrawingBackend(), await accepted(store))
        assert kept_bytes(store, done) == sum(len(store.table.picture(done.id, row) or b"") for row in (0, 1))

    asyncio.run(body())


def test_the_key_with_fewest_running_is_next(store: JobStore, clock: Clock) -> None:
    async def body() -> None:
        for _ in range(3):
            await accepted(store)
            clock.now += 1
        late = await accepted(store, OTHER)
        assert store.table.claim("a") is not None
        second = store.table.claim("a")
        assert second is not None
        assert second.id == late.id

    asyncio.run(body())


def test_old_jobs_are_forgotten_and_stale_ones_fail(store: JobStore, clock: Clock) -> None:
    async def body() -> None:
        done = await run(store, DrawingBackend(), await accepted(store))
        clock.now += 1800
        fresh = await accepted(store)
        clock.now += 1801
        store.remove_old()
        assert store.table.get(done.id) is None
        assert store.table.picture(done.id, 0) is None
        clock.now += 1800
        store.remove_old()
        stale = store.table.get(fresh.id)
        assert stale is not None
        assert (stale.state, facts(stale)["error"]["code"]) == ("failed", "job_expired")

    asyncio.run(body())


# -- over HTTP --


def test_the_routes_of_jobs(tmp_path: Path) -> None:
    backend = DrawingBackend()
    app = service_app(backend, ServingSettings(), home=tmp_path)
    asked = {"image": base64.b64encode(portrait()).decode(), "rows": [{"happy": 0.1}, {"happy": 0.9}]}
    with local_client(app) as client:
        backend.go.clear()
        taken = client.post("/v1/edits", json=asked, headers={"prefer": "respond-async"})
        place = taken.headers["location"]
        assert (taken.status_code, taken.json()["status"]) == (202, "queued")
        assert client.get(f"{place}/results/0.png").json()["error"]["code"] == "not_finished"
        backend.go.set()
        end = time.monotonic() + SECONDS
        while (job := client.get(place).json())["status"] != "succeeded":
            assert time.monotonic() < end, job
            time.sleep(0.05)
        assert [result["image"] for result in job["results"]] == [
            f"{place}/results/{row}.png" for row in (0, 1)
        ]
        picture = client.get(job["results"][1]["image"])
        assert picture.headers["content-type"] == "image/png"
        assert (picture.headers["adapter-name"], picture.headers["adapter-version"]) == ("pixelsmile", "1")
        assert picture.headers["adapter-digest"] == str(digest_of(1))
        assert client.get(f"{place}/results/2.png").status_code == 404
        assert client.get(f"{place}/results/x.png").status_code == 422
        assert [one["id"] for one in client.get("/v1/jobs").json()["jobs"]] == [job["id"]]
        assert client.delete(place).json()["status"] == "succeeded"
        assert client.delete("/v1/jobs/job_none").status_code == 404


# -- on a server --


def test_postgresql_holds_jobs_alike(postgres: Postgres, clock: Clock, tmp_path: Path) -> None:
    async def body() -> None:
        store = JobStore(JobTable(postgres.database(), clock), Sender(Keys.open(tmp_path)), clock=clock)
        jobs = await asyncio.gather(*(accepted(store, idempotency_key="k") for _ in range(8)))
        assert len({job.id for job in jobs}) == 1
        more = [await accepted(store) for _ in range(5)]
        claims = await asyncio.gather(*(asyncio.to_thread(store.table.claim, f"w{n}") for n in range(12)))
        taken = [claim.id for claim in claims if claim is not None]
        assert len(taken) == len(set(taken)), "nobody shares a job"
        while (claim := store.table.claim("last")) is not None:
            taken.append(claim.id)
        assert sorted(taken) == sorted([jobs[0].id, *(job.id for job in more)])
        clock.now += LEASE_SECONDS + 1
        done = await run(store, DrawingBackend(), more[0])
        assert (done.state, done.attempts) == ("succeeded", 2)
        assert store.table.picture(done.id, 1) is not None
        assert store.table.counts()["succeeded"] >= 1

    asyncio.run(body())


@pytest.mark.parametrize("act", ["claims it", "removes it"])
def test_what_expired_is_ended_by_one_process_whatever_another_does_meanwhile(
    postgres: Postgres, clock: Clock, tmp_path: Path, act: str
) -> None:
    """The other has its turn when the one has found the job, and asks for the time to note its end."""
    uri, keys = postgres.database(), Keys.open(tmp_path)
    keys.add("studio", ["edit"])
    other, asked, claimed = JobTable(uri, clock), itertools.count(), []

    def meanwhile() -> float:
        if clock.now > before + 3600 and next(asked) == 1:
            if act == "claims it":
                claimed.append(other.claim("somebody"))
            else:
                other.remove_old(3600)
        return clock.now

    before = clock.now
    store = JobStore(JobTable(uri, meanwhile), Sender(keys, loopback=True), keep_seconds=3600, clock=clock)
    job = asyncio.run(accepted(store, webhook=Webhook(url="http://127.0.0.1:9/told")))
    clock.now += 3601
    store.remove_old()
    assert next(asked) >= 2, "the other had no turn"
    assert claimed == ([None] if act == "claims it" else [])
    assert now(store, job).state == "failed"
    owed = [other.due(60) for _ in range(3)]
    assert sum(one is not None for one in owed) == 1, "its end is told once"
