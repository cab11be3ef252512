"""The scanner: hostile weights in, a report out. No file makes it execute, unpickle or import anything.

``scan`` runs the layers in order: container, structure, then numerics and weight space in one pass over the
numbers. A layer that blocks ends the scan, for the next one relies on it. Whatever happens inside, the answer
is a report: a scanner that fails blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from registry.digest import Digest, digest_content
from registry.errors import DigestMismatch, NetworkError, shown
from registry.scanning.report import UNFINISHED, Finding, ScanReport, finding, located, report

if TYPE_CHECKING:
    from registry.content import Content
    from registry.families import BaseFacts
    from registry.formats import Header
    from registry.manifest import AdapterCard
    from registry.scanning.figures import ModuleFigures, WeightSpace
    from registry.scanning.population import Population

__all__ = ["Finding", "ScanReport", "scan"]


def scan(
    weights: Content,
    card: AdapterCard,
    *,
    bases: Mapping[str, BaseFacts] | None = None,
    digest: Digest | None = None,
    population: Population | None = None,
) -> ScanReport:
    """Return what is suspicious about an adapter's weights.

    Args:
        weights: the content of the safetensors file, hostile; read tensor by tensor.
        card: what the adapter claims to be.
        bases: the base models that are known; ``families.KNOWN_BASES`` by default.
        digest: the sha256 of the weights, when it is known already.
        population: clean adapters to compare the weights with, if they are of this base and rank; otherwise
            those that ship for the base, the rank and the recipe.

    Returns:
        A report; its verdict is "pass" only when every check ran and found nothing.
    """
    from registry import families

    run = _Run(base=(families.KNOWN_BASES if bases is None else bases).get(card.base.id))
    try:
        _layers(weights, card, population, run)
    except (DigestMismatch, NetworkError):
        raise  # the bytes are not there to be judged
    except Exception as error:  # fail closed: whatever a file provokes is a finding
        run.findings.append(finding(UNFINISHED, "the file", f"{type(error).__name__}: {shown(error)}"))
    findings = run.findings if run.header is None else located(run.findings, run.header.tensors)
    return report(
        digest_content(weights) if digest is None else digest,
        findings,
        run.facts,
        size=len(weights),
        base=run.base,
        modules=run.modules,
        space=run.space,
    )


@dataclass(kw_only=True, slots=True)
class _Run:
    """What is known so far; a scan that fails reports that much."""

    base: BaseFacts | None
    header: Header | None = None
    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)
    modules: Sequence[ModuleFigures] = ()
    space: WeightSpace | None = None


def _layers(weights: Content, card: AdapterCard, population: Population | None, run: _Run) -> None:
    from registry.scanning import container, detector, structure

    run.header, found = container.check(weights)
    run.findings += found
    if run.header is None:
        return
    run.facts["tensors"] = len(run.header.tensors)
    pairs, found = structure.check(run.header, card, run.base)
    run.findings += found
    if run.base is None or any(item.severity == "block" for item in run.findings):
        return
    place = ("weights", run.base.id, card.lora.rank)
    if population is not None and (population.kind, population.base, population.rank) != place:
        population = None  # others than these are no measure of it
    examined = detector.examine(weights, pairs, card, run.base, population)
    run.findings += examined.findings
    run.facts.update(examined.facts)
    run.modules, run.space = examined.modules, examined.space
