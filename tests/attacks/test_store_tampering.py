"""Whoever controls the store changes, cuts, empties or removes objects; a pull refuses and keeps nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fakes.registries import NAME, copy_registry, forget_trust, kept, newest, objects, one, overwrite
from registry.errors import DigestMismatch, NotFound, RegistryError, StaleTrust, Unsigned
from registry.signing.trust import bin_role

OBJECTS = {
    "weights": "models/*/adapter_weights/*",
    "card": "blobs/blake3/*",
    "manifest": "manifests/sha256/*",
    "training statement": "statements/*/training.*",
    "licence statement": "statements/*/licence.*",
    "scan statement": "statements/*/scan.*",
    "evaluation statement": "statements/*/evaluation.*",
    "approval statement": "statements/*/approval.*",
    "MLflow model file": "models/*/MLmodel",
    "root": "trust/*.root.json",
    "timestamp": "trust/timestamp.json",
    "snapshot": "trust/*.snapshot.json",
    "targets": "trust/*.targets.json",
    "names": "trust/*.names.json",
    "versions": f"trust/*.{bin_role(NAME)}.json",
}

TRUST = ("root", "timestamp", "snapshot", "targets", "names", "versions")
STATEMENTS = [what for what in OBJECTS if what.endswith("statement")]


def flip(data: bytes, at: int) -> bytes:
    """One bit is not what it was."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "first byte": lambda data: flip(data, 0),
    "middle byte": lambda data: flip(data, len(data) // 2),
    "last byte": lambda data: flip(data, len(data) - 1),
    "cut": lambda data: data[:-1],
    "longer": lambda data: data + b"\n",
    "empty": lambda data: b"",
}


def find(home: Path, what: str) -> Path:
    """An object of the one adapter in the store; of trust metadata the newest edition."""
    if what in TRUST:
        return newest(home, bin_role(NAME) if what == "versions" else what)
    return one(home, OBJECTS[what])


def reference(what: str) -> str:
    """An alias is read from the aliases alone; what names a version is read when a version is asked for."""
    return f"{NAME}:1" if what == "versions" else f"{NAME}@prod"


def test_the_cases_are_every_object_of_the_store(home: Path) -> None:
    copy_registry(home)
    superseded = {path for what in TRUST for path in objects(home).glob(OBJECTS[what])}
    found = {path for path in objects(home).rglob("*") if path.is_file() and path.name != ".lock"}
    assert {find(home, what) for what in OBJECTS} | superseded == found


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("what", OBJECTS)
def test_a_changed_object_is_refused(home: Path, what: str, damage: str) -> None:
    registry = copy_registry(home)
    # The first byte as a machine sees it which has pulled before; that one has no need to ask for versions.
    if damage != "first byte" or what == "versions":
        forget_trust(home)
    path = find(home, what)
    overwrite(path, DAMAGE[damage](path.read_bytes()))

    with pytest.raises(DigestMismatch) as refusal:
        registry.pull(reference(what))

    assert refusal.value.exit_code == 13
    assert refusal.value.mend
    assert not kept(home)


@pytest.mark.parametrize("what", OBJECTS)
def test_verify_refuses_what_pull_refuses(home: Path, what: str) -> None:
    registry = copy_registry(home)
    forget_trust(home)
    path = find(home, what)
    overwrite(path, DAMAGE["middle byte"](path.read_bytes()))
    with pytest.raises(DigestMismatch):
        registry.verify(reference(what))


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("weights", NotFound),
        ("card", NotFound),
        ("manifest", NotFound),
        *((what, Unsigned) for what in STATEMENTS),
        *((kind, StaleTrust) for kind in TRUST),
    ],
)
@pytest.mark.parametrize("known", [True, False], ids=["machine that pulled before", "new machine"])
def test_a_removed_object_is_missed(home: Path, what: str, error: type[RegistryError], known: bool) -> None:
    registry = copy_registry(home)
    if not known or what == "versions":
        forget_trust(home)
    find(home, what).unlink()
    with pytest.raises(error) as refusal:
        registry.pull(reference(what))
    assert type(refusal.value).exit_code == error.exit_code
    assert not kept(home)


def test_a_byte_that_json_does_not_care_about_is_refused(home: Path) -> None:
    """Hex digits in upper case mean the same signature; the store shows other bytes all the same."""
    registry = copy_registry(home)
    forget_trust(home)
    path = find(home, "timestamp")
    text = path.read_bytes()
    start = text.index(b'"sig":"') + len(b'"sig":"')
    overwrite(path, text[:start] + text[start : start + 128].upper() + text[start + 128 :])
    with pytest.raises(DigestMismatch):
        registry.pull(f"{NAME}@prod")
    assert not kept(home)


def test_a_foreign_file_in_the_model_folder_is_refused(home: Path) -> None:
    registry = copy_registry(home)
    overwrite(find(home, "MLflow model file").with_name("loader.py"), b"print('run me')\n")
    with pytest.raises(DigestMismatch, match=r"loader\.py"):
        registry.pull(f"{NAME}@prod")
    assert not kept(home)


def test_a_link_out_of_the_store_is_not_followed(home: Path, tmp_path: Path) -> None:
    registry = copy_registry(home)
    path = find(home, "weights")
    elsewhere = tmp_path / "weights"
    elsewhere.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(elsewhere)
    with pytest.raises(RegistryError, match="symbolic link"):
        registry.pull(f"{NAME}@prod")
    assert not kept(home)


def test_more_statements_than_are_read_are_refused(home: Path) -> None:
    registry = copy_registry(home)
    scan = find(home, "scan statement")
    for number in range(64):
        overwrite(scan.with_name(f"scan.{number:064x}.json"), b"{}")
    with pytest.raises(DigestMismatch, match="69 statements"):
        registry.pull(f"{NAME}@prod")
