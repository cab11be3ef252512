"""Findings and the report of a scan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal

from registry.digest import Digest
from registry.errors import shown
from registry.scanning.rules import RULES, RULES_VERSION, Severity

Verdict = Literal["pass", "review", "block"]

# A hostile file may break a rule in every tensor; a report stays readable.
_MAX_PER_RULE: Final = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What a rule found.

    Attributes:
        rule: the id of the rule.
        severity: "block" or "review".
        where: the tensor, module or part of the file; escaped.
        evidence: what was seen there; escaped.
    """

    rule: str
    severity: Severity
    where: str
    evidence: str

    @property
    def title(self) -> str:
        """The rule in a few words."""
        return RULES[self.rule].title

    @property
    def help(self) -> str:
        """Why the rule matters."""
        return RULES[self.rule].help


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanReport:
    """The result of a scan.

    Attributes:
        weights: the digest of the bytes that were scanned.
        findings: what was found, gravest first.
        verdict: "pass", "review" or "block".
        rules_version: the version of the rules.
        facts: what was measured, for example the largest spectral norm.
        omitted: how many further findings of the same rules were left out.
    """

    weights: Digest
    findings: tuple[Finding, ...]
    verdict: Verdict
    rules_version: str
    facts: Mapping[str, float] = field(hash=False)
    omitted: int = 0

    @property
    def passed_rules(self) -> tuple[str, ...]:
        """The rules that found nothing; none when the scan was blocked, for then some did not run."""
        if self.verdict == "block":
            return ()
        return tuple(sorted(set(RULES) - {found.rule for found in self.findings}))

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "verdict": self.verdict,
            "rules_version": self.rules_version,
            "weights": str(self.weights),
            "facts": dict(self.facts),
            "omitted": self.omitted,
            "findings": [
                {
                    "rule": found.rule,
                    "severity": found.severity,
                    "title": found.title,
                    "where": found.where,
                    "evidence": found.evidence,
                    "help": found.help,
                }
                for found in self.findings
            ],
        }

    def text(self) -> str:
        """Return the report for a terminal: printable ASCII, ending with a line break."""
        lines = [f"scan: {self.verdict} (rules {self.rules_version}, {self.weights})"]
        for found in self.findings:
            lines.append(f"  {found.severity:6} {found.rule}  {found.title}")
            lines.append(f"         {found.where}: {found.evidence}")
        if self.omitted:
            lines.append(f"  ... and {self.omitted} more of the same")
        return "\n".join(lines) + "\n"


def finding(rule: str, where: object, evidence: object) -> Finding:
    """Return a finding with both hostile texts escaped."""
    return Finding(
        rule=rule, severity=RULES[rule].severity, where=shown(where), evidence=shown(evidence, 400)
    )


def report(weights: Digest, findings: Iterable[Finding], facts: Mapping[str, float]) -> ScanReport:
    """Return the report of a scan of the bytes with the digest ``weights``."""
    kept: list[Finding] = []
    counts: dict[str, int] = {}
    for found in sorted(findings, key=lambda item: (item.severity != "block", item.rule)):
        counts[found.rule] = counts.get(found.rule, 0) + 1
        if counts[found.rule] <= _MAX_PER_RULE:
            kept.append(found)
    return ScanReport(
        weights=weights,
        findings=tuple(kept),
        verdict=_verdict(kept),
        rules_version=RULES_VERSION,
        facts=MappingProxyType(dict(facts)),
        omitted=sum(counts.values()) - len(kept),
    )


def _verdict(findings: Sequence[Finding]) -> Verdict:
    severities = {found.severity for found in findings}
    return "block" if "block" in severities else "review" if "review" in severities else "pass"
