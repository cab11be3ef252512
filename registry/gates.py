"""The gates of an alias: what a version has to pass before the alias may mean it.

All gates are looked at, also behind one that fails, so that a person sees the whole list at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

from registry import admission, attestation, behaviour, belief, evaluation, waivers
from registry.attestation import ROLE_OF, Kind
from registry.digest import Digest
from registry.errors import (
    BadSignature,
    InvalidDocument,
    NeedsReview,
    NetworkError,
    PolicyRefused,
    RegistryError,
    Unsigned,
)
from registry.manifest import WEIGHTS_NAME, AdapterManifest
from registry.reference import Reference, check_alias
from registry.scanning.rules import RULES
from registry.signing import envelope
from registry.storage import shelf

if TYPE_CHECKING:
    from registry.client import Registry
    from registry.signing.trust import Target, TrustState, VersionView

Outcome = Literal["pass", "fail", "missing"]

_WAIVABLE: Final[tuple[Kind, ...]] = ("scan", "behaviour", "waiver")


@dataclass(frozen=True, kw_only=True, slots=True)
class GateCheck:
    """One gate of an alias.

    Attributes:
        name: what is demanded.
        outcome: "pass", "fail" or "missing" (nobody has said anything yet).
        detail: what was found.
        metric: the rule and the figure, where it is about a metric.
    """

    name: str
    outcome: Outcome
    detail: str
    metric: evaluation.MetricCheck | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GateReport:
    """Every gate between a version and an alias.

    Attributes:
        reference: ``name:version``.
        alias: ``name@alias``.
        manifest: the version.
        before: what the alias means so far.
        beside: ``name@alias`` of each partner that serving may load together with it -> what that means.
        checks: the gates, in the order in which they were looked at.
        refusal: the error of the first gate that does not pass, or None.
    """

    reference: str
    alias: str
    manifest: AdapterManifest
    before: Target | None
    beside: Mapping[str, Digest | None]
    checks: tuple[GateCheck, ...]
    refusal: RegistryError | None


def gates(registry: Registry, reference: Reference, alias: str, *, back: bool = False) -> GateReport:
    """Look at every gate between a version and an alias; nothing is changed.

    Args:
        registry: the registry.
        reference: the version.
        alias: the alias.
        back: it is a rollback: the alias meant this version before, so no-regression rules are not asked.

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
    demands = registry.demands(alias)
    bench = _Bench(
        registry=registry, trust=state.about(target), manifest=manifest, alias=alias, policy=demands
    )
    bench.look("named", lambda: _named(manifest, reference))
    bench.look("not revoked", lambda: admission.check_revocation(manifest, state))
    bench.look("not yanked", lambda: _not_yanked(state, manifest))
    _look_at_statements(bench)
    before = state.aliases().get(path)
    _look_at_metrics(bench, before, back=back)
    beside = _partners(state, registry.policy.scan.partners(path))
    for partner, found in beside.items():
        bench.look(f"together with {partner}", partial(_probed_together, bench, partner, found))
    bench.look("licence policy", lambda: admission.check_licences(manifest.card, bench.policy))
    bench.look("files and scan", lambda: _look_at_files(bench))
    return GateReport(
        reference=f"{manifest.name}:{manifest.version}",
        alias=path,
        manifest=manifest,
        before=before,
        beside=beside,
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
    policy: admission.Policy
    checks: list[GateCheck] = field(default_factory=list)
    refusal: RegistryError | None = None
    statements: dict[Kind, list[attestation.Statement]] = field(default_factory=dict)
    evaluations: Sequence[bytes] = ()
    waivers: waivers.Waivers = waivers.NONE

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

    def note(
        self,
        name: str,
        outcome: Outcome,
        detail: str,
        error: RegistryError | None = None,
        metric: evaluation.MetricCheck | None = None,
    ) -> None:
        """Note a result; the first error is what a refused promotion raises."""
        self.checks.append(GateCheck(name=name, outcome=outcome, detail=detail, metric=metric))
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
    bench.evaluations = by_kind.get("evaluation", [])
    wanted: Sequence[Kind] = bench.policy.required
    for kind in (*wanted, *(kind for kind in by_kind if kind not in wanted)):
        waiving = by_kind.get("waiver", []) if kind in _WAIVABLE and kind != "waiver" else []
        bench.look(kind, partial(_statements, bench, kind, by_kind.get(kind, []), waiving))


def _statements(bench: _Bench, kind: Kind, found: Sequence[bytes], waiving: Sequence[bytes]) -> str:
    if not found:
        mend = f"`registry attest` or `registry approve` where the {ROLE_OF[kind]} key is"
        lacking = "" if kind != "training" else f"; {admission.no_provenance()}"
        raise Unsigned(f"no {kind} statement{lacking}", mend)
    # What is there beyond what is demanded must be genuine and say yes; its keys are not counted.
    demand = replace(bench.policy, required=tuple(one for one in bench.policy.required if one == kind))
    documents = admission.check_statements([*found, *waiving], bench.manifest, bench.trust, demand)
    read = [statement for statement in documents.statements if statement.kind == kind]
    bench.statements[kind] = read
    if kind in _WAIVABLE:
        bench.waivers = documents.waivers
    return _told(kind, read, documents)


def _told(kind: Kind, read: Sequence[attestation.Statement], documents: admission.AdmittedDocuments) -> str:
    """What a gate found in statements that it accepts."""
    if kind == "approval":
        return ", ".join(str(statement.predicate.get("by")) for statement in read)
    if kind == "waiver":
        return _in_force(documents.waivers) or "none of them counts now"
    signed = f"signed by the {ROLE_OF[kind]}"
    if kind == "training":
        weights = documents.manifest.file(WEIGHTS_NAME).sha256
        rule = admission.PROVENANCE_RULE
        return f"{signed} over {documents.digest}, which names the weights {weights}: {rule} holds"
    if any(statement.outcome == "review" for statement in read):
        return f"{signed}; asks for a review, {_in_force(documents.waivers) or 'which the policy allows'}"
    return signed


def _in_force(found: waivers.Waivers) -> str:
    """The waivers that count, in words."""
    if found.until is None:
        return ""
    rules = ", ".join(sorted(frozenset[str]().union(*(one.rules for one in found.granted))))
    return f"waived until {found.until:%Y-%m-%d %H:%M} UTC: {rules}"


def _partners(state: TrustState, aliases: Sequence[str]) -> dict[str, Digest | None]:
    known = state.aliases()
    return {alias: known[alias].digest if alias in known else None for alias in aliases}


def _probed_together(bench: _Bench, partner: str, digest: Digest | None) -> str:
    """The pair with what a partner means now was probed, and the probe found nothing that is not waived."""
    if digest is None:
        return f"{partner} means nothing yet; it is promoted only when the pair was probed"
    other = shelf.read_manifest(bench.registry.store, digest)
    weights, name = other.file(WEIGHTS_NAME).sha256, f"{other.name}:{other.version}"
    said = [behaviour.parse(found.predicate).pairs for found in bench.statements.get("behaviour", [])]
    verdicts = [pairs[weights] for pairs in said if weights in pairs]
    if not verdicts:
        raise Unsigned(
            f"no behaviour statement has probed it together with {name}, which {partner} means",
            f"`trainer probe` the two together, and `registry attest --kind behaviour`; weights {weights}",
        )
    verdict = behaviour.worst(*verdicts)
    if verdict == "fail":
        rule = behaviour.FAILED_RULE
        raise PolicyRefused(
            f"{rule}: {RULES[rule].title}: together with {name}, which {partner} means",
            "take the pair out of the policy so that they are never loaded together, or promote another one",
        )
    rule = behaviour.PAIR_RULE
    if verdict == "pass":
        return f"probed with {name}"
    if bench.policy.allow_review or bench.waivers.covers(rule, str(weights)):
        return f"probed with {name}; it asks for a review, {_in_force(bench.waivers) or 'which is allowed'}"
    raise NeedsReview(
        f"{rule}: {RULES[rule].title}: probed with {name}, which {partner} means",
        f"look at the probe; an approver who accepts it signs `registry waive ... {rule} --where {weights}`",
    )


def _look_at_metrics(bench: _Bench, before: Target | None, *, back: bool) -> None:
    """One gate for each rule on a metric; a figure that the signed evaluations lack is missing."""
    gate = bench.registry.policy.gate(bench.alias)
    baseline = None
    if any(rule.max_regression is not None for rule in gate.metrics.values()):
        try:
            baseline = _baseline(bench, before, back=back)
        except NetworkError:
            raise
        except RegistryError as error:
            bench.note("what the alias means", "fail", error.message, error)
    for check in evaluation.check_metrics(gate, _evaluations(bench), baseline):
        refusal = None
        if check.outcome != "pass":
            kind = Unsigned if check.outcome == "missing" else PolicyRefused
            refusal = kind(f"{check.name}: {check.detail}", check.mend)
        name = check.name if check.kind == "range" else f"{check.name}, no regression"
        bench.note(name, check.outcome, check.detail, refusal, check)


def _evaluations(bench: _Bench) -> list[evaluation.Evaluation]:
    """What genuine evaluations say of this adapter, also one that refuses it: people see by how much."""
    believed, _ = belief.believe(bench.manifest.digest, bench.evaluations, bench.trust)
    read = [evaluation.parse(found.statement.predicate) for found in believed]
    return [found for found in read if attestation.judged_another(found, bench.manifest) is None]


def _baseline(bench: _Bench, before: Target | None, *, back: bool) -> evaluation.Baseline:
    """What an alias means now, that a version must not be worse than."""
    alias, mine = f"{bench.manifest.name}@{bench.alias}", bench.manifest.file(WEIGHTS_NAME).sha256
    if before is None:
        return evaluation.Baseline(weights=None, words=f"the first version: {alias} means nothing yet")
    now = shelf.read_manifest(bench.registry.store, before.digest)
    weights, name = now.file(WEIGHTS_NAME).sha256, f"{now.name}:{now.version}"
    if weights == mine:
        return evaluation.Baseline(weights=None, words=f"{alias} means these very weights")
    if back:
        return evaluation.Baseline(weights=None, words=f"a rollback: {alias} meant it before")
    if any(bench.trust.is_revoked(digest) is not None for digest in (before.digest, weights)):
        return evaluation.Baseline(weights=None, words=f"{name}, which {alias} means, is revoked")
    return evaluation.Baseline(weights=weights, words=f"{name}, which {alias} means", reference=alias)


def _look_at_files(bench: _Bench) -> str:
    """Every byte in the store, and the scanner of today."""
    from registry.storage.catalog import check_model
    from registry.transfer import StoredContent

    manifest = bench.manifest
    documents = admission.AdmittedDocuments(
        manifest=manifest, digest=manifest.digest, statements=(), waivers=bench.waivers
    )
    files = {entry.path: StoredContent(bench.registry.store, entry) for entry in manifest.files}
    report = admission.check_files(documents, files, bench.policy)
    check_model(bench.registry.store, manifest)
    how = "" if report.verdict == "pass" else f", {_in_force(bench.waivers) or 'which the policy allows'}"
    return f"scan: {report.verdict}, rules {report.rules_version}{how}"
