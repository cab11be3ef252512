"""Following a real registry: promotion, rollback, revocation, refusals, adapters on demand."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fakes.followed import PROD, follower, meant, soon, three_versions, wait_until
from fakes.registries import NAME, expire, newest, objects, resign
from registry.admission import VerifiedAdapter
from registry.client import Registry
from registry.digest import Digest
from registry.errors import Explained, NetworkError, NotFound, Revoked, StaleTrust, UsageError
from registry.manifest import WEIGHTS_NAME
from registry.reference import Reference
from serving import following, judging
from serving.errors import AdapterMismatch, NotServed, Overloaded
from serving.following import Follower
from serving.metrics import Metrics
from serving.trust import Watch
from serving.versions import Entry, Version

Make = Callable[..., Follower]


@pytest.fixture
def registry(home: Path) -> Registry:
    return three_versions(home)


@pytest.fixture
def make(registry: Registry) -> Iterator[Make]:
    """Makes followers of the registry and ends them."""
    made: list[Follower] = []

    def new(**options: Any) -> Follower:
        made.append(follower(registry, **options))
        return made[-1]

    yield new
    for one in made:
        one.stop()


def version(found: Follower, reference: str = PROD) -> int:
    return meant(found, reference).number


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(f"foundry_serving_{name}", labels) or 0.0


class Device:
    """Where adapters go before they serve; what it has not got room for it refuses.

    Attributes:
        taken: ``name:version`` of every adapter that it was given, in order.
        refused: versions that do not fit.
        held: the version that waits until it is ``free``; None is all of them.
    """

    def __init__(self, *refused: str) -> None:
        self.taken: list[str | None] = []
        self.refused = set(refused)
        self.held: str | None = None
        self.free = threading.Event()
        self.free.set()

    def __call__(self, adapter: VerifiedAdapter) -> None:
        self.taken.append(adapter.reference)
        assert self.held not in (None, adapter.reference) or self.free.wait(120)
        if adapter.reference in self.refused:
            raise AdapterMismatch(f"{adapter.reference} does not fit", "take another one")


# -- what is served --


def test_a_followed_reference_is_served_and_named(make: Make) -> None:
    found = make()
    assert [status.state for status in found.statuses()] == ["loading"]
    assert found.missing == f"{PROD} is loading: it takes a moment"
    with pytest.raises(NotServed, match="is not loaded yet"):
        found.resolve(PROD)
    began = time.time()
    found.poll()
    adapter = found.resolve(PROD)
    (status,) = found.statuses()
    assert (adapter.reference, status.state, status.followed) == (f"{NAME}:1", "ready", True)
    assert (status.reference, status.name, status.version) == (PROD, NAME, 1)
    assert status.digest == adapter.digest
    assert status.since is not None
    assert status.checked is not None
    assert began <= status.checked <= time.time()
    assert status.problem is None
    assert found.missing is None
    assert asyncio.run(found.status(PROD)) == status


def test_facts_are_those_of_the_signed_card_and_ready_for_json(make: Make) -> None:
    found = make()
    found.poll()
    facts = json.loads(json.dumps(found.statuses()[0].facts))
    card = found.resolve(PROD).card
    assert facts["base"]["id"] == card.base.id
    assert facts["expressions"] == list(card.conditioning.expressions)
    assert (facts["strength_min"], facts["strength_max"]) == (0.0, 1.5)
    assert (facts["rank"], facts["license"]) == (card.lora.rank, card.license)
    assert [one["license"] for one in facts["ingredients"]] == [one.license for one in card.ingredients]
    assert facts["scan"] == {"verdict": "pass", "findings": 0}
    said = {one["kind"]: one for one in facts["statements"]}
    assert set(said) == {"approval", "evaluation", "licence", "scan", "training"}
    assert all(one["signed"] and one["key_ids"] for one in said.values())
    assert (said["approval"]["by"], said["approval"]["role"]) == ("a person", "approver")


def test_stacked_adapters_are_followed_too(make: Make) -> None:
    found = make(stacked={PROD: (f"{NAME}:2",)})
    found.poll()
    assert [(one.reference, one.version, one.followed) for one in found.statuses()] == [
        (PROD, 1, True),
        (f"{NAME}:2", 2, True),
    ]


def test_a_reference_that_is_none_is_refused(make: Make) -> None:
    with pytest.raises(UsageError, match="names no version"):
        make(adapters=("pixelsmile",))
    found = make()
    found.poll()
    with pytest.raises(UsageError, match="names no version"):
        meant(found, "pixelsmile")


# -- promotion and rollback --


def test_a_promotion_goes_live_by_itself_and_soon(make: Make, registry: Registry) -> None:
    found = make()
    found.start()
    registry.promote(f"{NAME}:2", "prod")
    seconds = wait_until(lambda: version(found) == 2)
    print(f"live {seconds:.2f} s after the promotion, asked every 0.1 s")


def test_the_old_version_answers_until_the_new_one_is_on_the_device(make: Make, registry: Registry) -> None:
    device = Device()
    found = make(on_new=device)
    found.poll()
    held = found.resolve(PROD)
    registry.promote(f"{NAME}:2", "prod")
    device.free.clear()
    found.poll(wait=False)
    wait_until(lambda: device.taken == [f"{NAME}:1", f"{NAME}:2"])
    assert found.resolve(PROD) is held
    device.free.set()
    wait_until(lambda: version(found) == 2)
    found.check(held)  # who began with it may finish
    assert held.reference == f"{NAME}:1"


def test_a_rollback_comes_from_memory(make: Make, registry: Registry) -> None:
    device = Device()
    found = make(on_new=device)
    found.poll()
    first = found.resolve(PROD)
    registry.promote(f"{NAME}:2", "prod")
    found.poll()
    registry.rollback(NAME, "prod")
    shutil.rmtree(objects(registry.place.home) / "models")  # nothing of it can be fetched
    shutil.rmtree(registry.place.cache)
    found.poll()
    assert found.resolve(PROD) is first
    assert device.taken == [f"{NAME}:1", f"{NAME}:2", f"{NAME}:1"]


def test_a_rollback_does_not_wait_until_another_reference_is_loaded(make: Make, registry: Registry) -> None:
    staging, device = f"{NAME}@staging", Device()
    registry.promote(f"{NAME}:2", "staging")
    found = make(adapters=(PROD, staging), on_new=device)
    found.poll()
    registry.promote(f"{NAME}:2", "prod")
    found.poll()
    device.held = f"{NAME}:3"
    device.free.clear()
    registry.promote(f"{NAME}:3", "staging")
    found.poll(wait=False)
    wait_until(lambda: device.taken[-1] == f"{NAME}:3")
    registry.rollback(NAME, "prod")
    found.poll(wait=False)
    wait_until(lambda: version(found) == 1)
    assert version(found, staging) == 2
    device.free.set()
    wait_until(lambda: version(found, staging) == 3)


def test_a_promotion_waits_neither_for_loads_on_demand_nor_for_a_judgement(
    make: Make, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "JUDGED_SECONDS", 0.0)
    device = Device()
    found = make(on_new=device)
    found.poll()
    device.held = f"{NAME}:3"
    device.free.clear()
    digest = registry.show(f"{NAME}:3").manifest.digest
    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(meant, found, text) for text in (f"{NAME}:3", f"{NAME}@{digest}")]
        wait_until(lambda: device.taken.count(f"{NAME}:3") == 2)
        found.poll(wait=False)  # what serves is to be judged
        registry.promote(f"{NAME}:2", "prod")
        found.poll(wait=False)
        wait_until(lambda: version(found) == 2)
        assert not any(one.done() for one in asking)
        device.free.set()


def test_others_are_told_before_a_followed_reference_moves(make: Make, registry: Registry) -> None:
    told: list[tuple[str, int | None]] = []

    def named(version: Version) -> None:
        told.append((str(version), found.statuses()[0].version))
        if version.number == 3:
            raise NotServed("somebody is not ready", "")

    found = make(on_named=named, light=True)
    found.poll()
    for number in (2, 1, 3):
        registry.promote(f"{NAME}:{number}", "prod")
        found.poll()
    meant(found, f"{NAME}:2")
    assert told == [(f"{NAME}:1", None), (f"{NAME}:2", 1), (f"{NAME}:1", 2), (f"{NAME}:3", 1)]
    assert version(found) == 1
    assert found.statuses()[0].problem == "somebody is not ready"


def test_what_is_served_under_another_alias_is_promoted_without_loading_it_again(
    make: Make, registry: Registry
) -> None:
    registry.promote(f"{NAME}:2", "staging")
    found = make(adapters=(PROD, f"{NAME}@staging"))
    found.poll()
    staged = meant(found, f"{NAME}@staging").in_memory()
    registry.promote(f"{NAME}:2", "prod")
    found.poll()
    assert found.resolve(PROD) is staged


def test_a_version_that_is_not_meant_any_more_when_it_arrives_is_not_served(
    make: Make, registry: Registry
) -> None:
    device = Device()
    found = make(on_new=device)
    found.poll()
    registry.promote(f"{NAME}:2", "prod")
    device.free.clear()
    found.poll(wait=False)
    wait_until(lambda: len(device.taken) == 2)
    registry.rollback(NAME, "prod")
    found.poll(wait=False)
    since = found.statuses()[0].since
    device.free.set()
    found.poll()
    assert (version(found), found.statuses()[0].since) == (1, since)  # it has never moved


def test_taking_an_alias_away_withdraws_nothing_and_is_said(make: Make, registry: Registry) -> None:
    found = make()
    found.poll()
    registry.demote(NAME, "prod")
    found.poll()
    assert version(found) == 1
    assert "there is no pixelsmile@prod" in str(found.statuses()[0].problem)


# -- revocation --


def test_a_revocation_stops_every_reference_and_whoever_waits(make: Make, registry: Registry) -> None:
    found = make(adapters=(f"{NAME}:3",))
    found.poll()
    held = meant(found, PROD).in_memory()
    others = (PROD, f"{NAME}:1", f"{NAME}@{held.digest}")
    assert {meant(found, text).digest for text in others} == {held.digest}
    found.check(held)
    registry.revoke(f"{NAME}:1", "it was trained on stolen pictures")
    found.poll()
    for text in (*others, str(held.digest)):
        with pytest.raises(Revoked, match="stolen pictures"):
            meant(found, text)
    with pytest.raises(Revoked, match="stolen pictures"):
        found.check(held)
    assert version(found, f"{NAME}:3") == 3
    states = {one.reference: one.state for one in found.statuses()}
    assert states == {f"{NAME}:3": "ready"} | dict.fromkeys(others, "revoked")


def test_a_revoked_followed_version_says_so_and_a_rollback_mends_it(make: Make, registry: Registry) -> None:
    found = make()
    found.poll()
    registry.promote(f"{NAME}:2", "prod")
    found.poll()
    held = found.resolve(PROD)
    registry.revoke(f"{NAME}:2", "bad")
    found.poll()
    with pytest.raises(Revoked):
        found.resolve(PROD)
    (status,) = found.statuses()
    assert (status.state, status.name, status.version, status.digest) == ("revoked", NAME, 2, held.digest)
    assert status.problem == f"{NAME}:2, which {PROD} means, was revoked: bad"
    assert found.missing is None  # whoever asks has to be told
    registry.rollback(NAME, "prod")
    found.poll()
    assert version(found) == 1
    assert found.missing is None


@pytest.mark.parametrize("state", ["revoked", "refused", "loading"])
def test_a_reference_that_cannot_be_served_takes_nobody_from_the_others(
    make: Make, registry: Registry, state: str
) -> None:
    staging, device = f"{NAME}@staging", Device(f"{NAME}:3")
    if state != "loading":  # or nobody has promoted it
        registry.promote(f"{NAME}:2" if state == "revoked" else f"{NAME}:3", "staging")
    found = make(adapters=(staging, PROD), on_new=device)
    found.poll()
    if state == "revoked":
        registry.revoke(f"{NAME}:2", "bad")
        found.poll()
    late = make(adapters=(staging, PROD), on_new=device)
    assert late.missing is not None  # nothing is known yet
    late.poll()
    for one in (found, late):
        assert (version(one), one.missing) == (1, None)
        assert one.statuses()[0].state == state
    # Nor does the next version while it is loaded.
    device.refused.clear()
    device.free.clear()
    registry.promote(f"{NAME}:3", "staging")
    wait_until(lambda: [found.poll(wait=False), f"{NAME}:3" in device.taken][1])
    assert found.missing is None
    device.free.set()
    wait_until(lambda: [found.poll(), version(found, staging) == 3][1])


def test_what_is_loaded_for_the_first_time_is_waited_for(make: Make, registry: Registry, home: Path) -> None:
    registry.promote(f"{NAME}:2", "staging")
    staging, device = f"{NAME}@staging", Device()
    found = make(adapters=(PROD, staging), on_new=device)
    device.held = f"{NAME}:2"
    device.free.clear()
    found.poll(wait=False)
    wait_until(lambda: f"{NAME}:2" in device.taken)
    assert version(found) == 1
    assert found.missing == f"{staging} is loading: it takes a moment"
    device.free.set()
    found.poll()
    assert found.missing is None


def test_revoked_weights_count_like_a_revoked_version(make: Make, registry: Registry) -> None:
    found = make()
    found.poll()
    held = found.resolve(PROD)
    assert held.manifest is not None
    weights = held.manifest.file(WEIGHTS_NAME).sha256
    registry.authority.revoke(weights, "a backdoor")
    found.poll()
    for asked in (lambda: found.resolve(PROD), lambda: found.check(held)):
        with pytest.raises(Revoked, match="a backdoor"):
            asked()
    for _ in range(2):
        found.poll()
        assert found.statuses()[0].state == "revoked"


@pytest.mark.parametrize("what", ["version", "weights"])
def test_what_means_a_revoked_version_stops_though_that_never_served(
    make: Make, registry: Registry, what: str
) -> None:
    """Every server of a fleet says the same, also one that was late and one that is started now."""
    found = make()
    found.poll()
    registry.promote(f"{NAME}:2", "prod")
    if what == "version":
        registry.revoke(f"{NAME}:2", "bad")
    else:
        registry.authority.revoke(registry.show(f"{NAME}:2").manifest.file(WEIGHTS_NAME).sha256, "bad")
    late = make()
    for one in (found, late):
        one.poll()
        with pytest.raises(Revoked, match="bad"):
            one.resolve(PROD)
        assert (one.statuses()[0].state, one.statuses()[0].version) == ("revoked", 2)


def test_a_revocation_does_not_wait_for_another_version_to_load(make: Make, registry: Registry) -> None:
    device = Device()
    found = make(on_new=device)
    found.poll()
    held = found.resolve(PROD)
    device.free.clear()
    registry.promote(f"{NAME}:2", "prod")
    found.poll(wait=False)
    wait_until(lambda: len(device.taken) == 2)
    registry.revoke(f"{NAME}:1", "bad")
    found.poll(wait=False)
    with pytest.raises(Revoked):
        found.check(held)
    with pytest.raises((Revoked, NotServed)):
        found.resolve(PROD)
    device.free.set()
    wait_until(lambda: found.statuses()[0].version == 2)


# -- refusals --


def test_a_version_that_does_not_fit_leaves_the_old_one_and_is_not_tried_in_a_hurry(
    make: Make, registry: Registry
) -> None:
    metrics, device = Metrics(), Device(f"{NAME}:2")
    found = make(on_new=device, metrics=metrics, follow_seconds=0.2)
    found.poll()
    registry.promote(f"{NAME}:2", "prod")
    for _ in range(20):
        found.poll()
    assert version(found) == 1
    (status,) = found.statuses()
    assert (status.state, status.version, status.problem) == ("ready", 1, f"{NAME}:2 does not fit")
    tries = device.taken.count(f"{NAME}:2")
    assert 1 <= tries < 10  # in 20 rounds, however slow they are
    assert value(metrics, "verification_failures_total", reason="does_not_fit") == tries
    assert value(metrics, "adapter_loads_total", adapter=NAME, outcome="failed") == tries
    device.refused.clear()
    wait_until(lambda: [found.poll(), version(found)][1] == 2)
    assert found.statuses()[0].problem is None
    assert value(metrics, "promotions_total", adapter=NAME) == 1
    assert value(metrics, "followed_version", reference=PROD) == 2


def test_what_is_said_against_a_version_that_serves_is_told_and_stops_nothing(
    make: Make, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "JUDGED_SECONDS", 0.0)
    metrics = Metrics()
    found = make(metrics=metrics)
    for _ in range(2):
        found.poll()
        assert found.statuses()[0].problem is None
    registry.attest(f"{NAME}:1", "evaluation", {"verdict": "fail", "reasons": ["it ages people"]})
    for _ in range(2):
        found.poll()
    (status,) = found.statuses()
    assert (version(found), status.state) == (1, "ready")
    assert str(status.problem).startswith(f"{NAME}:1 would not be admitted today: the evaluation statement")
    assert value(metrics, "verification_failures_total", reason="policy") == 1
    registry.promote(f"{NAME}:2", "prod")
    found.poll()
    assert found.statuses()[0].problem is None


def test_an_unexpected_failure_refuses_one_adapter_and_ends_nothing(make: Make, registry: Registry) -> None:
    def fail(adapter: VerifiedAdapter) -> None:
        if adapter.reference == f"{NAME}:2":
            raise MemoryError("the device is full")

    found = make(on_new=fail, adapters=(PROD, f"{NAME}:3"))
    registry.promote(f"{NAME}:2", "prod")
    found.poll()
    assert [one.state for one in found.statuses()] == ["refused", "ready"]
    with pytest.raises(Exception, match="MemoryError: the device is full"):
        found.resolve(PROD)
    registry.rollback(NAME, "prod")
    found.poll()
    assert version(found) == 1


# -- a registry that cannot be asked --


def test_a_store_that_is_gone_stops_nothing_and_comes_back(
    make: Make, registry: Registry, home: Path
) -> None:
    metrics = Metrics()
    found = make(metrics=metrics)
    found.poll()
    assert value(metrics, "registry_up") == 1
    confirmed = found.statuses()[0].checked
    objects(home).rename(home / "away")
    for _ in range(3):
        found.poll()
    (status,) = found.statuses()
    assert (version(found), status.state, status.checked) == (1, "ready", confirmed)
    assert "the registry cannot be believed" in str(status.problem)
    assert value(metrics, "registry_up") == 0
    assert value(metrics, "verification_failures_total", reason="stale_trust") == 1  # not once a round
    (home / "away").rename(objects(home))
    registry.promote(f"{NAME}:2", "prod")
    found.poll()
    assert version(found) == 2
    assert found.statuses()[0].problem is None
    assert value(metrics, "registry_up") == 1


def test_who_reads_that_the_registry_does_not_answer_finds_the_figure_to_it(
    registry: Registry, home: Path
) -> None:
    metrics, seen = Metrics(), list[tuple[bool, float]]()

    class Read(Watch):
        """A watch that another thread reads whenever it has another error, or none any more."""

        def __setattr__(self, name: str, to: object) -> None:
            super().__setattr__(name, to)
            if name == "error":
                seen.append((to is None, value(metrics, "registry_up")))

    watch = Read(registry.place, metrics)
    watch.refresh()
    objects(home).rename(home / "away")
    watch.refresh()
    (home / "away").rename(objects(home))
    watch.refresh()
    assert seen[1:] == [(True, 1), (False, 0), (True, 1)]


@pytest.mark.parametrize("looks", range(5))
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (NetworkError("it is down", "wait"), "the registry does not answer: it is down"),
        (StaleTrust("it is old", "ask"), "the registry cannot be believed: it is old"),
    ],
)
def test_a_round_may_end_well_between_any_two_looks_at_what_the_last_one_met(
    registry: Registry, error: Explained, words: str, looks: int
) -> None:
    """The round is another thread's: what is told is told as before it or as after it, and never fails."""

    class Recovering(Watch):
        """A watch whose error is gone after so many looks at it."""

        def __init__(self) -> None:
            self.left = looks
            super().__init__(registry.place)

        @property
        def error(self) -> Explained | None:
            self.left -= 1
            return error if self.left >= 0 else None

        @error.setter
        def error(self, value: Explained | None) -> None: ...

    assert Recovering().problem in (words, None)
    entry = Entry(reference=Reference.parse(PROD), followed=True, error=NotServed("it is new", "wait"))
    assert entry.status(Recovering()).problem in (f"it is new; {words}", "it is new")
    with pytest.raises((NotServed, type(error)), match=r"^(it is down|it is old|the registry was not asked)"):
        Recovering().resolve(entry.reference)


def test_expired_trust_metadata_stop_nothing(make: Make, registry: Registry, home: Path) -> None:
    found = make()
    found.poll()
    resign(home, {"timestamp": expire})
    (registry.place.keys / "online.pem").unlink()  # as on every machine that only serves
    found.poll()
    assert version(found) == 1
    assert "has expired" in str(found.statuses()[0].problem)
    with pytest.raises(StaleTrust):  # but nothing is loaded under it
        meant(found, f"{NAME}:2")
    again = make()
    again.poll()
    with pytest.raises(StaleTrust):
        again.resolve(PROD)
    assert again.missing is not None


@pytest.mark.parametrize("ended", [False, True])
def test_a_machine_with_the_online_key_renews_what_ends(make: Make, home: Path, ended: bool) -> None:
    """As on a laptop, where nothing else does; also what has ended while the machine slept."""
    found = make()
    began = time.monotonic()
    found.poll()
    left = soon(time.monotonic() - began) if ended else timedelta(hours=1)
    key = home / "registry" / "keys" / "online.pem"
    ends = (datetime.now(UTC) + left).replace(microsecond=0)
    resign(home, {"timestamp": lambda signed: setattr(signed, "expires", ends)})
    key.rename(home / "away.pem")
    found.poll()
    assert found.statuses()[0].problem is None
    if ended:
        wait_until(lambda: datetime.now(UTC) > ends)
        found.poll()
        assert "has expired" in str(found.statuses()[0].problem)
    (home / "away.pem").rename(key)
    found.poll()
    assert found.statuses()[0].problem is None
    signed = json.loads(newest(home, "timestamp").read_bytes())["signed"]
    assert datetime.fromisoformat(signed["expires"]) - datetime.now(UTC) > timedelta(hours=6)


# -- on demand --


def test_other_references_are_served_on_demand_and_loaded_once(make: Make) -> None:
    device = Device()
    found = make(on_new=device)
    found.poll()
    asked = [f"{NAME}:2"] * 8
    with ThreadPoolExecutor(8) as pool:
        answers = [one.in_memory() for one in pool.map(lambda text: meant(found, text), asked)]
    assert len({id(answer) for answer in answers}) == 1
    assert device.taken == [f"{NAME}:1", f"{NAME}:2"]
    digest = answers[0].digest
    assert meant(found, f"{NAME}@{digest}").in_memory() is answers[0]
    assert meant(found, str(digest)).in_memory() is answers[0]
    (_, status, _) = found.statuses()
    assert (status.reference, status.followed, status.state) == (f"{NAME}:2", False, "ready")
    assert asyncio.run(found.status(f"{NAME}:2")).digest == digest


def test_what_is_followed_answers_to_its_other_names_without_loading(make: Make) -> None:
    device = Device()
    found = make(on_new=device, on_demand=False)
    found.poll()
    first = found.resolve(PROD)
    for text in (f"{NAME}:1", f"{NAME}@{first.digest}", str(first.digest)):
        assert meant(found, text).in_memory() is first
        assert asyncio.run(found.status(text)).version == 1
    assert device.taken == [f"{NAME}:1"]
    for text in (f"{NAME}:2", str(Digest("sha256:" + "0" * 64))):
        with pytest.raises(NotServed, match="is not served here"):
            meant(found, text)


def test_names_that_nobody_signed_cost_nothing(make: Make) -> None:
    found = make()
    with pytest.raises(NotServed, match="not asked yet"):
        meant(found, f"{NAME}:2")
    found.poll()
    for text in (f"{NAME}:9", "grumpy@prod", f"{NAME}@staging", f"{NAME}@sha256:{'0' * 64}"):
        with pytest.raises(NotFound):
            meant(found, text)
    assert [one.reference for one in found.statuses()] == [PROD]


def test_an_alias_on_demand_is_followed_while_it_is_kept(make: Make, registry: Registry) -> None:
    found = make()
    found.poll()
    registry.promote(f"{NAME}:2", "staging")
    found.poll()
    assert version(found, f"{NAME}@staging") == 2
    registry.promote(f"{NAME}:3", "staging")
    found.poll()
    assert version(found, f"{NAME}@staging") == 3
    registry.demote(NAME, "staging")
    found.poll()
    with pytest.raises(NotFound):
        meant(found, f"{NAME}@staging")
    assert [one.reference for one in found.statuses()] == [PROD]


def test_what_was_promoted_since_the_last_round_is_served_when_it_is_loaded(
    make: Make, registry: Registry
) -> None:
    registry.promote(f"{NAME}:2", "staging")
    found = make()
    found.poll()
    registry.promote(f"{NAME}:3", "staging")
    assert version(found, f"{NAME}@staging") == 3


def test_a_refusal_on_demand_is_told_again_without_another_try(make: Make) -> None:
    device = Device(f"{NAME}:2")
    found = make(on_new=device, follow_seconds=60)
    found.poll()
    for _ in range(5):
        with pytest.raises(AdapterMismatch, match="does not fit"):
            meant(found, f"{NAME}:2")
        found.poll()
    assert device.taken == [f"{NAME}:1", f"{NAME}:2"]
    assert [one.state for one in found.statuses()] == ["ready", "refused"]


def test_memory_for_what_nobody_follows_is_bounded(make: Make, registry: Registry) -> None:
    found = make(adapter_memory=1)
    found.poll()
    for number in (2, 3, 2):
        assert version(found, f"{NAME}:{number}") == number
        assert [one.reference for one in found.statuses()] == [PROD, f"{NAME}:{number}"]
    roomy = make()
    roomy.poll()
    for number in (2, 3):
        meant(roomy, f"{NAME}:{number}")
    assert len(roomy.statuses()) == 3


def test_the_number_of_references_on_demand_is_bounded(
    make: Make, monkeypatch: pytest.MonkeyPatch, registry: Registry
) -> None:
    monkeypatch.setattr(following, "MAX_ON_DEMAND", 2)
    found = make()
    found.poll()
    digest = meant(found, f"{NAME}:2").digest
    meant(found, f"{NAME}@{digest}")
    meant(found, f"{NAME}:2")
    meant(found, f"{NAME}:3")
    assert [one.reference for one in found.statuses()] == [PROD, f"{NAME}:2", f"{NAME}:3"]


def test_too_many_loads_at_once_are_put_off(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "MAX_LOADING", 1)
    device = Device()
    found = make(on_new=device)
    found.poll()
    device.free.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(meant, found, f"{NAME}:2")
        wait_until(lambda: len(device.taken) == 2)
        with pytest.raises(Overloaded):
            meant(found, f"{NAME}:3")
        device.free.set()
        assert str(first.result()) == f"{NAME}:2"
    assert version(found, f"{NAME}:3") == 3


# -- without weights --


def test_a_light_follower_knows_what_references_mean_and_holds_no_weights(
    make: Make, registry: Registry
) -> None:
    found = make(light=True)
    found.poll()
    answers = meant(found, PROD)
    assert (answers.number, answers.adapter) == (1, None)
    facts = found.statuses()[0].facts
    assert facts is not None
    assert facts["scan"] == {"verdict": "pass", "findings": 0}
    with pytest.raises(NotServed, match="holds no weights"):
        found.resolve(PROD)
    registry.promote(f"{NAME}:2", "prod")
    found.poll()
    assert version(found) == 2
    registry.revoke(f"{NAME}:2", "bad")
    found.poll()
    with pytest.raises(Revoked):
        meant(found, PROD)
