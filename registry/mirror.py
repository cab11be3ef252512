"""Mirrors: a registry, or some of its versions, carried as one file to a site without a network.

An archive holds trust metadata, manifests, statements and files as the store holds them (docs/formats.md).
Whoever carries it is as untrusted as a store. This module writes archives, and judges the documents of their
versions on both sides; ``intake`` is how a site takes one.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, NamedTuple

from registry import admission, transfer
from registry.content import Content, VerifiedContent
from registry.digest import Digest, FileEntry, digest_bytes
from registry.errors import (
    BadSignature,
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
from registry.reference import Reference
from registry.storage import shelf
from registry.storage.archive import ArchiveWriter, order
from registry.storage.base import ObjectStore, file_key, manifest_key, read
from registry.waivers import NONE, Waivers

if TYPE_CHECKING:
    from registry.client import Registry
    from registry.signing.trust import Target, TrustState
    from registry.transfer import Progress

TRUST: Final = "trust/"
TIMESTAMP: Final = f"{TRUST}timestamp.json"
_ATTEMPTS: Final = 4
REFUSALS: Final = (Revoked, Unsigned, PolicyRefused, NeedsReview)
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
class Version:
    """A version whose documents were admitted; they are not kept in memory.

    Attributes:
        reference: ``name:version``.
        digest: digest of its manifest.
        files: its files.
        documents: size of its manifest and of every statement, by their keys.
        waivers: those that counted when it was admitted.
    """

    reference: str
    digest: Digest
    files: tuple[FileEntry, ...]
    documents: Mapping[str, int]
    waivers: Waivers = NONE


# -- export --


def export(
    registry: Registry,
    archive: Path,
    references: Sequence[Reference] = (),
    progress: Progress = transfer.silent,
    *,
    lifetime: timedelta | None = None,
) -> Mirrored:
    """Write an archive of the named versions, or of all that this registry's policy admits.

    The same state of the registry becomes the same bytes. A chunk is in memory at a time, and every byte is
    verified on its way.

    Args:
        registry: where from.
        archive: the file; it must not exist yet.
        references: which versions; none is all of them, without those that are revoked or not approved.
        progress: hears about the stage "export".
        lifetime: how long a site shall believe the archive; needs the online key. Whoever carries it can
            show this state for so long to readers who have seen nothing newer; None is as long as the
            timestamp in the store, a day at most.

    Raises:
        UsageError: the file exists.
        RegistryError: a named version is refused, or see the error tree.
    """
    if archive.exists():
        raise UsageError(f"{archive} exists already", "choose another name, or remove that file")
    if lifetime is not None:
        registry.record("export", archive.name, {"days": lifetime / timedelta(days=1)})
        registry.authority.publish_for(lifetime)
    state, trust = snapshot(registry)
    if lifetime is not None:
        registry.authority.publish_anchor()  # readers of the store go on to one of the usual life
    versions, left_out = admitted(registry, registry.store, state, references)
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
        expires=believed_until(state),
    )


class _Member(NamedTuple):
    """What becomes a member of an archive; opened when its turn comes."""

    size: int
    open: Callable[[], Content]


def _members(
    store: ObjectStore, trust: Mapping[str, bytes], versions: Sequence[Version]
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


def snapshot(registry: Registry) -> tuple[TrustState, dict[str, bytes]]:
    """What is signed now, and all of its metadata as the store has it.

    Raises:
        StaleTrust: others keep publishing while it is read.
    """
    for attempt in range(_ATTEMPTS):
        state = registry.authority.state()
        try:
            found = {key: read(registry.store, key) for key in trust_keys(state)}
            roots = [key for key in registry.store.keys(TRUST) if is_root(key, state)]
            return state, found | {key: read(registry.store, key) for key in roots}
        except NotFound:  # somebody has just published, and removed what was superseded
            if attempt == _ATTEMPTS - 1:
                require_unchanged(registry, state)
                raise
    raise AssertionError("unreachable")


def require_unchanged(registry: Registry, state: TrustState) -> None:
    """Say so if what was read does not fit together because somebody has published since, and not otherwise.

    Raises:
        StaleTrust: somebody has.
    """
    if registry.authority.state().version("timestamp") != state.version("timestamp"):
        raise StaleTrust(
            "others publish faster than the trust metadata can be read",
            "run the same command again when fewer of them do",
        )


def trust_keys(state: TrustState) -> list[str]:
    """Keys of the metadata of a state, without those of its roots."""
    from registry.signing.trust import TOP

    meta = state.signed("snapshot")["meta"]
    numbered = {role: state.version(role) for role in TOP if role not in ("root", "timestamp")}
    numbered |= {role: int(meta[f"{role}.json"]["version"]) for role in state.bins()}
    return [f"{TRUST}{number}.{role}.json" for role, number in numbered.items()] + [TIMESTAMP]


def is_root(key: str, state: TrustState) -> bool:
    """Whether a key is that of a root up to the newest one; a draft of the next one is not."""
    number, _, role = key.removeprefix(TRUST).partition(".")
    return role == "root.json" and number in map(str, range(1, state.version("root") + 1))


def believed_until(state: TrustState) -> str:
    """When the first of the metadata that readers look at expires, ISO 8601."""
    from registry.signing.trust import TOP

    first = min(map(state.expires, (*TOP, *state.bins())))
    return first.isoformat(timespec="seconds")


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that gets its name when all of it is written, unless something has the name by then."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as stream:
            temporary = Path(stream.name)
            try:
                yield stream.file
                stream.flush()
                os.fsync(stream.fileno())
                temporary.chmod(0o644)
                _name(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
    except FileExistsError:
        raise UsageError(f"{path} exists already", "choose another name, or remove that file") from None
    except OSError as error:
        raise RegistryError(
            f"{path} cannot be written: {error.strerror or error}", "check the folder and its free space"
        ) from error


def _name(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a disk that is carried around often has no links
        if path.exists():
            raise FileExistsError(str(path)) from None
        temporary.rename(path)


# -- admission, on both sides --


def admitted(
    registry: Registry, store: ObjectStore, state: TrustState, references: Sequence[Reference] = ()
) -> tuple[list[Version], tuple[LeftOut, ...]]:
    """The versions in a store whose documents this machine's policy admits, and those that it leaves out.

    Raises:
        RegistryError: somebody has changed something, or a version that was asked for is refused.
    """
    gates = policies_of(registry, state)
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
            found.append(_admit(store, state, target, gates.get(digest, [registry.demands(None)])))
        except REFUSALS as error:
            if references:
                raise
            left_out.append(LeftOut(reference=target.path, refusal=error))
    return found, tuple(left_out)


def policies_of(registry: Registry, state: TrustState) -> Mapping[Digest, list[admission.Policy]]:
    """The policies by which a version may be pulled: that of its number, and those of its aliases."""
    found: dict[Digest, list[admission.Policy]] = {}
    for path, target in state.aliases().items():
        known = found.setdefault(target.digest, [registry.demands(None)])
        known.append(registry.demands(path.partition("@")[2]))
    return found


def _admit(
    store: ObjectStore, state: TrustState, target: Target, policies: Sequence[admission.Policy]
) -> Version:
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
            documents = admission.admit_documents(
                data, envelopes, state.about(target), policy, target.digest, reference
            )
            break
        except REFUSALS:
            if number == len(policies):
                raise
    sizes = {key: len(envelope) for key, envelope in statements.items()}
    return Version(
        reference=target.path,
        digest=target.digest,
        files=manifest.files,
        documents={manifest_key(target.digest): len(data), **sizes},
        waivers=documents.waivers,
    )
