"""Trust metadata: made, renewed, pruned and repaired; what a reader resolves comes from signed names only."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fakes.registries import expire, forget_trust, newest, resign
from registry.digest import digest_bytes
from registry.errors import (
    BadSignature,
    Conflict,
    NetworkError,
    NotFound,
    RegistryError,
    StaleTrust,
    UsageError,
)
from registry.reference import Reference
from registry.signing import edition
from registry.signing.authority import Authority
from registry.signing.refresh import TrustClient
from registry.signing.signers import ROLES, KeyRing
from registry.signing.trust import TOP, ExpiredTrust, TrustState, bin_role
from registry.storage.base import read
from registry.storage.local import LocalObjects

ONE, TWO = digest_bytes(b"one"), digest_bytes(b"two")


@pytest.fixture
def store(home: Path) -> LocalObjects:
    return LocalObjects(home / "registry" / "objects")


@pytest.fixture
def keys(home: Path) -> KeyRing:
    return KeyRing(folder=home / "registry" / "keys")


@pytest.fixture
def client(store: LocalObjects, home: Path) -> TrustClient:
    return TrustClient(store, home / "trust")


@pytest.fixture
def authority(store: LocalObjects, keys: KeyRing, client: TrustClient) -> Authority:
    made = Authority(store, keys, client)
    assert made.initialise()
    return made


def metadata(store: LocalObjects) -> list[str]:
    return [key.removeprefix("trust/") for key in store.keys("trust/")]


def test_a_new_registry_has_every_key_and_nothing_to_say(authority: Authority, keys: KeyRing) -> None:
    state = authority.state()
    assert all(keys.holds(role) for role in ROLES)
    assert (state.aliases(), state.versions()) == ({}, {})
    for role in ("publisher", "scanner", "evaluator", "approver"):
        assert [key.keyid for key in state.keys(role)] == [keys.signer(role).public_key.keyid]
        assert state.threshold(role) == 1
    with pytest.raises(BadSignature, match="'root'"):
        state.keys("root")
    assert not authority.initialise()


def test_names_resolve_to_what_was_signed(authority: Authority) -> None:
    authority.add_version("x:1", ONE, 3)
    authority.add_version("x:2", TWO, 3)
    state = authority.set_alias("x@prod", ONE, 3, {"version": 1}, None)
    assert state.resolve(Reference.parse("x:2")).digest == TWO
    assert state.resolve(Reference.parse("x@prod")).digest == ONE
    assert state.resolve(Reference.parse(f"x@{TWO}")).path == "x:2"
    assert list(state.versions_of("x")) == [1, 2]
    for missing, hint in {"x:3": "x@prod", "x@beta": "registry promote", "y:1": "registry list"}.items():
        with pytest.raises(NotFound) as refusal:
            state.resolve(Reference.parse(missing))
        assert hint in refusal.value.mend
    with pytest.raises(NotFound):
        state.resolve(Reference.parse(f"y@{ONE}"))


def test_a_version_cannot_be_given_away_twice(authority: Authority) -> None:
    authority.add_version("x:1", ONE, 3)
    authority.add_version("x:1", ONE, 3)
    with pytest.raises(RegistryError, match="exists already"):
        authority.add_version("x:1", TWO, 3)


def test_superseded_metadata_is_removed_and_numbers_only_grow(
    authority: Authority, store: LocalObjects
) -> None:
    """The edition before the newest stays, for readers who are in the middle of it."""
    for version in range(1, 5):
        authority.add_version(f"x:{version}", ONE, 3)
    assert set(metadata(store)) == {
        "1.root.json",
        "1.targets.json",
        "2.names.json",
        f"3.{bin_role('x')}.json",
        f"4.{bin_role('x')}.json",
        "4.snapshot.json",
        "5.snapshot.json",
        "timestamp.json",
    }


def test_what_a_racer_has_just_written_is_not_removed(authority: Authority, store: LocalObjects) -> None:
    """It is newer than everything that is named; its timestamp may follow in a moment."""
    authority.add_version("x:1", ONE, 3)
    racing = f"trust/9.{bin_role('x')}.json"
    store.put(racing, b"by another machine")
    authority.add_version("y:1", ONE, 3)
    assert read(store, racing) == b"by another machine"


def test_an_interrupted_publication_is_repeated(
    authority: Authority, store: LocalObjects, client: TrustClient
) -> None:
    """What it left behind is named by no snapshot: readers do not see it, the next one steps over it."""
    store.put(f"trust/1.{bin_role('x')}.json", b"half")
    assert client.refresh().versions() == {}
    for version in (1, 2, 3):
        state = authority.add_version(f"x:{version}", ONE, 3)
    assert state.version(bin_role("x")) == 4
    assert f"1.{bin_role('x')}.json" not in metadata(store)


def test_an_interrupted_start_is_repeated(store: LocalObjects, keys: KeyRing, client: TrustClient) -> None:
    authority = Authority(store, keys, client)
    authority.initialise()
    root = keys.signer("root").public_key
    store.delete("trust/timestamp.json")
    forget_trust(client.pinned.parent.parent)
    assert authority.initialise()
    assert keys.signer("root").public_key == root
    assert authority.state().versions() == {}


def test_a_registry_in_use_is_never_started_again(authority: Authority, store: LocalObjects) -> None:
    """A missing timestamp beside adapters is an attack or an accident, not a new registry."""
    store.put("manifests/sha256/" + ONE.hex, b"one")
    store.delete("trust/timestamp.json")
    assert not authority.initialise()
    with pytest.raises(StaleTrust, match="withholds"):
        authority.state()


def test_a_foreign_store_is_not_taken_over(authority: Authority, store: LocalObjects, tmp_path: Path) -> None:
    other = tmp_path / "other"
    stranger = Authority(store, KeyRing(folder=other / "keys"), TrustClient(store, other / "trust"))
    with pytest.raises(UsageError, match="does not trust"):
        stranger.initialise()
    assert authority.state().versions() == {}


def test_a_root_is_pinned_once(authority: Authority, client: TrustClient) -> None:
    with pytest.raises(UsageError, match="pinned already"):
        client.pin(b"another")


def test_nothing_is_believed_without_a_pinned_root(store: LocalObjects, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="registry init"):
        TrustClient(store, tmp_path / "empty").refresh()


@pytest.mark.parametrize("kind", ["timestamp", "snapshot"])
def test_expired_freshness_is_renewed_where_the_online_key_is(
    authority: Authority, client: TrustClient, home: Path, kind: str
) -> None:
    version = client.refresh().version("timestamp")
    resign(home, {kind: expire})
    shutil.copy(home / "registry/objects/trust/timestamp.json", home / "trust/metadata/timestamp.json")
    shutil.copy(newest(home, "snapshot"), home / "trust/metadata/snapshot.json")
    state = authority.state()
    assert state.version("timestamp") > version
    assert state.expires("timestamp") > datetime.now(UTC) + timedelta(hours=20)


@pytest.mark.parametrize("where", ["home", "elsewhere"], ids=["this machine", "another machine"])
def test_who_is_late_to_renew_takes_what_another_has_renewed(
    authority: Authority, store: LocalObjects, keys: KeyRing, home: Path, tmp_path: Path, where: str
) -> None:
    """Both found the metadata expired; one was faster. That is no attack, and needs no third edition."""
    resign(home, {"timestamp": expire})
    for role in ("timestamp", "snapshot"):
        shutil.copy(newest(home, role), home / "trust/metadata" / f"{role}.json")
    shutil.copytree(home / "trust", tmp_path / "elsewhere" / "trust")
    renewed: list[int] = []

    class Late(TrustClient):
        def current(self) -> TrustState:
            try:
                return super().current()
            except ExpiredTrust:
                renewed.append(authority.state().version("timestamp"))
                raise

    folder = {"home": home, "elsewhere": tmp_path / "elsewhere"}[where] / "trust"
    state = Authority(store, keys, Late(store, folder)).state()
    assert [state.version("timestamp")] == renewed


def test_a_memory_that_is_replaced_while_it_is_read_is_of_one_edition(
    authority: Authority, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process publishes and refreshes after each of the reads in turn."""
    client = TrustClient(authority.store, home / "trust", max_age=3600)
    read_bytes, reads, turn = Path.read_bytes, 1, 0

    def reading(path: Path) -> bytes:
        nonlocal reads
        data, reads = read_bytes(path), reads + 1
        if reads == turn:
            authority.revoke(ONE, f"reason {turn}")
        return data

    monkeypatch.setattr(Path, "read_bytes", reading)
    while reads >= turn:
        reads, turn = 0, turn + 1
        state = client.current()
        snapshot = state.signed("timestamp")["meta"]["snapshot.json"]["version"]
        assert snapshot == state.version("snapshot"), turn
        for role in ("targets", "names"):
            assert state.signed("snapshot")["meta"][f"{role}.json"]["version"] == state.version(role), turn
    monkeypatch.undo()
    assert turn > len(TOP), "it published after none of the reads"
    assert authority.state().is_revoked(ONE) == f"reason {turn - 1}"


def test_freshness_is_renewed_before_it_ends(authority: Authority, home: Path) -> None:
    def soon(signed: Any) -> None:
        signed.expires = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)

    resign(home, {"timestamp": soon})
    assert authority.state().expires("timestamp") > datetime.now(UTC) + timedelta(hours=20)


def test_a_renewal_that_fails_does_not_stop_a_reader(
    authority: Authority, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def soon(signed: Any) -> None:
        signed.expires = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)

    resign(home, {"timestamp": soon})
    (home / "registry" / "keys" / "online.pem").chmod(0o644)
    with caplog.at_level(logging.WARNING):
        assert authority.state().versions() == {}
    assert "could not be renewed" in caplog.text


@pytest.mark.parametrize("kind", ["targets", "names", bin_role("x")])
def test_expired_names_are_renewed_by_publishing(
    authority: Authority, client: TrustClient, home: Path, kind: str
) -> None:
    authority.add_version("x:1", ONE, 3)
    resign(home, {kind: expire})
    for role in ("targets", "names", "snapshot", "timestamp", bin_role("x")):
        shutil.copy(newest(home, role), home / "trust/metadata" / f"{role}.json")
    with pytest.raises(StaleTrust, match="expired") as refusal:
        client.refresh().versions_of("x")
    assert ("approver" if kind == "targets" else "publisher") in refusal.value.mend
    assert list(authority.signing_state().versions()) == ["x:1"]
    state = authority.add_version("x:2", ONE, 3)
    assert list(state.versions()) == ["x:1", "x:2"]
    assert not state.renewal_of_names_due(datetime.now(UTC))


def test_a_bin_that_nobody_asks_for_is_renewed_along(
    authority: Authority, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(edition.LIFETIMES, "versions", timedelta(days=10))
    authority.add_version("x:1", ONE, 3)
    monkeypatch.undo()
    state = authority.add_version("y:1", ONE, 3)
    assert bin_role("x") != bin_role("y")
    assert not list(state.expiring(datetime.now(UTC)))
    apart = state.expires(bin_role("x")) - state.expires(bin_role("y"))
    assert abs(apart) < timedelta(minutes=1), "signed in one edition, if not in one second"


def test_what_expires_soon_is_told(
    authority: Authority, keys: KeyRing, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told() -> list[str]:
        return [record.message for record in caplog.records if record.name.startswith("registry.")]

    assert not told()
    monkeypatch.setitem(edition.LIFETIMES, "targets", timedelta(days=10))
    authority.revoke(ONE, "gone")
    with caplog.at_level(logging.WARNING):
        authority.state()
    (message,) = told()
    assert "targets expires on" in message
    assert "approver key" in message


def test_a_key_that_readers_would_refuse_signs_nothing(
    authority: Authority, keys: KeyRing, store: LocalObjects, home: Path
) -> None:
    before = {key: read(store, key) for key in store.keys("")}
    (home / "registry" / "keys" / "approver.pem").unlink()
    keys.generate("approver")
    with pytest.raises(BadSignature, match="not one that the registry trusts"):
        authority.set_alias("x@prod", ONE, 3, {}, None)
    assert {key: read(store, key) for key in store.keys("")} == before


def test_revocations_add_up(authority: Authority) -> None:
    authority.revoke(ONE, "first")
    state = authority.revoke(TWO, "second")
    assert (state.is_revoked(ONE), state.is_revoked(TWO)) == ("first", "second")
    assert state.is_revoked(digest_bytes(b"three")) is None


# -- aliases, yanks, the anchor --


def test_an_alias_that_was_moved_meanwhile_is_not_moved_back(authority: Authority) -> None:
    authority.set_alias("x@prod", ONE, 3, {"version": 1}, None)
    authority.set_alias("x@prod", TWO, 3, {"version": 2}, ONE)
    three = digest_bytes(b"three")
    for expected in (None, ONE):
        with pytest.raises(Conflict, match="was moved to version 2 while you were promoting version 3"):
            authority.set_alias("x@prod", three, 3, {"version": 3}, expected)
    with pytest.raises(Conflict, match="was moved to version 2"):
        authority.remove_alias("x@prod", ONE)
    before = authority.state().version("targets")
    state = authority.set_alias("x@prod", TWO, 3, {"version": 2}, ONE)
    assert state.version("targets") == before, "what is so already is not signed again"
    assert authority.remove_alias("x@prod", TWO).aliases() == {}
    with pytest.raises(Conflict, match="was removed while you were promoting"):
        authority.set_alias("x@prod", three, 3, {"version": 3}, TWO)


def test_yanks_come_and_go(authority: Authority) -> None:
    authority.revoke(ONE, "gone")
    assert authority.yank(TWO, "ugly").is_yanked(TWO) == "ugly"
    state = authority.unyank(TWO)
    assert state.is_yanked(TWO) is None
    assert (state.is_revoked(ONE), state.is_yanked(ONE)) == ("gone", None)


def test_every_publication_carries_the_newest_head_of_the_log(
    store: LocalObjects, keys: KeyRing, client: TrustClient
) -> None:
    heads: list[dict[str, Any]] = []
    authority = Authority(store, keys, client, anchor=lambda _: heads[-1] if heads else None)
    authority.initialise()
    assert authority.state().ledger_anchor() is None
    for length in (1, 2):
        heads.append({"length": length, "digest": str(ONE)})
        assert authority.add_version(f"x:{length}", ONE, 3).ledger_anchor() == heads[-1]
    heads.append({"length": 3, "digest": str(TWO)})
    assert authority.publish_anchor().ledger_anchor() == heads[-1]
    heads.clear()
    assert authority.add_version("x:3", ONE, 3).ledger_anchor() == {"length": 3, "digest": str(TWO)}


# -- this machine's memory --


def test_fresh_metadata_is_read_without_the_store_and_without_tuf(
    authority: Authority, store: LocalObjects, home: Path
) -> None:
    """In a process of its own, for this one has imported tuf."""
    authority.add_version("x:1", ONE, 3)
    assert list(authority.set_alias("x@prod", ONE, 3, {}, None).versions()) == ["x:1"]
    code = """
import sys
from pathlib import Path
from registry.reference import Reference
from registry.signing.refresh import TrustClient
state = TrustClient(None, Path(sys.argv[1]), max_age=3600).current()
print(state.resolve(Reference.parse("x@prod")).digest, state.resolve(Reference.parse("x:1")).digest)
print(sorted({"tuf", "securesystemslib", "boto3"} & set(sys.modules)))
"""
    found = subprocess.run(
        [sys.executable, "-c", code, str(home / "trust")], capture_output=True, text=True, check=True
    )
    assert found.stdout == f"{ONE} {ONE}\n[]\n"


def test_news_are_seen_when_the_memory_is_too_old(authority: Authority, home: Path) -> None:
    patient = TrustClient(authority.store, home / "other", max_age=3600)
    patient.pin(authority.client.pinned.read_bytes())
    assert patient.current().versions() == {}
    authority.add_version("x:1", ONE, 3)
    assert patient.current().versions() == {}
    hasty = TrustClient(authority.store, home / "other")
    assert list(hasty.current().versions()) == ["x:1"]
    assert list(patient.current().versions()) == ["x:1"]


def test_offline_goes_on_while_the_metadata_count(
    authority: Authority,
    client: TrustClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What this machine has used before is kept up to date by every refresh."""
    assert list(authority.add_version("x:1", ONE, 3).versions()) == ["x:1"]
    authority.add_version("x:2", TWO, 3)

    def away(*_: Any) -> Any:
        raise NetworkError("the store is away")

    monkeypatch.setattr(LocalObjects, "read", away)
    with caplog.at_level(logging.WARNING):
        assert list(client.current().versions()) == ["x:1", "x:2"]
    assert "the store does not answer" in caplog.text
    with pytest.raises(NetworkError):
        client.refresh()


def test_a_bin_removed_while_it_is_read_is_read_from_the_next_edition(
    authority: Authority, store: LocalObjects, home: Path
) -> None:
    authority.add_version("x:1", ONE, 3)
    slow = TrustClient(store, home / "slow")
    slow.pin(authority.client.pinned.read_bytes())
    state = slow.refresh()
    for version in (2, 3, 4):
        authority.add_version(f"x:{version}", ONE, 3)
    assert list(state.versions_of("x")) == [1, 2, 3, 4]


def test_metadata_that_no_reader_would_take_are_not_published(
    authority: Authority, store: LocalObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the registry would lock itself: who wants to take an alias away has to read them first."""
    authority.initialise()
    before = read(store, edition.TIMESTAMP)
    monkeypatch.setattr(edition, "MAX_DOCUMENT_BYTES", 500)
    with pytest.raises(RegistryError, match="readers take 500") as caught:
        authority.add_version("pixelsmile:1", ONE, 1)
    assert "registry demote" in caught.value.mend
    assert read(store, edition.TIMESTAMP) == before
    monkeypatch.undo()
    assert list(authority.client.refresh().versions()) == []
