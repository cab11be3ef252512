"""Attesting: statements are signed about versions that exist: by their kind, as an approval, as a waiver.

Each is a line of the audit log. A statement by the same key that says the same is found, not doubled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from registry import attestation
from registry.attestation import ROLE_OF, Kind
from registry.errors import BadSignature, Conflict, UsageError, shown
from registry.manifest import WEIGHTS_NAME, AdapterManifest
from registry.reconcile import index_version
from registry.reference import Reference
from registry.results import Attested
from registry.signing import envelope
from registry.storage import shelf
from registry.waivers import waiver_predicate

if TYPE_CHECKING:
    from registry.client import Registry


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
    return sign_recorded(registry, manifest, kind, predicate, registry.place.actor)


def waive(
    registry: Registry,
    reference: Reference,
    rules: Sequence[str],
    *,
    by: str,
    reason: str,
    days: int,
    where: str | None = None,
) -> Attested:
    """Sign that findings of some rules in a version may pass for a while.

    Args:
        registry: the registry.
        reference: the version.
        rules: ids of rules that ask for a review; one that blocks cannot be waived.
        by: who decides.
        reason: why; people will read it.
        days: how long it counts; the policy sets the limit.
        where: only findings at this place, as the report of the scan names it.

    Raises:
        UsageError: a rule cannot be waived, or another argument is wrong.
        RegistryError: see the error tree.
    """
    target = registry.authority.state().resolve(reference)
    manifest = shelf.read_manifest(registry.store, target.digest)
    predicate = waiver_predicate(
        manifest.file(WEIGHTS_NAME).sha256,
        rules,
        by=by,
        reason=reason,
        at=datetime.now(UTC),
        days=days,
        max_days=registry.policy.scan.waiver_days,
        where=where,
    )
    return sign_recorded(registry, manifest, "waiver", predicate, by)


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
    policy = registry.demands(reference.alias)
    needed = tuple(kind for kind in policy.required if kind != "approval")
    documents = check_in_store(registry, state, target, reference, replace(policy, required=needed))
    at = datetime.now(UTC).isoformat(timespec="seconds")
    predicate = attestation.approval_predicate(by=by, reason=reason, at=at, automatic=automatic)
    return sign_recorded(registry, documents.manifest, "approval", predicate, by)


def sign_recorded(
    registry: Registry, manifest: AdapterManifest, kind: Kind, predicate: Mapping[str, Any], actor: str
) -> Attested:
    """Sign a statement about a published version, with a line in the audit log; see `sign`."""
    there = shelf.read_statements(registry.store, manifest.digest)
    signed = sign(registry, manifest, kind, predicate, there)
    _record(registry, manifest, signed, actor)
    return signed


def keep_recorded(
    registry: Registry, manifest: AdapterManifest, kind: Kind, data: bytes, actor: str
) -> Attested:
    """Keep an envelope that was signed elsewhere and verified here, with a line in the audit log.

    Raises:
        Conflict: there are as many statements as anybody reads.
    """
    there = shelf.read_statements(registry.store, manifest.digest)
    if data not in there.values():
        _check_room(f"{manifest.name}:{manifest.version}", there)
    key, new = shelf.put_statement(registry.store, manifest.digest, kind, data)
    kept = Attested(
        reference=f"{manifest.name}:{manifest.version}",
        kind=kind,
        digest=manifest.digest,
        statement=key,
        reused=not new,
        predicate=attestation.parse_statement(envelope.unverified_payload(data)).predicate,
    )
    _record(registry, manifest, kept, actor)
    return kept


def _record(registry: Registry, manifest: AdapterManifest, signed: Attested, actor: str) -> None:
    """Write a statement that is new into the audit log, and into the index for people."""
    if signed.reused:
        return
    digest = signed.statement.rpartition(".json")[0].rpartition(".")[2]
    details = {"kind": signed.kind, "digest": str(manifest.digest), "statement": f"sha256:{digest}"}
    action = {"approval": "approve", "waiver": "waive"}.get(signed.kind, "attest")
    if signed.kind == "approval" and signed.predicate.get("verdict") != "pass":
        action = "reject"
    registry.record(action, signed.reference, details, actor=actor)
    state = registry.authority.publish_anchor()
    index_version(registry, state, manifest.digest)


def sign(
    registry: Registry,
    manifest: AdapterManifest,
    kind: Kind,
    predicate: Mapping[str, Any],
    there: Mapping[str, bytes],
) -> Attested:
    """Sign a statement, or find among those there the one by the same key that says the same.

    Args:
        registry: the registry.
        manifest: what it is about.
        kind: what is attested; its role's key signs.
        predicate: what the statement says.
        there: the envelopes about the manifest that the store holds, by their keys.

    Raises:
        UsageError: the predicate is not valid.
        Conflict: there are as many statements as anybody reads.
        NotFound: the key is not on this machine.
    """
    subject = f"{manifest.name}:{manifest.version}"
    payload = attestation.statement(kind, subject, manifest.digest, predicate)
    signed = Attested(
        reference=subject, kind=kind, digest=manifest.digest, statement="", reused=True, predicate=predicate
    )
    signer = registry.keys.signer(ROLE_OF[kind])
    public = envelope.PublicKey.of(signer.public_key)
    said = _without_time(predicate)
    for key, data in there.items():
        try:
            found = attestation.parse_statement(envelope.verify(data, [public], 1))
        except BadSignature:
            continue
        if found.kind == kind and _without_time(found.predicate) == said:
            return replace(signed, statement=key, predicate=found.predicate)
    _check_room(subject, there)
    data = envelope.sign(payload, [signer])
    key, new = shelf.put_statement(registry.store, manifest.digest, kind, data)
    return replace(signed, statement=key, reused=not new)


def _check_room(subject: str, there: Mapping[str, bytes]) -> None:
    if len(there) >= shelf.MAX_STATEMENTS:
        raise Conflict(
            f"{subject} has {len(there)} statements; with one more nobody could pull it",
            "push it as a new version, which begins without any",
        )


def _without_time(predicate: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in predicate.items() if key != "at"}
