"""Serving on a real Ray cluster: engines and ingresses, two of each, a real registry, and killed replicas."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families as parse

from fakes.collectors import Collector, collector
from fakes.followed import PROD, wait_until
from fakes.registries import NAME
from fakes.served import Ask, Truth, served_home
from registry.client import Registry
from servers.ray_service import RayService, running
from serving.errors import UsageError
from serving.metrics import PREFIX
from serving.ray_command import ray_command

pytestmark = [pytest.mark.slow, pytest.mark.integration]

SHORT = Ask()
LONG = Ask(steps=100, size=(128, 128))
"""It has to last until a test has seen that it runs, and has done something about it."""
SETTINGS = {
    "ADAPTERS": json.dumps([PROD]),
    "PORT": "0",
    "FOLLOW_SECONDS": "0.5",
    "MAX_ROWS": "4",
    "MAX_WAITING": "8",
    "GRACE_SECONDS": "10",
}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Versions 1, 2 and 3 are approved; 1 is ``prod`` when the tests begin."""
    return served_home(tmp_path_factory.mktemp("ray-serving") / "home")


@pytest.fixture(scope="module")
def truth(registry: Registry) -> Truth:
    """What the versions answer."""
    return Truth(registry)


@pytest.fixture(scope="module")
def seen() -> Iterator[Collector]:
    """Gets the spans of all replicas."""
    with collector() as made:
        yield made


@pytest.fixture(scope="module")
def service(
    registry: Registry, truth: Truth, seen: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RayService]:
    """One cluster for the module."""
    log = tmp_path_factory.mktemp("log") / "log"
    settings = {**SETTINGS, "OTLP_ENDPOINT": seen.endpoint}
    with running(registry.place.home, ingresses=2, settings=settings, log=log) as found:
        yield found


@pytest.fixture
def client(service: RayService) -> Iterator[httpx.Client]:
    """A client, once all replicas live."""
    with httpx.Client(base_url=service.url, timeout=300) as client:
        service.wait_for_replicas(2)
        # Any of the ingresses may answer, and each hears of the engines by itself.
        wait_until(lambda: all(client.get("/v2/health/ready").status_code == 200 for _ in range(12)))
        yield client


def edit(client: httpx.Client, ask: Ask = SHORT, adapter: str = PROD) -> httpx.Response:
    return client.post("/v1/edits", json=ask.body(adapter), headers={"Accept": "image/png"})


def require_right(answer: httpx.Response, truth: Truth, ask: Ask) -> str:
    """The digest that an answer names; its pixels are those of that version."""
    assert answer.status_code == 200, answer.text
    digest = answer.headers["Adapter-Digest"]
    assert truth.off(digest, ask, answer.content) <= 1
    return digest


def steps_of_engines(client: httpx.Client) -> dict[str, float]:
    """Steps that each replica has taken."""
    return {
        sample.labels["replica"]: sample.value
        for family in parse(client.get("/metrics").text)
        for sample in family.samples
        if sample.name == PREFIX + "step_seconds_count"
    }


def told_by(client: httpx.Client) -> dict[str, float]:
    """Steps of all engines together, as each ingress knows: any of them may answer."""
    found = {}
    for _ in range(12):
        steps = steps_of_engines(client)
        (ingress,) = (replica for replica, taken in steps.items() if not taken)
        found[ingress] = sum(steps.values())
    return found


def steps_of_all(client: httpx.Client) -> float:
    """Steps that the engines have taken, once every ingress has asked them again: it does so now and then.

    An edit is made, so whoever tells another number than before has asked since.
    """
    before = told_by(client)
    wait_until(lambda: [before.update(told_by(client) | before), len(before) == 2][1])
    assert edit(client).status_code == 200
    now: dict[str, float] = {}

    def heard() -> bool:
        now.update(told_by(client))
        return all(now.get(ingress, steps) != steps for ingress, steps in before.items())

    wait_until(heard)
    return max(now.values())


def await_live(client: httpx.Client, truth: Truth, version: int) -> float:
    """Waits until ``prod`` is this version, whichever ingress is asked; returns the seconds that it took.

    Each ingress hears of it by itself, and which one answers is a matter of luck.
    """
    digest = truth.digest(version)
    return wait_until(
        lambda: all(edit(client).headers.get("Adapter-Digest") == digest for _ in range(12)), 300
    )


def test_an_edit_is_that_of_the_digest_it_names(client: httpx.Client, truth: Truth) -> None:
    answer = edit(client)
    assert require_right(answer, truth, SHORT) == truth.digest(1)
    assert (answer.headers["Adapter-Name"], answer.headers["Adapter-Version"]) == (NAME, "1")


def test_a_promotion_and_a_rollback_are_live_without_a_failed_or_mixed_answer(
    client: httpx.Client, registry: Registry, truth: Truth, service: RayService
) -> None:
    stop, answers = threading.Event(), []

    def ask_on(number: int) -> None:
        ask = Ask(seed=number)
        with httpx.Client(base_url=service.url, timeout=300) as mine:
            while not stop.is_set():
                answers.append((ask, edit(mine, ask)))

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask_on, number) for number in range(3)]
        try:
            registry.promote(f"{NAME}:2", "prod")
            took = await_live(client, truth, 2)
            registry.rollback(NAME, "prod")
            await_live(client, truth, 1)
        finally:
            stop.set()
    assert all(one.exception() is None for one in asking)
    digests = {require_right(answer, truth, ask) for ask, answer in answers}
    assert digests == {truth.digest(1), truth.digest(2)}
    print(f"live everywhere {took:.1f} s after the promotion")


def test_a_scrape_and_a_trace_reach_the_engines(client: httpx.Client, truth: Truth, seen: Collector) -> None:
    """Whoever is asked, an ingress tells the metrics of all engines, and a trace goes on in the engine."""
    mine = "ab" * 16
    headers = {"Accept": "image/png", "traceparent": f"00-{mine}-{'cd' * 8}-01"}
    assert client.post("/v1/edits", json=SHORT.body(PROD), headers=headers).status_code == 200

    def engines() -> dict[str, float]:
        return steps_of_engines(client)

    wait_until(lambda: sum(engines().values()) > 0 and len(engines()) == 3)
    order = {"queue", "encode", "steps", "decode"}
    wait_until(lambda: {"POST /v1/edits", *order} <= set(seen.spans(mine)))
    spans = seen.spans(mine)
    assert {spans[name].parent for name in order} == {spans["POST /v1/edits"].span}
    assert spans["steps"].attributes["foundry.adapter.digest"] == truth.digest(1)


def test_events_come_step_by_step_with_previews(client: httpx.Client, truth: Truth) -> None:
    events: list[tuple[str, dict]] = []
    body = Ask(steps=4).body(PROD, previews=2)
    with client.stream("POST", "/v1/edits", json=body, headers={"Accept": "text/event-stream"}) as answer:
        assert answer.headers["Adapter-Digest"] == truth.digest(1)
        name = ""
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                events.append((name, json.loads(line[6:])))
    assert events[0][0] == "queued"
    assert [data["step"] for name, data in events if name == "step"] == [1, 2, 3, 4]
    assert sum(1 for name, data in events if name == "step" and data.get("pictures")) == 2
    (result,) = (data for name, data in events if name == "result")
    picture = base64.b64decode(result["results"][0]["image"])
    assert truth.off(truth.digest(1), Ask(steps=4), picture) <= 1


def test_another_version_is_served_when_it_is_named(client: httpx.Client, truth: Truth) -> None:
    assert require_right(edit(client, adapter=f"{NAME}:3"), truth, SHORT) == truth.digest(3)
    exact = f"{NAME}@{truth.digest(2)}"
    assert require_right(edit(client, adapter=exact), truth, SHORT) == truth.digest(2)
    unknown = edit(client, adapter="nobody:1")
    assert unknown.status_code == 404
    assert unknown.json()["error"]["mend"]


def test_a_request_outlives_the_engine_that_worked_on_it(
    client: httpx.Client, truth: Truth, service: RayService
) -> None:
    before = {one.pid for one in service.replicas()}
    with ThreadPoolExecutor(6) as pool:
        asks = [replace(LONG, seed=seed) for seed in range(6)]
        answers = [pool.submit(edit, client, ask) for ask in asks]
        wait_until(lambda: client.get("/v2/health/ready").json()["running"] >= 4)
        killed = service.kill()
        assert not any(answer.done() for answer in answers), "it died while they ran"
        for ask, answer in zip(asks, answers, strict=True):
            require_right(answer.result(), truth, ask)
    service.wait_for_replicas(2)
    assert killed not in {one.pid for one in service.replicas()}
    assert len({one.pid for one in service.replicas()} - before) == 1


def test_who_hangs_up_frees_the_engine(client: httpx.Client, service: RayService) -> None:
    """It does not take the steps that nobody waits for any more."""
    body = {**LONG.body(PROD), "expressions": None, "rows": [{"happy": 0.1 * row} for row in range(4)]}

    before = steps_of_all(client)
    for _ in range(2):
        with client.stream("POST", "/v1/edits", json=body, headers={"Accept": "text/event-stream"}) as answer:
            lines = answer.iter_lines()  # held: a generator that is let go closes the connection
            assert any(line == "event: step" for line in lines), "it runs"
        took = wait_until(lambda: client.get("/v2/health/ready").json()["running"] == 0)
        print(f"the engine is free {took:.1f} s after the caller went")
    assert 0 < steps_of_all(client) - before < 2 * LONG.steps


def test_too_many_requests_are_told_when_to_come_again(client: httpx.Client, truth: Truth) -> None:
    asks = [Ask(seed=seed, steps=40) for seed in range(60)]
    with ThreadPoolExecutor(60) as pool:
        answers = list(pool.map(lambda ask: edit(client, ask), asks))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert 0 < len(refused) < 60
    assert all(float(answer.headers["Retry-After"]) > 0 for answer in refused)
    for ask, answer in zip(asks, answers, strict=True):
        if answer.status_code != 429:
            require_right(answer, truth, ask)


def test_a_job_outlives_the_ingress_that_took_it(
    client: httpx.Client, truth: Truth, service: RayService
) -> None:
    """Both ingresses are killed while the jobs run: what was accepted is finished by their successors."""
    service.wait_for_replicas(2, "ingress")
    asks = [Ask(seed=seed, steps=60) for seed in range(8)]
    jobs = []
    for ask in asks:
        taken = client.post("/v1/edits", json=ask.body(PROD) | {"async": True})
        assert taken.status_code == 202, taken.text
        jobs.append(taken.headers["Location"])
    for _ in range(2):
        service.kill("ingress")
    service.wait_for_replicas(2, "ingress")

    def states() -> set[str]:
        found = [client.get(job) for job in jobs]
        return {answer.json()["status"] if answer.status_code == 200 else "?" for answer in found}

    wait_until(lambda: states() == {"succeeded"}, 300)
    for ask, job in zip(asks, jobs, strict=True):
        assert truth.off(truth.digest(1), ask, client.get(f"{job}/results/0.png").content) <= 1


def test_a_revoked_version_stops_everywhere(client: httpx.Client, registry: Registry, truth: Truth) -> None:
    """The last one that uses the registry: nobody takes a revocation back."""
    require_right(edit(client, adapter=f"{NAME}:3"), truth, SHORT)
    registry.revoke(f"{NAME}:3", "it was trained on what it must not be")
    exact = f"{NAME}@{truth.digest(3)}"
    names = (exact, f"{NAME}:3") * 12
    answers: list[httpx.Response] = []

    def refused() -> bool:
        """So often that each ingress was asked for both; all that are kept were refused."""
        answers[:] = [edit(client, adapter=name) for name in names]
        return {answer.status_code for answer in answers} == {410}

    wait_until(refused, 300)
    assert "it must not be" in answers[0].json()["error"]["message"]
    require_right(edit(client), truth, SHORT)


def test_a_scale_that_cannot_be_is_explained_before_anything_starts() -> None:
    wrong = CliRunner().invoke(ray_command, ["--engines", "0"])
    assert isinstance(wrong.exception, UsageError)
    assert "engines" in wrong.exception.message
