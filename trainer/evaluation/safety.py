"""Is an adapter harmless where nothing is asked of it: at strength 0, by the neutral and by other prompts?

`trainer probe` gives none of these answers: it looks for hidden triggers among thousands of words
(docs/scanner.md), this looks at what every user does. *Strength 0* must be the base, bit for bit. The
*neutral* prompt must leave people alone, as far as the base does. The *empty* prompt and prompts that name no
expression must not do more than the declared words do.

What has to run on the base is one part of work (`trainer.parts`): it runs where the edits ran.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from registry.manifest import BaseModelRef, ConditioningSpec
from trainer.errors import DataError
from trainer.evaluation.background import background_ssim
from trainer.evaluation.bare import Scene, Zero, change_by, strength_zero
from trainer.evaluation.editing import candidate, forget_engine
from trainer.evaluation.plan import BLEND_INTENSITY, NEUTRAL, mixed, plan_of, single
from trainer.evaluation.reading import resized
from trainer.evaluation.report import Probe
from trainer.evaluation.statistics import Sample, difference, estimate
from trainer.parts import forget, in_parts
from trainer.provenance import code_digest
from trainer.sections import SuiteSection
from trainer.stage import stage_key

if TYPE_CHECKING:
    from trainer.evaluation.bench import Bench, Measured

ZERO, IDLE, OTHER = "strength_zero", "neutral_prompt", "unrelated_prompts"
TITLES: Final = {
    ZERO: "Strength 0 is the base",
    IDLE: "The neutral prompt leaves people alone",
    OTHER: "Prompts that name no expression",
}
SUBJECTS: Final = 4
"""The first people of the suite, whom the base itself is asked about; two of them at strength 0."""
UNRELATED: Final = (
    "a portrait",
    "keep everything as it is",
    "make the background blue",
    "a dog in a garden",
    "the hair is red",
)
"""Prompts of ordinary words that adapters of expressions do not declare."""
MOST_DRIFT: Final = 2.0
"""Levels of 255 that pixels may move by the neutral prompt, in the mean and beyond the base's own."""
MOST_IDENTITY: Final = 0.03
"""Cosine that identity may lose there, beyond the base's own."""
MOST_EXPRESSION: Final = 0.05
"""Intensity that the strongest judged expression may gain there, beyond the base's own."""
MOST_EMPTY: Final = 0.5
"""Change by the empty prompt, of that by declared words: the good adapter makes 0.25, eight times it 1.03."""
MOST_UNRELATED: Final = 1.25
"""Change by `UNRELATED`, of that by declared words: the good adapter makes 0.94, one of another base 1.47."""
HARMLESS: Final = 0.1
"""Change of what the base predicts that is harmless by itself: the good adapter's empty prompt makes 0.06."""


def probes(bench: Bench, measured: Mapping[str, Measured]) -> tuple[Probe, ...]:
    """Ask all of it.

    Args:
        bench: where the adapter was measured.
        measured: "adapter" and "base", which were both asked for neutral.

    Raises:
        BaseModelError: there is no base model.
        ServingError, RegistryError, DataError: as for edits.
    """
    adapter, seed = measured["adapter"], bench.plan.suite.seed
    editor = adapter.editor
    key = stage_key(
        "safety", weights=str(editor.weights), base=str(bench.base_digest), plan=str(bench.plan.digest()),
        code=str(code_digest()),
    )  # fmt: skip
    told = {
        "suite": bench.plan.suite.model_dump(mode="json"),
        "conditioning": editor.card.conditioning.model_dump(mode="json"),
        "adapter": str(editor.folder.resolve()),
        "weights": str(editor.weights),
        "base": bench.base.model_dump(mode="json"),
        "base_path": str(bench.base_path.resolve()),
    }
    out = bench.probes(editor.weights)
    _, (answer,) = in_parts("safety", out, key, safety_part, [told], bench.mapper, bench.progress)
    forget(out, key)
    return (
        judge_zero(Zero(**answer["zero"])),
        neutral_probe(bench, adapter, measured["base"]),
        judge_others(answer["kinds"], np.array(answer["changes"], np.float64), seed),
    )


def safety_part(
    folder: Path,
    *,
    suite: Mapping[str, Any],
    conditioning: Mapping[str, Any],
    adapter: str,
    weights: str,
    base: Mapping[str, Any],
    base_path: str,
) -> dict[str, Any]:
    """Ask a base that never had an adapter, and then with this one; see `trainer.parts`.

    Raises:
        DataError: the adapter is not the one that the evaluation began with.
        RegistryError: the scan or the licence check refuses it.
    """
    from PIL import Image

    from serving import pipelines, settings

    # From JSON, because strict models take a list for a tuple only there.
    spec = ConditioningSpec.model_validate_json(json.dumps(conditioning))
    plan = plan_of(SuiteSection.model_validate_json(json.dumps(suite)), spec)
    known = BaseModelRef.model_validate_json(json.dumps(base))
    verified, found = candidate(Path(adapter), allow_review=True)
    if found != weights:
        raise DataError(
            f"the adapter in {adapter} is not the one that this evaluation began with",
            "let nothing write there, and run the same command again",
        )
    forget_engine()  # a large base does not fit twice
    pipeline = pipelines.load(known.family, Path(base_path), device=settings.load().device)
    scenes = [
        Scene(picture=Image.fromarray(plan.pictures.source(index)), seed=subject.seed)
        for index, subject in enumerate(plan.subjects[:SUBJECTS])
    ]
    first, last = plan.expressions[0], plan.expressions[-1]
    blend = mixed({first: BLEND_INTENSITY, last: BLEND_INTENSITY})
    asks = tuple(dict.fromkeys((NEUTRAL, single(first, 1.0), single(last, 0.5), blend)))
    zero = strength_zero(pipeline, verified, known, scenes[:2], asks, plan.suite.steps)
    prompts = [("empty", ""), *(("unrelated", text) for text in unrelated(spec))]
    prompts += [
        ("neutral", spec.prompt(spec.neutral)),
        *(("declared", spec.prompt(x)) for x in spec.expressions),
    ]
    changes = change_by(pipeline, verified, scenes, [text for _, text in prompts])
    return {"zero": asdict(zero), "kinds": [kind for kind, _ in prompts], "changes": changes.tolist()}


def unrelated(spec: ConditioningSpec) -> list[str]:
    """The prompts of `UNRELATED` without any word that an adapter declares."""
    declared = {word for name in (spec.neutral, *spec.expressions) for word in name.split()}
    return [text for text in UNRELATED if not declared & set(text.split())]


# -- strength 0 --------------------------------------------------------------------------------------------


def judge_zero(zero: Zero) -> Probe:
    """Whether strength 0 is the base; one bit that differs is a failure."""
    figures = {name: float(value) for name, value in asdict(zero).items()}
    if zero.again:
        return _probe(
            ZERO, "skipped", "this machine does not repeat the base's own edits bit for bit", figures
        )
    wrong = [
        f"{count} of {zero.edits} edits {when} are not the base's"
        for count, when in (
            (zero.attached, "at strength 0"),
            (zero.returned, "at strength 0 after strength 1"),
            (zero.detached, "after the adapter was taken off"),
        )
        if count
    ]
    if wrong:
        return _probe(ZERO, "fail", "; ".join(wrong), figures)
    said = (
        f"{zero.edits} edits at strength 0, before and after strength 1, and with the adapter taken off, are "
        f"the base's to the last bit of latents and pixels; at strength 1 {zero.full} differ"
    )
    return _probe(ZERO, "pass", said, figures)


# -- the neutral prompt ------------------------------------------------------------------------------------


def neutral_probe(bench: Bench, adapter: Measured, base: Measured) -> Probe:
    """What the neutral prompt does to people with the adapter, beyond what it does on the base alone.

    Raises:
        DataError: a picture is gone.
    """
    asked = [
        index
        for index in range(len(bench.plan.subjects))
        if (index, NEUTRAL) in adapter.edited and (index, NEUTRAL) in base.edited
    ]
    if not asked:
        return _probe(IDLE, "skipped", "nobody was asked for the neutral face", {})
    here, there = (_idle(bench, one, asked) for one in (adapter, base))
    return judge_neutral(here, there, bench.plan.suite.seed)


def _idle(bench: Bench, measured: Measured, asked: Sequence[int]) -> dict[str, NDArray[np.float64]]:
    """Of each subject's neutral edit [S]: drift in levels, SSIM with the source, identity, expression."""
    rows = measured.readings.row_of()
    found: dict[str, list[float]] = {"drift": [], "ssim": [], "identity": [], "expression": []}
    for index in asked:
        edit, row = measured.picture(index, NEUTRAL), rows[index, NEUTRAL]
        source = resized(bench.plan.pictures.source(index), edit.shape[:2])
        found["drift"].append(float(np.abs(edit.astype(np.float64) - source).mean()))
        found["ssim"].append(float(background_ssim(source, edit[None], np.ones(edit.shape[:2], bool))[0]))
        found["identity"].append(float(measured.readings.values["identity"][row]))
        found["expression"].append(float(measured.readings.judged[row].max()))
    return {name: np.array(values, np.float64) for name, values in found.items()}


def judge_neutral(
    adapter: Mapping[str, NDArray[np.float64]], base: Mapping[str, NDArray[np.float64]], seed: int
) -> Probe:
    """Whether the neutral prompt does more with the adapter than on the base.

    Fails where the whole 95 % interval over subjects lies beyond what is tolerated.

    Args:
        adapter: "drift", "ssim", "identity" and "expression", each [S], NaN where nothing could be told.
        base: the same of the same subjects.
        seed: of the bootstrap.
    """
    figures, wrong, told = dict[str, float](), list[str](), list[str]()
    for name, sign, most, words in (
        ("drift", 1, MOST_DRIFT, "levels that pixels move"),
        ("ssim", -1, None, "structural similarity"),
        ("identity", -1, MOST_IDENTITY, "identity"),
        ("expression", 1, MOST_EXPRESSION, "strongest judged expression"),
    ):
        known = np.isfinite(base[name])
        if not known.any():
            continue
        # A face that the base keeps and the adapter's edit lacks has no identity left.
        with_it, alone = np.nan_to_num(adapter[name][known], nan=0.0), base[name][known]
        gap = difference(Sample.of(sign * with_it), Sample.of(sign * alone), seed=seed)
        here, there = float(with_it.mean()), float(alone.mean())
        figures |= {name: here, f"{name}_base": there, f"{name}_beyond": gap.value}
        figures |= {f"{name}_beyond_low": gap.low, f"{name}_beyond_high": gap.high}
        said = f"{words} {here:.3f} (base {there:.3f})"
        told.append(said)
        if most is not None and gap.low > most:
            wrong.append(f"{said}: worse by {gap.low:.3f} to {gap.high:.3f}, tolerated {most:g}")
    if not figures:
        return _probe(IDLE, "skipped", "no neutral edit could be compared with its source", figures)
    return _probe(IDLE, "fail" if wrong else "pass", "; ".join(wrong or told), figures)


# -- prompts that name no expression -----------------------------------------------------------------------


def judge_others(kinds: Sequence[str], changes: NDArray[np.float64], seed: int) -> Probe:
    """Whether the empty prompt and unrelated ones stay below what declared words do.

    Args:
        kinds: [P] "empty", "unrelated", "neutral" or "declared".
        changes: [S, P] as `trainer.evaluation.bare.change_by`.
        seed: of the bootstrap.
    """
    mean = {
        kind: changes[:, [place for place, one in enumerate(kinds) if one == kind]].mean(axis=1)
        for kind in dict.fromkeys(kinds)
    }
    if not (mean["declared"] > 0).all():
        said = "the declared words change nothing, so there is nothing to compare with"
        return _probe(OTHER, "skipped", said, {"declared": float(mean["declared"].mean())})
    figures, wrong, told = {"declared": float(mean["declared"].mean())}, list[str](), list[str]()
    for kind, most in (("empty", MOST_EMPTY), ("unrelated", MOST_UNRELATED), ("neutral", None)):
        if kind not in mean:  # every unrelated prompt has a word that the adapter declares
            continue
        share = estimate(Sample.of(mean[kind] / mean["declared"]), seed=seed)
        figures |= {kind: float(mean[kind].mean()), f"{kind}_share": share.value}
        figures |= {f"{kind}_share_low": share.low, f"{kind}_share_high": share.high}
        said = f"{kind} {share.value:.2f} (95 % interval {share.low:.2f} to {share.high:.2f})"
        told.append(said)
        if most is not None and share.low > most and figures[kind] > HARMLESS:
            wrong.append(f"{said}, tolerated {most:g}")
    start = "change of what the base predicts, of that by declared words: "
    return _probe(OTHER, "fail" if wrong else "pass", start + "; ".join(wrong or told), figures)


def _probe(name: str, outcome: Any, found: str, figures: Mapping[str, float]) -> Probe:
    rounded = {key: round(value, 6) for key, value in figures.items()}
    return Probe(name=name, title=TITLES[name], outcome=outcome, found=found, figures=rounded)
