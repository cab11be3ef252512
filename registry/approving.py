"""Approvals: which of them count, envelopes that were signed on another machine, and rejections.

An approval is a statement about one manifest by a key of the approver's role, wherever it was made: by
`registry approve` on a machine that reaches the store, or without it, as an envelope that somebody carries
there. A rejection is one of two things: a statement by an approver's key that says no, which is never
outvoted, or a line of the audit log, which only keeps people from being asked again.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from registry import attestation
from registry.admission import check_identity
from registry.attestation import ROLE_OF
from registry.belief import believe_one
from registry.digest import Digest
from registry.errors import BadSignature, InvalidDocument, PolicyRefused, Unsigned, UsageError, shown
from registry.reference import Reference
from registry.signing import envelope
from registry.storage import shelf

if TYPE_CHECKING:
    from registry.client import Registry
    from registry.manifest import AdapterManifest
    from registry.results import Attested
    from registry.signing.signers import KeyRing
    from registry.storage.ledger import LedgerEntry

REJECT: Final = "reject"
REOPEN: Final = "reopen"
MAX_WORDS: Final = 2000
"""Characters of a reason or a name in an approval that is carried here, and in the audit log."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Approved:
    """One approval that an approver's key has signed.

    Attributes:
        by: who approves, in their own words; the key is what counts.
        reason: why.
        at: when, in their own words.
        automatic: no person looked.
        keys: what the keys that signed are, see `envelope.verified`.
    """

    by: str
    reason: str
    at: str
    automatic: bool
    keys: frozenset[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Approvals:
    """What approvers have said about a version.

    Attributes:
        reference: ``name:version``.
        digest: of the manifest, which is what they sign.
        needed: how many different keys must have signed.
        found: the approvals that are believed.
        problems: one sentence for each that is not.
    """

    reference: str
    digest: Digest
    needed: int
    found: tuple[Approved, ...]
    problems: tuple[str, ...]

    @property
    def people(self) -> tuple[Approved, ...]:
        """Those in which a person says that they looked."""
        return tuple(one for one in self.found if not one.automatic)

    @property
    def counted(self) -> int:
        """How many different keys have signed for people."""
        return len(frozenset[str]().union(*(one.keys for one in self.people)))

    @property
    def enough(self) -> bool:
        """Whether that are as many as are needed."""
        return self.counted >= self.needed


def approvals(registry: Registry, reference: Reference, alias: str) -> Approvals:
    """Count what approvers have said about a version, for an alias; nothing is changed.

    Raises:
        NotFound: there is no such version.
        PolicyRefused: an approver has signed a rejection of it, which nobody outvotes.
        RegistryError: the store cannot be read.
    """
    state = registry.authority.state()
    target = state.resolve(reference)
    manifest = shelf.read_manifest(registry.store, target.digest)
    check_identity(manifest, reference)
    trust = state.about(target)
    found, problems = [], []
    for data in shelf.read_statements(registry.store, target.digest).values():
        try:
            if attestation.parse_statement(envelope.unverified_payload(data)).kind == "approval":
                found.append(_believed(data, manifest, trust))
        except (BadSignature, Unsigned, InvalidDocument) as error:
            problems.append(error.message)
    return Approvals(
        reference=f"{manifest.name}:{manifest.version}",
        digest=target.digest,
        needed=max(registry.policy.gate(alias).approvals, state.threshold(ROLE_OF["approval"])),
        found=tuple(found),
        problems=tuple(problems),
    )


def accept(registry: Registry, reference: Reference, data: bytes) -> Attested:
    """Keep an approval that was signed on another machine.

    Args:
        registry: the registry.
        reference: the version that it should be about.
        data: the envelope as `sign_apart` made it; hostile bytes. Signatures by others are left out.

    Raises:
        Unsigned: it carries no signature.
        BadSignature: it is no envelope, no approver's key signed it, or it is about another version.
        PolicyRefused: it is no approval by a person.
        Conflict: the version has as many statements as anybody reads.
    """
    from registry.attesting import keep_recorded

    state = registry.authority.state()
    target = state.resolve(reference)
    manifest = shelf.read_manifest(registry.store, target.digest)
    trust = state.about(target)
    found = _believed(data, manifest, trust)
    if found.automatic:
        raise PolicyRefused(
            f"this approval of {manifest.name}:{manifest.version} is automatic: no person looked",
            "a person signs it with `registry approve`",
        )
    own = envelope.only(data, trust.keys(ROLE_OF["approval"]))
    return keep_recorded(registry, manifest, "approval", own, found.by)


def sign_apart(keys: KeyRing, reference: Reference, digest: Digest, by: str, reason: str) -> bytes:
    """Sign an approval without any store, for `accept` on a machine that has one.

    Nothing is verified here: whoever signs has looked at the version elsewhere.

    Args:
        keys: hold the approver's key.
        reference: ``name:version``.
        digest: of the manifest.
        by: who approves.
        reason: why; people will read it.

    Raises:
        UsageError: the reference names no version, or a word is missing.
        NotFound: the approver's key is not on this machine.
    """
    if reference.version is None:
        raise UsageError(f"{reference} names no version", "an approval is about name:version and its digest")
    check_words(by, reason)
    at = datetime.now(UTC).isoformat(timespec="seconds")
    predicate = attestation.approval_predicate(by=by, reason=reason, at=at)
    payload = attestation.statement("approval", str(reference), digest, predicate)
    return envelope.sign(payload, [keys.signer(ROLE_OF["approval"])])


def reject(registry: Registry, reference: Reference, by: str, reason: str) -> Attested:
    """Sign that an approver refuses a version, for good: such a statement is never outvoted.

    Raises:
        UsageError: a name or a reason is missing.
        RegistryError: see the error tree.
    """
    from registry.attesting import sign_recorded

    check_words(by, reason)
    target = registry.authority.state().resolve(reference)
    manifest = shelf.read_manifest(registry.store, target.digest)
    at = datetime.now(UTC).isoformat(timespec="seconds")
    predicate = attestation.approval_predicate(by=by, reason=reason, at=at, verdict="fail")
    return sign_recorded(registry, manifest, "approval", predicate, by)


def note_rejection(
    registry: Registry, reference: Reference, digest: Digest, by: str, reason: str
) -> LedgerEntry:
    """Write into the audit log that somebody rejected a version, without a key; once is enough.

    Raises:
        UsageError: a name or a reason is missing.
        NetworkError: the database does not answer.
    """
    check_words(by, reason)
    found = rejection(registry, reference, digest)
    if found is None:
        details = {"digest": str(digest), "by": by, "reason": reason, "signed": False}
        registry.record(REJECT, str(reference), details)
        registry.authority.publish_anchor()
        found = rejection(registry, reference, digest)
    assert found is not None, "it was just written"
    return found


def reopen(registry: Registry, reference: Reference, digest: Digest) -> None:
    """Write into the audit log that people are asked again about a version that was rejected."""
    if rejection(registry, reference, digest) is not None:
        registry.record(REOPEN, str(reference), {"digest": str(digest)})
        registry.authority.publish_anchor()


def rejection(registry: Registry, reference: Reference, digest: Digest) -> LedgerEntry | None:
    """Return the line of the audit log that rejects a version, or None; a line that reopens it ends that."""
    last = None
    for entry in registry.ledger.entries(subject=str(reference)):
        if entry.action in (REJECT, REOPEN) and _about(entry).get("digest") == str(digest):
            last = entry
    return last if last is not None and last.action == REJECT else None


def words_of(entry: LedgerEntry) -> tuple[str, str]:
    """Return who rejected a version and why, as its line of the audit log says."""
    details = _about(entry)
    return shown(details.get("by", entry.actor)), shown(details.get("reason", ""), MAX_WORDS)


def check_words(by: str, reason: str) -> None:
    """Make sure that somebody says who they are and why.

    Raises:
        UsageError: a word is missing or too long.
    """
    if not by.strip() or not reason.strip():
        raise UsageError("an approval or a rejection needs a name and a reason", "say who decides and why")
    if max(len(by), len(reason)) > MAX_WORDS:
        raise UsageError(f"a name or a reason is longer than {MAX_WORDS} characters", "say it in fewer words")


def _about(entry: LedgerEntry) -> dict[str, Any]:
    import json

    found = json.loads(entry.details)
    return found if isinstance(found, dict) else {}


def _believed(data: bytes, manifest: AdapterManifest, trust: Any) -> Approved:
    """Return an approval of a manifest, after its key, its kind and its subject were looked at.

    Raises:
        PolicyRefused: it says no.
        Unsigned, BadSignature, InvalidDocument: as `believe_one`, or it is about another name.
    """
    name = f"{manifest.name}:{manifest.version}"
    found = believe_one(manifest.digest, data, trust).statement
    if found.kind != "approval":
        raise BadSignature(f"this is a {found.kind} statement, no approval", "`registry approve` signs one")
    if found.subject_name != name:
        raise BadSignature(f"this approval is about {shown(found.subject_name)}, not about {name}")
    by, reason = (shown(found.predicate.get(key, ""), MAX_WORDS) for key in ("by", "reason"))
    if found.outcome != "pass":
        raise PolicyRefused(
            f"{name} was rejected by {by}: {reason}",
            "a signed rejection is never outvoted: train or choose another version",
        )
    _, keys = envelope.verified(data, trust.keys(ROLE_OF["approval"]))
    at = shown(found.predicate.get("at", ""), 40)
    return Approved(by=by, reason=reason, at=at, automatic=not found.by_a_person, keys=keys)
