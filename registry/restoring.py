"""Restoring a registry from a backup, on this machine and on the servers that its settings name.

Everything is verified before anything is written: every byte by the manifest of the backup, the trust
metadata from the pinned root, every object by what is signed. Then objects, databases, files of the data
folder, trust metadata, and the timestamp last, so that readers see nothing or all of it. A note in the data
folder says which backup is being restored until that is done: the same command again goes on after an
interruption. MLflow is made to say what is signed, for its entries name the store, which may be another one.

Who can write to a backup can exchange what nobody signs: settings, policy, private keys, MLflow's database
(whose dump is run as it is). The digest that `registry backup` prints covers these too, if it was kept
elsewhere and is given; without it, ``registry.restore_plan`` keeps such settings inside the data folder.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from registry import transfer
from registry.backup import LEDGER, signed_targets
from registry.content import CHUNK_BYTES, Content, VerifiedContent
from registry.digest import Digest, digest_bytes, digest_content
from registry.doctor import Finding, examine
from registry.errors import (
    RegistryError,
    StaleTrust,
    shown,
)
from registry.parallel import each
from registry.reconcile import reconcile
from registry.restore_plan import (
    TIMESTAMP,
    Plan,
    check_dumps,
    check_free,
    prepare,
    stored,
    written,
)
from registry.signing.signers import ONLINE
from registry.storage import shelf
from registry.storage.base import ObjectStore, file_key, manifest_key, read
from registry.vault import PINNED, POLICY, Dump, Kept, Stored, Vault

if TYPE_CHECKING:
    from registry.client import Registry
    from registry.signing.trust import Target
    from registry.transfer import Progress


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
        warnings: what its owner should know.
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
    warnings: tuple[str, ...] = ()


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

    plan = prepare(home, vault, databases, name=name, digest=digest, only=only, progress=progress)
    if not overwrite and not plan.begun:
        check_free(plan, databases_only=bool(only))
    lost = [] if only else archived.newer(plan.place.trust, plan.state)
    if lost and not older:
        raise StaleTrust(
            f"this machine has seen newer trust metadata than the backup holds: {', '.join(lost[:5])}",
            "take a newer backup; or --older, and then what was signed since is lost, revocations too "
            "(docs/operations/backup.md)",
        )
    check_dumps(plan, replace=overwrite or (plan.begun and not only))
    if only:
        return _databases_alone(plan, overwrite=overwrite)
    return _carry_out(plan, tuple(lost), progress, overwrite=overwrite)


def _databases_alone(plan: Plan, *, overwrite: bool) -> Restored:
    for dump in plan.manifest.databases:
        if dump.path in plan.databases:
            _load(plan, dump, replace=overwrite)
    return Restored(
        name=plan.name, time=plan.manifest.time, root=plan.manifest.root, versions=0, objects=0,
        databases=tuple(sorted(plan.databases)), files=(), replaced=(), lost=(),
        findings=_examined(plan.registry),
    )  # fmt: skip


def _carry_out(plan: Plan, lost: tuple[str, ...], progress: Progress, *, overwrite: bool) -> Restored:
    again = plan.begun
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
    warnings = (*_warnings(plan), *_lead_on(plan, registry))
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
        warnings=warnings,
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


# -- writing --


def _put_objects(plan: Plan, progress: Progress) -> int:
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


def _load(plan: Plan, dump: Dump, *, replace: bool) -> None:
    with written(plan, dump) as file:
        plan.databases[dump.path].load(file, dump.major, replace=replace)


def _put_files(plan: Plan) -> tuple[str, ...]:
    """Write the files of the data folder; what says something else is kept beside."""
    from registry.settings import CONFIG_NAME
    from registry.signing import following

    replaced = []
    for kept in plan.manifest.files:
        path = plan.place.home / kept.path
        if kept.path == PINNED or (kept.path == CONFIG_NAME and path.exists()):
            continue  # the pin comes with the trust metadata; settings that are here name the new servers
        data = plan.vault.read(kept)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists() and path.read_bytes() != data:
            aside = following.aside(path)
            replaced.append(f"{kept.path.removesuffix(path.name)}{aside.name}")
            path.replace(aside)
        temporary = path.with_name(f".{path.name}.incoming-{os.getpid()}")
        temporary.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with os.fdopen(os.open(temporary, flags, 0o600), "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    return tuple(replaced)


def _put_trust(plan: Plan) -> None:
    """Make the store show what the backup has signed, the timestamp last, and this machine believe it."""
    from registry.signing import archived, following

    store, documents = plan.registry.store, plan.trust.documents
    following.keep(plan.place.trust, plan.trust)
    for key in sorted(documents.keys() - {TIMESTAMP}):
        data = documents[key]
        if not store.put(key, data) and read(store, key) != data:
            store.replace(key, data, store.stat(key).tag)
    for key in [*store.keys("trust/")]:
        if key not in documents:  # of the registry that is overwritten
            store.delete(key)
    if (tag := stored(store, TIMESTAMP)) is None or read(store, TIMESTAMP) != documents[TIMESTAMP]:
        store.replace(TIMESTAMP, documents[TIMESTAMP], tag)
    client = plan.registry.authority.client
    pinned = next(kept for kept in plan.manifest.files if kept.path == PINNED)
    mine = client.pinned.read_bytes() if client.pinned.exists() else plan.vault.read(pinned, CHUNK_BYTES)
    with client.locked():
        archived.remember(plan.place.trust, mine, documents, plan.state)


def _warnings(plan: Plan) -> Iterator[str]:
    """What is not as somebody may expect who restores."""
    place, policy = plan.place, plan.place.home / POLICY
    kept = next((one for one in plan.manifest.files if one.path == POLICY), None)
    if kept is not None and place.policy not in (None, policy) and not _says(place.policy, kept):
        yield (
            f"the settings look for the policy at {place.policy}; the one of the backup is {policy}: copy it "
            "there, or take `policy` out of the settings"
        )


def _lead_on(plan: Plan, registry: Registry) -> Iterator[str]:
    """Lead readers on to roots that were signed after the backup; yield what its owner should know."""
    from registry.signing import following

    roots = [*plan.trust.roots]
    try:
        if plan.trust.apart:
            roots += following.follow(registry.authority, plan.place.trust)
        places = following.settle(registry.authority) if roots else ()
    except RegistryError as error:
        numbers = ", ".join(map(str, plan.trust.apart or roots))
        yield (
            f"root {numbers} was signed after the backup, and its keys cannot sign here what is restored: "
            f"{error.message}. Readers who have seen it are shut out until `registry trust renew --ahead` "
            f"finds its keys in {plan.place.keys}, and the root in {plan.place.trust / following.KEPT}"
        )
        return
    if roots:
        kept = f"; its keys are in their place again: {', '.join(places)}" if places else ""
        yield f"root {roots[-1]} was signed after the backup and stays{kept}"


def _says(path: Path, kept: Kept) -> bool:
    try:
        return digest_bytes(path.read_bytes()) == kept.sha256
    except OSError:
        return False
