"""Restoring a registry from a backup, on this machine and on the servers that its settings name.

Everything is verified before anything is written: every byte by the manifest of the backup, the trust
metadata from the pinned root, every object by what is signed. Then objects, databases, files of the data
folder, trust metadata, and the timestamp last, so that readers see nothing or all of it. A note in the data
folder says which backup is being restored until that is done: the same command again goes on after an
interruption. MLflow is made to say what is signed, for its entries name the store, which may be another one.

Who can write to a backup can exchange what nobody signs: settings, policy, private keys, MLflow's database
(whose dump is run as it is). The digest that `registry backup` prints covers these too, if it was kept
elsewhere and is given.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from registry import transfer
from registry.backup import (
    LEDGER,
    MLFLOW,
    check_bytes,
    check_whole,
    signed_targets,
    trust_documents,
)
from registry.content import CHUNK_BYTES, Content, VerifiedContent
from registry.digest import Digest, digest_bytes, digest_content
from registry.doctor import Finding, examine
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
from registry.reconcile import reconcile
from registry.signing.signers import ONLINE
from registry.storage import shelf
from registry.storage.base import ObjectStore, file_key, manifest_key, read
from registry.storage.dumps import Database
from registry.vault import KEYS, PINNED, Dump, Kept, Manifest, Stored, Vault

if TYPE_CHECKING:
    from registry.client import Registry
    from registry.settings import Layout
    from registry.signing.trust import Target, TrustState
    from registry.transfer import Progress

NOTE: Final = "restoring.json"
SKIP: Final = "skip"
_TIMESTAMP: Final = "trust/timestamp.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """What a restore did.

    Attributes:
        name: of the backup.
        time: the moment that the registry is back at, UTC, ISO 8601: what was published later is gone.
        root: digest of the root that everything was verified from.
        versions: signed versions.
        objects: objects that the store did not have.
        databases: their names.
        files: of the data folder.
        replaced: files of the data folder that said something else, kept under these names.
        lost: metadata of which this machine has seen newer ones.
        findings: of the examination afterwards.
    """

    name: str
    time: str
    root: Digest
    versions: int
    objects: int
    databases: tuple[str, ...]
    files: tuple[str, ...]
    replaced: tuple[str, ...]
    lost: tuple[str, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is to be restored, and where to."""

    vault: Vault
    name: str
    digest: Digest
    manifest: Manifest
    state: TrustState
    registry: Registry
    databases: Mapping[str, Database]

    @property
    def place(self) -> Layout:
        return self.registry.place

    @property
    def note(self) -> Path:
        return self.place.home / NOTE


def restore(
    home: Path,
    vault: Vault,
    databases: Mapping[str, str],
    *,
    name: str | None = None,
    digest: Digest | None = None,
    overwrite: bool = False,
    older: bool = False,
    only: Collection[str] = (),
    progress: Progress = transfer.silent,
) -> Restored:
    """Restore a registry; see above.

    Args:
        home: the data folder.
        vault: where the backup is.
        databases: where databases go, name -> URI, or "skip".
        name: of the backup; None is the newest one.
        digest: what the manifest of the backup must be, as `registry backup` printed it.
        overwrite: replace a registry that is there.
        older: though this machine has seen newer trust metadata; what was signed since is lost.
        only: names of databases; nothing but these is written.
        progress: hears about the stages "verify" and "restore".

    Raises:
        UsageError: there is a registry already, or it is not said where a database goes.
        NotFound, DigestMismatch, BadSignature, InvalidDocument: the backup is not whole, or was changed.
        StaleTrust: it is older than what this machine has seen.
        RegistryError: see the error tree.
    """
    from registry.signing import archived

    chosen, manifest, found = vault.manifest(name)
    if digest is not None and digest != found:
        raise DigestMismatch(
            f"the backup {chosen} is {found}, not {digest}", "it was changed, or you mean another: --at NAME"
        )
    check_bytes(vault, manifest, progress)
    state = check_whole(vault, manifest)
    registry = _registry(home, vault, manifest)
    plan = _Plan(
        vault=vault, name=chosen, digest=found, manifest=manifest, state=state, registry=registry,
        databases=_targets(registry, manifest, databases, only),
    )  # fmt: skip
    _check_pin(plan)
    if not overwrite and not _begun(plan):
        _check_free(plan, databases_only=bool(only))
    if only:
        return _databases_alone(plan, overwrite=overwrite)
    lost = archived.newer(plan.place.trust, state)
    if lost and not older:
        raise StaleTrust(
            f"this machine has seen newer trust metadata than the backup holds: {', '.join(lost[:5])}",
            "take a newer backup; or --older, and then what was signed since is lost, revocations too "
            "(docs/operations/backup.md)",
        )
    return _carry_out(plan, tuple(lost), progress, overwrite=overwrite)


def _databases_alone(plan: _Plan, *, overwrite: bool) -> Restored:
    for dump in plan.manifest.databases:
        if dump.path in plan.databases:
            _load(plan, dump, replace=overwrite)
    return Restored(
        name=plan.name, time=plan.manifest.time, root=plan.manifest.root, versions=0, objects=0,
        databases=tuple(sorted(plan.databases)), files=(), replaced=(), lost=(),
        findings=_examined(plan.registry),
    )  # fmt: skip


def _carry_out(plan: _Plan, lost: tuple[str, ...], progress: Progress, *, overwrite: bool) -> Restored:
    again = _begun(plan)
    plan.place.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    plan.note.write_text(json.dumps({"backup": plan.digest, "name": plan.name}))
    objects = _put_objects(plan, progress)
    for dump in plan.manifest.databases:
        if dump.path in plan.databases:
            _load(plan, dump, replace=overwrite or again)
    replaced = _put_files(plan)
    _put_trust(plan)
    plan.note.unlink()
    # The settings may have come with the backup: everything is opened anew, as any command would.
    registry = type(plan.registry).open(plan.place.home)
    if registry.keys.holds(ONLINE):
        # An audit log that was left out may be away; the examination tells.
        with contextlib.suppress(*(() if LEDGER in plan.databases else (RegistryError,))):
            details = {"backup": plan.digest, "name": plan.name}
            registry.record("restore", shown(plan.vault.store.uri), details)
            registry.authority.publish_anchor()
        with contextlib.suppress(RegistryError):
            reconcile(registry, repair=True)
    return Restored(
        name=plan.name,
        time=plan.manifest.time,
        root=plan.manifest.root,
        versions=len(plan.state.versions()),
        objects=objects,
        databases=tuple(sorted(plan.databases)),
        files=tuple(kept.path for kept in plan.manifest.files),
        replaced=replaced,
        lost=lost,
        findings=_examined(registry),
    )


def _examined(registry: Registry) -> tuple[Finding, ...]:
    """What the doctor says, every byte read; an MLflow server that does not run yet is no problem."""
    later = "start it, and let `registry reconcile` compare it with what is signed"
    return tuple(
        Finding(check=found.check, outcome="warn", detail=found.detail, mend=later)
        if found.check == "index" and found.exit_code == 20
        else found
        for found in examine(registry, deep=True)
    )


# -- before anything is written --


def _registry(home: Path, vault: Vault, manifest: Manifest) -> Registry:
    """The registry to be: by the settings of this data folder, or else by those of the backup."""
    from registry.client import Registry
    from registry.settings import CONFIG_NAME, Layout, RegistrySettings, load

    folder = home.expanduser().absolute()
    kept = next((one for one in manifest.files if one.path == CONFIG_NAME), None)
    if kept is None or (folder / CONFIG_NAME).exists():
        return Registry.open(folder)
    with tempfile.TemporaryDirectory(prefix="registry-restore-") as temporary:
        vault.write(kept, Path(temporary) / CONFIG_NAME)
        settings = load("registry", RegistrySettings, data_folder=Path(temporary))
    return Registry(Layout(home=folder, settings=settings))


def _targets(
    registry: Registry, manifest: Manifest, given: Mapping[str, str], only: Collection[str]
) -> dict[str, Database]:
    """Where each database of the backup goes.

    Raises:
        UsageError: it is not said, or it cannot go there.
    """
    place = registry.place
    known = {LEDGER: place.ledger_uri}
    if place.tracking_uri.startswith("sqlite:"):
        known[MLFLOW] = place.tracking_uri
    dumps = {dump.path: dump for dump in manifest.databases}
    strange = sorted({*given, *only} - set(dumps))
    if strange:
        raise UsageError(
            f"the backup holds no database {shown(strange[0])}", f"it holds {', '.join(dumps) or 'none'}"
        )
    found = {}
    for name, dump in dumps.items():
        if only and name not in only:
            continue
        uri = given.get(name, known.get(name))
        if uri is None:
            raise UsageError(
                f"it is not said where the database {name} goes",
                f"--database {name}=URI, or --database {name}={SKIP} to leave it out",
            )
        if uri == SKIP:
            continue
        found[name] = Database.of(uri)
        if found[name].kind != dump.kind:
            raise UsageError(
                f"the database {name} was {dump.kind}, and cannot become {found[name].kind}",
                f"restore it as {dump.kind}: --database {name}=URI",
            )
    return found


def _check_pin(plan: _Plan) -> None:
    """Make sure that the backup is of the registry that this machine believes.

    A backup brings a root of its own; where one is pinned already, all has to follow from that one.

    Raises:
        BadSignature: it is of another registry, or does not follow from the pinned root.
    """
    from registry.signing import archived

    pinned = plan.registry.authority.client.pinned
    try:
        data = pinned.read_bytes()
    except FileNotFoundError:
        return
    roots = {kept.sha256 for kept in plan.manifest.trust if kept.path.endswith(".root.json")}
    if digest_bytes(data) not in roots | {plan.manifest.root}:
        raise BadSignature(
            f"the backup does not hold the root that is pinned here ({pinned}): it is of another registry, "
            "or from before that root",
            "choose another data folder, or another backup",
        )
    archived.verify(trust_documents(plan.vault, plan.manifest), data)


def _begun(plan: _Plan) -> bool:
    """Whether this very restore was begun and did not end."""
    try:
        return bool(json.loads(plan.note.read_bytes())["backup"] == plan.digest)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_free(plan: _Plan, *, databases_only: bool) -> None:
    """Keep what is there from being overwritten.

    Raises:
        UsageError: there is a registry.
    """
    there = [f"the key {plan.place.home / kept.path}" for kept in plan.manifest.files
             if kept.path.startswith(KEYS) and (plan.place.home / kept.path).exists()]  # fmt: skip
    if databases_only:
        there = []
    elif _stored(plan.registry.store, _TIMESTAMP) is not None:
        there.append(f"the store {plan.registry.store.uri}")
    for name, database in plan.databases.items():
        if database.exists():
            there.append(f"the database {name} ({database.address})")
    if there:
        raise UsageError(
            f"there is a registry already: {there[0]}",
            "name empty servers in the environment or the settings, or replace it with --overwrite",
        )


# -- writing --


def _put_objects(plan: _Plan, progress: Progress) -> int:
    """Write everything that is signed into the store; return how many objects were new."""
    from registry.manifest import AdapterManifest
    from registry.storage.mlmodel import write_model

    store, there = plan.registry.store, {kept.path: kept for kept in plan.manifest.objects}
    targets = list({target.digest: target for target in signed_targets(plan.state)}.values())
    counted: list[int] = []

    def put(target: Target) -> None:
        manifest = AdapterManifest.parse(plan.vault.read(there[manifest_key(target.digest)]))
        new, whole = 0, True
        for entry in manifest.files:
            kept = there.get(file_key(entry))
            if kept is None:
                whole = False  # it was revoked, and cleaned up
                continue
            new += _put(store, kept, VerifiedContent(plan.vault.content(kept), entry))
        if whole:
            write_model(store, manifest)
        for key in (path for path in there if path.startswith(f"statements/{target.digest.hex}/")):
            new += _put(store, there[key], plan.vault.read(there[key]))
        shelf.put_manifest(store, manifest)
        counted.append(new)
        progress("restore", len(counted), len(targets))

    each(put, targets)
    return sum(counted)


def _put(store: ObjectStore, kept: Kept, content: Content) -> int:
    """Write an object, over one that is damaged if need be; return 1 if anything was written."""
    if store.put(kept.path, content):
        return 1
    if (
        store.stat(kept.path).size == kept.size
        and digest_content(Stored(store, kept.path, kept.size)) == kept.sha256
    ):
        return 0
    store.delete(kept.path)
    store.put(kept.path, content)
    return 1


def _load(plan: _Plan, dump: Dump, *, replace: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="registry-restore-") as temporary:
        file = Path(temporary) / "dump"
        plan.vault.write(dump, file)
        plan.databases[dump.path].load(file, dump.major, replace=replace)


def _put_files(plan: _Plan) -> tuple[str, ...]:
    """Write the files of the data folder; what says something else is kept beside."""
    from registry.settings import CONFIG_NAME

    replaced = []
    for kept in plan.manifest.files:
        path = plan.place.home / kept.path
        if kept.path == PINNED or (kept.path == CONFIG_NAME and path.exists()):
            continue  # the pin comes with the trust metadata; settings that are here name the new servers
        data = plan.vault.read(kept)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists() and path.read_bytes() != data:
            replaced.append(f"{kept.path}.before-restore")
            path.replace(path.with_name(f"{path.name}.before-restore"))
        temporary = path.with_name(f".{path.name}.incoming-{os.getpid()}")
        temporary.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with os.fdopen(os.open(temporary, flags, 0o600), "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    return tuple(replaced)


def _put_trust(plan: _Plan) -> None:
    """Make the store show what the backup has signed, the timestamp last, and this machine believe it."""
    from registry.signing import archived

    store, documents = plan.registry.store, trust_documents(plan.vault, plan.manifest)
    for key in sorted(documents.keys() - {_TIMESTAMP}):
        data = documents[key]
        if not store.put(key, data) and read(store, key) != data:
            store.replace(key, data, store.stat(key).tag)
    for key in [*store.keys("trust/")]:
        if key not in documents:  # of the registry that is overwritten
            store.delete(key)
    if (tag := _stored(store, _TIMESTAMP)) is None or read(store, _TIMESTAMP) != documents[_TIMESTAMP]:
        store.replace(_TIMESTAMP, documents[_TIMESTAMP], tag)
    client = plan.registry.authority.client
    pinned = next(kept for kept in plan.manifest.files if kept.path == PINNED)
    mine = client.pinned.read_bytes() if client.pinned.exists() else plan.vault.read(pinned, CHUNK_BYTES)
    with client.locked():
        archived.remember(plan.place.trust, mine, documents, plan.state)


def _stored(store: ObjectStore, key: str) -> str | None:
    try:
        return store.stat(key).tag
    except NotFound:
        return None
