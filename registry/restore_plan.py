"""What is found out about a restore before anything is written: that it may be done, and where things go.

A backup place may be in anybody's hands. What is signed is verified from the root; settings are not signed.
So those of a backup may name nothing that lies out of the new data folder, neither files, which would be
written over, nor servers, which would be sent credentials, unless the digest of the backup is known.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from registry.backup import LEDGER, MLFLOW, check_bytes, check_whole, trust_documents
from registry.content import CHUNK_BYTES
from registry.digest import Digest, digest_bytes
from registry.errors import BadSignature, DigestMismatch, NotFound, UsageError, shown
from registry.settings import CONFIG_NAME
from registry.storage.base import ObjectStore, read
from registry.storage.database import masked
from registry.storage.dumps import Database
from registry.vault import KEYS, PINNED, Dump, Manifest, Vault

if TYPE_CHECKING:
    from registry.client import Registry
    from registry.settings import Layout, RegistrySettings
    from registry.signing.archived import Followed
    from registry.signing.trust import TrustState
    from registry.transfer import Progress

NOTE: Final = "restoring.json"
SKIP: Final = "skip"
_ROOT: Final = re.compile(r"[1-9][0-9]{0,8}\.root\.json")
TIMESTAMP: Final = "trust/timestamp.json"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be restored, and where to.

    Attributes:
        vault: where the backup is.
        name: of the backup.
        digest: of its manifest.
        manifest: what it holds.
        registry: what is to be, by its settings.
        databases: that are to be restored, and where.
        trust: what is to be believed: what the backup has, and roots that were signed later.
    """

    vault: Vault
    name: str
    digest: Digest
    manifest: Manifest
    registry: Registry
    databases: Mapping[str, Database]
    trust: Followed

    @property
    def place(self) -> Layout:
        """Where the registry is to be."""
        return self.registry.place

    @property
    def state(self) -> TrustState:
        """What is signed."""
        return self.trust.state

    @property
    def note(self) -> Path:
        """The file that says that a restore has begun and not ended."""
        return self.place.home / NOTE

    @property
    def begun(self) -> bool:
        """Whether this very restore was begun and did not end."""
        try:
            return bool(json.loads(self.note.read_bytes())["backup"] == self.digest)
        except (OSError, ValueError, KeyError, TypeError):
            return False


def prepare(
    home: Path,
    vault: Vault,
    databases: Mapping[str, str],
    *,
    name: str | None,
    digest: Digest | None,
    only: Collection[str],
    progress: Progress,
) -> Plan:
    """Verify a backup and find out where everything in it goes; arguments and errors as for `restore`."""
    from registry.signing import archived, following

    chosen, manifest, found = vault.manifest(name)
    if digest is not None and digest != found:
        raise DigestMismatch(
            f"the backup {chosen} is {found}, not {digest}", "it was changed, or you mean another: --at NAME"
        )
    check_bytes(vault, manifest, progress)
    check_whole(vault, manifest)
    registry = _registry(home, vault, manifest, proven=digest is not None)
    targets = _targets(registry, manifest, databases, only)
    _check_pin(registry, vault, manifest)
    pinned = next(kept for kept in manifest.files if kept.path == PINNED)
    roots = [] if only else [*following.kept(registry.place.trust), _roots_of(registry.store)]
    trust = archived.follow(trust_documents(vault, manifest), vault.read(pinned, CHUNK_BYTES), roots)
    return Plan(
        vault=vault, name=chosen, digest=found, manifest=manifest, registry=registry, databases=targets,
        trust=trust,
    )  # fmt: skip


def _registry(home: Path, vault: Vault, manifest: Manifest, *, proven: bool) -> Registry:
    """The registry to be: by the settings of this data folder, or else by those of the backup."""
    from registry.client import Registry
    from registry.settings import Layout, RegistrySettings, load

    folder = home.expanduser().absolute()
    kept = next((one for one in manifest.files if one.path == CONFIG_NAME), None)
    if kept is None or (folder / CONFIG_NAME).exists():
        return Registry.open(folder)
    with tempfile.TemporaryDirectory(prefix="registry-restore-") as temporary:
        vault.write(kept, Path(temporary) / CONFIG_NAME)
        settings = load("registry", RegistrySettings, data_folder=Path(temporary))
    if not proven:
        _check_inside(folder, load("registry", RegistrySettings, data_folder=folder), settings)
    return Registry(Layout(home=folder, settings=settings))


def _check_inside(home: Path, ours: RegistrySettings, theirs: RegistrySettings) -> None:
    """Keep settings that anybody may have written from naming places of this machine, or servers.

    Raises:
        UsageError: they do, and nobody here has said the same.
    """
    for key in ("store", "ledger", "mlflow_tracking_uri", "cache"):
        value = getattr(theirs, key)
        if value not in (None, getattr(ours, key)) and not _is_inside(home, str(value)):
            raise _unproven(home, key, str(value))
    for role, uri in theirs.keys.items():
        known = uri == ours.keys.get(role) or uri.startswith("env:")
        if not known and not _is_inside(home, uri):
            raise _unproven(home, f"keys.{role}", uri)


def _unproven(home: Path, key: str, value: str) -> UsageError:
    return UsageError(
        f"by the settings in the backup {shown(key)} is {masked(value)}, which is not in {home}, and nothing "
        "proves that its owner wrote them",
        "give --sha256 what `registry backup` printed; or say yourself where things go, in the environment "
        f"or in {home / CONFIG_NAME}",
    )


def _is_inside(home: Path, uri: str) -> bool:
    """Whether what a setting names is in a folder; not if that is in any doubt."""
    path: Path | None = Path(uri)
    if set("%?#") & set(uri):
        return False
    if uri.startswith("sqlite"):
        try:
            path = Database.of(uri).file
        except UsageError:
            return False
    elif uri.startswith("file:"):
        path = Path(uri.removeprefix("file:").removeprefix("//"))
    return path is not None and path.is_absolute() and path.resolve().is_relative_to(home.resolve())


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


def _check_pin(registry: Registry, vault: Vault, manifest: Manifest) -> None:
    """Make sure that the backup is of the registry that this machine believes.

    A backup brings a root of its own; where one is pinned already, all has to follow from that one.

    Raises:
        BadSignature: it is of another registry, or does not follow from the pinned root.
    """
    from registry.signing import archived

    pinned = registry.authority.client.pinned
    try:
        data = pinned.read_bytes()
    except FileNotFoundError:
        return
    roots = {kept.sha256 for kept in manifest.trust if kept.path.endswith(".root.json")}
    if digest_bytes(data) not in roots | {manifest.root}:
        raise BadSignature(
            f"the backup does not hold the root that is pinned here ({pinned}): it is of another registry, "
            "or from before that root",
            "choose another data folder, or another backup",
        )
    archived.verify(trust_documents(vault, manifest), data)


def _roots_of(store: ObjectStore) -> dict[int, bytes]:
    """Roots that the store shows: hostile."""
    names = {key: key.removeprefix("trust/") for key in store.keys("trust/")}
    return {
        int(name.partition(".")[0]): read(store, key) for key, name in names.items() if _ROOT.fullmatch(name)
    }


def check_free(plan: Plan, *, databases_only: bool) -> None:
    """Keep what is there from being overwritten.

    Raises:
        UsageError: there is a registry.
    """
    there = [f"the key {plan.place.home / kept.path}" for kept in plan.manifest.files
             if kept.path.startswith(KEYS) and (plan.place.home / kept.path).exists()]  # fmt: skip
    if databases_only:
        there = []
    elif stored(plan.registry.store, TIMESTAMP) is not None:
        there.append(f"the store {plan.registry.store.uri}")
    for name, database in plan.databases.items():
        if database.exists():
            there.append(f"the database {name} ({database.address})")
    if there:
        raise UsageError(
            f"there is a registry already: {there[0]}",
            "name empty servers in the environment or the settings, or replace it with --overwrite",
        )


def check_dumps(plan: Plan, *, replace: bool) -> None:
    """Make sure that every database can be loaded, so that none is touched if one cannot.

    Raises:
        DigestMismatch, UsageError, NetworkError: see `Database.check`.
    """
    for dump in plan.manifest.databases:
        if dump.path in plan.databases:
            with written(plan, dump) as file:
                plan.databases[dump.path].check(file, dump.major, replace=replace)


@contextlib.contextmanager
def written(plan: Plan, dump: Dump) -> Iterator[Path]:
    """A dump as a file, verified, that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="registry-restore-") as temporary:
        file = Path(temporary) / "dump"
        plan.vault.write(dump, file)
        yield file


def stored(store: ObjectStore, key: str) -> str | None:
    """The tag of an object; None if there is none."""
    try:
        return store.stat(key).tag
    except NotFound:
        return None
