"""Mirror archives in the hands of somebody who carries them, and the site that they are for."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

from registry.client import Registry
from registry.signing.refresh import TrustClient
from registry.storage.archive import ArchiveWriter, order

Members = dict[str, bytes]


def site(home: Path, publisher: Path) -> Registry:
    """A new data folder that knows nothing but the publisher's root."""
    registry = Registry.open(home)
    client = TrustClient(registry.store, registry.place.trust)
    client.pin((publisher / "trust" / "pinned.root.json").read_bytes())
    return registry


def members(archive: Path) -> Members:
    """What any tar program finds in an archive."""
    with tarfile.open(archive) as found:
        return {member.name: found.extractfile(member).read() for member in found}  # type: ignore[union-attr]


def packed(content: Mapping[str, bytes]) -> bytes:
    """An archive in the one right spelling."""
    sink = io.BytesIO()
    writer = ArchiveWriter(sink.write)
    for key in sorted(content, key=order):
        writer.add(key, content[key])
    writer.close()
    return sink.getvalue()


def repacked(archive: Path, change: Callable[[Members], object]) -> None:
    """Changes the members of an archive, which keeps its spelling."""
    content = members(archive)
    change(content)
    archive.write_bytes(packed(content))


def find(content: Mapping[str, bytes], part: str) -> str:
    """The only key that has something in it."""
    (key,) = [key for key in content if part in key]
    return key


def appearance(home: Path) -> dict[str, bytes]:
    """Everything that a site holds, except for locks."""
    return {
        str(path.relative_to(home)): path.read_bytes()
        for path in sorted(home.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }
