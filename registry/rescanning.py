"""Scanning again: what is released is judged by the rules of today.

A rule that is new, or judges otherwise, says nothing about what was scanned before it. So every version that
an alias means is read from the store and scanned again. What passes gets a fresh scan statement, so that
pulls need not scan it themselves; what does not pass is reported and left as it is. Nothing is revoked here:
a false alarm must not take production down, and who decides is a person. Whoever loads an adapter scans it by
today's rules in any case, so that a report is news for people and no gate.

A store or an index that does not answer for a moment costs one row, not the others: what was found is told,
and the next run goes on with what was not finished.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

from registry import admission, attestation
from registry.attesting import sign_recorded
from registry.belief import believe
from registry.content import VerifiedContent
from registry.digest import Digest
from registry.errors import (
    NeedsReview,
    NetworkError,
    NotFound,
    RegistryError,
    ScanRefused,
    UsageError,
)
from registry.manifest import WEIGHTS_NAME, AdapterManifest
from registry.reference import Reference, check_name
from registry.results import Listed
from registry.scanning.rules import RULES_VERSION
from registry.storage import shelf
from registry.views import listing

if TYPE_CHECKING:
    from registry.client import Registry
    from registry.scanning.report import ScanReport
    from registry.signing.trust import TrustState
    from registry.transfer import Progress

Outcome = Literal["pass", "current", "waived", "review", "block", "unfinished"]

_PATIENCE: Final = 3
"""After so many versions in a row for which the network failed, the others are not tried."""

_MENDS: Final[Mapping[Outcome, str]] = {
    "block": "look at `registry scan`, and take it out of use with `registry demote` or `registry revoke`",
    "unfinished": "look whether the store is whole with `registry doctor --deep`, and run it again",
    "review": "look at the findings; an approver who accepts them signs `registry waive`",
}
_ERRORS: Final[Mapping[Outcome, type[RegistryError]]] = {
    "block": ScanRefused,
    "unfinished": RegistryError,
    "review": NeedsReview,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rescanned:
    """What the rules of today say about one released version.

    Attributes:
        reference: ``name:version``.
        digest: digest of its manifest.
        aliases: the aliases that mean it.
        outcome: "pass" got a fresh statement; "current" had one by today's rules, and was not read again;
            "waived" has findings that approvers let pass; "unfinished" could not be scanned.
        rules: ids of the rules that found something that is not waived.
        detail: what a person should know, in a line.
    """

    reference: str
    digest: Digest
    aliases: tuple[str, ...]
    outcome: Outcome
    rules: tuple[str, ...] = ()
    detail: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rescan:
    """The answer of a rescan.

    Attributes:
        rows: one for each version that an alias means, by name and number.
        rules_version: the version of the rules.
    """

    rows: tuple[Rescanned, ...]
    rules_version: str = RULES_VERSION

    @property
    def refusal(self) -> RegistryError | None:
        """The error of the gravest outcome: blocked, not finished, needs a review; None if all is well."""
        for outcome, error in _ERRORS.items():
            found = [row.reference for row in self.rows if row.outcome == outcome]
            if found:
                return error(f"{outcome} by rules {self.rules_version}: {', '.join(found)}", _MENDS[outcome])
        return None

    def table(self) -> list[dict[str, str]]:
        """Return the answer as the rows of a table for people."""
        return [
            {
                "reference": row.reference,
                "aliases": ", ".join(row.aliases),
                "result": row.outcome,
                "rules": " ".join(row.rules) or "-",
                "detail": row.detail,
            }
            for row in self.rows
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the answer as JSON values."""
        return {
            "rules_version": self.rules_version,
            "rows": [
                {
                    "reference": row.reference,
                    "digest": str(row.digest),
                    "aliases": [*row.aliases],
                    "outcome": row.outcome,
                    "rules": [*row.rules],
                    "detail": row.detail,
                }
                for row in self.rows
            ],
        }


def rescan(
    registry: Registry,
    names: Sequence[str] = (),
    *,
    everything: bool = False,
    progress: Progress | None = None,
) -> Rescan:
    """Scan what is released by the rules of today, and sign a scan statement for what passes.

    A run that was interrupted goes on where it was: what has a statement by today's rules is not read again.
    A version for which the network fails is unfinished, and so is what is not tried after several in a row.

    Args:
        registry: the registry.
        names: adapters whose aliases are looked at.
        everything: look at every adapter; otherwise at least one name is needed.
        progress: hears about the versions.

    Raises:
        UsageError: neither names nor everything, or both.
        NotFound: no alias means a version of a name, or the scanner's key is not on this machine.
        NetworkError: the store does not answer before the first version is looked at.
    """
    if bool(names) == everything:
        raise UsageError(
            "name adapters, or ask for all of them", "registry rescan NAME, or registry rescan --all"
        )
    registry.require_keys("scanner")
    state = registry.authority.state()
    wanted = _released(state, names)
    rows: list[Rescanned] = []
    failed = 0  # times in a row
    for number, row in enumerate(wanted):
        if progress is not None:
            progress("rescan", number, len(wanted))
        if failed == _PATIENCE:
            rows.append(_row(row, "unfinished", f"not tried: the network failed {failed} times in a row"))
            continue
        try:
            rows.append(_rescan_one(registry, state, row))
            failed = 0
        except NetworkError as error:
            rows.append(_row(row, "unfinished", error.message))
            failed += 1
    if progress is not None:
        progress("rescan", len(wanted), len(wanted))
    return Rescan(rows=tuple(rows))


def _released(state: TrustState, names: Sequence[str]) -> list[Listed]:
    """Every version that an alias means, and that was not revoked: nobody loads those any more."""
    rows = listing(state) if not names else []
    for name in sorted({check_name(name) for name in names}):
        own = [row for row in listing(state, name) if row.aliases]
        if not own:
            raise NotFound(f"no alias means a version of {name}", "`registry list` shows the aliases")
        rows = [*rows, *own]
    return [row for row in rows if row.aliases and row.revoked is None]


def _row(row: Listed, outcome: Outcome, detail: str, rules: tuple[str, ...] = ()) -> Rescanned:
    return Rescanned(
        reference=row.reference,
        digest=row.digest,
        aliases=row.aliases,
        outcome=outcome,
        rules=rules,
        detail=detail.partition("\n")[0],
    )


def _rescan_one(registry: Registry, state: TrustState, row: Listed) -> Rescanned:
    """Look at one version.

    Raises:
        NetworkError: the store or the index does not answer.
    """
    outcome: Outcome = "unfinished"
    rules: tuple[str, ...] = ()
    try:
        manifest = shelf.read_manifest(registry.store, row.digest)
        known = shelf.read_statements(registry.store, row.digest)
        trust = state.about(state.resolve(Reference.parse(row.reference)))
        believed, _ = believe(row.digest, known.values(), trust)
        documents = admission.AdmittedDocuments(
            manifest=manifest, digest=row.digest, statements=tuple(one.statement for one in believed)
        )
        if documents.scanned_as_today(registry.demands(None)):
            outcome, detail = "current", "scanned by these rules before"
        else:
            report = _scanned(registry, manifest)
            waiving = [one.envelope for one in believed if one.statement.kind == "waiver"]
            outcome, rules, detail = _judged(registry, report, manifest, waiving, trust, row.aliases)
        if outcome == "pass":
            predicate = attestation.scan_predicate(report)
            sign_recorded(registry, manifest, "scan", predicate, registry.place.actor)
            detail = "a fresh scan statement is signed"
    except NetworkError:
        raise
    except RegistryError as error:
        outcome, detail = "unfinished", error.message
    return _row(row, outcome, detail, rules)


def _scanned(registry: Registry, manifest: AdapterManifest) -> ScanReport:
    """Scan the bytes in the store, which are compared with the manifest as they are read."""
    from registry.scanning import scan
    from registry.transfer import StoredContent

    entry = manifest.file(WEIGHTS_NAME)
    content = VerifiedContent(StoredContent(registry.store, entry), entry)
    return scan(content, manifest.card, bases=registry.demands(None).bases, digest=entry.sha256)


def _judged(
    registry: Registry,
    report: ScanReport,
    manifest: AdapterManifest,
    waiving: Sequence[bytes],
    trust: admission.TrustView,
    aliases: Sequence[str],
) -> tuple[Outcome, tuple[str, ...], str]:
    """Return the outcome, the rules that stand against it, and a line; every alias has to accept a waiver."""
    outcome: Outcome = "pass" if report.verdict == "pass" else "block"
    against = [found for found in report.findings if found.severity == "block"]
    said = ""
    if report.verdict == "review":
        against = []
        for alias in aliases:
            policy = replace(registry.demands(alias), required=())
            waived = admission.check_statements(waiving, manifest, trust, policy).waivers
            against += [] if policy.allow_review else waived.uncovered(report)
            said = "the policy allows it" if waived.until is None else f"until {waived.until:%Y-%m-%d}"
        outcome = "review" if against else "waived"
    if not report.finished:
        outcome = "unfinished"
    if against:
        first = against[0]
        said = f"{first.title}, at {first.where}: {first.evidence}"
    return outcome, tuple(sorted({found.rule for found in against})), said
