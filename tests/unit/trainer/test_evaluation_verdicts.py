"""Editors whose quality is known: perfect, lazy, swapped, erratic, a stranger. Renders are their edits."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fakes.adapters import card
from fakes.evaluations import PROBES
from registry.digest import digest_bytes
from registry.manifest import AdapterCard
from registry.policy import Threshold
from trainer.data.blobs import Blobs, encode_png
from trainer.errors import BaseModelError, DataError
from trainer.evaluation import Bench, EvaluationReport, Wanted, measure
from trainer.evaluation.bench import Measured, folder_digest
from trainer.evaluation.comparison import TRUTH, Compared, Comparison, everything, tables
from trainer.evaluation.comparison_page import page, turned
from trainer.evaluation.editing import Edited, Editor, candidate
from trainer.evaluation.evaluating import build_report, progress_of
from trainer.evaluation.judges import judges_of
from trainer.evaluation.plan import Ask, Plan, Portrait, mixed, plan_of, single, vector
from trainer.evaluation.reading import read
from trainer.evaluation.readings import VALUES, Readings
from trainer.evaluation.report import Digests, Gap, Probe
from trainer.evaluation.terminal import compared
from trainer.portraits.renderer import CONFUSING_PAIRS
from trainer.progress import Whole, silent
from trainer.recipe import load
from trainer.sections import SuiteSection

RULES = {
    "top1_accuracy": Threshold(min=0.85),
    "base_top1_accuracy": Threshold(max=0.3),
    "structural_confusion": Threshold(max=0.08),
    "control_linearity": Threshold(min=0.85),
    "identity_ratio": Threshold(min=0.8),
    "paired_psnr": Threshold(min=22.0),
    "psnr_gain": Threshold(min=3.0),
}
SUITE = SuiteSection.model_validate(
    {
        "name": "known", "identities": {"human": 4, "anime": 2}, "first_identity": 900,
        "intensities": (0.0, 0.5, 1.0), "blend_people": 1, "judge": {"scorer": "judge"},
    }
)  # fmt: skip
PARTNER = {a: b for x, y in CONFUSING_PAIRS for a, b in ((x, y), (y, x))}
Draw = Callable[[Plan, int, Ask], Portrait]


def right(plan: Plan, index: int, ask: Ask) -> Portrait:
    found = plan.pictures.truth(index, ask)
    assert found is not None, "drawn people have true answers"
    return found


def lazy(plan: Plan, index: int, ask: Ask) -> Portrait:
    return plan.pictures.source(index)


def swapped(plan: Plan, index: int, ask: Ask) -> Portrait:
    return right(plan, index, mixed({PARTNER[name]: x for name, x in ask}))


def erratic(plan: Plan, index: int, ask: Ask) -> Portrait:
    """Right at full strength, without control on the way: too much for some people, nothing for others."""
    return right(plan, index, mixed({name: x if x >= 1 else 1.4 * (index % 2) for name, x in ask}))


def stranger(plan: Plan, index: int, ask: Ask) -> Portrait:
    return right(plan, (index + 1) % len(plan.subjects), ask)


EDITORS: Mapping[str, Draw] = {
    "perfect": right, "lazy": lazy, "swapped": swapped, "erratic": erratic, "stranger": stranger
}  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    place = tmp_path_factory.mktemp("bench")
    recipe = load("pixelsmile-portraits")
    plan = plan_of(SUITE, recipe.conditioning)
    return Bench(plan=plan, judges=judges_of(SUITE, place), base=recipe.base, base_path=place, place=place)


def measured_as(bench: Bench, name: str, draw: Draw, *, base: bool = False) -> Measured:
    """What an editor that draws so is measured as, by the shipped judges."""
    blobs, edited = Blobs(bench.place / f"{name}-{draw.__name__}"), Edited()
    who = Editor(
        name=name, folder=bench.place, weights=digest_bytes(draw.__name__.encode()),
        card=AdapterCard.parse(json.dumps(card()).encode()), strength=0.0 if base else 1.0,
    )  # fmt: skip
    for index in range(len(bench.plan.subjects)):
        for ask in who.asks(bench.plan, index):
            picture = np.asarray(draw(bench.plan, index, ask))
            edited[index, ask] = blobs.add(encode_png(picture), "image/png")
    readings = read(bench.plan, bench.judges, edited, blobs, silent)
    return Measured(editor=who, readings=readings, edited=edited, blobs=blobs)


@pytest.fixture(scope="module")
def known(bench: Bench) -> dict[str, Measured]:
    return {name: measured_as(bench, name, draw, base=name == "lazy") for name, draw in EDITORS.items()}


def report_of(
    bench: Bench,
    known: Mapping[str, Measured],
    name: str,
    *,
    base: str = "lazy",
    rules: Mapping[str, Threshold] = RULES,
    against: str | None = None,
    taken: bool = False,
    probes: tuple[Probe, ...] = (),
) -> EvaluationReport:
    measured = {"adapter": known[name], "base": known[base]}
    if against is not None:
        measured["against"] = known[against]
    digests = Digests(
        adapter=known[name].editor.weights, raw=None, base=digest_bytes(b"base"), judges=bench.judges.digests,
        suite=bench.plan.digest(), code=digest_bytes(b"code"),
    )  # fmt: skip
    wanted = Wanted(adapter=bench.place, rules=rules, taken=taken)
    return build_report(bench, measured, bench.truth(), wanted, digests, probes)


# -- one editor against its gate --


def test_a_perfect_editor_passes_every_rule(bench: Bench, known: Mapping[str, Measured]) -> None:
    report = report_of(bench, known, "perfect")
    assert report.verdict.passed, report.verdict.reasons
    assert report.verdict.failed == report.verdict.reasons == ()
    assert report.metric("paired_psnr").value.value == 60
    assert report.metric("top1_accuracy").value == report.metric("top1_accuracy").references["renders"]


@pytest.mark.parametrize(
    ("name", "culprits", "innocent"),
    [
        ("lazy", {"top1_accuracy", "control_linearity", "psnr_gain"}, {"identity_ratio"}),
        ("swapped", {"top1_accuracy", "structural_confusion"}, {"base_top1_accuracy", "identity_ratio"}),
        ("erratic", {"control_linearity"}, {"top1_accuracy", "structural_confusion", "paired_psnr"}),
        ("stranger", {"identity_ratio", "paired_psnr"}, {"top1_accuracy", "structural_confusion"}),
    ],
)
def test_a_bad_editor_is_refused_by_the_right_metric(
    bench: Bench, known: Mapping[str, Measured], name: str, culprits: set[str], innocent: set[str]
) -> None:
    rules = {metric: rule for metric, rule in RULES.items() if name != "lazy" or metric != "psnr_gain"}
    if name == "lazy":
        culprits = culprits - {"psnr_gain"}
    report = report_of(bench, known, name, rules=rules)
    assert not report.verdict.passed
    assert culprits <= set(report.verdict.failed)
    assert not innocent & set(report.verdict.failed)
    for culprit in culprits:
        assert any(reason.startswith(f"{culprit} is ") for reason in report.verdict.reasons)
        assert report.metric(culprit).examples, "the edits that speak against it are named"


def test_a_base_that_knows_the_expressions_already_is_refused(
    bench: Bench, known: Mapping[str, Measured]
) -> None:
    report = report_of(bench, known, "perfect", base="perfect")
    assert {"base_top1_accuracy", "psnr_gain"} <= set(report.verdict.failed)


def test_without_rules_nothing_fails_but_a_probe_does(bench: Bench, known: Mapping[str, Measured]) -> None:
    assert report_of(bench, known, "swapped", rules={}, probes=PROBES).verdict.passed
    wrong = PROBES[0].model_copy(update={"outcome": "fail"})
    report = report_of(bench, known, "perfect", probes=(wrong,))
    assert report.verdict.failed == (wrong.name,)


def test_a_regression_is_refused_and_shown_beside(bench: Bench, known: Mapping[str, Measured]) -> None:
    rule = {"top1_accuracy": Threshold(max_regression=0.1, direction="higher")}
    worse = report_of(bench, known, "swapped", rules=rule, against="perfect")
    assert worse.verdict.failed == ("top1_accuracy",)
    gap = worse.metric("top1_accuracy").difference
    assert gap is not None
    assert gap.high < 0
    assert gap.p_holm >= gap.p
    assert worse.against is not None
    assert worse.against.weights == known["perfect"].editor.weights
    assert len(worse.against_curves) == len(worse.curves)
    assert report_of(bench, known, "perfect", rules=rule, against="swapped").verdict.passed


def test_a_regression_rule_needs_something_to_compare_with(
    bench: Bench, known: Mapping[str, Measured]
) -> None:
    """Where the alias means another version, nothing to compare with is no way around the rule."""
    rule = {"top1_accuracy": Threshold(max_regression=0.1, direction="higher")}
    first = report_of(bench, known, "perfect", rules=rule)
    assert first.verdict.passed
    assert any("not judged" in note for note in first.verdict.notes)
    later = report_of(bench, known, "perfect", rules=rule, taken=True)
    assert later.verdict.failed == ("top1_accuracy",)


def test_a_rule_on_what_was_not_measured_is_not_kept(bench: Bench, known: Mapping[str, Measured]) -> None:
    found = report_of(bench, known, "perfect", rules={"no_such_thing": Threshold(min=1)})
    assert found.verdict.failed == ("no_such_thing",)
    assert "does not measure it" in found.verdict.reasons[0]


def test_the_worst_cases_come_first(bench: Bench) -> None:
    def one_mistake(plan: Plan, index: int, ask: Ask) -> Portrait:
        wrong = (index, ask) == (2, single("happy", 1.0))
        return right(plan, index, single("sad", 1.0) if wrong else ask)

    found = {"adapter": measured_as(bench, "mistaken", one_mistake), "lazy": measured_as(bench, "bare", lazy)}
    report = report_of(bench, found, "adapter", rules={"top1_accuracy": Threshold(min=1.0)})
    subject = bench.plan.subjects[2].name
    case = next(case for case in report.worst if case.subject == subject and "happy" in case.asked)
    assert case.judged_as == "sad"
    assert (subject, {"happy": 1.0}) in [
        (case.subject, case.asked) for case in report.metric("top1_accuracy").examples
    ]


def test_reports_are_the_same_every_time_and_survive_json(
    bench: Bench, known: Mapping[str, Measured]
) -> None:
    report = report_of(bench, known, "swapped", against="perfect")
    assert report == report_of(bench, known, "swapped", against="perfect")
    assert EvaluationReport.model_validate_json(report.model_dump_json()) == report
    assert report.predicate()["verdict"] == "fail"


# -- several editors --


@pytest.fixture(scope="module")
def crowd(bench: Bench) -> Bench:
    """Enough people for differences that are seen after all comparisons are counted."""
    suite = bench.plan.suite.model_copy(update={"identities": {"human": 16}, "blend_people": 0})
    return replace(bench, plan=plan_of(suite, load("pixelsmile-portraits").conditioning))


def said(bench: Bench, drawn: Callable[[Ask], Ask]) -> Readings:
    """Readings of an editor that shows this, by a judge that is right up to a little noise; no pixels."""
    plan, rng = bench.plan, np.random.default_rng(1)
    rows = [(index, ask) for index, one in enumerate(plan.subjects) for ask in one.asks]
    judged = np.stack([vector(drawn(ask)) for _, ask in rows]).astype(float)
    ones = np.ones(len(rows))
    usual = {"source_face": 1.0, "identity": 0.9, "psnr": 30.0, "background_lpips": 0.01}
    return Readings(
        subjects=np.array([index for index, _ in rows]),
        asks=tuple(ask for _, ask in rows),
        judged=judged + rng.normal(0, 0.01, judged.shape),
        values={name: usual.get(name, 1.0) * ones for name in VALUES},
    )


SHOWN: Mapping[str, Callable[[Ask], Ask]] = {
    "perfect": lambda ask: ask,
    "swapped": lambda ask: mixed({PARTNER[name]: x for name, x in ask}),
    "none": lambda ask: (),
    "weak": lambda ask: mixed({name: x / 2 for name, x in ask}),
}


def comparison_of(bench: Bench, names: Mapping[str, str]) -> Comparison:
    """What is called so and shows that."""
    made = AdapterCard.parse(json.dumps(card()).encode())
    editors = [
        Editor(name=name, folder=bench.place, weights=digest_bytes(kind.encode()), card=made)
        for name, kind in names.items()
    ]
    readings = {name: said(bench, SHOWN[kind]) for name, kind in names.items()}
    found = everything(editors, list(names))
    return Comparison(
        code_version="1", code=digest_bytes(b"code"), base=digest_bytes(b"base"), judges=bench.judges.names,
        judge_digests=bench.judges.digests, suite=bench.plan.describe(), suite_digest=bench.plan.digest(),
        adapters=tuple(Compared(name=name, reference=name, weights=None) for name in names),
        metrics=tables(bench, found, readings, said(bench, SHOWN["perfect"])),
        curves={name: measure.response_curves(bench.plan, one) for name, one in readings.items()},
    )  # fmt: skip


def test_only_real_differences_make_ranks(crowd: Bench) -> None:
    comparison = comparison_of(crowd, {name: name for name in ("swapped", "perfect", "none")})
    rows = {row.name: row for row in comparison.metrics}
    # Who shows nothing is right once in a while, by the noise of the judge; who is always wrong never is.
    assert rows["top1_accuracy"].ranks == {"perfect": 1, "none": 2, "swapped": 3}
    for row in rows.values():
        for pair in row.pairs:
            real = pair.gap.p_holm < 0.05 and not pair.gap.low <= 0 <= pair.gap.high
            assert (pair.better is not None) == real
            if real:
                better = pair.first if (pair.gap.value > 0) == (row.direction == "higher") else pair.second
                assert pair.better == better
        for name, rank in row.ranks.items():
            beaten = sum(
                name in (pair.first, pair.second) and pair.better not in (None, name) for pair in row.pairs
            )
            assert rank == 1 + beaten
    assert "top1_accuracy" in comparison.better("perfect", "swapped")
    assert comparison.better("swapped", "perfect") == ()
    assert TRUTH in rows["top1_accuracy"].values
    assert "base_top1_accuracy" not in rows


def test_an_editor_cannot_be_told_from_itself(crowd: Bench) -> None:
    found = comparison_of(crowd, {"one": "weak", "other": "weak"})
    assert all(set(row.ranks.values()) == {1} for row in found.metrics)
    text = compared(found, Path("place"))
    assert "one and other cannot be told apart on this suite" in text
    assert "is really better than" not in text


def test_the_more_are_compared_the_more_a_difference_must_show(crowd: Bench) -> None:
    def p(*names: str) -> float:
        rows = {row.name: row for row in comparison_of(crowd, {name: name for name in names}).metrics}
        pairs = {(pair.first, pair.second): pair for pair in rows["top1_accuracy"].pairs}
        return pairs["swapped", "perfect"].gap.p_holm

    assert p("swapped", "perfect") < p("swapped", "perfect", "none", "weak") < 0.05


def test_few_people_show_no_difference_and_are_not_ranked(crowd: Bench) -> None:
    """Three people exchange in eight ways: no p-value can be small."""
    suite = crowd.plan.suite.model_copy(update={"identities": {"human": 3}})
    few = replace(crowd, plan=plan_of(suite, load("pixelsmile-portraits").conditioning))
    found = comparison_of(few, {"swapped": "swapped", "perfect": "perfect"})
    assert all(set(row.ranks.values()) <= {1} for row in found.metrics)
    assert "3 people are too few" in found.warning
    assert found.warning[:20] in " ".join(compared(found, Path("place")).split())


def test_as_many_people_as_the_warning_says_show_a_difference(crowd: Bench) -> None:
    names = {"swapped": "swapped", "perfect": "perfect"}
    assert not comparison_of(crowd, names).warning
    suite = crowd.plan.suite.model_copy(update={"identities": {"human": 5}})
    few = replace(crowd, plan=plan_of(suite, load("pixelsmile-portraits").conditioning))
    (said,) = re.findall(r"(\d+) people could", comparison_of(few, names).warning)
    suite = crowd.plan.suite.model_copy(update={"identities": {"human": int(said)}})
    enough = replace(crowd, plan=plan_of(suite, load("pixelsmile-portraits").conditioning))
    assert comparison_of(enough, names).better("perfect", "swapped")


def test_a_difference_from_the_other_side() -> None:
    gap = Gap(value=0.2, low=0.1, high=0.4, p=0.01, p_holm=0.02, n=9, detectable=0.1)
    other = turned(gap)
    assert (other.value, other.low, other.high) == (-0.2, -0.4, -0.1)
    assert turned(other) == gap


def test_names_on_the_page_cannot_write_to_it(bench: Bench, known: Mapping[str, Measured]) -> None:
    names = {"<script>alert(1)</script>": "swapped", "b\x1b[31m": "perfect"}
    found = comparison_of(bench, names)
    text = page(found, bench.plan, {name: known[kind] for name, kind in names.items()})
    assert "<script" not in text
    assert "&lt;script" in text
    assert "\x1b" not in text
    assert "\x1b" not in compared(found, Path("place"))
    assert text.count("<polyline") == len(names) * len(bench.plan.expressions)


# -- the rest --


def test_one_measure_of_progress_ends_once() -> None:
    told: list[tuple[int, int, str]] = []
    whole = Whole(lambda stage, done, total, note="": told.append((done, total, note)), "evaluate", 10)
    first, second = whole.part("a", 4), whole.part("b", 6)
    first("edits", 1, 2, "edits")
    first("edits", 2, 2)
    second("judge", 3, 3)
    whole.end("done")
    assert told == [(2, 10, "a, edits"), (4, 10, "a"), (9, 10, "b"), (10, 10, "done")]


def test_progress_counts_edits_twice_and_answers_once(bench: Bench, known: Mapping[str, Measured]) -> None:
    told: list[int] = []
    counted = replace(bench, progress=lambda stage, done, total, note="": told.append(total))
    progress_of(counted, {"adapter": known["perfect"].editor}).end("done")
    assert told == [3 * bench.pictures(known["perfect"].editor)]


def test_true_answers_that_are_read_again_are_in_use(bench: Bench) -> None:
    """A clean-up removes what nobody has used for long; see `flows.garbage`."""
    first = bench.truth()
    (folder,) = bench.place.glob("truth-*")
    then = time.time() - 40 * 86_400
    os.utime(folder, (then, then))
    again = bench.truth()
    assert first is not None
    assert again is not None
    assert folder.stat().st_mtime > then + 86_400


def test_an_incomplete_adapter_folder_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no adapter folder"):
        candidate(tmp_path)


def test_a_folder_without_a_base_model_is_explained(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"model_index\.json is missing"):
        folder_digest(tmp_path)


def test_the_digest_of_a_base_covers_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "vae").mkdir()
    weights = tmp_path / "vae" / "weights.safetensors"
    weights.write_bytes(b"a")
    first = folder_digest(tmp_path)
    (tmp_path / "base.json").write_text("{}")
    assert folder_digest(tmp_path) == first, "a base that is registered is the same base"
    weights.write_bytes(b"b")
    assert folder_digest(tmp_path) != first
    weights.write_bytes(b"a")
    weights.rename(tmp_path / "vae" / "other.safetensors")
    assert folder_digest(tmp_path) != first
