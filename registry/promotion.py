"""Promotion: the gates of an alias, and the aliases themselves: moved, rolled back, taken away, revoked.

All gates are looked at, also behind one that fails, so that a person sees the whole list at once. An alias
is moved only from the version that was seen when the gates were looked at: of two promotions at the same
moment one wins, and the other is told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

from registry import admission, attestation, policy
from registry.attestation import ROLE_OF, Kind
from registry.errors import (
    BadSignature,
    InvalidDocument,
    NetworkError,
    NotFound,
    PolicyRefused,
    RegistryError,
    Unsigned,
    UsageError,
)
from registry.manifest import AdapterManifest
from registry.reconcile import index_version
from registry.reference import Reference, check_alias, check_name
from registry.results import Listed, Promotion
from registry.signing import envelope
from registry.storage import shelf
from registry.views import listed

if TYPE_CHECKING:
    from registry.client import Registry
    from registry.signing.trust import Target, TrustState, VersionView

Outcome = Literal["pass", "fail", "missing"]

_HISTORY: Final = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class GateCheck:
    """One gate of an alias.

    Attributes:
        name: what is demanded.
        outcome: "pass", "fail" or "missing" (nobody has said anything yet).
        detail: what was found.
    """

    name: str
    outcome: Outcome
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GateReport:
    """Every gate between a version and an alias.

    Attributes:
        reference: ``name:version``.
        alias: ``name@alias``.
        manifest: the version.
        before: what the alias means so far.
        checks: the gates, in the order in which they were looked at.
        refusal: the error of the first gate that does not pass, or None.
    """

    reference: str
    alias: str
    manifest: AdapterManifest
    before: Target | None
    checks: tuple[GateCheck, ...]
    refusal: RegistryError | None


def gates(registry: Registry, reference: Reference, alias: str) -> GateReport:
    """Look at every gate between a version and an alias; nothing is changed.

    Raises:
        NotFound: there is no such version.
        DigestMismatch, InvalidDocument: the store has no genuine manifest of it.
        NetworkError: the store does not answer.
    """
    check_alias(alias)
    registry.catalog.require()
    state = registry.authority.signing_state()
    target = state.resolve(reference)
    manifest = shelf.read_manifest(registry.store, target.digest)
    path = f"{manifest.name}@{alias}"
    bench = _Bench(registry=registry, trust=state.about(target), manifest=manifest, alias=alias)
    bench.look("named", lambda: _named(manifest, reference))
    bench.look("not revoked", lambda: admission.check_revocation(manifest, state))
    bench.look("not yanked", lambda: _not_yanked(state, manifest))
    _look_at_statements(bench)
    _look_at_metrics(bench)
    bench.look("licence policy", lambda: admission.check_licences(manifest.card, bench.policy))
    bench.look("files and scan", lambda: _look_at_files(bench))
    return GateReport(
        reference=f"{manifest.name}:{manifest.version}",
        alias=path,
        manifest=manifest,
        before=state.aliases().get(path),
        checks=tuple(bench.checks),
        refusal=bench.refusal,
    )


@dataclass(kw_only=True)
class _Bench:
    """What the gates of one version share, and their results so far."""

    registry: Registry
    trust: VersionView
    manifest: AdapterManifest
    alias: str
    checks: list[GateCheck] = field(default_factory=list)
    refusal: RegistryError | None = None
    statements: dict[Kind, list[attestation.Statement]] = field(default_factory=dict)

    @property
    def policy(self) -> admission.Policy:
        return self.registry.policy.admission(self.alias)

    def look(self, name: str, step: Callable[[], object]) -> None:
        """Take a step and note how it went; a network that fails ends the looking."""
        try:
            detail = step()
        except NetworkError:
            raise
        except RegistryError as error:
            self.note(name, "missing" if isinstance(error, Unsigned) else "fail", error.message, error)
        else:
            self.note(name, "pass", detail if isinstance(detail, str) else "")

    def note(self, name: str, outcome: Outcome, detail: str, error: RegistryError | None = None) -> None:
        """Note a result; the first error is what a refused promotion raises."""
        self.checks.append(GateCheck(name=name, outcome=outcome, detail=detail))
        self.refusal = self.refusal or error


def _named(manifest: AdapterManifest, reference: Reference) -> str:
    admission.check_identity(manifest, reference)
    return f"{manifest.name}:{manifest.version}, {manifest.digest}"


def _not_yanked(state: TrustState, manifest: AdapterManifest) -> None:
    reason = state.is_yanked(manifest.digest)
    if reason is not None:
        raise PolicyRefused(f"it was yanked: {reason}", "promote another version, or take the yank back")


def _look_at_statements(bench: _Bench) -> None:
    """One gate for each kind of statement that is demanded or there."""
    by_kind: dict[Kind, list[bytes]] = {}
    strange: RegistryError | None = None
    for data in shelf.read_statements(bench.registry.store, bench.manifest.digest).values():
        try:
            kind = attestation.parse_statement(envelope.unverified_payload(data)).kind
        except (InvalidDocument, BadSignature) as error:
            strange = BadSignature(error.message, error.mend)
            continue
        by_kind.setdefault(kind, []).append(data)
    if strange is not None:
        bench.note("statements", "fail", strange.message, strange)
    wanted: Sequence[Kind] = bench.policy.required
    for kind in (*wanted, *(kind for kind in by_kind if kind not in wanted)):
        bench.look(kind, partial(_statements, bench, kind, by_kind.get(kind, [])))


def _statements(bench: _Bench, kind: Kind, found: Sequence[bytes]) -> str:
    if not found:
        mend = f"`registry attest` or `registry approve` where the {ROLE_OF[kind]} key is"
        raise Unsigned(f"no {kind} statement", mend)
    demand = replace(bench.policy, required=(kind,))
    read = admission.check_statements(found, bench.manifest, bench.trust, demand)
    bench.statements[kind] = read
    if kind == "approval":
        return ", ".join(str(statement.predicate.get("by")) for statement in read)
    return f"signed by the {ROLE_OF[kind]}"


def _look_at_metrics(bench: _Bench) -> None:
    """One gate for each threshold; a figure that the signed evaluation lacks is missing."""
    evaluations = bench.statements.get("evaluation", [])
    predicate: Mapping[str, Any] = evaluations[-1].predicate if evaluations else {}
    for check in policy.check_metrics(bench.registry.policy.gate(bench.alias), predicate):
        refusal = None
        if check.outcome != "pass":
            kind = Unsigned if check.outcome == "missing" else PolicyRefused
            refusal = kind(
                f"{check.name} is {check.found}, wanted is {check.wanted}",
                "evaluate and push a better version, or change the threshold in the policy file",
            )
        bench.note(check.name, check.outcome, f"{check.found} ({check.wanted})", refusal)


def _look_at_files(bench: _Bench) -> str:
    """Every byte in the store, and the scanner of today."""
    from registry.storage.catalog import check_model
    from registry.transfer import StoredContent

    manifest = bench.manifest
    documents = admission.AdmittedDocuments(manifest=manifest, digest=manifest.digest, statements=())
    files = {entry.path: StoredContent(bench.registry.store, entry) for entry in manifest.files}
    report = admission.check_files(documents, files, bench.policy)
    check_model(bench.registry.store, manifest)
    return f"scan: {report.verdict}, rules {report.rules_version}"


def promote(registry: Registry, report: GateReport, action: str = "promote") -> Promotion:
    """Sign that an alias means the version whose gates were looked at; MLflow is told afterwards.

    Raises:
        RegistryError: the first gate that did not pass.
        Conflict: the alias was moved since the gates were looked at.
    """
    if report.refusal is not None:
        raise report.refusal
    manifest, before = report.manifest, report.before
    reused = before is not None and before.digest == manifest.digest
    if not reused:
        registry.require_keys("approver")
        expected = None if before is None else before.digest
        details = {"alias": report.alias, "digest": str(manifest.digest), "before": expected}
        with registry.recorded(action, report.reference, details):
            registry.authority.set_alias(
                report.alias,
                manifest.digest,
                len(manifest.canonical_bytes()),
                {"version": manifest.version, "history": _history(before, manifest.version)},
                expected,
            )
    registry.catalog.point(manifest.name, report.alias.partition("@")[2], manifest.digest)
    return Promotion(
        reference=report.alias,
        version=manifest.version,
        digest=manifest.digest,
        previous=None if before is None else before.custom.get("version"),
        reused=reused,
    )


def _history(before: Target | None, version: int) -> list[int]:
    """The versions that an alias meant before, newest first, each once."""
    if before is None:
        return []
    older = [before.custom.get("version"), *before.custom.get("history", [])]
    kept = [number for number in dict.fromkeys(older) if isinstance(number, int) and number != version]
    return kept[:_HISTORY]


def rollback(registry: Registry, name: str, alias: str, to: int | None = None) -> Promotion:
    """Point an alias back to a version that it meant before; that version has to pass today's gates.

    Args:
        registry: the registry.
        name: the adapter.
        alias: its alias.
        to: the version; None is the one before.

    Raises:
        NotFound: there is no such alias, or it never meant that version.
        RegistryError: the first gate that does not pass.
    """
    path = f"{check_name(name)}@{check_alias(alias)}"
    target = registry.authority.signing_state().aliases().get(path)
    if target is None:
        raise NotFound(f"there is no {path}", "`registry list` shows the aliases")
    history = [int(number) for number in target.custom.get("history", [])]
    if not history or (to is not None and to not in history):
        known = ", ".join(map(str, history)) or "none"
        raise NotFound(
            f"{path} has not meant {'another version' if to is None else f'version {to}'} before",
            f"versions that it meant: {known}; `registry promote` moves it to any other",
        )
    report = gates(registry, Reference(name=name, version=history[0] if to is None else to), alias)
    return promote(registry, report, "rollback")


def demote(registry: Registry, name: str, alias: str) -> Promotion:
    """Take an alias away; what it meant stays and can still be pulled by version.

    Raises:
        NotFound: there is no such alias.
        Conflict: it was moved at the same moment.
    """
    path = f"{check_name(name)}@{check_alias(alias)}"
    target = registry.authority.signing_state().aliases().get(path)
    if target is None:
        raise NotFound(f"there is no {path}", "`registry list` shows the aliases")
    version = target.custom.get("version")
    registry.require_keys("approver")
    with registry.recorded("demote", f"{name}:{version}", {"alias": path, "digest": str(target.digest)}):
        registry.authority.remove_alias(path, target.digest)
    registry.catalog.point(name, alias, None)
    return Promotion(reference=path, version=None, digest=target.digest, previous=version, reused=False)


def revoke(registry: Registry, reference: Reference, reason: str) -> Listed:
    """Sign that a version must not be loaded any more, not even from a warm cache.

    Raises:
        UsageError: no reason was given.
        RegistryError: see the error tree.
    """
    if not reason.strip():
        raise UsageError("a revocation needs a reason", mend="say why; people will read it")
    return _withdraw(registry, reference, "revoke", reason)


def yank(registry: Registry, reference: Reference, reason: str | None) -> Listed:
    """Hide a version from lists and promotions (or show it again: None); it can still be pulled.

    Raises:
        UsageError: the reason is empty.
        RegistryError: see the error tree.
    """
    if reason is not None and not reason.strip():
        raise UsageError("a yank needs a reason", mend="say why; people will read it")
    return _withdraw(registry, reference, "yank" if reason is not None else "unyank", reason)


def _withdraw(registry: Registry, reference: Reference, action: str, reason: str | None) -> Listed:
    target = registry.authority.signing_state().resolve(reference)
    manifest = shelf.read_manifest(registry.store, target.digest)
    subject = f"{manifest.name}:{manifest.version}"
    registry.require_keys("approver")
    with registry.recorded(action, subject, {"digest": str(target.digest), "reason": reason}):
        if reason is None:
            state = registry.authority.unyank(target.digest)
        elif action == "yank":
            state = registry.authority.yank(target.digest, reason)
        else:
            state = registry.authority.revoke(target.digest, reason)
    index_version(registry, state, target.digest)
    return listed(state, manifest.name, manifest.version, target.digest)
