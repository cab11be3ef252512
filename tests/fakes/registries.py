"""A real registry with one approved and promoted adapter, made once a process and copied for each test."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fakes.adapters import clean_adapter
from registry.client import Registry
from registry.families import KNOWN_BASES
from registry.signing.signers import KeyRing
from registry.signing.trust import bin_role, key_role

BASE = KNOWN_BASES["adapter-foundry/portraits-base"]
NAME = "pixelsmile"
PASSING: Mapping[str, Any] = {"verdict": "pass", "metrics": {"top1": 0.93}}


@functools.cache
def adapter_files(seed: int) -> Mapping[str, bytes]:
    """A clean adapter for the shipped base; every seed gives another one."""
    return clean_adapter(BASE, seed=seed)


def adapter_folder(folder: Path, seed: int = 0) -> Path:
    """Writes a clean adapter folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in adapter_files(seed).items():
        (folder / name).write_bytes(data)
    return folder


@functools.cache
def _template() -> Path:
    root = Path(tempfile.mkdtemp(prefix="registry-template-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    home = root / "home"
    registry = Registry.init(home)
    registry.push(adapter_folder(root / "adapter"), NAME, evaluation=PASSING)
    registry.approve(f"{NAME}:1", "a person", "looks right")
    registry.promote(f"{NAME}:1", "prod")
    return home


def copy_registry(home: Path) -> Registry:
    """Puts a registry with ``pixelsmile:1`` at ``pixelsmile@prod`` into a data folder."""
    shutil.copytree(_template(), home, dirs_exist_ok=True)
    return Registry.open(home)


def objects(home: Path) -> Path:
    """The folder of the object store."""
    return home / "registry" / "objects"


def one(home: Path, pattern: str) -> Path:
    """The only object whose key matches a glob pattern."""
    (path,) = objects(home).glob(pattern)
    return path


def overwrite(path: Path, data: bytes) -> None:
    """Changes an object the way somebody does who controls the store."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def kept(home: Path) -> list[Path]:
    """Every file in the cache, hidden ones included; the locks of the folder for incoming files are empty."""
    return [path for path in (home / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


def key_ring(home: Path) -> KeyRing:
    """The private keys of a registry."""
    return KeyRing(folder=home / "registry" / "keys")


def forget_trust(home: Path) -> None:
    """Makes the machine one that knows the pinned root and has seen nothing since."""
    shutil.rmtree(home / "trust" / "metadata", ignore_errors=True)


def newest(home: Path, role: str) -> Path:
    """The file of a role's newest trust metadata in the store."""
    if role == "timestamp":
        return objects(home) / "trust" / "timestamp.json"
    found = (objects(home) / "trust").glob(f"*.{role}.json")
    return max(found, key=lambda path: int(path.name.partition(".")[0]))


def resign(
    home: Path,
    changes: Mapping[str, Callable[[Any], None]],
    keys: Mapping[str, str] | None = None,
    ring: KeyRing | None = None,
) -> None:
    """Rewrites the store's trust metadata as somebody could who has some of the keys.

    Args:
        home: whose store.
        changes: what to do to the signed part of each role's metadata ("targets", "names", "versions-00" …;
            "versions" is the bin of the adapter `NAME`).
        keys: role whose key signs each kind, where it is not the honest one.
        ring: other keys than those of the registry.
    """
    from tuf.api.metadata import Metadata, MetaFile

    kinds = {"versions": bin_role(NAME)}
    ring = ring or key_ring(home)
    trust = objects(home) / "trust"

    def load(kind: str) -> Any:
        path = newest(home, kinds.get(kind, kind))
        return Metadata.from_bytes(path.read_bytes()).signed, path

    def store(kind: str, signed: Any, old: Path) -> bytes:
        metadata = Metadata(signed)
        metadata.sign(ring.signer((keys or {}).get(kind, key_role(kinds.get(kind, kind)))))
        data: bytes = metadata.to_bytes()
        old.unlink()
        name = "timestamp.json" if kind == "timestamp" else f"{signed.version}.{kinds.get(kind, kind)}.json"
        overwrite(trust / name, data)
        return data

    snapshot, snapshot_path = load("snapshot")
    timestamp, timestamp_path = load("timestamp")
    for kind in changes:
        if kind not in ("snapshot", "timestamp"):
            role = kinds.get(kind, kind)
            signed, path = load(kind)
            signed.version += 1
            changes[kind](signed)
            data = store(kind, signed, path)
            meta = MetaFile.from_data(signed.version, data, ["sha256"])
            meta.unrecognized_fields = snapshot.meta[f"{role}.json"].unrecognized_fields
            snapshot.meta[f"{role}.json"] = meta
    snapshot.version += 1
    changes.get("snapshot", lambda _: None)(snapshot)
    data = store("snapshot", snapshot, snapshot_path)
    timestamp.snapshot_meta = MetaFile.from_data(snapshot.version, data, ["sha256"])
    timestamp.version += 1
    changes.get("timestamp", lambda _: None)(timestamp)
    store("timestamp", timestamp, timestamp_path)


def expire(signed: Any) -> None:
    """A change for `resign`: the time of this metadata was over yesterday."""
    signed.expires = datetime.now(UTC).replace(microsecond=0) - timedelta(days=1)


def envelope_fields(path: Path) -> dict[str, Any]:
    """A DSSE envelope as JSON values."""
    fields: dict[str, Any] = json.loads(path.read_bytes())
    return fields
