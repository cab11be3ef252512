"""Publishing: an adapter folder becomes a signed version, with the statements that a push signs.

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
from registry.attestation import Kind
from registry.attesting import sign
from registry.behaviour import behaviour_predicate
from registry.content import Content, FileContent, Outline, VerifiedContent
from registry.digest import Fingerprint, digest_bytes
from registry.errors import Conflict, NeedsReview, NotFound
from registry.manifest import CARD_NAME, WEIGHTS_NAME, AdapterCard, AdapterManifest
from registry.reconcile import index_version
from registry.reference import check_name
from registry.results import PushResult
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
    behaviour: Mapping[str, Any] | None = None,
    for_review: bool = False,
    version: int | None = None,
    progress: Progress | None = None,
) -> PushResult:
    """Publish an adapter folder as a new version, or find the version that it already is.

    Scan and licence policy come first; nothing is written if they refuse. The training, licence and scan
    statements are signed, and those about an evaluation and a probe if there are any.

    Args:
        registry: where to.
        folder: holds the weights and the adapter card; other files are left alone.
        name: name of the adapter.
        evaluation: an evaluation report with a "verdict".
        behaviour: the report of a probe of these very weights; see `registry.behaviour`.
        for_review: publish also what the scanner wants a person to look at. Nobody can pull it before
            approvers have waived every finding.
        version: the number that it must get; None is the next one.
        progress: hears about the upload.

    Raises:
        PolicyRefused: the scan or the licences refuse.
        NeedsReview: the scan asks for a person, and it is not pushed for one.
        Conflict: the version exists with other content; versions are immutable.
        RegistryError: see the error tree.
    """
    from registry import transfer

    check_name(name)
    registry.catalog.require()
    registry.require_keys("publisher", "scanner")
    reports: dict[Kind, Mapping[str, Any]] = {}
    if evaluation is not None:
        reports["evaluation"] = attestation.evaluation_predicate(evaluation)
    if behaviour is not None:
        reports["behaviour"] = behaviour_predicate(behaviour)
    with open_folder(folder) as contents:
        prints = {path: Fingerprint.of(content) for path, content in contents.items()}
        # What is scanned is what is sent, also if somebody writes to the folder meanwhile.
        views = {path: VerifiedContent(contents[path], _outline(path, prints[path])) for path in contents}
        card, report = _inspect(registry, views, for_review)
        published = transfer.publish(registry.store, contents, prints, progress or transfer.silent)
        draft = AdapterManifest.make(card, name=name, version=1, files=published.entries)
        for kind, predicate in reports.items():
            attestation.check_about(kind, predicate, draft)
        report = replace(report, weights=draft.file(WEIGHTS_NAME).sha256)
        for attempt in range(_ATTEMPTS):
            try:
                manifest, reused = _publish(registry, draft, report, reports, version)
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
        findings=tuple(sorted({found.rule for found in report.findings})),
    )


def _inspect(
    registry: Registry, files: Mapping[str, Content], for_review: bool
) -> tuple[AdapterCard, ScanReport]:
    policy = registry.demands(None)
    try:
        return inspect_candidate(
            files, replace(policy, allow_review=policy.allow_review or for_review), _NOT_YET
        )
    except NeedsReview as error:
        raise NeedsReview(
            error.message,
            "look at the findings; if they are explained, push with --for-review: nobody can pull it before "
            "approvers have signed `registry waive`",
        ) from None


def _publish(
    registry: Registry,
    draft: AdapterManifest,
    report: ScanReport,
    reports: Mapping[Kind, Mapping[str, Any]],
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
    said = (*_predicates(registry, draft.card, report), *reports.items())
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
        sign(registry, manifest, kind, predicate, there)
    write_model(registry.store, manifest)


def _outline(path: str, found: Fingerprint) -> Outline:
    return Outline(path=path, size=found.size, blake3=found.blake3, chunks=found.chunks)


def _predicates(
    registry: Registry, card: AdapterCard, report: ScanReport
) -> Iterable[tuple[Kind, Mapping[str, Any]]]:
    verdict = judge_licences(card, registry.demands(None))
    yield "training", attestation.training_predicate(card, builder=BUILDER)
    yield "licence", attestation.licence_predicate(verdict, card)
    yield "scan", attestation.scan_predicate(report)


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
