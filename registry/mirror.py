"""Mirrors: a registry, or some of its versions, carried as one file to a site without a network.

An archive holds trust metadata, manifests, statements and files as the store holds them (docs/formats.md).
Whoever carries it is as untrusted as a store. An import verifies the trust metadata from the root that the
site has pinned, and refuses what is older than anything the site has seen; it admits every version by the
site's own policy, documents and bytes and the scanner of today; only then the first object appears in the
site's store, and the timestamp that makes all of it visible comes last. MLflow is not asked.

An interrupted import leaves objects that nothing names; the next one finds them there and goes on.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from registry import admission, transfer
from registry.content import Content, VerifiedContent
from registry.digest import Digest, FileEntry, digest_bytes
from registry.errors import (
    BadSignature,
    Conflict,
    DigestMismatch,
    NeedsReview,
    NotFound,
    PolicyRefused,
    RegistryError,
    Revoked,
    StaleTrust,
    Unsigned,
    UsageError,
)
from registry.manifest import AdapterManifest
from registry.reference import Reference
from registry.storage import shelf
from registry.storage.archive import ArchiveObjects, ArchiveWriter, order
from registry.storage.base import ObjectStore, file_key, manifest_key, read
from registry.storage.mlmodel import write_model

if TYPE_CHECKING:
    from registry.client import Registry
    from registry.signing.trust import Target, TrustState
    from registry.transfer import Progress

_TRUST: Final = "trust/"
_TIMESTAMP: Final = f"{_TRUST}timestamp.json"
_ATTEMPTS: Final = 4
_LEFT_OUT: Final = (Revoked, Unsigned, PolicyRefused, NeedsReview)
"""Refusals by which a genuine version stays outside; any other one says that something was changed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """A genuine version that was not taken.

    Attributes:
        reference: ``name:version``.
        refusal: why.
    """

    reference: str
    refusal: RegistryError


@dataclass(frozen=True, kw_only=True, slots=True)
class Mirrored:
    """What an export wrote, or an import took.

    Attributes:
        references: the versions, as ``name:version``.
        left_out: versions that were not taken.
        size: bytes of the archive.
        sent: bytes of files that the site's store did not have; for an export, bytes of all files.
        expires: when the first of the trust metadata that readers refresh stops being believed, ISO 8601.
    """

    references: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    size: int
    sent: int
    expires: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Version:
    """A version whose documents were admitted; they are known by their keys and sizes, not kept in memory."""

    reference: str
    digest: Digest
    files: tuple[FileEntry, ...]
    documents: Mapping[str, int]


# -- export --


def export(
    registry: Registry,
    archive: Path,
    references: Sequence[Reference] = (),
    progress: Progress = transfer.silent,
) -> Mirrored:
    """Write an archive of the named versions, or of all that this registry's policy admits.

    The same state of the registry becomes the same bytes. A chunk is in memory at a time, and every byte is
    verified on its way.

    Args:
        registry: where from.
        archive: the file; it must not exist yet.
        references: which versions; none is all of them, without those that are revoked or not approved.
        progress: hears about the stage "export".

    Raises:
        UsageError: the file exists.
        RegistryError: a named version is refused, or see the error tree.
    """
    if archive.exists():
        raise UsageError(f"{archive} exists already", "choose another name, or remove that file")
    state, trust = _snapshot(registry)
    versions, left_out = _admitted(registry, registry.store, state, references)
    members = dict(_members(registry.store, trust, versions))
    total, done = sum(member.size for member in members.values()), 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress("export", done, total)

    with _new_file(archive) as stream:
        writer = ArchiveWriter(stream.write)
        for key in sorted(members, key=order):
            writer.add(key, members[key].open(), count)
        writer.close()
    return Mirrored(
        references=tuple(version.reference for version in versions),
        left_out=left_out,
        size=archive.stat().st_size,
        sent=sum({file_key(entry): entry.size for found in versions for entry in found.files}.values()),
        expires=_expires(state),
    )


class _Member(NamedTuple):
    """What becomes a member of an archive; opened when its turn comes."""

    size: int
    open: Callable[[], Content]


def _members(
    store: ObjectStore, trust: Mapping[str, bytes], versions: Sequence[_Version]
) -> Iterator[tuple[str, _Member]]:
    for key, data in trust.items():
        yield key, _Member(len(data), partial(bytes, data))
    for version in versions:
        for key, size in version.documents.items():
            yield key, _Member(size, partial(_document, store, key))
        for entry in version.files:
            stored = transfer.StoredContent(store, entry)
            yield file_key(entry), _Member(entry.size, partial(VerifiedContent, stored, entry))


def _document(store: ObjectStore, key: str) -> bytes:
    """A manifest or a statement, whose key holds its digest."""
    data = read(store, key)
    if digest_bytes(data).hex not in key.rpartition("/")[2]:
        raise DigestMismatch(f"{key} is not what its name says", "`registry doctor` looks for more of it")
    return data


def _snapshot(registry: Registry) -> tuple[TrustState, dict[str, bytes]]:
    """What is signed now, and all of its metadata as the store has it."""
    for attempt in range(_ATTEMPTS):
        state = registry.authority.state()
        try:
            found = {key: read(registry.store, key) for key in _trust_keys(state)}
            roots = [key for key in registry.store.keys(_TRUST) if key.endswith(".root.json")]
            return state, found | {key: read(registry.store, key) for key in roots}
        except NotFound:  # somebody has just published, and removed what was superseded
            if attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


def _trust_keys(state: TrustState) -> list[str]:
    """Keys of the metadata of a state, without those of its roots."""
    from registry.signing.trust import TOP

    meta = state.signed("snapshot")["meta"]
    numbered = {role: state.version(role) for role in TOP if role not in ("root", "timestamp")}
    numbered |= {role: int(meta[f"{role}.json"]["version"]) for role in state.bins()}
    return [f"{_TRUST}{number}.{role}.json" for role, number in numbered.items()] + [_TIMESTAMP]


def _expires(state: TrustState) -> str:
    first = min(state.expires(role) for role in ("timestamp", "snapshot", "targets", "root"))
    return first.isoformat(timespec="seconds")


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[tempfile._TemporaryFileWrapper[bytes]]:
    """A file that gets its name when all of it is written, unless something has the name by then."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.") as stream:
            yield stream
            stream.flush()
            os.fchmod(stream.fileno(), 0o644)
            os.fsync(stream.fileno())
            os.link(stream.name, path)
    except FileExistsError:
        raise UsageError(f"{path} exists already", "choose another name, or remove that file") from None
    except OSError as error:
        raise RegistryError(
            f"{path} cannot be written: {error.strerror or error}", "check the folder and its free space"
        ) from error


# -- admission, on both sides --


def _admitted(
    registry: Registry, store: ObjectStore, state: TrustState, references: Sequence[Reference] = ()
) -> tuple[list[_Version], tuple[LeftOut, ...]]:
    """The versions in a store whose documents this machine's policy admits, and those that it leaves out.

    Raises:
        RegistryError: somebody has changed something, or a version that was asked for is refused.
    """
    gates = _gates(registry, state)
    versions = {target.digest: target for target in state.versions().values()}
    wanted = [target.digest for target in map(state.resolve, references)] if references else [*versions]
    found, left_out = [], []
    for digest in dict.fromkeys(wanted):
        target = versions.get(digest)
        if target is None:
            raise BadSignature(f"an alias means {digest}, which is no signed version", "push it again")
        if not references and not any(True for _ in store.keys(manifest_key(digest))):
            if store is registry.store:
                missing = NotFound(f"the manifest of {target.path} is not in the store", "push it again")
                left_out.append(LeftOut(reference=target.path, refusal=missing))
            continue  # an archive holds as many versions as somebody wanted
        try:
            found.append(_admit(store, state, target, gates.get(digest, [registry.policy.admission(None)])))
        except _LEFT_OUT as error:
            if references:
                raise
            left_out.append(LeftOut(reference=target.path, refusal=error))
    return found, tuple(left_out)


def _gates(registry: Registry, state: TrustState) -> Mapping[Digest, list[admission.Policy]]:
    """The policies by which a version may be pulled: that of its number, and those of its aliases."""
    found: dict[Digest, list[admission.Policy]] = {}
    for path, target in state.aliases().items():
        known = found.setdefault(target.digest, [registry.policy.admission(None)])
        known.append(registry.policy.admission(path.partition("@")[2]))
    return found


def _admit(
    store: ObjectStore, state: TrustState, target: Target, policies: Sequence[admission.Policy]
) -> _Version:
    """Judge the documents of a version by policies of which one has to admit it.

    Raises:
        RegistryError: none does; the error of the last one.
    """
    manifest = shelf.read_manifest(store, target.digest)
    statements = shelf.read_statements(store, target.digest)
    data, envelopes = manifest.canonical_bytes(), tuple(statements.values())
    reference = Reference.parse(target.path)
    for number, policy in enumerate(policies, start=1):
        try:
            admission.admit_documents(data, envelopes, state.about(target), policy, target.digest, reference)
            break
        except _LEFT_OUT:
            if number == len(policies):
                raise
    sizes = {key: len(envelope) for key, envelope in statements.items()}
    return _Version(
        reference=target.path,
        digest=target.digest,
        files=manifest.files,
        documents={manifest_key(target.digest): len(data), **sizes},
    )


# -- import --


def import_(registry: Registry, archive: Path, progress: Progress = transfer.silent) -> Mirrored:
    """Take an archive into this site's store; see above.

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
        versions, left_out = _admitted(registry, source, state)
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
            expires=_expires(state),
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
    source: ArchiveObjects, state: TrustState, versions: Sequence[_Version], left_out: Sequence[LeftOut]
) -> None:
    """Make sure that the archive holds nothing that no signed name needs.

    Raises:
        BadSignature: it holds a manifest that nobody signed.
        DigestMismatch: it holds something else.
        NotFound: it lacks something.
    """
    signed = state.versions()
    digests = {version.digest for version in versions}
    digests |= {signed[found.reference].digest for found in left_out}
    needed = {*_trust_keys(state)}
    for digest in digests:
        manifest = shelf.read_manifest(source, digest)
        needed |= {manifest_key(digest), *(file_key(entry) for entry in manifest.files)}
        needed |= {*source.keys(f"statements/{digest.hex}/")}
    for key in source.keys(""):
        if key in needed or (key.startswith(_TRUST) and key.endswith(".root.json")):
            continue
        if key.startswith("manifests/"):
            raise BadSignature(f"nobody signed {key}, which the archive holds", _MEND)
        raise DigestMismatch(f"the archive holds {key}, which no signed version needs", _MEND)
    for key in needed:
        source.stat(key)


_MEND: Final = "it was tampered with, and nothing of it was taken; export it again"


def _admit_files(
    registry: Registry,
    source: ArchiveObjects,
    state: TrustState,
    versions: Sequence[_Version],
    progress: Progress,
) -> tuple[list[_Version], tuple[LeftOut, ...]]:
    """Verify every byte of the versions' files and scan them."""
    gates = _gates(registry, state)
    total, done = sum(entry.size for version in versions for entry in version.files), 0
    found, left_out = [], []
    for version in versions:
        manifest = shelf.read_manifest(source, version.digest)
        files = _files(source, manifest)
        documents = admission.AdmittedDocuments(manifest=manifest, digest=version.digest, statements=())
        policies = gates.get(version.digest, [registry.policy.admission(None)])
        try:
            admission.check_files(documents, files, policies[0])
            found.append(version)
        except _LEFT_OUT as error:
            left_out.append(LeftOut(reference=version.reference, refusal=error))
        done += sum(entry.size for entry in version.files)
        progress("verify", done, total)
    return found, tuple(left_out)


def _files(source: ArchiveObjects, manifest: AdapterManifest) -> dict[str, Content]:
    return {entry.path: source.content(file_key(entry)) for entry in manifest.files}


def _take(
    registry: Registry, source: ArchiveObjects, versions: Sequence[_Version], progress: Progress
) -> int:
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
    wanted = {key: metadata / f"{key.partition('.')[2]}" for key in _trust_keys(state) if key != _TIMESTAMP}
    history = metadata / "root_history"
    for number in range(pinned, state.version("root") + 1):
        wanted[f"{_TRUST}{number}.root.json"] = (
            folder / "pinned.root.json" if number == pinned else history / f"{number}.root.json"
        )
    for key, path in sorted(wanted.items()):
        data = path.read_bytes()
        if not store.put(key, data) and read(store, key) != data:
            store.replace(key, data, store.stat(key).tag)
    timestamp = (metadata / "timestamp.json").read_bytes()
    if tag is None or read(store, _TIMESTAMP) != timestamp:
        try:
            store.replace(_TIMESTAMP, timestamp, tag)
        except Conflict as error:
            raise Conflict("somebody else changed this site's store meanwhile", error.mend) from error
    for key in [*store.keys(_TRUST)]:
        if key not in wanted and key != _TIMESTAMP and not key.endswith(".root.json"):
            store.delete(key)


def _number_of(root: Path) -> int:
    import json

    return int(json.loads(root.read_bytes())["signed"]["version"])


def _tag(store: ObjectStore) -> str | None:
    try:
        return store.stat(_TIMESTAMP).tag
    except NotFound:
        return None
