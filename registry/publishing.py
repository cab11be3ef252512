"""Publishing: an adapter folder becomes a signed version, and statements are signed about it.

Every step can be interrupted and repeated: files, then manifest, then statements, then the signed name, and
last the index. Nothing is visible before its name is signed, and a name is signed last of what trust needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from registry import attestation
from registry.admission import inspect_candidate, judge_licences
from registry.attestation import ROLE_OF, Kind
from registry.content import Content, FileContent, Outline, VerifiedContent
from registry.digest import Fingerprint, digest_bytes
from registry.errors import BadSignature, Conflict, NotFound, UsageError, shown
from registry.manifest import CARD_NAME, WEIGHTS_NAME, AdapterCard, AdapterManifest
from registry.reconcile import index_version
from registry.reference import Reference, check_name
from registry.results import Attested, PushResult
from registry.signing import envelope
from registry.storage import shelf
from registry.storage.catalog import write_model

if TYPE_CHECKING:
    from registry.client import Registry
    from registry.scanning.report import ScanReport
    from registry.signing.trust import TrustState
    from registry.transfer import Progress

BUILDER: Final = "https://adapter-foundry.dev/builder/registry-push/v1"

_ATTEMPTS: Final = 5
# The sha256 of the weights is computed while they are sent, after the scan.
_NOT_YET: Final = digest_bytes(b"")


def push(
    registry: Registry,
    folder: Path,
    name: str,
    *,
    evaluation: Mapping[str, Any] | None = None,
    version: int | None = None,
    progress: Progress | None = None,
) -> PushResult:
    """Publish an adapter folder as a new version, or find the version that it already is.

    Scan and licence policy come first; nothing is written if they refuse. The training, licence and scan
    statements are signed, and the evaluation statement if there is an evaluation.

    Args:
        registry: where to.
        folder: holds the weights and the adapter card; other files are left alone.
        name: name of the adapter.
        evaluation: an evaluation report with a "verdict".
        version: the number that it must get; None is the next one.
        progress: hears about the upload.

    Raises:
        PolicyRefused: the scan or the licences refuse.
        Conflict: the version exists with other content; versions are immutable.
        RegistryError: see the error tree.
    """
    from registry import transfer

    check_name(name)
    registry.catalog.require()
    registry.require_keys("publisher", "scanner")
    if evaluation is not None:
        attestation.evaluation_predicate(evaluation)
    with open_folder(folder) as contents:
        prints = {path: Fingerprint.of(content) for path, content in contents.items()}
        # What is scanned is what is sent, also if somebody writes to the folder meanwhile.
        views = {path: VerifiedContent(contents[path], _outline(path, prints[path])) for path in contents}
        card, report = inspect_candidate(views, registry.policy.admission(None), _NOT_YET)
        published = transfer.publish(registry.store, contents, prints, progress or transfer.silent)
        draft = AdapterManifest.make(card, name=name, version=1, files=published.entries)
        report = replace(report, weights=draft.file(WEIGHTS_NAME).sha256)
        for attempt in range(_ATTEMPTS):
            try:
                manifest, reused = _publish(registry, draft, report, evaluation, version)
                break
            except Conflict:
                if version is not None or attempt == _ATTEMPTS - 1:
                    raise
        # A file that was there before may have been swept away meanwhile: nobody referred to it.
        sent = published.sent + transfer.upload(registry.store, contents, manifest.files)
    return PushResult(
        reference=f"{name}:{manifest.version}",
        version=manifest.version,
        digest=manifest.digest,
        uploaded_bytes=sent,
        reused=reused,
    )


def _publish(
    registry: Registry,
    draft: AdapterManifest,
    report: ScanReport,
    evaluation: Mapping[str, Any] | None,
    wanted: int | None,
) -> tuple[AdapterManifest, bool]:
    """Give uploaded files a number, statements and a signed name; return the manifest and if it was known."""
    name = draft.name
    state = registry.authority.signing_state()
    known = _version_with(state, draft)
    version = wanted or known or max(state.versions_of(name), default=0) + 1
    manifest = AdapterManifest.make(draft.card, name=name, version=version, files=draft.files)
    taken = state.versions_of(name).get(version)
    if taken is not None and taken.digest != manifest.digest:
        raise Conflict(
            f"{name}:{version} exists with other content; versions are immutable",
            "push without --version: the adapter gets the next free number",
        )
    said = tuple(_predicates(registry, draft.card, report, evaluation))
    _put_documents(registry, manifest, said)
    reference = f"{name}:{version}"
    if taken is None or state.renewal_of_names_due(datetime.now(UTC)):
        action, size = "push" if taken is None else "renew", len(manifest.canonical_bytes())
        details = {"digest": str(manifest.digest), "license": manifest.license}
        with registry.recorded(action, reference, details):
            state = registry.authority.add_version(reference, manifest.digest, size, _facts(draft))
        # Leftovers of an earlier push that were found here may have been swept away before they had a name.
        _put_documents(registry, manifest, said)
    index_version(registry, state, manifest.digest)
    return manifest, taken is not None


def _put_documents(
    registry: Registry, manifest: AdapterManifest, said: Iterable[tuple[Kind, Mapping[str, Any]]]
) -> None:
    """Make sure that manifest, statements and model file of a version are in the store."""
    shelf.put_manifest(registry.store, manifest)
    there = shelf.read_statements(registry.store, manifest.digest)
    for kind, predicate in said:
        _sign(registry, manifest, kind, predicate, there)
    write_model(registry.store, manifest)


def attest(
    registry: Registry,
    reference: Reference,
    kind: Kind,
    predicate: Mapping[str, Any],
    role: str | None = None,
) -> Attested:
    """Sign a statement about a published version.

    Args:
        registry: the registry.
        reference: the version.
        kind: what is attested.
        predicate: the statement's content.
        role: whose key signs; the role that the kind needs is the only one that will be believed.

    Raises:
        UsageError: the role cannot sign such statements, or the predicate is not valid.
        RegistryError: see the error tree.
    """
    if kind not in ROLE_OF:
        raise UsageError(
            f"there is no statement of the kind {shown(kind)!r}", mend=f"kinds are: {', '.join(ROLE_OF)}"
        )
    if role is not None and role != ROLE_OF[kind]:
        raise UsageError(
            f"a statement of the kind {kind!r} is only believed from the {ROLE_OF[kind]}",
            mend=f"sign it as {ROLE_OF[kind]}",
        )
    target = registry.authority.state().resolve(reference)
    manifest = shelf.read_manifest(registry.store, target.digest)
    attestation.check_about(kind, predicate, manifest)
    return _attest(registry, manifest, kind, predicate, registry.place.actor)


def approve(
    registry: Registry, reference: Reference, by: str, reason: str, *, automatic: bool = False
) -> Attested:
    """Sign that somebody approved a version, after everything else about it was verified.

    Args:
        registry: the registry.
        reference: the version.
        by: who approves.
        reason: why; people will read it.
        automatic: no person looked at it.

    Raises:
        RegistryError: the version would not pass admission even with an approval.
    """
    from registry.pulling import check_in_store

    if not by.strip() or not reason.strip():
        raise UsageError("an approval needs a name and a reason", mend="say who approves and why")
    state = registry.authority.state()
    target = state.resolve(reference)
    policy = registry.policy.admission(reference.alias)
    needed = tuple(kind for kind in policy.required if kind != "approval")
    documents = check_in_store(
        registry, state, target, reference, replace(policy, required=needed, approvals=0)
    )
    at = datetime.now(UTC).isoformat(timespec="seconds")
    predicate = attestation.approval_predicate(by=by, reason=reason, at=at, automatic=automatic)
    return _attest(registry, documents.manifest, "approval", predicate, by)


def _attest(
    registry: Registry, manifest: AdapterManifest, kind: Kind, predicate: Mapping[str, Any], actor: str
) -> Attested:
    there = shelf.read_statements(registry.store, manifest.digest)
    signed = _sign(registry, manifest, kind, predicate, there)
    if not signed.reused:
        digest = signed.statement.rpartition(".json")[0].rpartition(".")[2]
        details = {"kind": kind, "digest": str(manifest.digest), "statement": f"sha256:{digest}"}
        registry.record("approve" if kind == "approval" else "attest", signed.reference, details, actor=actor)
        state = registry.authority.publish_anchor()
        index_version(registry, state, manifest.digest)
    return signed


def _sign(
    registry: Registry,
    manifest: AdapterManifest,
    kind: Kind,
    predicate: Mapping[str, Any],
    there: Mapping[str, bytes],
) -> Attested:
    """Sign a statement, or find among those there the one by the same key that says the same."""
    subject = f"{manifest.name}:{manifest.version}"
    payload = attestation.statement(kind, subject, manifest.digest, predicate)
    signer = registry.keys.signer(ROLE_OF[kind])
    public = envelope.PublicKey.of(signer.public_key)
    said = _without_time(predicate)
    for key, data in there.items():
        try:
            found = attestation.parse_statement(envelope.verify(data, [public], 1))
        except BadSignature:
            continue
        if found.kind == kind and _without_time(found.predicate) == said:
            return Attested(reference=subject, kind=kind, digest=manifest.digest, statement=key, reused=True)
    data = envelope.sign(payload, [signer])
    key, new = shelf.put_statement(registry.store, manifest.digest, kind, data)
    return Attested(reference=subject, kind=kind, digest=manifest.digest, statement=key, reused=not new)


def _outline(path: str, found: Fingerprint) -> Outline:
    return Outline(path=path, size=found.size, blake3=found.blake3, chunks=found.chunks)


def _without_time(predicate: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in predicate.items() if key != "at"}


def _predicates(
    registry: Registry, card: AdapterCard, report: ScanReport, evaluation: Mapping[str, Any] | None
) -> Iterable[tuple[Kind, Mapping[str, Any]]]:
    verdict = judge_licences(card, registry.policy.admission(None))
    yield "training", attestation.training_predicate(card, builder=BUILDER)
    yield "licence", attestation.licence_predicate(verdict, card)
    yield "scan", attestation.scan_predicate(report)
    if evaluation is not None:
        yield "evaluation", attestation.evaluation_predicate(evaluation)


def _facts(draft: AdapterManifest) -> dict[str, Any]:
    """What the publisher signs beside the digest: what lists and searches need without the manifest."""
    return {
        "content": str(draft.digest),
        "base": draft.base.id,
        "license": draft.license,
        "description": draft.description[:120],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version_with(state: TrustState, draft: AdapterManifest) -> int | None:
    """The signed version that holds the same content, whatever its number."""
    for version, target in state.versions_of(draft.name).items():
        if target.custom.get("content") == draft.digest:
            return version
    return None


@contextmanager
def open_folder(folder: Path) -> Iterator[dict[str, Content]]:
    """Open the files of an adapter folder, to be read in pieces.

    Raises:
        NotFound: the folder is no adapter folder.
        RegistryError: a file cannot be read.
    """
    with ExitStack() as stack:
        contents: dict[str, Content] = {}
        for name in (CARD_NAME, WEIGHTS_NAME):
            try:
                contents[name] = stack.enter_context(FileContent(folder / name))
            except NotFound:
                raise NotFound(
                    f"{folder} has no {name}",
                    mend=f"an adapter folder holds {WEIGHTS_NAME} and {CARD_NAME}, as a trainer writes them",
                ) from None
        yield contents


def read_folder(folder: Path) -> dict[str, bytes]:
    """Read the files of an adapter folder into memory.

    Raises:
        NotFound: the folder is no adapter folder.
        RegistryError: a file cannot be read.
    """
    with open_folder(folder) as contents:
        return {name: content[: len(content)] for name, content in contents.items()}
