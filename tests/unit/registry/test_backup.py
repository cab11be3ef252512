"""Backups and restores on one machine: what comes back, what an interruption leaves, what readers say."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fakes.registries import NAME, PASSING, adapter_folder, copy_registry, objects, overwrite
from registry import backup as backups
from registry.cli import cli
from registry.client import Registry
from registry.digest import Digest
from registry.doctor import examine, exit_code
from registry.errors import (
    Conflict,
    DigestMismatch,
    NotFound,
    RegistryError,
    StaleTrust,
    UsageError,
)
from registry.mirror import TIMESTAMP
from registry.restore_plan import NOTE
from registry.restoring import Restored, restore
from registry.signing import keys as key_rotation
from registry.signing.following import KEPT
from registry.signing.rotation import AHEAD, Rotation
from registry.signing.signers import ONLINE
from registry.storage.local import LocalObjects
from registry.vault import BACKUPS, Vault

PROD = f"{NAME}@prod"


@pytest.fixture
def origin(tmp_path: Path) -> Registry:
    """A registry with one released adapter."""
    return copy_registry(tmp_path / "origin")


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    """An empty place for backups."""
    return Vault(LocalObjects(tmp_path / "backups"))


def put_back(home: Path, vault: Vault, **options: Any) -> Restored:
    return restore(home, Vault(vault.store), {}, **options)


def reader(tmp_path: Path, registry: Registry, name: str) -> Registry:
    """A machine that pinned the root and reads the store of a registry."""
    home = tmp_path / name
    home.mkdir()
    (home / "adapter-foundry.toml").write_text(f'[registry]\nstore = "{registry.store.uri}"\n')
    found = Registry.open(home)
    found.authority.client.pin(registry.authority.client.pinned.read_bytes())
    return found


def elsewhere(tmp_path: Path, origin: Registry) -> Path:
    """A new data folder for the store of a registry, which is destroyed with all that belongs to it."""
    home = tmp_path / "elsewhere"
    home.mkdir()
    (home / "adapter-foundry.toml").write_text(f'[registry]\nstore = "{origin.store.uri}"\n')
    shutil.rmtree(origin.place.home)
    return home


def release(registry: Registry, folder: Path, name: str, seed: int) -> str:
    reference = registry.push(adapter_folder(folder, seed), name, evaluation=PASSING).reference
    registry.approve(reference, "a person", "looks right")
    registry.promote(reference, "prod")
    return reference


def test_everything_comes_back_in_another_folder(tmp_path: Path, origin: Registry, vault: Vault) -> None:
    for name, text in {
        "registry/policy.toml": "# ours\n",
        "serving/keys.json": '{"version": 1, "keys": []}',
        "reviews/decisions.jsonl": "",
    }.items():
        (origin.place.home / name).parent.mkdir(exist_ok=True)
        (origin.place.home / name).write_text(text)
    origin = Registry.open(origin.place.home)
    before = origin.list()
    made = backups.make(origin, vault, {})
    keys = {path.name: path.read_bytes() for path in origin.place.keys.glob("*.pem")}
    shutil.rmtree(origin.place.home)

    new = tmp_path / "new"
    restored = put_back(new, vault, digest=made.digest)

    assert exit_code(restored.findings) == 0, restored.findings
    registry = Registry.open(new)
    assert registry.list() == before
    assert registry.pull(PROD).reference == f"{NAME}:1"
    assert {path.name: path.read_bytes() for path in registry.place.keys.glob("*.pem")} == keys
    assert all(path.stat().st_mode & 0o077 == 0 for path in registry.place.keys.glob("*.pem"))
    assert (new / "registry" / "policy.toml").read_text() == "# ours\n"
    assert (new / "serving" / "keys.json").exists()
    assert (new / "reviews" / "decisions.jsonl").exists()
    actions = [entry.action for entry in registry.ledger.entries()]
    assert actions[:4] == ["init", "push", "approve", "promote"]
    assert actions[4:6] == ["backup", "restore"]
    assert not (new / NOTE).exists()
    assert release(registry, tmp_path / "more", NAME, 1) == f"{NAME}:2"


def test_a_second_backup_copies_what_is_new(tmp_path: Path, origin: Registry, vault: Vault) -> None:
    first = backups.make(origin, vault, {})
    again = backups.make(origin, Vault(vault.store), {})
    release(origin, tmp_path / "more", "another", 1)
    later = backups.make(origin, Vault(vault.store), {})
    files = {kept.sha256 for kept in first.manifest.objects}
    assert {kept.sha256 for kept in again.manifest.objects} == files
    # The audit log has a row more, a line of SQLite's pages; nothing of the store was sent again.
    assert again.new < 100_000 < first.new
    added = {kept.sha256: kept.size for kept in later.manifest.objects if kept.sha256 not in files}
    assert sum(added.values()) < later.new < later.size
    assert backups.verify(vault, first.name).digest == first.digest
    assert backups.verify(vault).name == later.name


def test_the_first_of_several_backups_comes_back_too(tmp_path: Path, origin: Registry, vault: Vault) -> None:
    first = backups.make(origin, vault, {})
    release(origin, tmp_path / "more", "another", 1)
    backups.make(origin, Vault(vault.store), {})
    put_back(tmp_path / "new", vault, name=first.name)
    assert [found.reference for found in Registry.open(tmp_path / "new").list()] == [f"{NAME}:1"]


class Cut(BaseException):
    """The end of a process, as a kill makes it: nothing catches it."""


class CutStore(LocalObjects):
    """A folder of objects of a machine that dies before some write."""

    def __init__(self, folder: Path, writes: int) -> None:
        super().__init__(folder)
        self.left = writes

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Cut

    def put(self, key: str, content: Any, sent: Any = None) -> bool:
        self._count()
        return super().put(key, content, sent)

    def replace(self, key: str, data: bytes, tag: str | None) -> None:
        self._count()
        super().replace(key, data, tag)


def test_a_killed_backup_is_no_backup(tmp_path: Path, origin: Registry, vault: Vault) -> None:
    first = backups.make(origin, vault, {})
    release(origin, tmp_path / "more", "another", 1)
    writes = 0
    while True:
        folder = tmp_path / "cut"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "backups", folder)
        cut = Vault(CutStore(folder, writes))
        try:
            made = backups.make(origin, cut, {})
            break
        except Cut:
            assert Vault(LocalObjects(folder)).names() == [first.name]
            assert backups.verify(Vault(LocalObjects(folder))).digest == first.digest
            writes += 1
    assert writes > 5
    assert cut.names() == [first.name, made.name]
    backups.verify(cut)


@pytest.mark.slow
def test_a_killed_restore_can_be_repeated(
    tmp_path: Path, origin: Registry, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    backups.make(origin, vault, {})
    before = origin.list()
    writes = 0
    while True:
        new = tmp_path / f"new-{writes}"
        monkeypatch.setattr(Registry, "store", CutStore(objects(new), writes), raising=False)
        try:
            put_back(new, vault)
            break
        except Cut:
            begun = (new / NOTE).exists()
            assert begun or (objects(new) / "trust" / "timestamp.json").exists() or writes == 0
        finally:
            monkeypatch.undo()
            monkeypatch.setenv("ADAPTER_FOUNDRY_HOME", str(tmp_path / "home"))
        if writes % 5 == 0 or not begun:
            if begun:
                put_back(new, vault)
            assert Registry.open(new).list() == before
        writes += 1
    assert writes > 10


def test_there_is_no_backup_of_a_damaged_store(origin: Registry, vault: Vault) -> None:
    (weights,) = objects(origin.place.home).glob("models/*/adapter_weights/*")
    data = weights.read_bytes()
    overwrite(weights, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DigestMismatch):
        backups.make(origin, vault, {})
    weights.unlink()
    with pytest.raises(NotFound):
        backups.make(origin, vault, {})
    assert vault.names() == []


def test_files_of_a_revoked_version_may_be_gone(tmp_path: Path, origin: Registry, vault: Vault) -> None:
    origin.revoke(f"{NAME}:1", "it leaks")
    (weights,) = objects(origin.place.home).glob("models/*/adapter_weights/*")
    weights.unlink()
    backups.make(origin, vault, {})
    backups.verify(vault)
    assert exit_code(put_back(tmp_path / "new", vault).findings) == 0
    with pytest.raises(RegistryError) as refused:
        Registry.open(tmp_path / "new").pull(f"{NAME}:1")
    assert refused.value.exit_code == 15


def test_a_registry_that_is_there_stays(tmp_path: Path, origin: Registry, vault: Vault) -> None:
    backups.make(origin, vault, {})
    new = tmp_path / "new"
    put_back(new, vault)
    with pytest.raises(UsageError, match="there is a registry already"):
        put_back(new, vault)
    reference = release(Registry.open(new), tmp_path / "more", "another", 1)
    policy = new / "registry" / "policy.toml"
    policy.write_text("# mine\n")
    with pytest.raises(StaleTrust, match="this machine has seen newer"):
        put_back(new, vault, overwrite=True)
    assert Registry.open(new).pull(reference).reference == reference
    restored = put_back(new, vault, overwrite=True, older=True)
    assert any("versions-" in line for line in restored.lost)
    with pytest.raises(NotFound):
        Registry.open(new).pull(reference)


def test_what_said_something_else_is_kept(tmp_path: Path, origin: Registry, vault: Vault) -> None:
    (origin.place.home / "registry" / "policy.toml").write_text("# then\n")
    backups.make(Registry.open(origin.place.home), vault, {})
    new = tmp_path / "new"
    (new / "registry").mkdir(parents=True)
    (new / "registry" / "policy.toml").write_text("# mine\n")
    assert put_back(new, vault).replaced == ("registry/policy.toml.before-restore",)
    assert (new / "registry" / "policy.toml").read_text() == "# then\n"
    assert (new / "registry" / "policy.toml.before-restore").read_text() == "# mine\n"


def test_every_key_that_restores_put_aside_is_still_there(
    tmp_path: Path, origin: Registry, vault: Vault
) -> None:
    """Two backups, two rotations: the newest key may be nowhere but beside the restored one."""
    home = origin.place.home

    def held() -> set[bytes]:
        return {path.read_bytes() for path in (home / "registry" / "keys").iterdir()}

    seen, names = held(), []
    for _ in range(2):
        names.append(backups.make(Registry.open(home), Vault(vault.store), {}).name)
        key_rotation.rotate(Registry.open(home).authority, "approver")
        seen |= held()
    for name in names:
        put_back(home, vault, name=name, overwrite=True, older=True)
    assert held() == seen


def test_what_an_earlier_restore_put_aside_stays(tmp_path: Path, origin: Registry, vault: Vault) -> None:
    policy = origin.place.home / "registry" / "policy.toml"
    policy.write_text("# then\n")
    backups.make(Registry.open(origin.place.home), vault, {})
    for number, ending in enumerate(("", "-2", "-3")):
        policy.write_text(f"# {number}\n")
        restored = put_back(origin.place.home, vault, overwrite=True, older=True)
        assert restored.replaced == (f"registry/policy.toml.before-restore{ending}",)
    kept = sorted(path.read_text() for path in policy.parent.glob("policy.toml.*"))
    assert kept == ["# 0\n", "# 1\n", "# 2\n"]


def test_a_root_that_was_signed_after_the_backup_stays_for_those_who_have_seen_it(
    tmp_path: Path, origin: Registry, vault: Vault
) -> None:
    late = reader(tmp_path, origin, "late")
    late.pull(PROD)
    backups.make(origin, vault, {})
    key_rotation.rotate(origin.authority, "root")
    late.pull(PROD)
    home = origin.place.home
    second = (objects(home) / "trust" / "2.root.json").read_bytes()
    assert late.authority.state().version("root") == 2

    restored = put_back(home, vault, overwrite=True, older=True)
    assert restored.warnings == (
        "root 2 was signed after the backup and stays; its keys are in their place again: root",
    )
    assert exit_code(restored.findings) == 0
    assert (objects(home) / "trust" / "2.root.json").read_bytes() == second
    assert Rotation(Registry.open(home).authority).advance() == ()
    assert late.pull(PROD).reference == f"{NAME}:1"
    assert reader(tmp_path, origin, "fresh").pull(PROD).reference == f"{NAME}:1"

    # The store is lost too; this machine has the root in its memory, and can change keys as before.
    shutil.rmtree(objects(home))
    put_back(home, vault, overwrite=True, older=True)
    assert (objects(home) / "trust" / "2.root.json").read_bytes() == second
    assert key_rotation.rotate(Registry.open(home).authority, "root").draft.version == 3
    for _ in range(2):  # readers have seen what the first restore was raised to
        assert Rotation(Registry.open(home).authority).advance() == ()
    late.pull(PROD)
    assert late.authority.state().version("root") == 3


@pytest.mark.parametrize("role", [ONLINE, "approver", "publisher"])
def test_what_is_restored_is_signed_for_a_root_from_after_the_backup(
    tmp_path: Path, origin: Registry, vault: Vault, role: str
) -> None:
    early, late = reader(tmp_path, origin, "early"), reader(tmp_path, origin, "late")
    early.pull(PROD)
    backups.make(origin, vault, {})
    key_rotation.rotate(origin.authority, role)
    late.pull(PROD)
    home = origin.place.home
    restored = put_back(home, vault, overwrite=True, older=True)
    assert restored.warnings[0].endswith(f"its keys are in their place again: {role}")
    assert exit_code(restored.findings) == 0
    assert Rotation(Registry.open(home).authority).advance() == ()
    for who in (early, late, reader(tmp_path, origin, "fresh")):
        assert who.pull(PROD).reference == f"{NAME}:1"
        assert who.authority.state().version("root") == 2
    assert release(Registry.open(home), tmp_path / "more", "another", 1) == "another:1"


def test_a_root_whose_keys_are_away_is_kept_until_they_are_here(
    tmp_path: Path, origin: Registry, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under that root nobody would believe the store; without it, who has not seen it does."""
    early, late = reader(tmp_path, origin, "early"), reader(tmp_path, origin, "late")
    backups.make(origin, vault, {})
    key_rotation.rotate(origin.authority, ONLINE)
    late.pull(PROD)
    home = origin.place.home
    second = (objects(home) / "trust" / "2.root.json").read_bytes()
    key = (origin.place.keys / "online.pem").read_bytes()
    (origin.place.keys / "online.pem").unlink()

    for _ in range(2):  # the second restore finds it where the first one has put it
        restored = put_back(home, vault, overwrite=True, older=True)
        assert str(home / "trust" / KEPT) in restored.warnings[0]
        assert (home / "trust" / KEPT / "2.root.json").read_bytes() == second
        assert not (objects(home) / "trust" / "2.root.json").exists()
    assert early.pull(PROD).reference == f"{NAME}:1"
    with pytest.raises(RegistryError):
        late.pull(PROD)
    monkeypatch.setenv("ADAPTER_FOUNDRY_HOME", str(home))
    told = CliRunner().invoke(cli, ["trust", "renew", "--ahead"])
    assert "waits for its keys" in told.stderr
    assert early.pull(PROD).reference == f"{NAME}:1"

    found = origin.place.keys / "from-the-safe.pem"
    found.write_bytes(key)
    found.chmod(0o600)
    assert CliRunner().invoke(cli, ["trust", "renew", "--ahead"]).stderr == ""
    assert not (home / "trust" / KEPT).exists()
    assert late.pull(PROD).reference == f"{NAME}:1"
    assert early.pull(PROD).reference == f"{NAME}:1"


def test_a_root_that_only_readers_have_is_brought_back(
    tmp_path: Path, origin: Registry, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Store and data folder are lost after a change of the root, and the newest backup is older."""
    late = reader(tmp_path, origin, "late")
    backups.make(origin, vault, {})
    key_rotation.rotate(origin.authority, "root")
    late.pull(PROD)
    place = elsewhere(tmp_path, origin)
    assert put_back(place, vault).warnings == ()
    (place / "trust" / KEPT).mkdir(mode=0o700)
    shutil.copy(tmp_path / "late/trust/metadata/root_history/2.root.json", place / "trust" / KEPT)
    with pytest.raises(StaleTrust):
        late.pull(PROD)
    monkeypatch.setenv("ADAPTER_FOUNDRY_HOME", str(place))
    assert CliRunner().invoke(cli, ["trust", "renew", "--ahead"]).exit_code == 0
    assert late.pull(PROD).reference == f"{NAME}:1"


def test_a_policy_from_outside_is_told_where_it_lies(tmp_path: Path, origin: Registry, vault: Vault) -> None:
    policy = tmp_path / "etc" / "policy.toml"
    policy.parent.mkdir()
    policy.write_text("# ours\n")
    (origin.place.home / "adapter-foundry.toml").write_text(f'[registry]\npolicy = "{policy}"\n')
    made = backups.make(Registry.open(origin.place.home), vault, {})
    assert any(str(policy) in line and "registry/policy.toml" in line for line in made.warnings)

    assert put_back(tmp_path / "same", vault).warnings == ()  # it is there still
    policy.unlink()
    restored = put_back(tmp_path / "new", vault)
    own = tmp_path / "new" / "registry" / "policy.toml"
    (warning,) = restored.warnings
    assert str(policy) in warning
    assert str(own) in warning
    (found,) = (one for one in restored.findings if one.check == "policy")
    assert found.mend.startswith(f"copy {own} there")
    assert own.read_text() == "# ours\n"
    shutil.copyfile(own, policy)
    (found,) = (one for one in examine(Registry.open(tmp_path / "new")) if one.check == "policy")
    assert found.outcome == "ok"


def test_readers_who_have_seen_newer_refuse_until_the_numbers_are_raised(
    tmp_path: Path, origin: Registry, vault: Vault
) -> None:
    """A restore from an older backup is a rollback, and clients say so; the keys can say that it is meant."""
    early, late = reader(tmp_path, origin, "early"), reader(tmp_path, origin, "late")
    early.pull(PROD)
    backups.make(origin, vault, {})
    # Another adapter lies in another bin, which the backup does not have at all.
    lost = release(origin, tmp_path / "more", "another", 1)
    late.pull(PROD)
    late.pull(lost)
    place = elsewhere(tmp_path, origin)

    put_back(place, vault)
    early.pull(PROD)  # it has seen nothing newer
    with pytest.raises(StaleTrust) as refused:
        late.pull(PROD)
    assert refused.value.exit_code == 16

    registry = Registry.open(place)
    assert Rotation(registry.authority).advance() == ()
    assert registry.authority.state().version("timestamp") > AHEAD
    assert late.pull(PROD).reference == f"{NAME}:1"
    with pytest.raises(NotFound):
        late.pull(lost)
    early.pull(PROD)
    assert release(registry, tmp_path / "again", "another", 1) == lost
    assert late.pull(lost).reference == lost


def test_numbers_are_raised_where_the_keys_are(
    tmp_path: Path, origin: Registry, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Approvers apart: the machine of the registry says what is left, the approver's does it."""
    late = reader(tmp_path, origin, "late")
    backups.make(origin, vault, {})
    origin.yank(f"{NAME}:1", "blurs")
    late.pull(f"{NAME}:1")
    key = (origin.place.keys / "approver.pem").read_bytes()
    place = elsewhere(tmp_path, origin)
    put_back(place, vault)
    registry = Registry.open(place)
    (registry.place.keys / "approver.pem").unlink()
    monkeypatch.setenv("ADAPTER_FOUNDRY_HOME", str(registry.place.home))
    told = json.loads(CliRunner().invoke(cli, ["trust", "renew", "--ahead", "--json"]).stdout)
    assert told == {"ahead": False, "left": ["targets"]}
    with pytest.raises(StaleTrust):
        late.pull(f"{NAME}:1")
    (registry.place.keys / "approver.pem").write_bytes(key)
    (registry.place.keys / "approver.pem").chmod(0o600)
    assert Rotation(Registry.open(registry.place.home).authority).advance() == ()
    late.pull(f"{NAME}:1")


def test_a_backup_while_others_publish_is_whole(tmp_path: Path, origin: Registry, vault: Vault) -> None:
    ended = threading.Event()
    problems: list[BaseException] = []

    def publish() -> None:
        registry = Registry.open(origin.place.home)
        try:
            for seed in range(1, 4):
                release(registry, tmp_path / f"adapter-{seed}", f"other-{seed}", seed)
        except BaseException as error:
            problems.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=publish)
    thread.start()
    made = 0
    while not ended.is_set() or not made:
        try:
            backups.make(origin, Vault(vault.store), {})
            made += 1
        except (Conflict, StaleTrust):  # the other machine keeps publishing
            continue
    thread.join()
    assert not problems
    for name in vault.names():
        backups.verify(vault, name)
    put_back(tmp_path / "new", vault, name=vault.names()[0])


def test_who_is_outrun_by_others_is_not_told_that_the_store_was_changed(
    origin: Registry, vault: Vault
) -> None:
    others = Registry.open(origin.place.home).authority
    assert origin.authority.state().version("timestamp")

    class Outrun(LocalObjects):
        def read(self, key: str, start: int, stop: int) -> bytes:
            if key == TIMESTAMP:
                others.publish_anchor()
            return super().read(key, start, stop)

    origin.store = Outrun(objects(origin.place.home))
    with pytest.raises(StaleTrust, match="others publish faster"):
        backups.make(origin, vault, {})
    assert list(vault.names()) == []


def test_encrypted_keys_stay_encrypted_and_open_ones_are_told(
    tmp_path: Path, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    phrase = "a long passphrase that nobody prints"
    monkeypatch.setenv("ADAPTER_FOUNDRY_KEY_PASSPHRASE", phrase)
    registry = Registry.init(tmp_path / "closed")
    made = backups.make(registry, vault, {})
    assert made.warnings == ()
    monkeypatch.delenv("ADAPTER_FOUNDRY_KEY_PASSPHRASE")
    everything = b"".join(path.read_bytes() for path in (tmp_path / "backups").rglob("*") if path.is_file())
    assert b"ENCRYPTED PRIVATE KEY" in everything
    assert b"BEGIN PRIVATE KEY" not in everything
    assert phrase.encode() not in everything
    opened = backups.make(copy_registry(tmp_path / "open"), Vault(LocalObjects(tmp_path / "other")), {})
    assert "not encrypted: the keys approver" in opened.warnings[0]
    without = backups.make(
        Registry.open(tmp_path / "open"), Vault(LocalObjects(tmp_path / "third")), {}, keys=False
    )
    assert not any(kept.path.startswith("registry/keys") for kept in without.manifest.files)
    assert "private keys are not in this backup" in without.warnings[0]


def test_further_databases_and_where_they_go(
    tmp_path: Path, origin: Registry, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sqlite3

    jobs = tmp_path / "jobs.db"
    with sqlite3.connect(jobs) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE t (a TEXT)")
        connection.execute("INSERT INTO t VALUES ('kept')")
        connection.commit()
        # Still open, its rows still in the journal beside the file.
        monkeypatch.setenv("JOBS", f"sqlite+aiosqlite:///{jobs}")
        backups.make(origin, vault, {"serving": "env:JOBS"})
    with pytest.raises(UsageError, match="not said where the database serving goes"):
        put_back(tmp_path / "new", vault)
    with pytest.raises(UsageError, match="holds no database"):
        restore(tmp_path / "new", vault, {"prefect": "skip"})
    with pytest.raises(UsageError, match="cannot become postgresql"):
        restore(tmp_path / "new", vault, {"serving": "postgresql://a@b/c"})
    assert not (tmp_path / "new").exists()
    target = tmp_path / "there" / "jobs.db"
    restore(tmp_path / "new", vault, {"serving": f"sqlite:///{target}"})
    with sqlite3.connect(target) as connection:
        assert connection.execute("SELECT a FROM t").fetchall() == [("kept",)]
    restore(tmp_path / "third", vault, {"serving": "skip"})


def test_one_database_alone(tmp_path: Path, origin: Registry, vault: Vault) -> None:
    """The audit log is lost, and nothing else is touched; it continues what is signed."""
    backups.make(origin, vault, {})
    ledger = origin.place.home / "registry" / "ledger.db"
    with pytest.raises(UsageError, match="the database ledger"):
        put_back(origin.place.home, vault, only=["ledger"])
    ledger.unlink()
    trust = {path: path.read_bytes() for path in (origin.place.home / "trust").rglob("*") if path.is_file()}
    found = put_back(origin.place.home, vault, only=["ledger"])
    assert found.databases == ("ledger",)
    outcomes = {one.check: one.outcome for one in found.findings}
    assert outcomes["audit log"] == outcomes["trust metadata"] == "ok"
    assert {path: path.read_bytes() for path in trust} == trust
    with pytest.raises(UsageError, match="holds no database"):
        put_back(origin.place.home, vault, only=["prefect"])


@pytest.fixture
def run(origin: Registry, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Runs a command in the origin's data folder."""
    monkeypatch.setenv("ADAPTER_FOUNDRY_HOME", str(origin.place.home))

    def invoke(*words: str) -> Any:
        return CliRunner().invoke(cli, words)

    return invoke


def test_the_commands_say_what_they_did(
    tmp_path: Path, run: Any, origin: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = str(tmp_path / "backups")
    made = run("backup", place, "--json")
    assert made.exit_code == 0
    told = json.loads(made.stdout)
    assert told["objects"] == 8
    assert Digest(told["sha256"])
    assert "keys approver" in made.stderr
    assert json.loads(run("backup", "--verify", place, "--json").stdout)["sha256"] == told["sha256"]
    assert told["sha256"] in run("backup", "--verify", place).stdout
    for words in (["--verify", "--without-keys"], ["--at", "x"], ["--database", "no"]):
        assert isinstance(run("backup", place, *words).exception, UsageError)
    monkeypatch.setenv("ADAPTER_FOUNDRY_HOME", str(tmp_path / "new"))
    back = run("restore", place, "--sha256", told["sha256"], "--json")
    assert back.exit_code == 0
    assert json.loads(back.stdout)["healthy"] is True
    assert back.stderr == ""
    again = run("restore", place, "--overwrite", "--older")
    assert "without --sha256" in again.stderr
    assert "`registry trust renew --ahead`" in again.stdout


def test_a_folder_that_others_read_gets_no_backup(tmp_path: Path, origin: Registry) -> None:
    folder = tmp_path / "shared"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    with pytest.raises(UsageError, match="others may look into"):
        backups.make(origin, Vault.open(str(folder)), {})
    assert os.listdir(folder) == []


def test_a_machine_that_only_reads_can_be_backed_up(tmp_path: Path, origin: Registry, vault: Vault) -> None:
    found = reader(tmp_path, origin, "reader")
    made = backups.make(found, vault, {})
    assert made.manifest.databases == ()
    assert [kept.path for kept in made.manifest.files] == ["adapter-foundry.toml", "trust/pinned.root.json"]
    assert datetime.fromisoformat(made.manifest.time) <= datetime.now(UTC)
    assert next(iter(vault.store.keys(BACKUPS))).endswith(f"{made.name}.json")
