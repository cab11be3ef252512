"""Intake: a site takes what a mirror archive brings, or nothing of it.

An import verifies the trust metadata from the root that the site has pinned, and refuses what is older than
anything the site has seen; it admits every version by the site's own policy, documents and bytes and the
scanner of today; only then the first object appears in the site's store, and the timestamp that makes all of
it visible comes last. MLflow is not asked.

An interrupted import leaves objects that nothing names; the next one finds them there and goes on.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from registry import admission, transfer
from registry.content import Content
from registry.errors import BadSignature, Conflict, DigestMismatch, NotFound, StaleTrust
from registry.manifest import AdapterManifest
from registry.mirror import (
    REFUSALS,
    TIMESTAMP,
    TRUST,
    LeftOut,
    Mirrored,
    Version,
    admitted,
    believed_until,
    is_root,
    policies_of,
    trust_keys,
)
from registry.storage import shelf
from registry.storage.archive import ArchiveObjects
from registry.storage.base import ObjectStore, file_key, manifest_key, read
from registry.storage.mlmodel import write_model

if TYPE_CHECKING:
    from registry.client import Registry
    from registry.signing.trust import TrustState
    from registry.transfer import Progress

_MEND: Final = "it was tampered with, and nothing of it was taken; export it again"


def take(registry: Registry, archive: Path, progress: Progress = transfer.silent) -> Mirrored:
    """Verify an archive and take its versions into this site's store; see above.

    Args:
        registry: the site's registry, which has pinned a root.
        archive: the file.
        progress: hears about the stages "verify" and "upload".

    Raises:
        NotFound: no root is pinned here, or the archive lacks a file.
        DigestMismatch: the archive is none, or something in it was changed.
        BadSignature: it is signed by others than those who may.
        StaleTrust: it is older than what this site has seen, or its time is over.
        PolicyRefused: it is too large, or no version in it is admitted.
        Conflict: the site's store was changed at the same moment.
        RegistryError: see the error tree.
    """
    from registry.signing.refresh import TrustClient

    with contextlib.closing(ArchiveObjects(archive)) as source, _copied_trust(registry) as folder:
        tag = _tag(registry.store)
        state = _verified_state(source, folder)
        versions, left_out = admitted(registry, source, state)
        _check_members(source, state, versions, left_out)
        versions, more = _admit_files(registry, source, state, versions, progress)
        left_out += more
        if not versions and left_out:
            raise left_out[0].refusal
        sent = _take(registry, source, versions, progress)
        _take_trust(registry.store, state, folder, tag)
        TrustClient(registry.store, registry.place.trust).refresh()
        return Mirrored(
            references=tuple(version.reference for version in versions),
            left_out=left_out,
            size=archive.stat().st_size,
            sent=sent,
            expires=believed_until(state),
        )


@contextlib.contextmanager
def _copied_trust(registry: Registry) -> Iterator[Path]:
    """A private copy of what this site believes, so that an archive that is refused changes nothing.

    What the site's store shows is looked at first: nobody carries in something that is older.
    """
    from registry.signing.refresh import TrustClient

    client = TrustClient(registry.store, registry.place.trust)
    if client.pinned.exists() and _tag(registry.store) is not None:
        with contextlib.suppress(StaleTrust):  # a site is cut off; its store may well be out of date
            client.refresh()
    with tempfile.TemporaryDirectory(prefix="registry-import-") as temporary:
        folder = Path(temporary) / "trust"
        if registry.place.trust.exists():
            with client.locked():
                shutil.copytree(registry.place.trust, folder, symlinks=True)
        yield folder


def _verified_state(source: ArchiveObjects, folder: Path) -> TrustState:
    """What an archive says, verified from the pinned root, every bin included."""
    from registry.signing.refresh import TrustClient

    state = TrustClient(source, folder).refresh()
    for role in state.bins():
        state.document(role)
    return state


def _check_members(
    source: ArchiveObjects, state: TrustState, versions: Sequence[Version], left_out: Sequence[LeftOut]
) -> None:
    """Make sure that the archive holds nothing that no signed name needs.

    Raises:
        BadSignature: it holds a manifest that nobody signed.
        DigestMismatch: it holds something else.
    """
    signed = state.versions()
    digests = {version.digest for version in versions}
    digests |= {signed[found.reference].digest for found in left_out}
    needed = {*trust_keys(state)}
    for digest in digests:
        manifest = shelf.read_manifest(source, digest)
        needed |= {manifest_key(digest), *(file_key(entry) for entry in manifest.files)}
        needed |= {*source.keys(f"statements/{digest.hex}/")}
    for key in source.keys(""):
        if key in needed or is_root(key, state):
            continue  # roots from before the pinned one are for sites that pinned an older one
        if key.startswith("manifests/"):
            raise BadSignature(f"nobody signed {key}, which the archive holds", _MEND)
        raise DigestMismatch(f"the archive holds {key}, which no signed version needs", _MEND)


def _admit_files(
    registry: Registry,
    source: ArchiveObjects,
    state: TrustState,
    versions: Sequence[Version],
    progress: Progress,
) -> tuple[list[Version], tuple[LeftOut, ...]]:
    """Verify every byte of the versions' files and scan them."""
    gates = policies_of(registry, state)
    total, done = sum(entry.size for version in versions for entry in version.files), 0
    found, left_out = [], []
    for version in versions:
        manifest = shelf.read_manifest(source, version.digest)
        files = _files(source, manifest)
        documents = admission.AdmittedDocuments(
            manifest=manifest, digest=version.digest, statements=(), waivers=version.waivers
        )
        policies = gates.get(version.digest, [registry.demands(None)])
        try:
            admission.check_files(documents, files, policies[0])
            found.append(version)
        except REFUSALS as error:
            left_out.append(LeftOut(reference=version.reference, refusal=error))
        done += sum(entry.size for entry in version.files)
        progress("verify", done, total)
    return found, tuple(left_out)


def _files(source: ArchiveObjects, manifest: AdapterManifest) -> dict[str, Content]:
    return {entry.path: source.content(file_key(entry)) for entry in manifest.files}


def _take(registry: Registry, source: ArchiveObjects, versions: Sequence[Version], progress: Progress) -> int:
    """Write admitted versions into the site's store; what is read again is verified again."""
    sent, store = 0, registry.store
    for version in versions:
        manifest = shelf.read_manifest(source, version.digest)
        sent += transfer.upload(store, _files(source, manifest), manifest.files, progress)
        write_model(store, manifest)
        shelf.put_manifest(store, manifest)
        for key, data in shelf.read_statements(source, version.digest).items():
            if key in version.documents:
                store.put(key, data)
    return sent


def _take_trust(store: ObjectStore, state: TrustState, folder: Path, tag: str | None) -> None:
    """Write the metadata that was verified: the copies on this machine, not those in the archive.

    Raises:
        Conflict: somebody else has changed the store's timestamp since the import began.
    """
    metadata = folder / "metadata"
    pinned = _number_of(folder / "pinned.root.json")
    wanted = {key: metadata / f"{key.partition('.')[2]}" for key in trust_keys(state) if key != TIMESTAMP}
    history = metadata / "root_history"
    for number in range(pinned, state.version("root") + 1):
        wanted[f"{TRUST}{number}.root.json"] = (
            folder / "pinned.root.json" if number == pinned else history / f"{number}.root.json"
        )
    for key, path in sorted(wanted.items()):
        data = path.read_bytes()
        if not store.put(key, data) and read(store, key) != data:
            store.replace(key, data, store.stat(key).tag)
    timestamp = (metadata / "timestamp.json").read_bytes()
    if tag is None or read(store, TIMESTAMP) != timestamp:
        try:
            store.replace(TIMESTAMP, timestamp, tag)
        except Conflict as error:
            raise Conflict("somebody else changed this site's store meanwhile", error.mend) from error
    for key in [*store.keys(TRUST)]:
        if key not in wanted and key != TIMESTAMP and not key.endswith(".root.json"):
            store.delete(key)


def _number_of(root: Path) -> int:
    return int(json.loads(root.read_bytes())["signed"]["version"])


def _tag(store: ObjectStore) -> str | None:
    try:
        return store.stat(TIMESTAMP).tag
    except NotFound:
        return None
