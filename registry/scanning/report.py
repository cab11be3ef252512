"""Findings and the report of a scan; ``sarif`` and ``page`` write it in other forms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal

from registry.digest import Digest
from registry.errors import shown
from registry.scanning.rules import RULES, RULES_VERSION, Severity

if TYPE_CHECKING:
    from registry.families import BaseFacts
    from registry.formats import TensorInfo
    from registry.scanning.figures import ModuleFigures, WeightSpace

Verdict = Literal["pass", "review", "block"]

UNFINISHED: Final = "ADP-SCN-001"
"""The rule of a scan that did not finish; its report blocks, and is never a pass."""

# A hostile file may break a rule in every tensor; a report stays readable.
_MAX_PER_RULE: Final = 20
_MAX_REGIONS: Final = 4
_NO_TEXTS: Final[Mapping[str, str]] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True, slots=True)
class Region:
    """The bytes of a tensor: its key, escaped, and a half-open range of the file."""

    key: str
    start: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What a rule found.

    Attributes:
        rule: the id of the rule.
        severity: "block" or "review".
        where: the tensor, module or part of the file; escaped.
        evidence: what was seen there; escaped.
        regions: the tensors that it is about, where it is about tensors.
    """

    rule: str
    severity: Severity
    where: str
    evidence: str
    regions: tuple[Region, ...] = ()

    @property
    def title(self) -> str:
        """The rule in a few words."""
        return RULES[self.rule].title

    @property
    def help(self) -> str:
        """Why the rule matters."""
        return RULES[self.rule].help

    @property
    def layer(self) -> str:
        """The layer of the rule."""
        return RULES[self.rule].layer

    def to_json(self) -> dict[str, Any]:
        """Return the finding as JSON values."""
        return {
            "rule": self.rule,
            "layer": self.layer,
            "severity": self.severity,
            "title": self.title,
            "where": self.where,
            "evidence": self.evidence,
            "help": self.help,
            "regions": [{"key": one.key, "start": one.start, "end": one.end} for one in self.regions],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanReport:
    """The result of a scan. The same bytes under the same rules give the same report: it holds no time.

    Attributes:
        weights: the digest of the bytes that were scanned.
        findings: what was found, gravest first.
        verdict: "pass", "review" or "block".
        rules_version: the version of the rules.
        facts: what was measured, for example the largest spectral norm.
        omitted: how many further findings of the same rules were left out.
        size: bytes of the file; None if it was not told.
        base: the base model by whose shapes the file was judged; None if there was none.
        modules: figures of the modules' updates; empty when the scan ended before.
        space: the weights beside those of clean adapters; None when the scan ended before.
        about: what else is known of the file, such as its dialect: name -> text, escaped.
    """

    weights: Digest
    findings: tuple[Finding, ...]
    verdict: Verdict
    rules_version: str
    facts: Mapping[str, float] = field(hash=False)
    omitted: int = 0
    size: int | None = None
    base: BaseFacts | None = field(default=None, hash=False)
    modules: tuple[ModuleFigures, ...] = ()
    space: WeightSpace | None = None
    about: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def finished(self) -> bool:
        """Whether every check ran that could; a scan that did not finish blocks."""
        return all(found.rule != UNFINISHED for found in self.findings)

    @property
    def passed_rules(self) -> tuple[str, ...]:
        """The rules that found nothing; none when the scan was blocked, for then some did not run."""
        if self.verdict == "block":
            return ()
        return tuple(sorted(_run(self) - {found.rule for found in self.findings}))

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "verdict": self.verdict,
            "finished": self.finished,
            "rules_version": self.rules_version,
            "weights": str(self.weights),
            "size": self.size,
            "base": None if self.base is None else {"id": self.base.id, "revision": self.base.revision},
            "about": dict(self.about),
            "facts": dict(self.facts),
            "omitted": self.omitted,
            "findings": [found.to_json() for found in self.findings],
            "weight_space": None if self.space is None else self.space.to_json(),
            "modules": [figures.to_json() for figures in self.modules],
        }

    def text(self) -> str:
        """Return the report for a terminal: printable ASCII, ending with a line break."""
        lines = [f"scan: {self.verdict} (rules {self.rules_version}, {self.weights})"]
        lines += [f"  {name}: {value}" for name, value in self.about.items()]
        for found in self.findings:
            lines.append(f"  {found.severity:6} {found.rule}  {found.title}")
            lines.append(f"         {found.where}: {found.evidence}")
        if self.omitted:
            lines.append(f"  ... and {self.omitted} more of the same")
        if self.space is not None and self.space.verdict == "not judged":
            lines.append(f"  weight space: not judged: {shown(self.space.why)}")
        return "\n".join(lines) + "\n"


def finding(rule: str, where: object, evidence: object) -> Finding:
    """Return a finding with both hostile texts escaped."""
    return Finding(
        rule=rule, severity=RULES[rule].severity, where=shown(where), evidence=shown(evidence, 400)
    )


def located(findings: Iterable[Finding], tensors: Mapping[str, TensorInfo]) -> list[Finding]:
    """Return the findings with the bytes of the tensors that they are about.

    A finding is about a tensor if ``where`` is its key, about a factor if it is ``<module>.lora_A``, and
    about both factors if it is their module.

    Args:
        findings: those that have regions keep them.
        tensors: key -> tensor, of the file's header.
    """
    from registry.formats import parse_key

    places: dict[str, list[Region]] = {}
    for key, info in tensors.items():
        region = Region(key=shown(key), start=info.start, end=info.end)
        names = {key}
        if (parsed := parse_key(key)) is not None:
            names |= {parsed.module, f"{parsed.module}.{parsed.tensor}"}
        for name in names:
            places.setdefault(shown(name), []).append(region)
    return [
        found if found.regions else replace(found, regions=tuple(places.get(found.where, ())[:_MAX_REGIONS]))
        for found in findings
    ]


def extended(scanned: ScanReport, findings: Iterable[Finding]) -> ScanReport:
    """Return a report with further findings, about what lies around the file.

    Args:
        scanned: the report of the file itself.
        findings: in any order.
    """
    more = report(scanned.weights, [*scanned.findings, *findings], scanned.facts)
    omitted = scanned.omitted + more.omitted
    return replace(scanned, findings=more.findings, verdict=more.verdict, omitted=omitted)


def report(
    weights: Digest,
    findings: Iterable[Finding],
    facts: Mapping[str, float],
    *,
    about: Mapping[str, str] = _NO_TEXTS,
    size: int | None = None,
    base: BaseFacts | None = None,
    modules: Sequence[ModuleFigures] = (),
    space: WeightSpace | None = None,
) -> ScanReport:
    """Return the report of a scan of the bytes with the digest ``weights``; see `ScanReport`.

    Args:
        about: name -> text; the texts may be hostile and are escaped.
    """
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
        size=size,
        base=base,
        modules=tuple(modules),
        space=space,
        about=MappingProxyType({shown(name, 60): shown(text) for name, text in about.items()}),
    )


def _run(scanned: ScanReport) -> set[str]:
    """The rules that a scan that blocks nothing took; those of signed statements are no part of it."""
    run = {rule for rule in RULES if not rule.startswith(("ADP-BEH-", "ADP-PRV-"))}
    judged = scanned.space is not None and scanned.space.verdict != "not judged"
    return run if judged else {rule for rule in run if not rule.startswith("ADP-WGT-")}


def _verdict(findings: Sequence[Finding]) -> Verdict:
    severities = {found.severity for found in findings}
    return "block" if "block" in severities else "review" if "review" in severities else "pass"
