"""Keys come and go: new roots, what stays readable meanwhile, and what an interruption leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from registry.digest import digest_bytes
from registry.errors import BadSignature, Conflict, NotFound, RegistryError, UsageError
from registry.signing import keys as people
from registry.signing import signers
from registry.signing.authority import Authority
from registry.signing.plan import Plan
from registry.signing.refresh import TrustClient
from registry.signing.rotation import DRAFT, Rotation
from registry.signing.signers import ROLES, KeyRing
from registry.signing.trust import TrustState, bin_role
from registry.storage.local import LocalObjects

ONE, TWO = digest_bytes(b"one"), digest_bytes(b"two")


@dataclass(frozen=True)
class Machine:
    """Somebody's computer: own keys, own memory, the same store as everybody."""

    home: Path
    store: LocalObjects

    @property
    def ring(self) -> KeyRing:
        return KeyRing(folder=self.home / "keys")

    @property
    def authority(self) -> Authority:
        return Authority(self.store, self.ring, TrustClient(self.store, self.home / "trust"))

    def state(self) -> TrustState:
        return self.authority.state()

    def keyid(self, role: str) -> str:
        return str(self.ring.signer(role).public_key.keyid)

    def lose(self, *roles: str) -> None:
        for role in roles:
            (self.home / "keys" / f"{role}.pem").unlink()

    def public(self, role: str) -> str:
        """A file with the public half of a new key of a role."""
        path = self.home / f"{role}.public.pem"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(signers.pem_of(people.make(self.ring, role)))
        return str(path)


@pytest.fixture
def store(tmp_path: Path) -> LocalObjects:
    return LocalObjects(tmp_path / "objects")


@pytest.fixture
def first(tmp_path: Path, store: LocalObjects) -> Machine:
    """The machine that made the registry and holds all of its keys."""
    machine = Machine(tmp_path / "first", store)
    assert machine.authority.initialise()
    machine.authority.add_version("x:1", ONE, 3)
    machine.authority.set_alias("x@prod", ONE, 3, {"version": 1}, None)
    return machine


def joined(tmp_path: Path, first: Machine, name: str) -> Machine:
    """A machine that pinned the root and has no keys yet."""
    machine = Machine(tmp_path / name, first.store)
    people.pin(machine.authority.client, people.export(first.state()))
    return machine


def listed(state: TrustState, role: str) -> set[str]:
    return set(Plan.of(state.signed("root")).holders[role].keys)


def readable(*machines: Machine) -> None:
    for machine in machines:
        state = machine.authority.client.refresh()
        assert "x:1" in state.versions()
        assert "x@prod" in state.aliases()


@pytest.mark.parametrize("role", ROLES)
def test_every_role_is_rotated_in_one_new_root(first: Machine, tmp_path: Path, role: str) -> None:
    reader = joined(tmp_path, first, "reader")
    readable(reader)
    old = first.keyid(role)
    result = people.rotate(first.authority, role)
    assert (result.old, result.draft.version, result.draft.missing) == (old, 2, 0)
    assert first.keyid(role) == result.new != old
    assert result.kept == first.home / "keys" / f"{role}.{old[:8]}.old.pem"
    assert signers.load(f"file:{result.kept}", role).public_key.keyid == old
    assert listed(first.state(), role) == {result.new}
    assert set(first.state().signed("targets")["delegations"]["keys"]) == listed(first.state(), "publisher")
    readable(reader, first, joined(tmp_path, first, "newcomer"))
    first.authority.add_version("x:2", TWO, 3)
    first.authority.set_alias("x@prod", TWO, 3, {}, ONE)
    readable(reader)


def test_every_role_rotated_one_after_the_other(first: Machine, tmp_path: Path) -> None:
    reader = joined(tmp_path, first, "reader")
    for _ in range(2):
        for role in ROLES:
            people.rotate(first.authority, role)
    assert first.state().version("root") == 1 + 2 * len(ROLES)
    readable(reader, first)
    for role in ROLES:
        assert listed(first.state(), role) == {first.keyid(role)}


class Cut(Exception):
    """The power went out."""


@contextmanager
def cut_at(machine: Machine, number: int) -> Iterator[None]:
    """Lets the store write `number` objects and then fail, as a killed process would leave it."""
    left = [number]
    put, replace_ = LocalObjects.put, LocalObjects.replace

    def counting(original: Any) -> Any:
        def write(*args: Any, **options: Any) -> Any:
            if left[0] == 0:
                raise Cut
            left[0] -= 1
            return original(*args, **options)

        return write

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalObjects, "put", counting(put))
        patch.setattr(LocalObjects, "replace", counting(replace_))
        yield


@pytest.mark.parametrize("role", ["publisher", "approver", "online", "root", "scanner"])
def test_a_rotation_that_is_cut_anywhere_stays_readable_and_is_completed(
    first: Machine, tmp_path: Path, role: str
) -> None:
    reader = joined(tmp_path, first, "reader")
    old = first.keyid(role)
    cuts = 0
    while True:
        try:
            with cut_at(first, cuts):
                people.rotate(first.authority, role)
            break
        except Cut:
            cuts += 1
        readable(reader, joined(tmp_path, first, f"newcomer-{cuts}"))
    assert cuts >= 1
    result = people.rotate(first.authority, "evaluator")
    assert result.draft.missing == 0
    assert old not in listed(first.state(), role)
    assert listed(first.state(), role) == {first.keyid(role)}
    readable(reader, first)


def test_key_files_are_put_in_place_after_a_cut(first: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new root is there, but the new key file still has its temporary name."""

    def fail(*_: Any) -> None:
        raise Cut

    old = first.keyid("publisher")
    with monkeypatch.context() as patch:
        patch.setattr("registry.signing.keys.os.replace", fail)
        with pytest.raises(Cut):
            people.rotate(first.authority, "publisher")
    assert first.keyid("publisher") == old
    result = people.rotate(first.authority, "publisher")
    assert first.keyid("publisher") == result.new
    assert listed(first.state(), "publisher") == {result.new}
    assert first.state().version("root") == 2


def test_people_join_with_keys_of_their_own(first: Machine, tmp_path: Path) -> None:
    second = joined(tmp_path, first, "second")
    draft = people.add(first.authority, "approver", second.public("approver"), threshold=2)
    assert any("threshold 1 -> 2" in line for line in draft.changes)
    people.add(first.authority, "publisher", second.public("publisher"))
    people.add(first.authority, "online", second.public("online"))
    assert second.state().threshold("approver") == 2
    second.authority.add_version("y:1", TWO, 3)
    second.authority.set_alias("y@prod", TWO, 3, {}, None)
    assert set(first.state().versions()) == {"x:1", "y:1"}
    assert {key.keyid for key in first.state().keys("approver")} == {
        first.keyid("approver"),
        second.keyid("approver"),
    }


def test_a_root_that_needs_two_people_waits_for_the_second(first: Machine, tmp_path: Path) -> None:
    second = joined(tmp_path, first, "second")
    waiting = people.add(first.authority, "root", second.public("root"), threshold=2)
    assert (waiting.version, waiting.missing) == (2, 1)
    readable(first, second)
    assert first.state().version("root") == 1
    with pytest.raises(Conflict, match="another new root"):
        people.rotate(first.authority, "scanner")
    seen = Rotation(second.authority).look()
    assert seen is not None
    assert seen.changes == waiting.changes
    done = Rotation(second.authority).sign(seen.digest)
    assert done.missing == 0
    assert first.state().version("root") == 2
    assert not list(first.store.keys(DRAFT))
    # From now on neither can change anything alone.
    alone = people.rotate(first.authority, "scanner")
    assert alone.draft.missing == 1
    assert people.rotate(first.authority, "scanner").draft.missing == 1, "the same again changes nothing"
    Rotation(second.authority).sign(alone.draft.digest)
    finished = people.rotate(first.authority, "scanner")
    assert finished.draft.missing == 0
    assert listed(first.state(), "scanner") == {first.keyid("scanner")} == {alone.new}


def test_what_was_signed_while_a_draft_waited_holds_under_the_new_root(
    first: Machine, tmp_path: Path
) -> None:
    """The old approver key promotes once more before the root that takes it away is complete."""
    second = joined(tmp_path, first, "second")
    people.add(first.authority, "root", second.public("root"), threshold=2)
    Rotation(second.authority).sign(Rotation(second.authority).look().digest)  # type: ignore[union-attr]
    waiting = people.rotate(first.authority, "approver")
    assert waiting.draft.missing == 1
    first.authority.set_alias("x@prod", TWO, 3, {}, ONE)
    with pytest.raises(BadSignature, match="approver key that stays"):
        Rotation(second.authority).sign(waiting.draft.digest)
    readable(first, second)
    # Whoever began signs the names for the time after, and the second signature was not in vain.
    assert people.rotate(first.authority, "approver").draft.missing == 0
    assert listed(first.state(), "approver") == {waiting.new} == {first.keyid("approver")}
    readable(first, second, joined(tmp_path, first, "newcomer"))


def test_a_draft_can_be_dropped(first: Machine, tmp_path: Path) -> None:
    second = joined(tmp_path, first, "second")
    people.add(first.authority, "root", second.public("root"), threshold=2)
    Rotation(first.authority).drop()
    assert Rotation(first.authority).look() is None
    with pytest.raises(NotFound):
        Rotation(second.authority).sign("")


def test_separate_machines_for_root_approver_and_publisher(first: Machine, tmp_path: Path) -> None:
    """Nobody holds two keys: the root lists, the publisher and then the approver follow."""
    second = joined(tmp_path, first, "second")
    public = second.public("publisher")
    rootless = Machine(tmp_path / "rootless", first.store)
    (tmp_path / "rootless" / "keys").mkdir(parents=True)
    people.pin(rootless.authority.client, people.export(first.state()))
    for role in ("root", "online"):
        (first.home / "keys" / f"{role}.pem").rename(rootless.home / "keys" / f"{role}.pem")
    people.add(rootless.authority, "publisher", public)
    assert second.keyid("publisher") in listed(rootless.state(), "publisher")
    assert second.keyid("publisher") not in rootless.state().signed("targets")["delegations"]["keys"]
    (first.home / "keys" / "online.pem").write_bytes((rootless.home / "keys" / "online.pem").read_bytes())
    (first.home / "keys" / "online.pem").chmod(0o600)
    Rotation(first.authority).renew()
    assert second.keyid("publisher") in first.state().signed("targets")["delegations"]["keys"]
    readable(first, second)


def test_a_key_is_revoked_everywhere_and_for_good(first: Machine, tmp_path: Path) -> None:
    second = joined(tmp_path, first, "second")
    public = second.public("publisher")
    people.add(first.authority, "publisher", public)
    people.add(first.authority, "scanner", public)
    gone = second.keyid("publisher")
    draft = people.remove(first.authority, gone[:8], planned=False)
    assert {line.partition(":")[0] for line in draft.changes} >= {"publisher", "scanner"}
    assert gone not in listed(first.state(), "publisher") | listed(first.state(), "scanner")
    assert gone not in first.state().signed("targets")["delegations"]["keys"]
    with pytest.raises(UsageError, match="cannot come back"):
        people.add(first.authority, "publisher", public)
    readable(first, second)


def test_what_a_revoked_publisher_signed_is_signed_anew(first: Machine, tmp_path: Path) -> None:
    second = joined(tmp_path, first, "second")
    for role in ("publisher", "online"):
        people.add(first.authority, role, second.public(role))
    second.authority.add_version("x:2", TWO, 3)
    people.remove(first.authority, second.keyid("publisher"), planned=False)
    assert list(joined(tmp_path, first, "newcomer").state().versions_of("x")) == [1, 2]
    assert {s["keyid"] for s in first.state().document(bin_role("x"))["signatures"]} == {
        first.keyid("publisher")
    }
    with pytest.raises(BadSignature, match="not one that the registry trusts"):
        second.authority.add_version("x:3", TWO, 3)


@pytest.mark.parametrize("role", ROLES)
def test_the_last_key_of_a_role_cannot_be_revoked(first: Machine, role: str) -> None:
    before = {key: first.store.stat(key).tag for key in first.store.keys("")}
    with pytest.raises(UsageError, match=f"role {role} would have 0 keys") as refusal:
        people.remove(first.authority, first.keyid(role), planned=False)
    assert f"registry trust add {role}" in refusal.value.mend
    assert {key: first.store.stat(key).tag for key in first.store.keys("")} == before


def test_thresholds_have_bounds(first: Machine) -> None:
    with pytest.raises(UsageError, match="need 2"):
        people.require(first.authority, "approver", 2)
    with pytest.raises(UsageError, match="online"):
        people.require(first.authority, "online", 2)
    with pytest.raises(UsageError, match="no role"):
        people.require(first.authority, "emperor", 1)


def test_one_key_does_not_fill_a_threshold_under_two_ids(first: Machine) -> None:
    plan = Plan.of(first.state().signed("root"))
    held = plan.holders["approver"]
    (key,) = held.keys.values()
    with pytest.raises(UsageError, match="already under another id"):
        plan.adding("approver", "0" * 64, key)
    twice = replace(held, keys={**held.keys, "0" * 64: key}, threshold=2)
    with pytest.raises(UsageError, match="would have"):
        replace(plan, holders={**plan.holders, "approver": twice}).checked()


def test_keys_are_found_by_enough_of_their_id(first: Machine) -> None:
    plan = Plan.of(first.state().signed("root"))
    keyid = first.keyid("root")
    assert plan.find(keyid[:8]) == keyid
    for wrong in (keyid[:7], "0" * 12, ""):
        with pytest.raises(UsageError, match="names"):
            plan.find(wrong)


def test_a_machine_without_the_root_key_changes_no_keys(first: Machine, tmp_path: Path) -> None:
    second = joined(tmp_path, first, "second")
    first.lose("root")
    with pytest.raises(BadSignature, match="no root key"):
        people.add(first.authority, "scanner", second.public("scanner"))
    assert first.state().version("root") == 1


def test_a_key_that_is_not_listed_cannot_be_rotated(first: Machine, tmp_path: Path) -> None:
    first.lose("scanner")
    people.make(first.ring, "scanner")
    with pytest.raises(BadSignature, match="not one that the registry lists"):
        people.rotate(first.authority, "scanner")


def test_renewing_gives_everything_a_new_life(first: Machine) -> None:
    before = first.state()
    Rotation(first.authority).renew()
    after = first.state()
    for role in ("root", "targets", "names", bin_role("x"), "snapshot", "timestamp"):
        assert after.version(role) > before.version(role), role
    readable(first)


def test_what_can_be_renewed_is_what_ends_soon_and_has_its_key_here(first: Machine, tmp_path: Path) -> None:
    def can(days: int) -> bool:
        return Rotation(first.authority).can_renew(datetime.now(UTC) + timedelta(days=days))

    assert not can(0), "all of it is young"
    assert can(70)
    # A root that waits for somebody else's signature is proposed once.
    second = joined(tmp_path, first, "second")
    people.add(first.authority, "root", second.public("root"), threshold=2)
    assert can(70)
    first.lose("approver", "publisher")
    assert not can(360)
    Rotation(first.authority).drop()
    assert can(360)
    assert not can(70), "the root lives longer than the names"
    first.lose("root")
    assert not can(360)


def test_a_private_key_is_never_taken_for_a_public_one(first: Machine) -> None:
    for role in ("scanner", "approver"):
        with pytest.raises(UsageError, match="private key"):
            people.add(first.authority, role, str(first.home / "keys" / "scanner.pem"))


def test_the_overview_names_what_is_here(first: Machine, tmp_path: Path) -> None:
    second = joined(tmp_path, first, "second")
    people.rotate(first.authority, "evaluator")
    mine, theirs = people.overview(first.authority), people.overview(second.authority)
    assert all(key["here"] for role in mine["roles"].values() for key in role["keys"])
    assert not any(key["here"] for role in theirs["roles"].values() for key in role["keys"])
    assert (theirs["root"]["version"], theirs["root"]["pinned_version"]) == (2, 1)
    assert len(mine["roles"]["evaluator"]["retired"]) == 1
    assert set(mine["expires"]) >= {"root", "targets", "names", bin_role("x"), "snapshot", "timestamp"}


def test_pinning_checks_the_fingerprint_and_the_signature(first: Machine, tmp_path: Path) -> None:
    root = people.export(first.state())
    machine = Machine(tmp_path / "other", first.store)
    client = machine.authority.client
    for wrong in (b"{}", b"", root.replace(b'"threshold":1', b'"threshold":2'), root[:-5]):
        with pytest.raises(BadSignature):
            people.pin(client, wrong)
    with pytest.raises(BadSignature, match="fingerprint"):
        people.pin(client, root, "sha256:" + "0" * 64)
    assert not client.pinned.exists()
    told = people.pin(client, root + b"\n", str(digest_bytes(root)))
    assert told == digest_bytes(root)
    readable(machine)
    with pytest.raises(RegistryError, match="pinned already"):
        people.pin(client, root)
