"""The scanner: hostile weights in, a report out. No file makes it execute, unpickle or import anything.

``scan`` runs the layers in order: container, then structure, then numerics. A layer that blocks ends the
scan, for the next one relies on it. Whatever happens inside, the answer is a report: a scanner that fails
blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from registry.digest import Digest, digest_content
from registry.errors import DigestMismatch, NetworkError, shown
from registry.scanning.report import Finding, ScanReport, finding, report

if TYPE_CHECKING:
    from registry.content import Content
    from registry.families import BaseFacts
    from registry.manifest import AdapterCard

__all__ = ["Finding", "ScanReport", "scan"]


def scan(
    weights: Content,
    card: AdapterCard,
    *,
    bases: Mapping[str, BaseFacts] | None = None,
    digest: Digest | None = None,
) -> ScanReport:
    """Return what is suspicious about an adapter's weights.

    Args:
        weights: the content of the safetensors file, hostile; read tensor by tensor.
        card: what the adapter claims to be.
        bases: the base models that are known; ``families.KNOWN_BASES`` by default.
        digest: the sha256 of the weights, when it is known already.

    Returns:
        A report; its verdict is "pass" only when every check ran and found nothing.
    """
    findings: list[Finding] = []
    facts: dict[str, float] = {}
    try:
        _run(weights, card, bases, findings, facts)
    except (DigestMismatch, NetworkError):
        raise  # the bytes are not there to be judged
    except Exception as error:  # fail closed: whatever a file provokes is a finding
        findings.append(finding("ADP-SCN-001", "the file", f"{type(error).__name__}: {shown(error)}"))
    return report(digest_content(weights) if digest is None else digest, findings, facts)


def _run(
    weights: Content,
    card: AdapterCard,
    bases: Mapping[str, BaseFacts] | None,
    findings: list[Finding],
    facts: dict[str, float],
) -> None:
    from registry import families
    from registry.scanning import container, numerics, structure

    header, found = container.check(weights)
    findings += found
    if header is None:
        return
    facts["tensors"] = len(header.tensors)
    base = (families.KNOWN_BASES if bases is None else bases).get(card.base.id)
    pairs, found = structure.check(header, card, base)
    findings += found
    if base is None or any(item.severity == "block" for item in findings):
        return
    found, measured = numerics.check(weights, pairs, families.family(base.family), base.spec)
    findings += found
    facts.update(measured)
