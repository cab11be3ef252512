"""The scan of a LoRA file that comes without an adapter card, in any dialect.

The container is read first, under the rules for files from elsewhere. Then the one dialect of all keys, the
known base that the modules and shapes fit, and the strength of each module as the dialect's own loader
applies it take the place of a card. What the file means is judged in its canonical form, which is made tensor
by tensor while it is read: structure, numerics and weight space are the layers that judge every adapter.

A loader that makes something else of the file than it says blocks it: what was judged would not be what runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from registry.dialects import loading, reading
from registry.dialects.canonical import CanonicalContent
from registry.dialects.grammar import PIXELSMILE, DialectError, Problem
from registry.digest import Digest, digest_content
from registry.errors import DigestMismatch, InvalidDocument, NetworkError, UsageError, shown
from registry.families import FAMILIES, KNOWN_BASES, BaseFacts
from registry.formats import FOREIGN, FormatError, Header
from registry.scanning import container, structure
from registry.scanning.report import UNFINISHED, Finding, ScanReport, finding, report

if TYPE_CHECKING:
    from registry.content import Content
    from registry.dialects.loading import Applied
    from registry.dialects.reading import LoraFile
    from registry.scanning.figures import ModuleFigures, WeightSpace
    from registry.scanning.population import Population

MIN_STRENGTH: Final = 0.25
"""Smallest alpha / rank that needs no explanation."""

MAX_STRENGTH: Final = 4.0
"""Largest alpha / rank that trainers give; beyond it, a file applies more than was ever looked at."""

MAX_UNEVENNESS: Final = 16.0
"""Largest ratio between the strengths of a file's modules that needs no explanation."""

_AGREEMENT = 1e-3
_RULE_OF: Final[Mapping[Problem, str]] = {
    "other": "ADP-MET-010",  # what the grammar does not call by a name of its own is about the strength
    "key": "ADP-STR-001",
    "text encoder": "ADP-STR-002",
    "magnitude": "ADP-MET-002",
    "method": "ADP-STR-014",
    "weight": "ADP-STR-013",
    "module": "ADP-STR-003",
    "mixture": "ADP-STR-020",
    "alone": "ADP-STR-004",
    "shape": "ADP-STR-005",
    "dtype": "ADP-CON-007",
}
_OF_THE_BASE: Final = frozenset({"module", "shape"})


@dataclass(frozen=True, kw_only=True, slots=True)
class DerivedBase:
    """See `Derived`: the base that a file fits."""

    id: str
    family: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DerivedLora:
    """See `Derived`: rank, kinds of modules and dtype of the canonical form."""

    rank: int
    targets: tuple[str, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Derived:
    """What a card would declare, taken from the file itself."""

    base: DerivedBase
    lora: DerivedLora


@dataclass(kw_only=True, slots=True)
class _Run:
    """What is known so far; a scan that fails reports that much."""

    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)
    base: BaseFacts | None = None
    modules: Sequence[ModuleFigures] = ()
    space: WeightSpace | None = None

    def blocks(self) -> bool:
        return any(item.severity == "block" for item in self.findings)


def scan_bare(
    weights: Content,
    *,
    base: str | None = None,
    bases: Mapping[str, BaseFacts] | None = None,
    config: bytes | None = None,
    digest: Digest | None = None,
    population: Population | None = None,
) -> ScanReport:
    """Return what is suspicious about a LoRA file without a card.

    Args:
        weights: the content of the safetensors file, hostile; read tensor by tensor.
        base: the id of the base that it must be for; None finds the known one that it fits.
        bases: the base models that are known; ``families.KNOWN_BASES`` by default.
        config: the ``adapter_config.json`` beside the file, hostile; None if there is none.
        digest: the sha256 of the weights, when it is known already.
        population: clean adapters to compare the weights with; by default the one that ships.

    Returns:
        A report, whose ``about`` names the dialect and the base, and whose facts hold ``strength_min`` and
        ``strength_max``: what a loader multiplies B @ A with.

    Raises:
        UsageError: there is no base of that name.
        DigestMismatch, NetworkError: the bytes are not there to be judged.
    """
    known = KNOWN_BASES if bases is None else bases
    if base is not None and base not in known:
        raise UsageError(f"the base model {shown(base)!r} is not known", "known bases: " + ", ".join(known))
    run = _Run()
    try:
        _layers(weights, [known[base]] if base is not None else [*known.values()], config, population, run)
    except (DigestMismatch, NetworkError):
        raise
    except Exception as error:  # fail closed: whatever a file provokes is a finding
        run.findings.append(finding(UNFINISHED, "the file", f"{type(error).__name__}: {shown(error)}"))
    return report(
        digest_content(weights) if digest is None else digest,
        run.findings,
        run.facts,
        about=run.about,
        size=len(weights),
        base=run.base,
        modules=run.modules,
        space=run.space,
    )


def _layers(
    weights: Content,
    bases: Sequence[BaseFacts],
    config: bytes | None,
    population: Population | None,
    run: _Run,
) -> None:
    header, found = container.check(weights, FOREIGN)
    run.findings += found
    if header is None or run.blocks():
        return
    run.facts["tensors"] = len(header.tensors)
    lora = _understood(header, weights, bases, config, run)
    if lora is None:
        return
    _tell(lora, run)
    _judge_strength(lora, config, run)
    canonical, claims = CanonicalContent(lora, weights), _derived(lora)
    pairs, found = structure.check(canonical.header, claims, lora.base)
    run.findings += found
    if run.blocks():
        return
    from registry.scanning import detector

    examined = detector.examine(canonical, pairs, claims, lora.base, population)
    run.findings += examined.findings
    run.facts.update(examined.facts)
    run.modules, run.space = examined.modules, examined.space


# -- which dialect, and for which base --


def _understood(
    header: Header, weights: Content, bases: Sequence[BaseFacts], config: bytes | None, run: _Run
) -> LoraFile | None:
    """Return what the file says for the base that it fits; None, with findings, if it fits none."""
    fitting: list[LoraFile] = []
    errors: list[DialectError] = []
    for base in bases:
        try:
            fitting.append(reading.understood(header, weights, base, config=config))
        except DialectError as error:
            errors.append(error)
        except FormatError:
            raise
        except InvalidDocument as error:  # a configuration; it is the same for every base
            run.findings.append(finding("ADP-MET-010", "the configuration", error.message))
            return None
    if not fitting:
        run.findings += _refusal(errors, len(bases) > 1)
        return None
    # The trainer's tag names the revision, too. Several bases of one architecture fit the same file.
    named = [lora for lora in fitting if lora.base.id == header.metadata.get("base", "").partition("@")[0]]
    chosen = min(named or fitting, key=_left_out)
    if len(fitting) > 1:
        run.about["fits"] = ", ".join(lora.base.id for lora in fitting)
    return chosen


def _left_out(lora: LoraFile) -> int:
    """How many modules of the base an adapter of these kinds would have and the file has not."""
    facts, kinds = FAMILIES[lora.base.family], set(lora.targets)
    return sum(facts.block_of(module)[1] in kinds for module in lora.base.spec) - len(lora.updates)


def _refusal(errors: Sequence[DialectError], several: bool) -> list[Finding]:
    """Return the findings about a file that fits no base, from the base that it fits best."""
    # What is wrong for every base is wrong with the file; otherwise the fewest keys tell the nearest base.
    nearest = min(errors, key=lambda error: (error.problem in _OF_THE_BASE, len(error.keys)))
    evidence = nearest.what
    if several and nearest.problem in _OF_THE_BASE:
        evidence = f"it fits no known base; the nearest: {evidence}"
    rule = _RULE_OF[nearest.problem]
    return [finding(rule, where, evidence) for where in nearest.keys or ["the file"]]


def _tell(lora: LoraFile, run: _Run) -> None:
    run.base = lora.base
    run.about |= {"dialect": lora.dialect, "base": lora.base.id, "dtype": lora.dtype, "strength": lora.source}
    run.about["targets"] = " ".join(lora.targets)
    run.facts |= {"rank": lora.rank, "rank_min": lora.ranks[0]}


def _derived(lora: LoraFile) -> Derived:
    return Derived(
        base=DerivedBase(id=lora.base.id, family=lora.base.family),
        lora=DerivedLora(
            rank=lora.rank,
            targets=lora.targets,
            dtype=lora.dtype,
        ),
    )


# -- the strength --


def _judge_strength(lora: LoraFile, config: bytes | None, run: _Run) -> None:
    """Compare what the file says with what its loader does, and both with what trainers give."""
    try:
        done = loading.applied(lora, config)
    except DialectError as error:
        run.findings += [finding("ADP-MET-010", where, error.what) for where in error.keys or ["the file"]]
        return
    said = {update.factors.module: update.scale for update in lora.updates}
    run.about["loader"] = f"{done.loader}: {done.why or 'all modules'}"
    if lora.dialect == PIXELSMILE:
        run.findings.append(finding("ADP-STR-021", "the file", f"{done.loader}: {done.why}"))
    elif done.scales:
        run.findings += _differences(said, done)
        said = dict(done.scales)
    run.facts |= {"strength_min": _short(min(said.values())), "strength_max": _short(max(said.values()))}
    run.findings += _absurd(lora, said, config)


def _differences(said: Mapping[str, float], done: Applied) -> list[Finding]:
    wrong = [
        module
        for module, scale in said.items()
        if not math.isclose(scale, done.scales.get(module, 0.0), rel_tol=_AGREEMENT)
    ]
    return [
        finding(
            "ADP-MET-011",
            module,
            f"the file says {said[module]:.6g} times B @ A, {done.loader} applies "
            f"{done.scales.get(module, 0.0):.6g} times",
        )
        for module in wrong
    ]


def _absurd(lora: LoraFile, scales: Mapping[str, float], config: bytes | None) -> list[Finding]:
    """Find strengths that no trainer gives.

    Trainers that keep alpha in a tensor leave it at a small number for any rank (kohya's and OneTrainer's
    default is 1, LightX2V takes 8 at rank 64): alpha from 1 up to the rank explains a weak update. With
    rank-stabilised LoRA it is alpha / sqrt(rank) that multiplies B @ A, so that a strong one is judged by
    alpha / rank as everywhere else.
    """
    findings = []
    stabilised = loading.is_stabilised(lora, config)
    alphas = {}
    for update in lora.updates:
        module, rank = update.factors.module, update.factors.rank
        scale = scales.get(module, 0.0)
        alphas[module] = alpha = scale * (math.sqrt(rank) if stabilised else rank)
        evidence = f"{scale:.6g} times B @ A: alpha {alpha:.6g} at rank {rank}"
        if alpha / rank > MAX_STRENGTH * (1 + _AGREEMENT):
            findings.append(finding("ADP-MET-012", module, evidence))
        elif 0 < scale < MIN_STRENGTH and alpha < 1 - _AGREEMENT:
            findings.append(finding("ADP-MET-013", module, evidence))
    several = [max(values.values()) / max(min(values.values()), 1e-30) for values in (scales, alphas)]
    if not findings and min(several) > MAX_UNEVENNESS:
        evidence = f"strengths from {min(scales.values()):.6g} to {max(scales.values()):.6g}"
        findings.append(finding("ADP-MET-013", "the file", evidence))
    return findings


def _short(value: float) -> float:
    return float(f"{value:.6g}")
