"""Whoever controls the store and some keys lies about keys: old and foreign ones, planted roots, bins."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fakes.followed import soon, wait_until
from fakes.registries import expire, newest, resign
from registry.digest import digest_bytes
from registry.errors import BadSignature, Conflict, DigestMismatch, NetworkError, NotFound, StaleTrust
from registry.reference import Reference
from registry.signing import edition, envelope
from registry.signing import keys as people
from registry.signing.authority import Authority
from registry.signing.edition import Edition
from registry.signing.plan import Plan
from registry.signing.refresh import TrustClient
from registry.signing.rotation import DRAFT, Rotation
from registry.signing.signers import KeyRing
from registry.signing.trust import EXPIRES_FIELD, ROOT_FIELD, Target, TrustState, bin_role, version_path
from registry.storage.base import read
from registry.storage.local import LocalObjects

ONE, TWO = digest_bytes(b"one"), digest_bytes(b"two")
SAID = b'{"_type":"https://in-toto.io/Statement/v1"}'


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
    made.add_version("x:1", ONE, 3)
    made.set_alias("x@prod", ONE, 3, {"version": 1}, None)
    return made


def newcomer(authority: Authority, home: Path, tmp_path: Path) -> TrustClient:
    """A machine that pinned the first root and has seen nothing since."""
    fresh = TrustClient(authority.store, tmp_path / "newcomer")
    fresh.pin((home / "trust" / "pinned.root.json").read_bytes())
    return fresh


def version(state: TrustState, number: int) -> Target:
    return state.versions_of("x")[number]


def believed(state: TrustState, number: int, role: str, statement: bytes) -> bool:
    """Whether admission would count a statement about a version."""
    try:
        envelope.verified(statement, state.about(version(state, number)).keys(role))
    except BadSignature:
        return False
    return True


# -- keys that are gone --


@pytest.mark.parametrize("role", ["scanner", "evaluator", "approver", "publisher"])
def test_a_retired_key_counts_for_versions_of_its_time_only(authority: Authority, role: str) -> None:
    """A planned rotation leaves old adapters loadable, and gives the old key no say about new ones."""
    old = authority.keys.signer(role)
    statement = envelope.sign(SAID, [old])
    people.rotate(authority, role)
    state = authority.add_version("x:2", TWO, 3)
    assert believed(state, 1, role, statement)
    assert not believed(state, 2, role, statement)
    assert old.public_key.keyid not in {key.keyid for key in state.keys(role)}


@pytest.mark.parametrize("role", ["scanner", "evaluator", "approver", "publisher"])
def test_a_revoked_key_counts_for_nothing(authority: Authority, home: Path, role: str) -> None:
    """Who stole a key can write any date into a statement: nothing that it ever signed is believed."""
    stolen = authority.keys.signer(role)
    people.rotate(authority, role)
    people.remove(authority, stolen.public_key.keyid, planned=False)
    assert not believed(authority.state(), 1, role, envelope.sign(SAID, [stolen]))


def test_signing_a_version_again_does_not_make_it_older(authority: Authority) -> None:
    """A retired key must not come back because a publisher renews or repeats a name."""
    old = authority.keys.signer("scanner")
    people.rotate(authority, "scanner")
    authority.add_version("x:2", TWO, 3)
    state = authority.add_version("x:1", ONE, 3)
    assert (version(state, 1).root, version(state, 2).root) == (1, 2)
    assert not believed(state, 2, "scanner", envelope.sign(SAID, [old]))


def test_a_version_that_nobody_signed_has_no_retired_keys(authority: Authority) -> None:
    """An alias alone tells no time: without its version only the keys of today count."""
    old = authority.keys.signer("scanner")
    people.rotate(authority, "scanner")
    state = authority.state()
    unknown = Target(path="x@prod", digest=TWO, custom={})
    with pytest.raises(BadSignature):
        envelope.verified(envelope.sign(SAID, [old]), state.about(unknown).keys("scanner"))


@pytest.mark.parametrize(("role", "kind"), [("approver", "targets"), ("online", "timestamp")])
@pytest.mark.parametrize("known", [True, False], ids=["machine that refreshed before", "new machine"])
def test_a_rotated_key_cannot_sign_names(
    authority: Authority, home: Path, tmp_path: Path, role: str, kind: str, known: bool
) -> None:
    result = people.rotate(authority, role)
    assert result.kept is not None
    reader = authority.client if known else newcomer(authority, home, tmp_path)
    thief = KeyRing(folder=home / "registry" / "keys", uris={"thief": f"file:{result.kept}"})
    resign(home, {kind: lambda signed: None}, {kind: "thief"}, thief)
    with pytest.raises(BadSignature):
        reader.refresh()


def test_a_rotated_publisher_cannot_sign_versions(authority: Authority, home: Path) -> None:
    from tuf.api.metadata import TargetFile

    result = people.rotate(authority, "publisher")
    thief = KeyRing(folder=home / "registry" / "keys", uris={"thief": f"file:{result.kept}"})
    role = bin_role("x")

    def sneak_in(signed: Any) -> None:
        path = version_path("x:2")
        signed.targets[path] = TargetFile(1, {"sha256": TWO.hex}, path)

    resign(home, {role: sneak_in}, {role: "thief"}, thief)
    with pytest.raises(BadSignature):
        authority.client.refresh().versions_of("x")


@pytest.mark.parametrize("missing", ["2.root.json", "1.root.json"])
def test_a_withheld_root_is_noticed_by_who_has_seen_it(
    authority: Authority, store: LocalObjects, missing: str
) -> None:
    """The store hides the root that took a key away."""
    people.rotate(authority, "scanner")
    store.delete(f"trust/{missing}")
    with pytest.raises(StaleTrust, match="withholds"):
        authority.client.refresh()


# -- planted roots --


def planted(authority: Authority, plan: Plan, *signers: Any, **fields: Any) -> None:
    """Puts a draft of a root into the store, signed by whom the attacker has."""
    from tuf.api.metadata import Metadata

    root = plan.root(authority.state().version("root") + 1)
    for name, value in fields.items():
        setattr(root, name, value)
    metadata = Metadata(root)
    for signer in signers:
        metadata.sign(signer, append=True)
    authority.store.delete(DRAFT)
    authority.store.put(DRAFT, metadata.to_bytes())


def evil(authority: Authority, tmp_path: Path) -> tuple[Plan, Any]:
    """A plan that makes a stranger an approver, and the stranger's key."""
    stranger = KeyRing(folder=tmp_path / "stranger").generate("approver")
    plan = Plan.of(authority.state().signed("root"))
    public = stranger.public_key
    return plan.adding("approver", public.keyid, public.to_dict()), stranger


def test_an_unsigned_draft_is_not_signed(authority: Authority, tmp_path: Path) -> None:
    """Our own signature must not be what makes a stranger's proposal credible."""
    plan, _ = evil(authority, tmp_path)
    planted(authority, plan)
    for action in (Rotation(authority).look, lambda: Rotation(authority).sign("")):
        with pytest.raises(BadSignature, match="no root key"):
            action()
    with pytest.raises(BadSignature):
        people.rotate(authority, "scanner")
    assert authority.state().version("root") == 1


def test_a_draft_signed_by_the_keys_that_it_introduces_is_not_signed(
    authority: Authority, tmp_path: Path
) -> None:
    """It lists the stranger as root, and under the id of the real root key."""
    plan, stranger = evil(authority, tmp_path)
    real = authority.keys.signer("root").public_key.keyid
    held = plan.holders["root"]
    plans = [
        plan.adding("root", stranger.public_key.keyid, stranger.public_key.to_dict()),
        replace(
            plan,
            holders={**plan.holders, "root": replace(held, keys={real: stranger.public_key.to_dict()})},
        ),
    ]
    for number, forged in enumerate(plans):
        signer = stranger
        if number:
            signer = KeyRing(folder=tmp_path / "stranger").signer("approver")
            signer.public_key.keyid = real
        planted(authority, forged, signer)
        with pytest.raises(BadSignature, match="no root key"):
            Rotation(authority).look()


def test_another_key_under_a_known_id_is_shown(authority: Authority, tmp_path: Path) -> None:
    """A malicious holder of one root key of two exchanges a key and keeps its id."""
    plan, stranger = evil(authority, tmp_path)
    now = Plan.of(authority.state().signed("root"))
    held = now.holders["approver"]
    (keyid,) = held.keys
    forged = replace(held, keys={keyid: stranger.public_key.to_dict()})
    plan = replace(now, holders={**now.holders, "approver": forged})
    planted(authority, plan, authority.keys.signer("root"))
    draft = Rotation(authority).look()
    assert draft is not None
    assert draft.changes == (f"approver: ! {keyid[:12]} becomes another key under the same id",)


@pytest.mark.parametrize(
    "fields",
    [
        {"unrecognized_fields": {}},
        {"consistent_snapshot": False},
        {"version": 7},
        {"expires": datetime.now(UTC).replace(microsecond=0) + timedelta(days=9999)},
    ],
    ids=["no roles", "other layout", "a leap", "for ever"],
)
def test_a_draft_that_says_more_than_it_shows_is_not_signed(authority: Authority, fields: Any) -> None:
    """Signed by a real root key; what would be confirmed must be all that it says."""
    plan = Plan.of(authority.state().signed("root"))
    planted(authority, plan, authority.keys.signer("root"), **fields)
    with pytest.raises(BadSignature):
        Rotation(authority).look()


@pytest.mark.parametrize("rubbish", [b"", b"{}", b"[]", b"\xff", b'{"signed":{},"signatures":[]}'])
def test_a_draft_that_cannot_be_read_is_refused(authority: Authority, rubbish: bytes) -> None:
    authority.store.put(DRAFT, rubbish)
    with pytest.raises(BadSignature, match="cannot be read"):
        Rotation(authority).look()
    Rotation(authority).drop()
    assert people.rotate(authority, "scanner").draft.version == 2


def test_a_draft_exchanged_after_it_was_looked_at_is_not_signed(
    authority: Authority, tmp_path: Path, keys: KeyRing
) -> None:
    """The store shows a harmless draft to the person and another one to the key."""
    honest = Plan.of(authority.state().signed("root"))
    root = keys.signer("root")
    planted(authority, honest, root)
    seen = Rotation(authority).look()
    assert seen is not None
    plan, _ = evil(authority, tmp_path)
    planted(authority, plan, root)
    with pytest.raises(Conflict, match="looked at"):
        Rotation(authority).sign(seen.digest)
    assert authority.state().version("root") == 1


def test_one_of_two_root_holders_cannot_publish_alone(
    authority: Authority, tmp_path: Path, store: LocalObjects
) -> None:
    second = KeyRing(folder=tmp_path / "second").generate("root").public_key
    plan = Plan.of(authority.state().signed("root")).adding("root", second.keyid, second.to_dict())
    Rotation(authority).enact(plan)
    both = Plan.of(authority.state().signed("root")).requiring("root", 2)
    Rotation(authority).enact(both)
    draft = json.loads(read(store, DRAFT))
    assert len(draft["signatures"]) == 1
    store.put("trust/3.root.json", json.dumps(draft, separators=(",", ":"), sort_keys=True).encode())
    with pytest.raises(BadSignature):
        authority.client.refresh()


# -- forged bins --


def test_a_bin_signed_by_another_role_is_refused(authority: Authority, home: Path) -> None:
    for thief in ("approver", "scanner", "online"):
        resign(home, {bin_role("x"): lambda signed: None}, {bin_role("x"): thief})
        with pytest.raises(BadSignature):
            authority.client.refresh().versions_of("x")


def test_an_older_bin_under_a_new_snapshot_is_refused(authority: Authority, home: Path) -> None:
    """Rollback by who stole the online key, for a machine that has seen the newer bin."""
    from tuf.api.metadata import MetaFile

    role = bin_role("x")
    old = newest(home, role).read_bytes()
    authority.add_version("x:2", TWO, 3)

    def go_back(snapshot: Any) -> None:
        snapshot.meta[f"{role}.json"] = MetaFile.from_data(
            json.loads(old)["signed"]["version"], old, ["sha256"]
        )

    resign(home, {"snapshot": go_back})
    with pytest.raises(StaleTrust, match="older"):
        authority.client.refresh()


def test_a_changed_bin_is_refused(authority: Authority, home: Path, tmp_path: Path) -> None:
    path = newest(home, bin_role("x"))
    genuine = path.read_bytes()
    for position in range(0, len(genuine), 37):
        path.unlink()
        path.write_bytes(genuine[:position] + bytes([genuine[position] ^ 1]) + genuine[position + 1 :])
        with pytest.raises(DigestMismatch):
            newcomer(authority, home, tmp_path / str(position)).refresh().versions_of("x")


def test_a_bin_of_another_number_is_refused(authority: Authority, home: Path, tmp_path: Path) -> None:
    """The online key names a genuine, signed bin under a number that it does not have."""

    def lie(snapshot: Any) -> None:
        snapshot.meta[f"{bin_role('x')}.json"].version += 1

    path = newest(home, bin_role("x"))
    number = int(path.name.partition(".")[0])
    shutil.copy(path, path.with_name(f"{number + 1}.{bin_role('x')}.json"))
    resign(home, {"snapshot": lie})
    with pytest.raises(DigestMismatch):
        newcomer(authority, home, tmp_path).refresh().versions_of("x")


def test_a_withheld_bin_is_refused(authority: Authority, home: Path, tmp_path: Path) -> None:
    newest(home, bin_role("x")).unlink()
    with pytest.raises(StaleTrust, match="withholds"):
        newcomer(authority, home, tmp_path).refresh().versions_of("x")


def test_a_hint_that_is_none_makes_a_bin_due(authority: Authority, home: Path) -> None:
    """The online key is stolen; what it says beside a bin must not keep readers from anything."""
    for hint in ("never", 7, None, "2099-01-01"):
        hints: dict[str, Any] = {} if hint is None else {EXPIRES_FIELD: hint}

        def forge(snapshot: Any, hints: dict[str, Any] = hints) -> None:
            snapshot.meta[f"{bin_role('x')}.json"].unrecognized_fields = hints

        resign(home, {"snapshot": forge})
        state = authority.client.refresh()
        assert [role for role, _ in state.expiring(datetime.now(UTC))] == [bin_role("x")]
        assert list(state.versions_of("x")) == [1]


def test_absurd_numbers_in_the_store_do_not_count(authority: Authority, store: LocalObjects) -> None:
    """Whoever writes to the store must not decide how long the names of metadata become."""
    before = authority.state().version("snapshot")
    store.put(f"trust/{'9' * 200}.snapshot.json", b"{}")
    assert authority.add_version("x:2", TWO, 3).version("snapshot") == before + 1


def test_a_bin_speaks_about_its_own_names_only(authority: Authority) -> None:
    """So that two bins can never disagree about a version."""
    from tuf.api.metadata import TargetFile

    assert bin_role("x") != bin_role("y")

    def sneak_in(changed: Edition) -> None:
        entries = changed.part(bin_role("y")).targets
        for path in (version_path("x:2"), version_path("y:1").partition("/")[0] + "/x:2", "y:1", "x:2"):
            entries[path] = TargetFile(1, {"sha256": TWO.hex}, path)

    state = authority.change(sneak_in)
    assert list(state.versions()) == ["x:1"]
    with pytest.raises(NotFound):
        state.resolve(Reference.parse("x:2"))


def test_an_expired_bin_is_refused(authority: Authority, home: Path) -> None:
    resign(home, {bin_role("x"): expire})
    with pytest.raises(StaleTrust, match="expired"):
        authority.client.refresh().versions_of("x")


# -- this machine's memory --


def remembering(authority: Authority, home: Path) -> TrustClient:
    """The same machine with trust metadata that counts for an hour."""
    return TrustClient(authority.store, home / "trust", max_age=3600)


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets", "names"])
def test_a_memory_of_two_refreshes_is_not_used(
    authority: Authority, home: Path, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refresh that was refused half-way leaves newer files beside older ones."""
    client = remembering(authority, home)
    assert client.current().version("root") == 1
    path = home / "trust" / "metadata" / f"{role}.json"
    path.write_bytes(path.read_bytes() + b" ")
    asked: list[bool] = []
    refresh = client.refresh

    def asking() -> TrustState:
        asked.append(True)
        return refresh()

    monkeypatch.setattr(client, "refresh", asking)
    # Some files tuf replaces, others differ from the store's copy for good; neither is believed unasked.
    with contextlib.suppress(DigestMismatch):
        client.current()
    assert asked


def test_an_old_memory_is_not_used(authority: Authority, home: Path) -> None:
    """Neither one that is older than the user allows, nor one from a clock that ran ahead."""
    client = remembering(authority, home)
    memory = home / "trust" / "metadata" / "memory.json"
    known = json.loads(memory.read_bytes())
    authority.store.delete("trust/timestamp.json")
    assert client.current().version("root") == 1
    change: Callable[[float], float]
    for change in (lambda checked: checked - 3700, lambda checked: checked + 3700):
        memory.write_text(json.dumps(known | {"checked": change(known["checked"])}))
        with pytest.raises(StaleTrust, match="withholds"):
            client.current()


def test_an_expired_memory_is_not_used_even_offline(
    authority: Authority, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who cuts the network off can freeze a machine for the life of a timestamp, not longer."""
    began = time.monotonic()
    authority.publish_anchor()
    monkeypatch.setitem(edition.LIFETIMES, "timestamp", soon(time.monotonic() - began))
    authority.publish_anchor()
    client = remembering(authority, home)
    ends = client.current().expires("timestamp")

    def away(*_: Any) -> Any:
        raise NetworkError("the store is away")

    monkeypatch.setattr(LocalObjects, "read", away)
    assert client.current().expires("timestamp") == ends, "as long as it counts"
    wait_until(lambda: datetime.now(UTC) > ends)
    with pytest.raises(NetworkError):
        client.current()


def test_the_root_number_of_a_version_is_signed(authority: Authority) -> None:
    entry = authority.state().signed(bin_role("x"))["targets"][version_path("x:1")]
    assert entry[ROOT_FIELD] == 1
