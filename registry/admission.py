"""Admission: hostile bytes in, a VerifiedAdapter out. The only maker of verified adapters; no IO.

The steps are those of docs/threat-model.md, in its order; each has an attack in tests/attacks that succeeds
when the step is removed. A step may rely on the ones before it and on nothing else.

The file is long because every step is in it: who reviews admission reads one file from top to bottom.

``VerifiedAdapter`` is the proof that the steps were taken. Python cannot stop code inside the process that
wants to cheat; the guard stops code that forgets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Final, NoReturn, Protocol

from registry import behaviour, evaluation, families, licenses, reproduction, waivers
from registry.attestation import (
    DEMANDED,
    ROLE_OF,
    Kind,
    Statement,
    judged_another,
    materials_match,
    parse_statement,
    probed_another,
    reproduced_another,
    scanned_with,
)
from registry.content import Content, VerifiedContent
from registry.digest import Digest, digest_bytes, file_entry
from registry.errors import (
    BadSignature,
    DigestMismatch,
    IdentityMismatch,
    InvalidDocument,
    NeedsReview,
    PolicyRefused,
    Revoked,
    ScanRefused,
    Unsigned,
    shown,
)
from registry.formats import MAX_WEIGHTS_BYTES, read_header, serialise
from registry.manifest import (
    CARD_NAME,
    MAX_CARD_BYTES,
    MAX_MANIFEST_BYTES,
    WEIGHTS_NAME,
    AdapterCard,
    AdapterManifest,
)
from registry.reference import Reference
from registry.scanning.rules import RULES
from registry.signing import envelope
from registry.waivers import Waivers

if TYPE_CHECKING:
    from datetime import datetime

    from registry.families import BaseFacts
    from registry.scanning.report import ScanReport

MAX_STATEMENTS: Final = 64
PROVENANCE_RULE: Final = "ADP-PRV-001"
"""What the training statement is for: steps 6, 8 and 9 take it over exactly these bytes."""

STEPS: Final[tuple[str, ...]] = (
    "Sizes: nothing is parsed or hashed that is larger than its limit",
    "The manifest is the one that was named",
    "The manifest has one reading",
    "The manifest is what the user asked for: name, version, digest",
    "Neither the manifest nor its weights are revoked",
    "Every required kind of statement is there",
    "Every statement is signed by enough keys of its kind's role",
    "Every statement is about this manifest",
    "Every statement says yes",
    "The licences permit the adapter",
    "The files are those of the manifest: no more, no fewer, the same bytes",
    "The card beside the weights says what the manifest says",
    "The scanner of today finds nothing that is not waived",
    "Only tensors are left: what is loaded is written anew",
)
"""What ``admit`` checks, in its order; the numbers in its body and in docs/threat-model.md count from 1."""

_TOKEN: Final = object()
_FILE_LIMITS: Final[Mapping[str, int]] = {WEIGHTS_NAME: MAX_WEIGHTS_BYTES, CARD_NAME: MAX_CARD_BYTES}


class Origin(Enum):
    """Where a verified adapter comes from."""

    REGISTRY = "registry"
    """Signed, approved by the policy and pulled by reference."""
    CANDIDATE = "candidate"
    """A folder that was only scanned: good for evaluation before signing, refused by production engines."""


class TrustView(Protocol):
    """What admission asks of the trust root; a plain view without IO."""

    def keys(self, role: str) -> Sequence[envelope.PublicKey]:
        """Return the keys of a role; none for an unknown role."""
        ...

    def threshold(self, role: str) -> int:
        """Return how many keys of a role must sign; at least 1."""
        ...

    def is_revoked(self, digest: Digest) -> str | None:
        """Return the signed reason why a manifest or a weights file was revoked, or None."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What has to hold beyond genuine bytes.

    Attributes:
        required: the kinds of statements that must be there.
        bases: the base models that adapters may be made for.
        allow_review: load adapters with findings that ask for a review, waived or not.
        waiver_days: waivers that run longer do not count.
        at: the time at which it is judged, in UTC; without it no waiver counts.
        approvals: how many different approvers must have signed, if approval is required at all; the trust
            root may ask for more, never for fewer.
        purpose: what every adapter and each of its ingredients must be allowed for.
        declared: conditions of licences that are said to be met; see `registry.policy.LicenseRules`.
        digest: digest of the policy file that this comes from, if it comes from one.
    """

    required: tuple[Kind, ...] = DEMANDED
    bases: Mapping[str, BaseFacts] = field(default_factory=lambda: families.KNOWN_BASES)
    allow_review: bool = False
    waiver_days: int = 90
    at: datetime | None = None
    approvals: int = 1
    purpose: licenses.Purpose = "commercial-redistribution"
    declared: tuple[str, ...] = ()
    digest: Digest | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AdmittedDocuments:
    """What is said about an adapter, believed: steps 1 to 10. Nothing is known about its files yet.

    Attributes:
        manifest: the signed manifest.
        digest: its digest.
        statements: every statement about it; each one is signed by its role and says yes, or is waived.
        waivers: those that count now.
    """

    manifest: AdapterManifest
    digest: Digest
    statements: tuple[Statement, ...]
    waivers: Waivers = waivers.NONE

    def scanned_as_today(self, policy: Policy) -> bool:
        """Whether a signed scan statement tells what the scanner of today would find in these weights."""
        from registry.scanning.configuration import today

        base = policy.bases.get(self.manifest.base.id)
        if base is None:
            return False
        weights, wanted = self.manifest.file(WEIGHTS_NAME).sha256, today(self.manifest.card, base)
        return any(scanned_with(found, weights) == wanted for found in self.statements)


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifiedAdapter:
    """An adapter that passed admission; the only thing that serving and trainer load.

    Attributes:
        manifest: the signed manifest; None for a candidate.
        card: what the adapter is.
        digest: the digest of the manifest, or of the canonical weights for a candidate.
        weights: canonical safetensors bytes, read by our own parser before any library sees them.
        origin: where it comes from.
        reference: ``name:version``; None for a candidate.
        scan: the report of the scan that just ran over the weights.
    """

    manifest: AdapterManifest | None
    card: AdapterCard
    digest: Digest
    weights: bytes = field(repr=False)
    origin: Origin
    reference: str | None
    scan: ScanReport = field(repr=False)
    token: InitVar[object] = None

    def __post_init__(self, token: object) -> None:
        if token is not _TOKEN:
            raise TypeError("only registry.admission makes a VerifiedAdapter; use admit or admit_candidate")

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled or copied: a proof does not travel, the bytes are admitted again."""
        raise TypeError("a VerifiedAdapter cannot be pickled or copied; admit its bytes again")


def admit(
    manifest_bytes: bytes,
    files: Mapping[str, bytes],
    statements: Sequence[bytes],
    trust: TrustView,
    policy: Policy,
    expected: Digest,
    reference: Reference,
) -> VerifiedAdapter:
    """Return the verified adapter in hostile bytes.

    Args:
        manifest_bytes: the manifest as it was stored.
        files: file name -> bytes, everything that was fetched for the adapter.
        statements: DSSE envelopes; each one must hold, not only the required ones, so that a signed refusal
            is never outvoted.
        trust: keys, thresholds and revocations, already verified.
        policy: what has to hold.
        expected: the manifest's digest, from trusted metadata or from the user.
        reference: what the user asked for.

    Raises:
        Unsigned, BadSignature, DigestMismatch, PolicyRefused, Revoked, NeedsReview, InvalidDocument: a step
            refuses; docs/threat-model.md tells which.
    """
    documents = admit_documents(manifest_bytes, statements, trust, policy, expected, reference)
    manifest = documents.manifest
    report = check_files(documents, files, policy)
    # 14. Only tensors are left: what is loaded is written anew.
    return VerifiedAdapter(
        manifest=manifest,
        card=manifest.card,
        digest=expected,
        weights=_canonical_weights(files[WEIGHTS_NAME]),
        origin=Origin.REGISTRY,
        reference=f"{manifest.name}:{manifest.version}",
        scan=report,
        token=_TOKEN,
    )


def admit_documents(
    manifest_bytes: bytes,
    statements: Sequence[bytes],
    trust: TrustView,
    policy: Policy,
    expected: Digest,
    reference: Reference,
) -> AdmittedDocuments:
    """Return what is said about an adapter: the steps before its files, which may be far away and large.

    Raises:
        Unsigned, BadSignature, DigestMismatch, PolicyRefused, Revoked, NeedsReview, InvalidDocument: as
            ``admit``.
    """
    # 1. Sizes: nothing is parsed or hashed that is larger than its limit.
    _check_sizes(manifest_bytes, {}, statements)
    # 2. The manifest is the one that was named.
    _check_manifest_digest(manifest_bytes, expected)
    # 3. The manifest has one reading.
    manifest = AdapterManifest.parse(manifest_bytes)
    # 4. The manifest is what the user asked for: name, version, digest.
    check_identity(manifest, reference)
    # 5. Neither the manifest nor its weights are revoked.
    check_revocation(manifest, trust)
    documents = check_statements(statements, manifest, trust, policy)
    # 10. The licences permit the adapter.
    check_licences(manifest.card, policy)
    return documents


def check_statements(
    statements: Sequence[bytes], manifest: AdapterManifest, trust: TrustView, policy: Policy
) -> AdmittedDocuments:
    """Return what is said about a manifest, and the waivers that count: steps 6 to 9.

    Raises:
        Unsigned, BadSignature, PolicyRefused, NeedsReview: a step refuses.
    """
    # 6. Every required kind of statement is there.
    by_kind = _sort_statements(statements, policy)
    # 7. Every statement is signed by enough keys of its kind's role.
    signed = _verify_signatures(by_kind, trust, policy)
    read = [found for found, _ in signed]
    # 8. Every statement is about this manifest.
    _check_subjects(read, manifest, manifest.digest)
    waived = _waivers(signed, manifest, trust, policy)
    # 9. Every statement says yes.
    _check_outcomes(read, manifest, policy, waived)
    return AdmittedDocuments(
        manifest=manifest, digest=manifest.digest, statements=tuple(read), waivers=waived
    )


def check_files(documents: AdmittedDocuments, files: Mapping[str, Content], policy: Policy) -> ScanReport:
    """Take the steps about an adapter's files, read in pieces; what is read is verified as it is read.

    Returns:
        The report of the scan that just ran.

    Raises:
        DigestMismatch, ScanRefused, NeedsReview, InvalidDocument: a step refuses.
    """
    manifest = documents.manifest
    # Sizes again (step 1): the manifest does not bound those of the files, the format does.
    _check_sizes(b"", files, ())
    # 11. The files are those of the manifest: no more, no fewer, the same bytes.
    _check_files(manifest, files)
    return _check_contents(documents, files, policy)


def check_transfer(documents: AdmittedDocuments, files: Mapping[str, Content], policy: Policy) -> None:
    """Take the steps about files whose chunks were compared with the manifest while they arrived.

    What the scanner says is taken from the signed scan statement when that was made by the rules of today
    over these weights: the same rules find the same. Whoever loads the files runs the scanner all the same.

    Raises:
        DigestMismatch, ScanRefused, NeedsReview, InvalidDocument: a step refuses.
    """
    _check_sizes(b"", files, ())
    _check_file_set(files)
    if documents.scanned_as_today(policy):
        _check_card(documents.manifest, VerifiedContent(files[CARD_NAME], documents.manifest.file(CARD_NAME)))
    else:
        _check_contents(documents, files, policy)


def _check_contents(documents: AdmittedDocuments, files: Mapping[str, Content], policy: Policy) -> ScanReport:
    manifest = documents.manifest
    contents = {entry.path: VerifiedContent(files[entry.path], entry) for entry in manifest.files}
    # 12. The card beside the weights says what the manifest says.
    _check_card(manifest, contents[CARD_NAME])
    # 13. The scanner of today finds nothing that is not waived.
    digest = manifest.file(WEIGHTS_NAME).sha256
    return _scan(contents[WEIGHTS_NAME], manifest.card, policy, digest, documents.waivers)


def inspect_candidate(
    files: Mapping[str, Content], policy: Policy | None = None, digest: Digest | None = None
) -> tuple[AdapterCard, ScanReport]:
    """Return the card of an adapter folder and the report of its scan, reading the files in pieces.

    It takes the steps that need no signature: sizes, the set of files, licences and scan.

    Args:
        files: file name -> content of the adapter folder.
        policy: only its bases, purpose and ``allow_review`` count.
        digest: the sha256 of the weights, when it is known already.

    Raises:
        DigestMismatch: a file is missing or too much.
        InvalidDocument, PolicyRefused, NeedsReview: a step refuses.
    """
    # A candidate is looked at, inside, before anything is decided: that is research until a policy says more.
    policy = Policy(purpose="internal-research") if policy is None else policy
    _check_sizes(b"", files, ())
    _check_file_set(files)
    card = AdapterCard.parse(files[CARD_NAME][: len(files[CARD_NAME])])
    check_licences(card, policy)
    return card, _scan(files[WEIGHTS_NAME], card, policy, digest)


def admit_candidate(files: Mapping[str, bytes], policy: Policy | None = None) -> VerifiedAdapter:
    """Return an adapter folder that was scanned but not signed, for evaluation before the push.

    Args:
        files: file name -> bytes of the adapter folder.
        policy: as for `inspect_candidate`.

    Raises:
        DigestMismatch, InvalidDocument, PolicyRefused, NeedsReview: as `inspect_candidate`.
    """
    card, report = inspect_candidate(files, policy)
    weights = _canonical_weights(files[WEIGHTS_NAME])
    return VerifiedAdapter(
        manifest=None,
        card=card,
        digest=digest_bytes(weights),
        weights=weights,
        origin=Origin.CANDIDATE,
        reference=None,
        scan=report,
        token=_TOKEN,
    )


def _check_sizes(manifest_bytes: bytes, files: Mapping[str, Content], statements: Sequence[bytes]) -> None:
    mend = "this is not what the trainer exports; ask who published it"
    sizes = [
        ("the manifest", len(manifest_bytes), MAX_MANIFEST_BYTES),
        ("the statements", len(statements), MAX_STATEMENTS),
    ]
    sizes += [("a statement", len(data), envelope.MAX_ENVELOPE_BYTES) for data in statements]
    sizes += [
        (shown(name), len(data), _FILE_LIMITS.get(name, MAX_CARD_BYTES)) for name, data in files.items()
    ]
    for what, size, limit in sizes:
        if size > limit:
            raise PolicyRefused(f"{what}: {size} is more than the limit of {limit}", mend)


def _check_manifest_digest(manifest_bytes: bytes, expected: Digest) -> None:
    found = digest_bytes(manifest_bytes)
    if found != expected:
        raise DigestMismatch(
            f"the manifest has the digest {found}, expected was {expected}",
            "the store or the way to it changed the bytes; report it, and pull from another mirror",
        )


def check_identity(manifest: AdapterManifest, reference: Reference) -> None:
    """Step 4 alone.

    Raises:
        IdentityMismatch: the manifest is not what the user asked for.
    """
    wrong = (
        manifest.name != reference.name
        or (reference.version is not None and manifest.version != reference.version)
        or (reference.digest is not None and manifest.digest != reference.digest)
    )
    if wrong:
        raise IdentityMismatch(
            f"asked for {reference}, got {manifest.name}:{manifest.version} ({manifest.digest})",
            "the index was changed or is confused; report it to who runs the registry",
        )


def check_revocation(manifest: AdapterManifest, trust: TrustView) -> None:
    """Step 5 alone.

    Raises:
        Revoked: the manifest or its weights were withdrawn.
    """
    for what, digest in (
        ("the adapter", manifest.digest),
        ("its weights file", manifest.file(WEIGHTS_NAME).sha256),
    ):
        reason = trust.is_revoked(digest)
        if reason is not None:
            raise Revoked(
                f"{what} of {manifest.name}:{manifest.version} was revoked: {shown(reason)}",
                "use another version; `registry list` shows them",
            )


def _sort_statements(statements: Sequence[bytes], policy: Policy) -> list[tuple[Kind, bytes]]:
    """Return each envelope with its claimed kind, which so far only decides whose keys are asked."""
    sorted_: list[tuple[Kind, bytes]] = []
    for data in statements:
        try:
            sorted_.append((parse_statement(envelope.unverified_payload(data)).kind, data))
        except InvalidDocument as error:
            raise BadSignature(error.message, error.mend) from None
    missing = [kind for kind in policy.required if kind not in {kind for kind, _ in sorted_}]
    if missing:
        lacking = f"; {no_provenance()}" if "training" in missing else ""
        raise Unsigned(
            f"the adapter lacks signed statements: {', '.join(missing)}{lacking}",
            "`registry push` signs training, licence and scan, `registry approve` the approval",
        )
    return sorted_


def _verify_signatures(
    statements: Sequence[tuple[Kind, bytes]], trust: TrustView, policy: Policy
) -> list[tuple[Statement, frozenset[str]]]:
    """Each envelope needs a key of its role; the keys of a kind are counted over all of its envelopes.

    So k approvals are k people who each sign on their own machine, and where more than one is needed, an
    approval that no person looked at counts for none. Kinds that the policy does not require are not counted,
    but what is there must be signed by the role: it may be a refusal.
    """
    read: list[tuple[Statement, frozenset[str]]] = []
    signed: dict[Kind, frozenset[str]] = {}
    needed = {
        kind: max(trust.threshold(ROLE_OF[kind]), policy.approvals if kind == "approval" else 1)
        for kind in policy.required
    }
    for kind, data in statements:
        role = ROLE_OF[kind]
        try:
            payload, keys = envelope.verified(data, trust.keys(role))
        except BadSignature as error:
            message = f"the {kind} statement needs the role {role}: {error.message}"
            raise BadSignature(message, error.mend) from None
        found = parse_statement(payload)
        read.append((found, keys))
        counts = kind != "approval" or found.by_a_person or needed.get(kind, 1) == 1
        signed[kind] = signed.get(kind, frozenset()) | (keys if counts else frozenset())
    for kind, least in needed.items():
        role = ROLE_OF[kind]
        if len(signed[kind]) < least:
            nobody = any(found.kind == kind == "approval" and not found.by_a_person for found, _ in read)
            aside = "; what is approved automatically is not counted" if nobody else ""
            raise BadSignature(
                f"the {kind} is signed by {len(signed[kind])} of the {least} {role} keys that it needs"
                f"{aside}",
                f"somebody else who holds a key of the role {role} must sign too, on their machine",
            )
    return read


def _check_subjects(statements: Sequence[Statement], manifest: AdapterManifest, expected: Digest) -> None:
    name = f"{manifest.name}:{manifest.version}"
    for found in statements:
        if found.digest != expected or found.subject_name != name:
            about = f"{shown(found.subject_name)} ({found.digest})"
            lacking = f"; {no_provenance()}" if found.kind == "training" else ""
            raise BadSignature(
                f"the {found.kind} statement is about {about}, not about {name}{lacking}",
                "a statement of another adapter was put here; report it to who runs the registry",
            )
        if found.kind == "evaluation":
            problem = judged_another(evaluation.parse(found.predicate), manifest)
            if problem is not None:
                raise BadSignature(problem, "evaluate the very adapter that was pushed")
        if found.kind == "behaviour":
            problem = probed_another(behaviour.parse(found.predicate), manifest)
            if problem is not None:
                raise BadSignature(problem, "probe the very adapter that was pushed, on its base")
        if found.kind == "reproduction":
            problem = reproduced_another(reproduction.parse(found.predicate), manifest)
            if problem is not None:
                raise BadSignature(problem, "reproduce the very adapter that was pushed")


def _waivers(
    signed: Sequence[tuple[Statement, frozenset[str]]],
    manifest: AdapterManifest,
    trust: TrustView,
    policy: Policy,
) -> Waivers:
    """Return the waivers that count; they need as many approvers as an approval."""
    return waivers.in_force(
        (waivers.parse(found.predicate, keys) for found, keys in signed if found.kind == "waiver"),
        manifest.file(WEIGHTS_NAME).sha256,
        policy.at,
        max_days=policy.waiver_days,
        needed=max(trust.threshold(ROLE_OF["waiver"]), policy.approvals),
    )


def _check_outcomes(
    statements: Sequence[Statement], manifest: AdapterManifest, policy: Policy, waived: Waivers
) -> None:
    name = f"{manifest.name}:{manifest.version}"
    for found in statements:
        if found.kind == "training" and not materials_match(found, manifest):
            raise PolicyRefused(
                f"the training statement of {name} names other materials than its manifest; "
                f"{no_provenance()}",
                "push the adapter again with the card that its training wrote",
            )
        if found.outcome == "review" and not policy.allow_review and not _is_waived(found, waived):
            raise NeedsReview(
                f"the {found.kind} statement of {name} asks for a review{_unwaived(found, waived)}",
                "read the findings with `registry show --attestations`; an approver who accepts them signs "
                "`registry waive`, or push a corrected version",
            )
        if found.kind == "reproduction" and found.kind not in policy.required:
            continue  # another machine may make something else without anybody's fault; a gate can ask
        if found.outcome == "fail":
            raise PolicyRefused(
                f"the {found.kind} statement of {name} says that it failed{_because(found)}",
                "push a corrected version; a signed refusal cannot be outvoted",
            )


def _because(found: Statement) -> str:
    """The first reasons that a statement gives for its refusal."""
    reasons = found.predicate.get("reasons")
    told = [shown(reason, 300) for reason in reasons[:3]] if isinstance(reasons, list) else []
    return f": {'; '.join(told)}" if told else ""


def _is_waived(found: Statement, waived: Waivers) -> bool:
    """Whether enough approvers let pass all that a statement asks a review for.

    A scan statement names rules without places: the scan of step 13 finds the places itself.
    """
    if found.kind == "behaviour":
        return waived.covers(behaviour.ALONE_RULE, behaviour.ALONE)
    warned = _warned(found)
    return bool(warned) and all(waived.mentions(rule) for rule in warned)


def _unwaived(found: Statement, waived: Waivers) -> str:
    if found.kind == "behaviour":
        return f": {behaviour.ALONE_RULE}, {RULES[behaviour.ALONE_RULE].title}"
    missing = [shown(rule, 60) for rule in _warned(found) if not waived.mentions(rule)]
    return f": {', '.join(missing)}" if missing else ""


def _warned(found: Statement) -> list[str]:
    rules = found.predicate.get("warnedTests")
    return [str(rule) for rule in rules] if isinstance(rules, list) else []


def no_provenance() -> str:
    """Return what a training statement that is missing, or about something else, means: rule and title."""
    return f"{PROVENANCE_RULE}: {RULES[PROVENANCE_RULE].title}"


def check_licences(card: AdapterCard, policy: Policy) -> None:
    """Step 10 alone.

    Raises:
        LicenseRefused: an ingredient forbids the adapter.
    """
    licenses.require(judge_licences(card, policy))


def judge_licences(card: AdapterCard, policy: Policy) -> licenses.LicenseVerdict:
    """Return what step 10 judges, with every ingredient; the licence statement is made from it."""
    base = policy.bases.get(card.base.id)
    return licenses.judge(
        card,
        None if base is None else base.license,
        purpose=policy.purpose,
        declared=policy.declared,
        policy=policy.digest,
    )


def _check_file_set(files: Mapping[str, Content]) -> None:
    missing, extra = sorted(set(_FILE_LIMITS) - set(files)), sorted(set(files) - set(_FILE_LIMITS))
    if missing:
        raise DigestMismatch(f"the adapter lacks {', '.join(missing)}", "fetch it again")
    if extra:
        raise DigestMismatch(
            f"the adapter has files that no manifest names: {', '.join(shown(name) for name in extra)}",
            f"an adapter is exactly {CARD_NAME} and {WEIGHTS_NAME}; remove everything else",
        )


def _check_files(manifest: AdapterManifest, files: Mapping[str, Content]) -> None:
    _check_file_set(files)
    for entry in manifest.files:
        found = file_entry(entry.path, files[entry.path])
        if found != entry:
            raise DigestMismatch(
                f"{entry.path} of {manifest.name}:{manifest.version} has {found.size} bytes, {found.sha256}; "
                f"the manifest says {entry.size} bytes, {entry.sha256}",
                "the store or the way to it changed the bytes; report it, and pull from another mirror",
            )


def _check_card(manifest: AdapterManifest, card: Content) -> None:
    if AdapterCard.parse(card[: len(card)]) != manifest.card:
        raise IdentityMismatch(
            f"{CARD_NAME} of {manifest.name}:{manifest.version} says something else than the manifest",
            "push the adapter again; the manifest is made from the card",
        )


def _scan(
    weights: Content,
    card: AdapterCard,
    policy: Policy,
    digest: Digest | None,
    waived: Waivers = waivers.NONE,
) -> ScanReport:
    from registry.scanning import scan

    report = scan(weights, card, bases=policy.bases, digest=digest)
    if report.verdict == "block":
        raise ScanRefused(
            "the scanner blocks the file:\n" + report.text().rstrip(),
            "export the adapter again from its training",
        )
    if report.verdict == "review" and not policy.allow_review and waived.uncovered(report):
        open_ = ", ".join(sorted({found.rule for found in waived.uncovered(report)}))
        raise NeedsReview(
            f"the scanner asks for a review ({open_}):\n" + report.text().rstrip(),
            "look at the findings; an approver who accepts them signs `registry waive`",
        )
    return report


def _canonical_weights(weights: bytes) -> bytes:
    return serialise(read_header(weights), weights)
