"""Trust metadata of a moment that has passed: verified from a root, whatever the clock says.

A backup is older than the day for which a timestamp is believed, so tuf's client would refuse it. Here
everything else that tuf checks is checked: signatures, thresholds, the chain of roots, numbers and digests.
What comes out is what was signed at that time; whether it is the newest, nobody can tell from it alone.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.digest import digest_bytes
from registry.errors import BadSignature, DigestMismatch, StaleTrust
from registry.signing.explained import explained
from registry.signing.refresh import verify_bin
from registry.signing.trust import NAMES, PREFIX, TOP, Document, TrustState


@dataclass(frozen=True, kw_only=True, slots=True)
class Followed:
    """Trust metadata of a moment that has passed, with roots that were signed since.

    Attributes:
        documents: metadata by their keys in a store, with the later roots under which all of them still hold.
        state: what these say.
        roots: numbers of the later roots among them.
        apart: still later roots by their numbers, by whose keys these metadata are not signed.
    """

    documents: Mapping[str, bytes]
    state: TrustState
    roots: tuple[int, ...]
    apart: Mapping[int, bytes]


def verify(documents: Mapping[str, bytes], pinned: bytes) -> TrustState:
    """Return what a complete set of trust metadata says.

    Args:
        documents: metadata by their keys in a store, every bin that the snapshot names included.
        pinned: the root from which all trust begins.

    Raises:
        BadSignature, DigestMismatch: something is not signed as it must be, was changed, or is missing.
    """
    with explained():
        root = _newest_root(documents, pinned)
    found: dict[str, Document] = {"root": root}
    with explained():
        _top(documents, found)
    for role in found["snapshot"]["signed"]["meta"]:
        name = role.removesuffix(".json")
        if name not in found:
            data = _named(documents, found, name)
            verify_bin(name, data, found)
            found[name] = json.loads(data)
    top = {role: found[role] for role in TOP}
    return TrustState(documents=top, read_bin=lambda role: found[role])


def follow(documents: Mapping[str, bytes], pinned: bytes, known: Sequence[Mapping[int, bytes]]) -> Followed:
    """Go on from the newest root of a verified set to roots that were signed later.

    Who has seen a root asks for its successor and for nothing older, so a store has to keep all of them.

    Args:
        documents: the set, as for `verify`.
        pinned: the root from which all trust begins.
        known: roots by their numbers, from whoever has some; hostile.

    Raises:
        BadSignature, DigestMismatch: see `verify`.
    """
    with explained():
        root = _newest_root(documents, pinned)
    later = chain(json.dumps(root).encode(), known)
    numbers = sorted(later)
    for held in range(len(numbers), -1, -1):
        whole = {**documents, **{f"{PREFIX}{number}.root.json": later[number] for number in numbers[:held]}}
        try:
            state = verify(whole, pinned)
        except (BadSignature, DigestMismatch):
            if not held:
                raise
            continue
        apart = {number: later[number] for number in numbers[held:]}
        return Followed(documents=whole, state=state, roots=tuple(numbers[:held]), apart=apart)
    raise AssertionError("unreachable")


def chain(root: bytes, known: Sequence[Mapping[int, bytes]]) -> dict[int, bytes]:
    """The roots that follow from one, each signed by the keys of the one before and by its own.

    Args:
        root: the one.
        known: roots by their numbers, from whoever has some; hostile.
    """
    from tuf.api.exceptions import RepositoryError
    from tuf.api.metadata import Metadata, Root

    current, found = Metadata[Root].from_bytes(root), dict[int, bytes]()
    while True:
        number = current.signed.version + 1
        for data in (roots[number] for roots in known if number in roots):
            try:
                following = Metadata[Root].from_bytes(data)
                if not isinstance(following.signed, Root) or following.signed.version != number:
                    continue
                for judge in (current.signed, following.signed):
                    judge.verify_delegate("root", following.signed_bytes, following.signatures)
            except RepositoryError:
                continue
            current, found[number] = following, data
            break
        else:
            return found


def newer(folder: Path, state: TrustState) -> list[str]:
    """The metadata of which a machine has seen newer ones than a state holds.

    Args:
        folder: what the machine believes, its ``trust`` folder.
        state: what is to be believed.
    """
    found = []
    for role in (*TOP, *state.bins()):
        try:
            seen = json.loads((folder / "metadata" / f"{role}.json").read_bytes())["signed"]["version"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(seen, int) and seen > state.version(role):
            found.append(f"{role} {seen} (here {state.version(role)})")
    kept = {path.stem for path in (folder / "metadata").glob("versions-*.json")}
    return found + sorted(f"{role} (not here)" for role in kept - set(state.bins()))


def remember(folder: Path, pinned: bytes, documents: Mapping[str, bytes], state: TrustState) -> None:
    """Make a machine believe a verified state, and forget what it has seen; its pin stays if it has one."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    shutil.rmtree(folder / "metadata", ignore_errors=True)
    history = folder / "metadata" / "root_history"
    history.mkdir(mode=0o700, parents=True)
    if not (folder / "pinned.root.json").exists():
        (folder / "pinned.root.json").write_bytes(pinned)
    first, last = _number(pinned), state.version("root")
    for number in range(first, last + 1):
        data = pinned if number == first else documents[f"{PREFIX}{number}.root.json"]
        (history / f"{number}.root.json").write_bytes(data)
    # As tuf's client keeps it.
    os.symlink(f"root_history/{last}.root.json", folder / "metadata" / "root.json")
    for role in (*TOP, *state.bins()):
        if role != "root":
            key = "timestamp.json" if role == "timestamp" else f"{state.version(role)}.{role}.json"
            (folder / "metadata" / f"{role}.json").write_bytes(documents[PREFIX + key])


# -- parts --


def _newest_root(documents: Mapping[str, bytes], pinned: bytes) -> Document:
    from tuf.api.metadata import Metadata, Root

    data, number = pinned, _number(pinned)
    copy = documents.get(f"{PREFIX}{number}.root.json")
    if copy is not None and copy != pinned:
        raise BadSignature(
            f"root {number} is not the one that is pinned", "this is the backup of another registry"
        )
    current = Metadata[Root].from_bytes(pinned)
    current.signed.verify_delegate("root", current.signed_bytes, current.signatures)
    while (after := documents.get(f"{PREFIX}{current.signed.version + 1}.root.json")) is not None:
        following = Metadata[Root].from_bytes(after)
        if following.signed.version != current.signed.version + 1:
            raise DigestMismatch("a root has another number than its name", "the backup was changed")
        for judge in (current.signed, following.signed):
            judge.verify_delegate("root", following.signed_bytes, following.signatures)
        current, data = following, after
    document: Document = json.loads(data)
    return document


def _top(documents: Mapping[str, bytes], found: dict[str, Document]) -> None:
    from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Targets, Timestamp

    root = Metadata[Root].from_dict(json.loads(json.dumps(found["root"]))).signed
    data = _of(documents, "timestamp.json")
    timestamp = Metadata[Timestamp].from_bytes(data)
    root.verify_delegate("timestamp", timestamp.signed_bytes, timestamp.signatures)
    found["timestamp"] = json.loads(data)
    meta = timestamp.signed.snapshot_meta
    data = _of(documents, f"{meta.version}.snapshot.json")
    meta.verify_length_and_hashes(data)
    snapshot = Metadata[Snapshot].from_bytes(data)
    root.verify_delegate("snapshot", snapshot.signed_bytes, snapshot.signatures)
    _check_number("snapshot", snapshot.signed.version, meta.version)
    found["snapshot"] = json.loads(data)
    listed: MetaFile = snapshot.signed.meta["targets.json"]
    data = _of(documents, f"{listed.version}.targets.json")
    listed.verify_length_and_hashes(data)
    targets = Metadata[Targets].from_bytes(data)
    root.verify_delegate("targets", targets.signed_bytes, targets.signatures)
    _check_number("targets", targets.signed.version, listed.version)
    found["targets"] = json.loads(data)
    if f"{NAMES}.json" not in snapshot.signed.meta:
        raise DigestMismatch("the snapshot names no adapters", "the backup was changed")


def _named(documents: Mapping[str, bytes], found: Mapping[str, Document], role: str) -> bytes:
    number: Any = found["snapshot"]["signed"]["meta"][f"{role}.json"]["version"]
    return _of(documents, f"{number}.{role}.json")


def _of(documents: Mapping[str, bytes], name: str) -> bytes:
    try:
        return documents[PREFIX + name]
    except KeyError:
        raise DigestMismatch(f"the trust metadata {name} are missing", "this set is not whole") from None


def _check_number(role: str, number: int, listed: int) -> None:
    if number != listed:
        raise DigestMismatch(f"{role} has another number than was signed", "the metadata were changed")


def _number(root: bytes) -> int:
    try:
        return int(json.loads(root)["signed"]["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise StaleTrust(f"{digest_bytes(root)} is no root", "pin the root of this registry") from error
