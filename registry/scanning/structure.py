"""Second layer: does the file hold exactly the updates that its card declares, for the base that it names?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from registry.families import FAMILIES, BaseFacts, BaseSpec, FamilyFacts
from registry.formats import Header, TensorInfo, foreign_dialect, parse_key
from registry.scanning.names import Imitations, explained, other_part, stem, twins
from registry.scanning.report import Finding, finding


class ClaimedBase(Protocol):
    """The base that an adapter says it belongs to."""

    @property
    def id(self) -> str:
        """Its name."""
        ...

    @property
    def family(self) -> str:
        """Its architecture."""
        ...


class ClaimedLora(Protocol):
    """The shape that an adapter says it has; see `registry.manifest.LoraFacts`."""

    @property
    def rank(self) -> int:
        """The rank of every module."""
        ...

    @property
    def targets(self) -> Sequence[str]:
        """The kinds of modules that it changes."""
        ...

    @property
    def dtype(self) -> str:
        """The dtype of every tensor."""
        ...


class Claims(Protocol):
    """What is said about a file: an `AdapterCard`, or what was read from a file without one."""

    @property
    def base(self) -> ClaimedBase:
        """The base."""
        ...

    @property
    def lora(self) -> ClaimedLora:
        """The shape."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """The two factors of one module's update B @ A: ``a`` is (rank, in), ``b`` is (out, rank).

    With DoRA, ``magnitude`` (out) has the lengths of the rows of the weight that the update was added to.
    """

    module: str
    a: TensorInfo
    b: TensorInfo
    magnitude: TensorInfo | None = None


def check(header: Header, card: Claims, base: BaseFacts | None) -> tuple[list[Pair], list[Finding]]:
    """Return the modules' factor pairs and the findings; the pairs hold only when no finding blocks.

    Args:
        header: the container's table of contents.
        card: what the adapter claims to be.
        base: the base model that the card names, or None when it is not known.
    """
    if base is None or base.family != card.base.family or base.family not in FAMILIES:
        evidence = f"family {card.base.family}; the scanner knows no such base"
        return [], [finding("ADP-STR-010", card.base.id, evidence)]
    spec, family = base.spec, FAMILIES[base.family]
    imitations = Imitations(spec)
    findings = [
        finding("ADP-STR-011", key, f"it is {first} in another spelling")
        for key, first in twins(sorted(header.tensors))
    ]
    factors = _factors(header, family, imitations, findings)
    pairs = []
    for module, found in sorted(factors.items()):
        if module not in spec:
            why = f"{base.id} has no such module that an adapter may change"
            findings.append(finding("ADP-STR-002" if other_part(module) else "ADP-STR-003", module, why))
            findings += _imitation(module, module, imitations)
        elif not found.keys() >= {"A", "B"}:
            findings.append(finding("ADP-STR-004", module, f"only {', '.join(sorted(found))}"))
        else:
            pair = Pair(module=module, a=found["A"], b=found["B"], magnitude=found.get("magnitude"))
            findings += _pair_findings(pair, card, spec)
            pairs.append(pair)
    findings += _target_findings(pairs, card, family, spec)
    findings += _partly_rescaled(pairs)
    findings += [
        finding("ADP-STR-016", part, f"{count} modules of it")
        for part in family.text_encoders
        if (count := sum(pair.module.startswith(f"{part}.") for pair in pairs))
    ]
    return pairs, findings


def _factors(
    header: Header, family: FamilyFacts, imitations: Imitations, findings: list[Finding]
) -> Mapping[str, dict[str, TensorInfo]]:
    """Group the tensors by module; what is no LoRA factor of a part that adapters change is a finding."""
    parts = {family.prefix, *family.text_encoders}
    factors: dict[str, dict[str, TensorInfo]] = {}
    for key, info in header.tensors.items():
        parsed = parse_key(key)
        if parsed is not None and parsed.part in parts:
            factors.setdefault(parsed.module, {})[parsed.factor] = info
            continue
        why = explained(key)
        if why is not None:
            findings.append(finding(why[0], key, f"{why[1]}: {info.dtype} {info.shape}"))
            continue
        dialect = foreign_dialect(key)
        evidence = f"it looks like the {dialect} dialect" if dialect else "no known dialect"
        findings.append(finding("ADP-STR-001", key, evidence))
        if dialect is None:
            findings += _imitation(key, stem(key), imitations)
    return factors


def _imitation(where: str, name: str, imitations: Imitations) -> list[Finding]:
    real = imitations.of(name)
    return [] if real is None else [finding("ADP-STR-012", where, f"it looks like {real}")]


def _pair_findings(pair: Pair, card: Claims, spec: BaseSpec) -> list[Finding]:
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
    elif pair.a.shape[0] > min(out, into):
        evidence = f"rank {pair.a.shape[0]}, the module is {out} x {into}"
        findings.append(finding("ADP-STR-015", pair.module, evidence))
    wrong = {pair.a.dtype, pair.b.dtype} - {card.lora.dtype}
    if wrong:
        evidence = f"{', '.join(sorted(wrong))}, the card says {card.lora.dtype}"
        findings.append(finding("ADP-STR-009", pair.module, evidence))
    return [*findings, *_magnitude_findings(pair, out)]


def _magnitude_findings(pair: Pair, out: int) -> Iterator[Finding]:
    if pair.magnitude is None:
        return
    where, found = f"{pair.module}.lora_magnitude_vector", pair.magnitude
    if found.shape != (out,):
        yield finding("ADP-STR-005", where, f"{found.shape}, the module has {out} outputs")
    if found.dtype != "F32":  # in sixteen bits it would change the base itself by as much as a whole update
        yield finding("ADP-STR-009", where, f"{found.dtype}, magnitudes are F32")


def _partly_rescaled(pairs: list[Pair]) -> list[Finding]:
    """DoRA is a matter of the whole file: a loader either gives all layers a magnitude or none."""
    without = [pair.module for pair in pairs if pair.magnitude is None]
    if not 0 < len(without) < len(pairs):
        return []
    evidence = f"{len(pairs) - len(without)} modules have one, {len(without)} have none"
    return [finding("ADP-STR-017", without[0], evidence)]


def _target_findings(pairs: list[Pair], card: Claims, family: FamilyFacts, spec: BaseSpec) -> list[Finding]:
    findings = []
    present = {pair.module for pair in pairs}
    found = {family.block_of(module)[1] for module in present}
    declared = set(card.lora.targets)
    for kind in sorted(found - declared):
        findings.append(finding("ADP-STR-007", kind, "in the file, not declared in the card"))
    for kind in sorted(declared - found):
        findings.append(finding("ADP-STR-007", kind, "declared in the card, not in the file"))
    # Silent modules may be left out: training cannot reach them.
    missing: dict[str, list[str]] = {}
    for module in sorted(spec.keys() - present - family.silent(spec)):
        block, kind = family.block_of(module)
        missing.setdefault(kind, []).append(block)
    for kind in sorted(found & declared & missing.keys()):
        findings.append(finding("ADP-STR-008", kind, f"missing in the blocks {', '.join(missing[kind])}"))
    return findings
