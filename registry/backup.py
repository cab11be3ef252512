"""Backups: everything of a registry that nobody could make again, into a folder or a bucket.

The order makes a backup consistent while the registry is used. Named databases first: what MLflow knows was
signed before it knew it. Then the trust metadata of one moment; then the objects that these name, which were
all there before they were named, and which no clean-up removes while they are. The audit log last: it only
grows, and holds the row that the trust metadata have signed as its head. The manifest makes it a backup.

What is read is compared with what is signed on its way, so that a damaged store gives no backup.
``registry.restoring`` goes the other way.
"""

from __future__ import annotations

import json
import stat
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from registry import transfer
from registry.content import CHUNK_BYTES, FileContent, VerifiedContent
from registry.digest import Digest, digest_bytes, digest_content
from registry.errors import (
    BadSignature,
    DigestMismatch,
    NotFound,
    RegistryError,
    StaleTrust,
    UsageError,
    shown,
)
from registry.parallel import each
from registry.signing.signers import ONLINE, ROLES
from registry.storage import shelf
from registry.storage.base import check_key, file_key, manifest_key
from registry.storage.dumps import Database
from registry.vault import HOME_FILES, KEYS, MEND, PINNED, POLICY, Dump, Kept, Manifest, Vault

if TYPE_CHECKING:
    from registry.client import Registry
    from registry.signing.trust import Target, TrustState
    from registry.transfer import Progress

LEDGER: Final = "ledger"
MLFLOW: Final = "mlflow"
_ATTEMPTS: Final = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """A backup that was made or verified.

    Attributes:
        name: what it is called in its place.
        digest: of its manifest, and so of all of it.
        manifest: what it holds.
        new: bytes that were copied; the rest was there from earlier backups.
        warnings: what its owner should know.
    """

    name: str
    digest: Digest
    manifest: Manifest
    new: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of everything in it."""
        return sum({kept.sha256: kept.size for kept in self.manifest.everything()}.values())


@dataclass(kw_only=True)
class _Making:
    registry: Registry
    vault: Vault
    progress: Progress
    warnings: list[str] = field(default_factory=list)


def make(
    registry: Registry,
    vault: Vault,
    databases: Mapping[str, str],
    *,
    keys: bool = True,
    progress: Progress = transfer.silent,
) -> Made:
    """Back a registry up; see above.

    Args:
        registry: the registry.
        vault: where to.
        databases: further databases, name -> URI; "ledger" and "mlflow" count in place of this machine's.
        keys: private keys too, as they lie here: encrypted ones stay encrypted.
        progress: hears about the stage "backup".

    Raises:
        UsageError: unencrypted keys would go where others can read them, or a database cannot be dumped.
        NotFound, DigestMismatch: the store lacks something that is signed, or holds something else.
        RegistryError: see the error tree.
    """
    making = _Making(registry=registry, vault=vault, progress=progress)
    wanted = default_databases(registry) | {name: Database.of(uri) for name, uri in databases.items()}
    files = list(_files(making, keys=keys))
    _check_place(vault, secret=[path for path, data in files if _is_open_key(path, data)])
    if registry.keys.holds(ONLINE):
        registry.record("backup", shown(vault.store.uri), {"databases": sorted(wanted), "keys": keys})
    ledger = {name: found for name, found in wanted.items() if name == LEDGER}
    dumps = [_dump(making, name, found) for name, found in wanted.items() if name not in ledger]
    time = datetime.now(UTC).isoformat(timespec="seconds")
    state, documents = _trust(registry)
    trust = tuple(vault.keep(key, data, digest_bytes(data)) for key, data in sorted(documents.items()))
    objects = _objects(making, state)
    dumps += [_dump(making, name, found) for name, found in ledger.items()]
    pinned = registry.authority.client.pinned.read_bytes()
    manifest = Manifest(
        time=time,
        store=registry.store.uri,
        root=digest_bytes(pinned),
        trust=trust,
        objects=objects,
        files=tuple(vault.keep(path, data, digest_bytes(data)) for path, data in files),
        databases=tuple(dumps),
    )
    name, digest = vault.finish(Manifest.parse(json.dumps(manifest.model_dump()).encode()))
    return Made(
        name=name, digest=digest, manifest=manifest, new=vault.written, warnings=tuple(making.warnings)
    )


def default_databases(registry: Registry) -> dict[str, Database]:
    """The databases of this machine's own registry: its audit log, and MLflow's if it is a file here."""
    place = registry.place
    found = {LEDGER: Database.of(place.ledger_uri)}
    if place.tracking_uri.startswith("sqlite:"):
        found[MLFLOW] = Database.of(place.tracking_uri)
    return {name: one for name, one in found.items() if one.file is None or one.file.exists()}


def _trust(registry: Registry) -> tuple[TrustState, dict[str, bytes]]:
    """All trust metadata of one moment; read again if somebody publishes meanwhile.

    Raises:
        StaleTrust: the store does not answer with what it shows now, or others keep publishing.
    """
    from registry.mirror import require_unchanged, snapshot
    from registry.signing import archived

    for attempt in range(_ATTEMPTS):
        state, documents = snapshot(registry)
        if state.remembered:
            raise StaleTrust("the store does not answer, so nothing can be backed up", "try again later")
        try:
            return archived.verify(documents, registry.authority.client.pinned.read_bytes()), documents
        except DigestMismatch:
            if attempt == _ATTEMPTS - 1:
                require_unchanged(registry, state)
                raise
    raise AssertionError("unreachable")


def _objects(making: _Making, state: TrustState) -> tuple[Kept, ...]:
    """Everything that the signed names mean; files of revoked versions may be gone."""
    found: dict[str, Kept] = {}
    targets = {target.digest: target for target in signed_targets(state)}
    done = 0

    def copy(target: Target) -> None:
        nonlocal done
        mine = {kept.path: kept for kept in _version(making, state, target)}
        with lock:
            found.update(mine)
            done += 1
            making.progress("backup", done, len(targets))

    lock = threading.Lock()
    each(copy, sorted(targets.values(), key=lambda target: target.path))
    return tuple(found[key] for key in sorted(found))


def signed_targets(state: TrustState) -> list[Target]:
    """The manifests that are signed, under whatever name."""
    return [*state.versions().values(), *state.aliases().values()]


def _version(making: _Making, state: TrustState, target: Target) -> Iterator[Kept]:
    store, vault = making.registry.store, making.vault
    manifest = shelf.read_manifest(store, target.digest)
    yield vault.keep(manifest_key(target.digest), manifest.canonical_bytes(), target.digest)
    for key, data in shelf.read_statements(store, target.digest).items():
        yield vault.keep(key, data, digest_bytes(data))
    for entry in manifest.files:
        if vault.holds(entry.sha256):
            yield Kept(path=file_key(entry), size=entry.size, sha256=entry.sha256)
            continue
        try:
            store.stat(file_key(entry))
        except NotFound:
            if is_revoked(state, target, entry.sha256):
                continue
            raise NotFound(
                f"the store lacks {entry.path} of {target.path}", "push the same folder again, or restore it"
            ) from None
        content = VerifiedContent(transfer.StoredContent(store, entry), entry)
        if digest_content(content) != entry.sha256:
            raise DigestMismatch(f"{entry.path} of {target.path} is not what was signed", "push it again")
        yield vault.keep(file_key(entry), content, entry.sha256)


def is_revoked(state: TrustState, target: Target, *files: Digest) -> bool:
    """Whether a manifest or one of its files was revoked."""
    return any(state.is_revoked(digest) is not None for digest in (target.digest, *files))


def _dump(making: _Making, name: str, database: Database) -> Dump:
    check_key(name)
    with tempfile.TemporaryDirectory(prefix="registry-backup-") as temporary:
        file = Path(temporary) / "dump"
        major = database.major()
        database.dump(file)
        with FileContent(file) as content:
            kept = making.vault.keep(name, content, digest_content(content))
    return Dump(**kept.model_dump(), kind=database.kind, major=major)


def _files(making: _Making, *, keys: bool) -> Iterator[tuple[str, bytes]]:
    """The files of the data folder that belong into a backup, read once."""
    place = making.registry.place
    paths = {name: place.home / name for name in (*HOME_FILES, PINNED)}
    if place.policy is not None:
        paths[POLICY] = place.policy
        if place.policy != place.home / POLICY:
            making.warnings.append(
                f"the policy {place.policy} is kept as {POLICY}: a restore puts it there, not where the "
                "settings look for it"
            )
    private = sorted(place.keys.glob("*")) if place.keys.is_dir() else []
    for path in private:
        if keys and path.is_file() and not path.is_symlink() and not path.name.startswith("."):
            paths[f"{KEYS}{path.name}"] = path
    open_keys: list[str] = []
    for name, path in paths.items():
        try:
            with FileContent(path) as content:
                data = content[0 : len(content)]
        except NotFound:
            continue
        if _is_open_key(name, data):
            open_keys.append(path.stem)
        yield name, data
    if open_keys:
        making.warnings.append(
            f"not encrypted: the keys {', '.join(open_keys)}; whoever reads the backup has them"
        )
    if not keys:
        making.warnings.append("private keys are not in this backup: keep them elsewhere")
        return
    for role, uri in sorted(making.registry.keys.uris.items()):
        if role in ROLES:
            making.warnings.append(f"the {role} key is at {shown(uri)}, which no backup holds")


def _is_open_key(path: str, data: bytes) -> bool:
    return path.startswith(KEYS) and b"PRIVATE KEY-----" in data and b"ENCRYPTED PRIVATE KEY" not in data


def _check_place(vault: Vault, secret: Sequence[str]) -> None:
    """Keep keys from places where others read.

    Raises:
        UsageError: others may look into the folder, or unencrypted keys would leave this machine.
    """
    from registry.storage.local import LocalObjects

    if not isinstance(vault.store, LocalObjects):
        if secret:
            raise UsageError(
                f"{secret[0]} is not encrypted, and would be sent to {vault.store.uri}",
                "encrypt the keys (docs/operations/rotation.md), or leave them out: --without-keys",
            )
        return
    folder = vault.store.path("objects").parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = stat.S_IMODE(folder.stat().st_mode)
    except OSError as error:
        raise RegistryError(f"{folder} cannot be made: {error.strerror}", "choose another folder") from error
    if mode & 0o077:
        raise UsageError(f"others may look into {folder} (mode {mode:04o})", f"chmod 700 {folder}")


# -- verifying one --


def verify(vault: Vault, name: str | None = None, progress: Progress = transfer.silent) -> Made:
    """Look whether a backup is whole: every byte, and that it holds all that its trust metadata name.

    Args:
        vault: where it is.
        name: which one; None is the newest.
        progress: hears about the stage "verify".

    Raises:
        NotFound, DigestMismatch, BadSignature, InvalidDocument: it is not.
    """
    chosen, manifest, digest = vault.manifest(name)
    check_bytes(vault, manifest, progress)
    check_whole(vault, manifest)
    return Made(name=chosen, digest=digest, manifest=manifest)


def check_bytes(vault: Vault, manifest: Manifest, progress: Progress = transfer.silent) -> None:
    """Read every byte of a backup and compare it with the digests of the manifest.

    Raises:
        NotFound, DigestMismatch: something is gone or was changed.
    """
    distinct = {kept.sha256: kept for kept in manifest.everything()}
    total, done, lock = sum(kept.size for kept in distinct.values()), 0, threading.Lock()

    def check(kept: Kept) -> None:
        nonlocal done
        vault.check(kept)
        with lock:
            done += kept.size
            progress("verify", done, total)

    each(check, sorted(distinct.values(), key=lambda kept: kept.sha256))


def trust_documents(vault: Vault, manifest: Manifest) -> dict[str, bytes]:
    """The trust metadata of a backup by their keys in the store, each verified by its digest."""
    return {kept.path: vault.read(kept, CHUNK_BYTES) for kept in manifest.trust}


def check_whole(vault: Vault, manifest: Manifest) -> TrustState:
    """Verify the trust metadata of a backup, and that it holds exactly what they name; return what they say.

    Raises:
        NotFound: it lacks something that is signed.
        BadSignature, DigestMismatch: something is not signed, or something else than what was signed.
    """
    from registry.mirror import is_root, trust_keys
    from registry.signing import archived

    pinned = next((kept for kept in manifest.files if kept.path == PINNED), None)
    if pinned is None or pinned.sha256 != manifest.root:
        raise DigestMismatch("the backup does not hold the root that it names", MEND)
    documents = trust_documents(vault, manifest)
    state = archived.verify(documents, vault.read(pinned, CHUNK_BYTES))
    needed = set(trust_keys(state))
    for key in documents:
        if key not in needed and not is_root(key, state):
            raise DigestMismatch(f"the backup holds {shown(key)}, which nothing signed names", MEND)
    there = {kept.path: kept for kept in manifest.objects}
    signed: set[str] = set()
    for target in signed_targets(state):
        signed |= {*_check_version(vault, state, target, there)}
    prefixes = {f"statements/{target.digest.hex}/" for target in signed_targets(state)}
    for key, kept in there.items():
        statement = key[: key.rfind("/") + 1] in prefixes and key.endswith(f".{kept.sha256.hex}.json")
        if key not in signed and not statement:
            raise BadSignature(f"nobody signed {shown(key)}, which the backup holds", MEND)
    return state


def _check_version(
    vault: Vault, state: TrustState, target: Target, there: Mapping[str, Kept]
) -> Iterator[str]:
    from registry.manifest import MAX_MANIFEST_BYTES as MOST
    from registry.manifest import AdapterManifest

    def held(key: str, sha256: Digest) -> Kept | None:
        kept = there.get(key)
        if kept is not None and kept.sha256 != sha256:
            raise DigestMismatch(f"{key} in the backup is not what was signed", MEND)
        return kept

    key = manifest_key(target.digest)
    kept = held(key, target.digest)
    if kept is None:
        raise NotFound(f"the backup lacks the manifest of {target.path}", MEND)
    yield key
    for entry in AdapterManifest.parse(vault.read(kept, MOST)).files:
        if held(file_key(entry), entry.sha256) is None and not is_revoked(state, target, entry.sha256):
            raise NotFound(f"the backup lacks {entry.path} of {target.path}", MEND)
        yield file_key(entry)
