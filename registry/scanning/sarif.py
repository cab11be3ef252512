"""Reports of scans as SARIF 2.1.0, for code scanning services and other tools.

The format is OASIS "Static Analysis Results Interchange Format (SARIF) Version 2.1.0 Plus Errata 01"; section
numbers below are of that text. One run tells of one invocation. Its results are what the rules found (a block
is an error, a review a warning) and the rules that found nothing (kind "pass", which 3.27.10 allows at level
"none" only). Nothing in it depends on the time or the machine: the same bytes give the same document.

Texts of the file are hostile. They come escaped by ``registry.errors.shown``; here brackets and braces are
escaped as well, for a viewer would make links of them (3.11.6) and placeholders (3.11.5).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import quote

from registry.scanning.configuration import TOOL, base_digest, rules_digest, scanner_version
from registry.scanning.report import Finding, Region, ScanReport
from registry.scanning.rules import RULES, RULES_VERSION, Severity
from registry.scanning.subjects import Scanned, Subject

SCHEMA: Final = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
FINGERPRINT: Final = "adapterFoundryRuleAndPlace/v1"

_LEVELS: Final[Mapping[Severity, str]] = {"block": "error", "review": "warning"}
# Code scanning services sort by it: 7.0 and more is "high", 4.0 and more "medium".
_SECURITY: Final[Mapping[Severity, str]] = {"block": "8.8", "review": "5.5"}
_RULE_INDEX: Final[Mapping[str, int]] = {rule: index for index, rule in enumerate(sorted(RULES))}
_ESCAPES: Final = str.maketrans({"{": "{{", "}": "}}", "[": "\\[", "]": "\\]"})


def sarif(scanned: Scanned, *, at: datetime | None = None) -> dict[str, Any]:
    """Return a SARIF log as JSON values.

    Args:
        scanned: what was scanned.
        at: when the scan ended; None leaves the time out, so that the document depends on the bytes alone.
    """
    artifacts = [_artifact(subject) for subject in scanned.subjects]
    results = [
        result for index, subject in enumerate(scanned.subjects) for result in _results(index, subject)
    ]
    run = {
        "tool": {"driver": _driver()},
        "invocations": [_invocation(scanned, at)],
        "artifacts": artifacts,
        "results": results,
        "properties": {"outcome": scanned.outcome, "rulesDigest": str(rules_digest())},
    }
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _driver() -> dict[str, Any]:
    return {
        "name": TOOL,
        "semanticVersion": scanner_version(),
        "rules": [_rule(rule) for rule in sorted(RULES)],
        "properties": {"rulesVersion": RULES_VERSION},
    }


def _rule(identity: str) -> dict[str, Any]:
    rule = RULES[identity]
    return {
        "id": rule.id,
        "shortDescription": _message(rule.title),
        "fullDescription": _message(rule.help),
        "help": _message(f"{rule.help} `registry scan --explain {rule.id}` tells more."),
        "defaultConfiguration": {"level": _LEVELS[rule.severity]},
        "properties": {
            "security-severity": _SECURITY[rule.severity],
            "tags": ["security", "machine-learning", rule.layer.replace(" ", "-")],
        },
    }


def _invocation(scanned: Scanned, at: datetime | None) -> dict[str, Any]:
    problems = [
        {
            "level": "error",
            "message": _message(subject.problem or "the scan did not finish"),
            "locations": [_place(index, subject)],
        }
        for index, subject in enumerate(scanned.subjects)
        if subject.outcome == "not finished"
    ]
    invocation: dict[str, Any] = {
        "executionSuccessful": not problems,
        "exitCode": scanned.exit_code,
        "exitCodeDescription": scanned.outcome,
        "toolExecutionNotifications": problems,
    }
    if at is not None:
        invocation["endTimeUtc"] = at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return invocation


def _artifact(subject: Subject) -> dict[str, Any]:
    artifact: dict[str, Any] = {"location": {"uri": _uri(subject.name)}, "roles": ["analysisTarget"]}
    report = subject.report
    if report is not None:
        artifact["hashes"] = {"sha-256": report.weights.hex}
        if report.size is not None:
            artifact["length"] = report.size
        artifact["properties"] = _facts(report)
    return artifact


def _facts(report: ScanReport) -> dict[str, Any]:
    properties: dict[str, Any] = {"verdict": report.verdict, "facts": dict(report.facts)}
    if report.base is not None and report.finished:
        properties["base"] = {
            "id": report.base.id,
            "revision": report.base.revision,
            "digest": str(base_digest(report.base)),
        }
    if report.space is not None:
        space = report.space.to_json()
        properties["weightSpace"] = {
            name: space[name] for name in ("verdict", "score", "p_values", "population")
        }
    return properties


def _results(index: int, subject: Subject) -> list[dict[str, Any]]:
    """What was found in an adapter, and the rules that found nothing in it."""
    if subject.report is None:
        return []
    seen: dict[str, int] = {}
    results = [_result(index, subject, found, seen) for found in subject.report.findings]
    for rule in subject.report.passed_rules:
        results.append(
            {
                "ruleId": rule,
                "ruleIndex": _RULE_INDEX[rule],
                "kind": "pass",
                "level": "none",
                "message": _message(f"not found: {RULES[rule].title}"),
                "locations": [_place(index, subject)],
                "partialFingerprints": {FINGERPRINT: _fingerprint(rule, "", seen)},
            }
        )
    return results


def _result(index: int, subject: Subject, found: Finding, seen: dict[str, int]) -> dict[str, Any]:
    regions: Sequence[Region | None] = found.regions or (None,)
    return {
        "ruleId": found.rule,
        "ruleIndex": _RULE_INDEX[found.rule],
        "kind": "fail",
        "level": _LEVELS[found.severity],
        "message": _message(f"{found.title}: {found.where}: {found.evidence}"),
        "locations": [_place(index, subject, found, region) for region in regions],
        "partialFingerprints": {FINGERPRINT: _fingerprint(found.rule, found.where, seen)},
    }


def _place(
    index: int, subject: Subject, found: Finding | None = None, region: Region | None = None
) -> dict[str, Any]:
    """A place in an artifact: the whole of it, or the bytes and the key of a tensor."""
    physical: dict[str, Any] = {"artifactLocation": {"uri": _uri(subject.name), "index": index}}
    place: dict[str, Any] = {"physicalLocation": physical}
    if region is not None:
        physical["region"] = {"byteOffset": region.start, "byteLength": region.end - region.start}
    if found is not None:
        name = found.where if region is None else region.key
        place["logicalLocations"] = [{"fullyQualifiedName": name, "kind": "resource"}]
    return place


def _fingerprint(rule: str, where: str, seen: dict[str, int]) -> str:
    """The same for the same rule at the same place, whatever the bytes; a number tells repetitions apart."""
    digest = hashlib.sha256(f"{rule}\0{where}".encode()).hexdigest()[:32]
    seen[digest] = seen.get(digest, 0) + 1
    return f"{digest}:{seen[digest]}"


def _message(text: str) -> dict[str, str]:
    return {"text": text.translate(_ESCAPES)}


def _uri(name: str) -> str:
    """A URI reference: of a path relative to where the scan ran, of a file, or of an object."""
    scheme = "s3://" if name.startswith("s3://") else "file://" if name.startswith("/") else ""
    return scheme + quote(name.removeprefix("s3://"), safe="/~")
