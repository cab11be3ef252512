"""What a scan was made with, by digest: the rules, the shapes of the base, the reference population.

Two scans with the same digests over the same bytes find the same. Entries are in-toto ResourceDescriptors,
as the test-result predicate wants them (in-toto attestation framework, spec/v1/resource_descriptor.md).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Final

from registry.digest import Digest, digest_bytes
from registry.manifest import canonical_json
from registry.scanning.rules import RULES, RULES_VERSION

if TYPE_CHECKING:
    from collections.abc import Mapping

    from registry.families import BaseFacts
    from registry.manifest import AdapterCard
    from registry.scanning.report import ScanReport

TOOL: Final = "adapter-foundry registry scan"
_URI: Final = "https://adapter-foundry.dev/attestation"


@cache
def scanner_version() -> str:
    """Return the version of the distribution that scans; "0" where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("adapter-foundry")
    except PackageNotFoundError:
        return "0"


@cache
def rules_digest() -> Digest:
    """Return the sha256 of the rule catalogue: the version, and id, severity, title and help of each rule."""
    rows = [[rule.id, rule.severity, rule.title, rule.help] for _, rule in sorted(RULES.items())]
    return digest_bytes(canonical_json({"version": RULES_VERSION, "rules": rows}))


def base_digest(base: BaseFacts) -> Digest:
    """Return the sha256 of what a file is compared with: the base's id, revision, family and shapes.

    Raises:
        UsageError: the base's family is not known, or its config lacks a value.
    """
    shapes = {module: list(shape) for module, shape in base.spec.items()}
    facts = {"id": base.id, "revision": base.revision, "family": base.family, "modules": shapes}
    return digest_bytes(canonical_json(facts))


def today(card: AdapterCard, base: BaseFacts) -> Mapping[str, str]:
    """Return the sha256 (hex) of each entry of `configuration` that a scan of today would compare with.

    Args:
        card: what the adapter claims to be; its base, rank and targets choose the population.
        base: the base model that it names.
    """
    from registry.scanning import population

    found = {"scanner-rules": rules_digest().hex, "base-spec": base_digest(base).hex}
    reference = population.find(
        "weights", base=base.id, rank=card.lora.rank, recipes=[population.recipe_key(card.lora.targets)]
    )
    return found if reference is None else {**found, "reference-population": reference.digest.hex}


def configuration(report: ScanReport) -> list[dict[str, Any]]:
    """Return what a scan was configured with and what it looked at, as in-toto ResourceDescriptors.

    Args:
        report: of the scan; without a base or a population their entries are left out.
    """
    entries: list[dict[str, Any]] = [
        {
            "name": "scanner",
            "uri": f"pkg:pypi/adapter-foundry@{scanner_version()}",
            "annotations": {"version": scanner_version()},
        },
        {
            "name": "scanner-rules",
            "uri": f"{_URI}/scanner-rules/v{report.rules_version}",
            "digest": {"sha256": rules_digest().hex},
            "annotations": {"version": report.rules_version},
        },
    ]
    if report.base is not None and report.finished:
        entries.append(
            {
                "name": "base-spec",
                "digest": {"sha256": base_digest(report.base).hex},
                "annotations": {"id": report.base.id, "revision": report.base.revision},
            }
        )
    reference = None if report.space is None else report.space.reference
    if reference is not None:
        entries.append(
            {
                "name": "reference-population",
                "digest": {"sha256": reference.digest.hex},
                "annotations": {"recipe": reference.recipe, "size": str(reference.size)},
            }
        )
    return [*entries, {"name": "weights", "digest": {"sha256": report.weights.hex}}]
