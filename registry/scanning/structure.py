"""Second layer: does the file hold exactly the updates that its card declares, for the base that it names?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from registry.families import FAMILIES, BaseFacts, BaseSpec, FamilyFacts
from registry.formats import Header, TensorInfo, foreign_dialect, parse_key
from registry.manifest import AdapterCard
from registry.scanning.report import Finding, finding

_ALPHA = re.compile(r"(^|[._])alpha$|\.(scale|scaling|magnitude_vector)(\.|$)|lora_magnitude", re.IGNORECASE)
_OTHER_PARTS: Final = re.compile(
    r"^(text_encoder|text_model|te\d?|lora_te|vae|first_stage|image_encoder)", re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """The two factors of one module's update B @ A: ``a`` is (rank, in), ``b`` is (out, rank)."""

    module: str
    a: TensorInfo
    b: TensorInfo


def check(header: Header, card: AdapterCard, base: BaseFacts | None) -> tuple[list[Pair], list[Finding]]:
    """Return the modules' factor pairs and the findings; the pairs hold only when no finding blocks.

    Args:
        header: the container's table of contents.
        card: what the adapter claims to be.
        base: the base model that the card names, or None when it is not known.
    """
    if base is None or base.family != card.base.family or base.family not in FAMILIES:
        evidence = f"family {card.base.family}; the scanner knows no such base"
        return [], [finding("ADP-STR-010", card.base.id, evidence)]
    findings: list[Finding] = []
    factors = _factors(header, findings)
    spec = base.spec
    pairs = []
    for module, found in sorted(factors.items()):
        if module not in spec:
            findings.append(
                finding("ADP-STR-003", module, f"{base.id} has no such module that an adapter may change")
            )
        elif len(found) == 1:
            findings.append(finding("ADP-STR-004", module, f"only lora_{next(iter(found))}"))
        else:
            pair = Pair(module=module, a=found["A"], b=found["B"])
            findings += _pair_findings(pair, card, spec)
            pairs.append(pair)
    findings += _target_findings(pairs, card, FAMILIES[base.family], spec)
    return pairs, findings


def _factors(header: Header, findings: list[Finding]) -> Mapping[str, dict[str, TensorInfo]]:
    """Group the tensors by module; what is no LoRA factor becomes a finding."""
    factors: dict[str, dict[str, TensorInfo]] = {}
    for key, info in header.tensors.items():
        parsed = parse_key(key)
        if parsed is not None:
            factors.setdefault(parsed.module, {})[parsed.factor] = info
        elif _OTHER_PARTS.search(key):
            findings.append(finding("ADP-STR-002", key, "only transformer.* is allowed"))
        elif _ALPHA.search(key):
            findings.append(finding("ADP-MET-002", key, f"{info.dtype} {info.shape}"))
        else:
            dialect = foreign_dialect(key)
            evidence = f"it looks like the {dialect} dialect" if dialect else "no known dialect"
            findings.append(finding("ADP-STR-001", key, evidence))
    return factors


def _pair_findings(pair: Pair, card: AdapterCard, spec: BaseSpec) -> list[Finding]:
    findings = []
    out, into = spec[pair.module]
    shapes = f"lora_A {pair.a.shape}, lora_B {pair.b.shape}, the module is {out} x {into}"
    fits = len(pair.a.shape) == len(pair.b.shape) == 2
    fits = fits and pair.a.shape[1] == into and pair.b.shape[0] == out and pair.a.shape[0] == pair.b.shape[1]
    if not fits:
        findings.append(finding("ADP-STR-005", pair.module, shapes))
    elif pair.a.shape[0] != card.lora.rank:
        evidence = f"rank {pair.a.shape[0]}, the card says {card.lora.rank}"
        findings.append(finding("ADP-STR-006", pair.module, evidence))
    wrong = {pair.a.dtype, pair.b.dtype} - {card.lora.dtype}
    if wrong:
        evidence = f"{', '.join(sorted(wrong))}, the card says {card.lora.dtype}"
        findings.append(finding("ADP-STR-009", pair.module, evidence))
    return findings


def _target_findings(
    pairs: list[Pair], card: AdapterCard, family: FamilyFacts, spec: BaseSpec
) -> list[Finding]:
    findings = []
    found: dict[str, set[int]] = {}
    for pair in pairs:
        index, kind = family.block_of(pair.module)
        found.setdefault(kind, set()).add(index)
    declared = set(card.lora.targets)
    for kind in sorted(set(found) - declared):
        findings.append(finding("ADP-STR-007", kind, "in the file, not declared in the card"))
    for kind in sorted(declared - set(found)):
        findings.append(finding("ADP-STR-007", kind, "declared in the card, not in the file"))
    blocks = {family.block_of(module)[0] for module in spec}
    for kind in sorted(set(found) & declared):
        # The last block's silent modules may be left out: training cannot reach them.
        needed = blocks - {max(blocks)} if kind in family.silent_in_last_block else blocks
        missing = sorted(needed - found[kind])
        if missing:
            findings.append(finding("ADP-STR-008", kind, f"missing in the blocks {missing}"))
    return findings
