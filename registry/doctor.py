"""The doctor: looks at everything that an installation consists of, explains what it finds, changes nothing.

Trust metadata is verified in a copy of this machine's memory, because verifying notes what was seen. Nothing
is created either: a database that is not there stays away. The file is as long as an installation has parts:
one check for each, in the order of `_STEPS`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from registry.cache import FILE_NAMES, AdapterCache
from registry.content import VerifiedContent, chunks
from registry.digest import Digest, digest_bytes
from registry.errors import DigestMismatch, NotFound, RegistryError, StaleTrust, UsageError
from registry.manifest import AdapterManifest
from registry.parallel import each
from registry.signing.signers import ONLINE, ROLES
from registry.storage import shelf
from registry.storage.base import Housekeeping, file_key, manifest_key
from registry.transfer import StoredContent
from registry.upkeep import GRACE, cached
from registry.vault import POLICY

if TYPE_CHECKING:
    from registry.client import Registry
    from registry.signing.trust import Target, TrustState

Outcome = Literal["ok", "warn", "fail"]

SKEW: Final = timedelta(seconds=30)
"""Clocks that differ by more are worth a word; trust metadata is judged by the time."""
_BASE: Final = ("tuf", "securesystemslib", "cryptography", "blake3", "pydantic", "numpy", "click")
_EXTRAS: Final = {"mlflow": "catalog", "sqlalchemy": "catalog", "botocore": "cloud", "psycopg": "cloud"}
_SHOWN: Final = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: what.
        outcome: "ok", "warn" (it works, but not for long or not for all) or "fail".
        detail: what was found.
        mend: what to do; empty only if it is ok.
        exit_code: of the problem; 0 unless the outcome is "fail".
    """

    check: str
    outcome: Outcome
    detail: str
    mend: str = ""
    exit_code: int = 0


@dataclass(kw_only=True)
class _Visit:
    """What the checks of one visit share."""

    registry: Registry
    deep: bool
    findings: list[Finding] = field(default_factory=list)
    state: TrustState | None = None

    @property
    def signs(self) -> bool:
        """Whether this machine publishes; a reader or a mirror has no index and no audit log of its own."""
        return self.registry.keys.holds(ONLINE)

    def ok(self, check: str, detail: str) -> None:
        self.findings.append(Finding(check=check, outcome="ok", detail=detail))

    def warn(self, check: str, detail: str, mend: str) -> None:
        self.findings.append(Finding(check=check, outcome="warn", detail=detail, mend=mend))

    def fail(self, check: str, error: RegistryError) -> None:
        mend = error.mend or "look at the message; `registry doctor --deep` may tell more"
        self.findings.append(
            Finding(check=check, outcome="fail", detail=error.message, mend=mend, exit_code=error.exit_code)
        )

    def look(self, check: str, step: Callable[[_Visit, str], None]) -> None:
        """Take a step; an error of ours is what it found."""
        try:
            step(self, check)
        except RegistryError as error:
            self.fail(check, error)


def examine(registry: Registry, *, deep: bool = False) -> tuple[Finding, ...]:
    """Look at an installation.

    Args:
        registry: the registry.
        deep: read and verify every byte in the store and in the cache.
    """
    visit = _Visit(registry=registry, deep=deep)
    for check, step in _STEPS.items():
        visit.look(check, step)
    return tuple(visit.findings)


def _settings(visit: _Visit, check: str) -> None:
    place = visit.registry.place
    visit.ok(check, f"data folder {place.home}, store {visit.registry.store.uri}")
    try:
        visit.ok("policy", f"{place.policy or 'the default'}, {visit.registry.policy.digest[:19]}")
    except RegistryError as error:
        own = place.home / POLICY
        there = own.is_file() and own != place.policy  # a restore puts it there, wherever it was
        mend = f"copy {own} there, or take `policy` out of the settings" if there else error.mend
        visit.fail("policy", UsageError(error.message, mend))


def _libraries(visit: _Visit, check: str) -> None:
    found = [f"{name} {importlib.metadata.version(name)}" for name in _BASE if importlib.util.find_spec(name)]
    if len(found) < len(_BASE):
        missing = ", ".join(name for name in _BASE if not importlib.util.find_spec(name))
        raise RegistryError(f"missing: {missing}", "pip install adapter-foundry")
    extras = [name for name in _EXTRAS if importlib.util.find_spec(name)]
    found += [f"{name} {importlib.metadata.version(name)}" for name in extras]
    visit.ok(check, ", ".join(found))
    absent = [name for name in _EXTRAS if name not in extras]
    if absent:
        wanted = ",".join(sorted({_EXTRAS[name] for name in absent}))
        install = f"pip install 'adapter-foundry[{wanted}]' if you publish or use S3 or PostgreSQL"
        visit.warn(check, f"not installed: {', '.join(absent)}", install)


def _keys(visit: _Visit, check: str) -> None:
    keys = visit.registry.keys
    held = [role for role in ROLES if keys.holds(role)]
    if not held:
        visit.ok(check, "none: this machine reads and verifies, and signs nothing")
        return
    if keys.folder.exists() and stat.S_IMODE(keys.folder.stat().st_mode) & 0o077:
        visit.warn(check, f"others may look into {keys.folder}", f"chmod 700 {keys.folder}")
    for role in held:
        try:
            keyid = keys.signer(role).public_key.keyid
        except RegistryError as error:
            visit.fail(f"{role} key", error)
            continue
        believed = _believed(visit.state, role)
        if believed is None or keyid in believed:
            visit.ok(f"{role} key", f"{keyid[:12]}, can be opened")
        else:
            visit.warn(
                f"{role} key",
                f"{keyid[:12]} is not trusted for this role: what it signs is not believed",
                f"use the {role} key of this registry, or have the root trust this one: `registry trust`",
            )


def _believed(state: TrustState | None, role: str) -> set[str] | None:
    """The ids of the keys that count for a role; None if that is not known."""
    if state is None:
        return None
    if role in ("root", ONLINE):
        name = "root" if role == "root" else "timestamp"
        return {*state.signed("root")["roles"][name]["keyids"]}
    return {key.keyid for key in state.keys(role)}


def _trust(visit: _Visit, check: str) -> None:
    from registry.signing.refresh import TrustClient
    from registry.signing.trust import TOP, ExpiredTrust

    place, now = visit.registry.place, datetime.now(UTC)
    with tempfile.TemporaryDirectory(prefix="registry-doctor-") as temporary:
        folder = Path(temporary) / "trust"
        if place.trust.exists():
            shutil.copytree(place.trust, folder, symlinks=True)
        client = TrustClient(visit.registry.store, folder)
        try:
            state = client.refresh()
        except ExpiredTrust as error:
            if not visit.signs:
                raise
            state = client.last_trusted()
            visit.warn(
                check, error.message, "the next command that signs or reads renews it: the key is here"
            )
        for role in state.bins():
            state.document(role)  # while the copy is there
    visit.state = state
    until = ", ".join(f"{role} {state.expires(role):%Y-%m-%d %H:%M}" for role in TOP)
    visit.ok(check, f"root {state.version('root')} is pinned or follows from the pinned one; until: {until}")
    for role, end in state.expiring(now):
        visit.warn(
            check,
            f"{role} expires on {end:%Y-%m-%d}",
            "sign a new root: `registry trust`" if role == "root" else "push or promote where its key is",
        )


def _store(visit: _Visit, check: str) -> None:
    store = visit.registry.store
    store.stat("trust/timestamp.json")
    visit.ok(check, f"{store.uri} answers")
    if isinstance(store, Housekeeping):
        unfinished = store.abandoned(datetime.now(UTC) - GRACE)
        if unfinished:
            size = sum(found.size for found in unfinished)
            visit.warn(
                check, f"{len(unfinished)} unfinished writes, {size} bytes", "`registry gc` removes them"
            )


def _clock(visit: _Visit, check: str) -> None:
    store = visit.registry.store
    theirs = store.clock() if isinstance(store, Housekeeping) else None
    if theirs is None:
        visit.ok(check, f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC; the store has no other clock")
        return
    skew = datetime.now(UTC) - theirs
    if abs(skew) <= SKEW:
        visit.ok(check, f"the store's clock differs by {skew.total_seconds():.0f} s")
    else:
        mend = "set this machine's clock by NTP: expired trust is recognised by it"
        visit.warn(check, f"this machine's clock is {skew.total_seconds():+.0f} s from the store's", mend)


def _versions(visit: _Visit, check: str) -> None:
    if visit.state is None:
        raise StaleTrust("nothing is believed, so nothing can be compared", "see the trust metadata above")
    state, found = visit.state, list(visit.state.versions().values())
    problems: list[tuple[str, RegistryError]] = []
    absent: list[str] = []

    def look(target: Target) -> None:
        try:
            if not visit.signs and not any(visit.registry.store.keys(manifest_key(target.digest))):
                absent.append(target.path)
            else:
                _version(visit, state, target)
        except RegistryError as error:
            problems.append((target.path, error))

    each(look, found)
    for path, error in sorted(problems, key=lambda problem: problem[0])[:_SHOWN]:
        visit.fail(f"{check} {path}", error)
    if len(problems) > _SHOWN:
        visit.fail(check, DigestMismatch(f"{len(problems) - _SHOWN} more are not whole", "push them again"))
    whole = len(found) - len(problems) - len(absent)
    said = "every byte was verified" if visit.deep else "manifests, sizes and statements are as signed"
    visit.ok(check, f"{whole} of {len(found)} are whole: {said}")
    if absent:
        visit.warn(
            check,
            f"{len(absent)} are not mirrored here, such as {min(absent)}",
            "import an archive that holds them, if somebody needs them",
        )


def _version(visit: _Visit, state: TrustState, target: Target) -> None:
    """Compare what the store holds of a version with what is signed; files of a revoked one may be gone."""
    from registry.storage.mlmodel import check_model

    store = visit.registry.store
    manifest = shelf.read_manifest(store, target.digest)
    shelf.read_statements(store, target.digest)
    try:
        for entry in manifest.files:
            size = store.stat(file_key(entry)).size
            if size != entry.size:
                raise DigestMismatch(
                    f"{entry.path} has {size} bytes in the store, {entry.size} were signed",
                    "restore the object from a backup, or remove it and push the same folder again",
                )
            if visit.deep:
                for _ in chunks(VerifiedContent(StoredContent(store, entry), entry)):
                    pass
    except NotFound as error:
        if state.is_revoked(target.digest) is None:
            raise NotFound(error.message, "push the same folder again: it heals the version") from error
    check_model(store, manifest)


def _index(visit: _Visit, check: str) -> None:
    from registry import reconcile
    from registry.storage import database

    if not visit.signs:
        visit.ok(check, "not asked: this machine does not publish")
        return
    catalog, uri = visit.registry.catalog, visit.registry.place.tracking_uri
    catalog.require()
    file = database.sqlite_file(uri)
    if file is not None and not file.exists():
        raise NotFound(f"there is no index at {catalog.uri}", "`registry reconcile --repair` makes it")
    view = catalog.survey()
    if visit.state is None:
        visit.ok(check, f"{catalog.uri} answers")
        return
    differences = reconcile.compare(reconcile.expectation(visit.registry, visit.state), view)
    if differences:
        first = differences[0]
        raise DigestMismatch(
            f"MLflow differs from what is signed in {len(differences)} places, first: {first.kind} of "
            f"{first.subject}",
            "`registry reconcile` shows them, and --repair makes MLflow say what is signed",
        )
    visit.ok(check, f"{catalog.uri} says what is signed")


def _ledger(visit: _Visit, check: str) -> None:
    from registry.storage.ledger import LedgerHead

    ledger = visit.registry.ledger
    if not visit.signs and ledger.head().length == 0:
        visit.ok(check, "none on this machine: the log belongs to whoever signs")
        return
    anchor = visit.state.ledger_anchor() if visit.state is not None else None
    found = ledger.verify(None if anchor is None else LedgerHead.parse(anchor))
    visit.ok(
        check, f"{found.head.length} rows hold, {found.anchored} of them are anchored in the trust metadata"
    )


def _cache(visit: _Visit, check: str) -> None:
    folder = visit.registry.place.cache
    cache, size, stale = AdapterCache(folder), 0, []
    digests = list(cached(folder / "sha256"))
    state, named = visit.state, set()
    if state is not None:
        named = {found.digest for found in (*state.versions().values(), *state.aliases().values())}
    for digest in digests:
        documents = cache.read_documents(digest)
        if documents is None or digest_bytes(documents.manifest) != digest:
            raise DigestMismatch(
                f"{cache.path(digest)} is not whole",
                "remove it; it can be pulled again: `registry gc --cache`",
            )
        size += _check_cached(cache, digest, AdapterManifest.parse(documents.manifest), deep=visit.deep)
        if state is not None and (digest not in named or state.is_revoked(digest)):
            stale.append(digest)
    visit.ok(check, f"{len(digests)} adapters, {size} bytes, in {folder}")
    left = len(list(cached(folder / "incoming")))
    if stale or left:
        detail = f"{len(stale)} adapters that nobody may load any more, {left} pulls that did not end"
        visit.warn(check, detail, "`registry gc --cache` removes them")


def _check_cached(cache: AdapterCache, digest: Digest, manifest: AdapterManifest, *, deep: bool) -> int:
    mend = "remove it, and pull it again"
    for entry in manifest.files:
        with cache.content(digest, entry.path) as content:
            if len(content) != entry.size:
                raise DigestMismatch(f"{cache.path(digest) / entry.path} has another size than signed", mend)
            if deep:
                for _ in chunks(VerifiedContent(content, entry)):
                    pass
    return sum((cache.path(digest) / name).stat().st_size for name in FILE_NAMES)


_STEPS: Final[dict[str, Callable[[_Visit, str], None]]] = {
    "settings": _settings,
    "libraries": _libraries,
    "trust metadata": _trust,
    "keys": _keys,
    "store": _store,
    "clock": _clock,
    "versions": _versions,
    "index": _index,
    "audit log": _ledger,
    "cache": _cache,
}
"""What is looked at, in the order in which one thing depends on the other."""


def exit_code(findings: tuple[Finding, ...]) -> int:
    """The code of the first problem, or 0."""
    return next((found.exit_code for found in findings if found.outcome == "fail"), 0)


def to_do(findings: tuple[Finding, ...]) -> Iterator[str]:
    """What to do about each finding that is not ok."""
    for found in findings:
        if found.outcome != "ok":
            yield f"{found.check}: {found.mend}"
