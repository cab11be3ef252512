"""`trainer probe`: loads an adapter and its base, probes it, writes what was found."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from registry.digest import Digest
from registry.errors import shown
from trainer.evaluation.probe.core import TEMPLATE, Probe
from trainer.evaluation.probe.deltas import deltas_of
from trainer.evaluation.probe.judging import PAIRED, judged, population_for
from trainer.evaluation.probe.page import page
from trainer.evaluation.probe.pictures import Pictures, shoot
from trainer.evaluation.probe.portraits import probe_portraits
from trainer.evaluation.probe.report import PATCH, ProbeReport
from trainer.evaluation.probe.settings import ProbeSettings
from trainer.evaluation.probe.sweep import Attach
from trainer.portraits.expressions import EXPRESSIONS

if TYPE_CHECKING:
    from PIL import Image

    from registry.admission import VerifiedAdapter
    from registry.manifest import BaseModelRef
    from registry.scanning.population import Population
    from serving.adapters import AdapterSlots
    from serving.pipelines.qwen_image_edit import QwenImageEdit

RESULT_NAME: Final = "probe.json"
PAGE_NAME: Final = "probe.html"
EXIT_CODES: Final = {"pass": 0, "review": 17, "fail": 14, "not judged": 17}
_SHOWN: Final = 3
_PORTRAITS: Final = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """An adapter folder that the scan lets be looked at.

    Attributes:
        adapter: what was admitted; a scan that asks for a review is no reason not to probe.
        weights: the digest of its weights file.
    """

    adapter: VerifiedAdapter
    weights: Digest

    @classmethod
    def read(cls, folder: Path) -> Candidate:
        """Read an adapter folder.

        Raises:
            DataError: a file is missing.
            RegistryError: the scan or the licence policy refuses it.
        """
        from trainer.evaluation.editing import candidate

        adapter, weights = candidate(folder, allow_review=True)
        return cls(adapter=adapter, weights=weights)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A finished probe: its report, and the content of the file that is signed."""

    report: ProbeReport
    result: dict[str, Any]

    @property
    def exit_code(self) -> int:
        """0 pass, 14 fail, 17 where a person has to look."""
        return EXIT_CODES[self.report.verdict]


def probe_folder(
    folder: Path,
    *,
    pipeline: QwenImageEdit,
    partners: Sequence[Path] = (),
    population: Population | None = None,
    out: Path | None = None,
    settings: ProbeSettings | None = None,
    words: Sequence[str] | None = None,
) -> Outcome:
    """Probe an adapter folder, alone and beside each partner.

    Args:
        folder: the adapter.
        pipeline: its base.
        partners: folders of adapters that may be loaded with it.
        population: clean adapters to compare with; None looks for a shipped one.
        out: where `RESULT_NAME` and `PAGE_NAME` are written; None writes nothing.
        settings, words: of the probe.

    Raises:
        DataError, RegistryError: see `Candidate.read`.
        AdapterMismatch, BaseModelError: an adapter does not fit the base.
    """
    from serving.adapters import AdapterSlots

    chosen = settings or ProbeSettings()
    candidate, others = Candidate.read(folder), [Candidate.read(partner) for partner in partners]
    card = candidate.adapter.card
    how = card.conditioning
    slots = AdapterSlots(pipeline)
    # Every adapter with this template is asked about the same words: populations compare like with like.
    common = EXPRESSIONS if how.template == TEMPLATE else ()
    probe = Probe(
        pipeline,
        images=probe_portraits(chosen.images),
        words=words,
        template=how.template,
        declared=(*common, *how.expressions),
        neutral=how.neutral,
        settings=chosen,
    )
    attach = _attached(slots, candidate.adapter)
    report = judged(probe.run(attach, how.expressions), population or population_for(card))
    report = replace(report, pairs=tuple(_pair(probe, pipeline, candidate, other) for other in others))
    result = report.predicate(
        candidate.weights.removeprefix("sha256:"), {"id": card.base.id, "revision": card.base.revision}
    )
    if out is not None:
        pictures = _pictures(probe, report, attach)
        _write(out, result, pictures, page(report, subject=folder.name, pictures=pictures))
    return Outcome(report=report, result=result)


def _attached(slots: AdapterSlots, adapter: VerifiedAdapter) -> Attach:
    @contextmanager
    def attach() -> Iterator[None]:
        slots.attach(adapter)
        try:
            yield
        finally:
            slots.detach()

    def new() -> AbstractContextManager[None]:
        return attach()

    return new


def _pair(probe: Probe, pipeline: QwenImageEdit, one: Candidate, other: Candidate) -> dict[str, Any]:
    """What the statement says of a pair; without a population of pairs it asks for a review."""
    deltas = [deltas_of(found.adapter, pipeline.family) for found in (one, other)]
    known = population_for(one.adapter.card, PAIRED)
    found = judged(probe.run_pair(deltas[0], deltas[1]), known)
    verdict = "review" if found.verdict == "not judged" else found.verdict
    score = round(found.statistics["pair_collapse_gain"], 6)
    return {"with": str(other.weights), "verdict": verdict, "score": score}


def _pictures(probe: Probe, report: ProbeReport, attach: Attach) -> Pictures:
    """Edits by the plain prompt, by the words and by the patch that stand out most."""
    plain = probe.template.format(probe.neutral)
    asked: dict[str, tuple[str, Callable[[Image.Image], Image.Image]]] = {
        f"no trigger: {probe.neutral}": (plain, _as_it_is)
    }
    for word, _ in report.tokens[:_SHOWN]:
        asked[shown(word)] = (report.prompts.get(word, plain), _as_it_is)
    for name, _ in report.patches[:1]:
        patch = next(patch for patch in probe.patches if patch.name == name)
        asked[PATCH + name] = (plain, patch.on)
    return shoot(probe.pipeline, probe.images[:_PORTRAITS], asked, attach, seed=probe.settings.seed)


def _as_it_is(image: Image.Image) -> Image.Image:
    return image


def _write(out: Path, result: dict[str, Any], pictures: Pictures, text: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    content = {**result, "pictures": {word: dict(sides) for word, sides in pictures.items()}}
    (out / RESULT_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (out / PAGE_NAME).write_text(text, encoding="utf-8")


def load_base(base: BaseModelRef) -> QwenImageEdit:
    """Return a base that is on this machine, the zoo's small ones included.

    Raises:
        BaseModelError: it is not on this machine.
    """
    from serving.pipelines.qwen_image_edit import QwenImageEdit
    from trainer.cli import find_base
    from trainer.zoo.bases import SMALL_BASES, base_id, small_base

    for name in SMALL_BASES:
        if base_id(name) == base.id:
            return small_base(name)
    return QwenImageEdit.load(find_base(base))


def table(report: ProbeReport, rows: int = 10) -> str:
    """The report for a terminal: printable ASCII, ending with a line break."""
    lines = [f"behaviour: {report.verdict}" + (f" ({shown(report.why)})" if report.why else "")]
    lines.append(f"  {'word':<28} score")
    lines += [f"  {shown(word):<28} {score:7.3f}" for word, score in report.tokens[:rows]]
    if report.patches:
        lines.append(f"  {'patch':<28} score")
        lines += [f"  {shown(name):<28} {score:7.3f}" for name, score in report.patches[:3]]
    names = ("excess", "collapse", "homoglyph_collapse", "patch_gap", "inversion")
    found = [f"{name} {report.statistics[name]:.3f}" for name in names if name in report.statistics]
    lines.append("  " + ", ".join(found))
    lines += [f"  with {pair['with']}: {pair['verdict']} ({pair['score']:.3f})" for pair in report.pairs]
    return "\n".join(lines) + "\n"
