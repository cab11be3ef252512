"""The suite's plan and measurement, with editors whose quality is known: perfect, lazy, swapped, erratic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from registry.digest import digest_bytes
from trainer.errors import BaseModelError, DataError, RecipeError
from trainer.evaluation import measure, pictures, suite
from trainer.evaluation.measure import Gallery
from trainer.evaluation.plan import NEUTRAL, Ask, Plan, mixed, plan_of, single, vector
from trainer.evaluation.report import Digests, EvaluationReport
from trainer.portraits.renderer import CONFUSING_PAIRS, EXPRESSIONS, render
from trainer.recipe import Recipe, parse

THRESHOLDS = {
    "top1_accuracy": 0.85,
    "base_top1_accuracy": 0.20,
    "structural_confusion": 0.08,
    "control_linearity": 0.85,
    "identity_ratio": 0.80,
    "paired_psnr": 22.0,
    "psnr_gain": 3.0,
}
DIGEST = digest_bytes(b"some bytes")
DIGESTS = Digests(adapter=DIGEST, raw=None, base=DIGEST, judges={"expression": DIGEST}, suite=DIGEST)

Editor = Callable[[Plan, int, Ask], Ask]
"""What an editor draws instead of what it was asked for."""


RECIPE = f"""
name: tiny
base: {{id: adapter-foundry/portraits-base, revision: "1", family: qwen-image-edit, license: Apache-2.0}}
data: {{identities: {{human: 2}}, validation: {{human: 1}}, first_identity: 0, intensities: [1.0]}}
lora: {{rank: 4, alpha: 4, targets: [attn.to_q]}}
optimiser: {{learning_rate: 0.01, steps: 100, batch_pairs: 2}}
losses: {{flow_matching: {{weight: 1}}}}
conditioning: {{template: "show a {{}} expression", expressions: [{", ".join(EXPRESSIONS)}]}}
evaluation:
  identities: {{human: 2, anime: 2}}
  first_identity: 900
  intensities: [0.0, 0.5, 1.0]
  steps: 2
  thresholds: {{{", ".join(f"{name}: {threshold}" for name, threshold in THRESHOLDS.items())}}}
release: {{adapter: tiny, license: Apache-2.0}}
"""


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return parse(RECIPE)


@pytest.fixture(scope="module")
def plan(recipe: Recipe) -> Plan:
    return plan_of(recipe)


def embed(pixels: np.ndarray) -> np.ndarray:
    """An identity encoder that knows people by the colours of 4 x 4 regions."""
    regions = pixels.reshape(len(pixels), 4, 16, 4, 16, 3).mean(axis=(2, 4)).reshape(len(pixels), -1) - 128
    return regions / np.linalg.norm(regions, axis=1, keepdims=True)


def perfect(plan: Plan, index: int, ask: Ask) -> Ask:
    return ask


def lazy(plan: Plan, index: int, ask: Ask) -> Ask:
    return NEUTRAL


def swapped(plan: Plan, index: int, ask: Ask) -> Ask:
    partner = {a: b for x, y in CONFUSING_PAIRS for a, b in ((x, y), (y, x))}
    return mixed({partner[name]: x for name, x in ask})


def erratic(plan: Plan, index: int, ask: Ask) -> Ask:
    """Right at full strength, without control on the way: too much for some people, nothing for others."""
    return mixed({name: x if x >= 1 else 1.4 * (index % 2) for name, x in ask})


def gallery(plan: Plan, editor: Editor, person: Callable[[int], int] = lambda index: index) -> Gallery:
    """True renders of what the editor draws; the judge knows what was drawn."""
    images, judged = {}, {}
    for index in range(len(plan.subjects)):
        subject = plan.subjects[person(index)]
        for ask in plan.everything(index):
            drawn = vector(editor(plan, index, ask))
            images[index, ask] = render(subject.person, drawn, place=subject.place)
            judged[index, ask] = drawn
    rows = iter(judged.values())
    return Gallery.of(images, lambda pixels: np.stack([next(rows) for _ in pixels]), embed)


@pytest.fixture(scope="module")
def truth(plan: Plan) -> Gallery:
    return gallery(plan, perfect)


def report_of(plan: Plan, truth: Gallery, edits: Gallery, base: Gallery | None = None) -> EvaluationReport:
    galleries = {"adapter": edits, "base": base or gallery(plan, lazy)}
    return suite.build_report(plan, galleries, truth, THRESHOLDS, DIGESTS, "1.0")


# -- plan ------------------------------------------------------------------------------------------------


def test_people_are_held_out_and_their_domains_alternate(recipe: Recipe, plan: Plan) -> None:
    assert [subject.person.domain for subject in plan.subjects] == ["human", "anime", "human", "anime"]
    seeds = {subject.person.seed for subject in plan.subjects}
    first = recipe.evaluation.first_identity
    assert seeds == set(range(first, first + 4))
    used = sum(recipe.data.identities.values()) + sum(recipe.data.validation.values())
    assert not seeds & set(range(recipe.data.first_identity, recipe.data.first_identity + used))


def test_each_request_is_made_once_and_neutral_is_shared(plan: Plan) -> None:
    for index in range(len(plan.subjects)):
        asks = plan.everything(index)
        assert len(asks) == len(set(asks))
        assert asks[0] == NEUTRAL == single("happy", 0.0)
        assert set(plan.full_strength()) <= set(asks)
        assert {single(name, x) for name in EXPRESSIONS for x in plan.intensities} <= set(asks)
    assert set(plan.blends) <= set(plan.everything(0))
    assert len(plan.blends) == 15


def test_a_request_does_not_depend_on_the_order_of_its_expressions() -> None:
    assert mixed({"sad": 0.5, "angry": 0.5}) == mixed({"angry": 0.5, "sad": 0.5, "happy": 0.0})
    assert vector(mixed({"sad": 0.5})).sum() == 0.5


def test_the_digest_of_the_suite_changes_with_what_is_asked(recipe: Recipe, plan: Plan) -> None:
    section = recipe.evaluation.model_copy(update={"steps": plan.steps + 1})
    other = plan_of(recipe.model_copy(update={"evaluation": section}))
    assert plan.digest() == plan_of(recipe).digest()
    assert plan.digest() != other.digest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intensities": (0.5, 1.0)}, "rise from 0"),
        ({"intensities": (0.0, 0.5)}, "contain 1"),
        ({"thresholds": {"top1": 0.9}}, "no metric is called 'top1'"),
        ({"thresholds": {"identity_ceiling": 0.9}}, "remove its threshold"),
    ],
)
def test_a_recipe_that_cannot_be_judged_is_explained(
    recipe: Recipe, change: dict[str, object], message: str
) -> None:
    section = recipe.evaluation.model_copy(update=change)
    with pytest.raises(RecipeError, match=message):
        plan_of(recipe.model_copy(update={"evaluation": section}))


@pytest.mark.parametrize("limits", [{"strength_max": 0.9}, {"strength_min": 0.1}])
def test_intensities_beyond_the_signed_range_are_explained(recipe: Recipe, limits: dict[str, float]) -> None:
    spec = recipe.conditioning.model_copy(update=limits)
    with pytest.raises(RecipeError, match="the adapter is made for"):
        plan_of(recipe.model_copy(update={"conditioning": spec}))


def test_the_intensity_strip_ends_where_the_signed_range_does(recipe: Recipe, plan: Plan) -> None:
    spec = recipe.conditioning.model_copy(update={"strength_max": 1.3})
    assert plan.strip[-1] == 1.5
    assert plan_of(recipe.model_copy(update={"conditioning": spec})).strip[-1] == 1.25


def test_an_unknown_expression_is_explained(recipe: Recipe) -> None:
    spec = recipe.conditioning.model_copy(update={"expressions": ("happy", "furious")})
    with pytest.raises(RecipeError, match="furious"):
        plan_of(recipe.model_copy(update={"conditioning": spec}))


# -- editors of known quality ----------------------------------------------------------------------------


def test_a_perfect_editor_passes_every_gate(plan: Plan, truth: Gallery) -> None:
    report = report_of(plan, truth, truth)
    assert report.verdict.passed
    assert report.verdict.failed == report.verdict.reasons == ()
    scalars = report.scalars()
    assert scalars["top1_accuracy"] == scalars["top1_accuracy.renders"] == 1
    assert scalars["control_linearity"] == pytest.approx(1)
    assert scalars["monotonicity"] == scalars["control_range"] == scalars["blend_success"] == 1
    assert scalars["structural_confusion"] == 0
    assert scalars["identity_ratio"] == pytest.approx(1)
    assert scalars["paired_psnr"] == 60
    assert scalars["seam_energy"] == scalars["seam_energy.renders"]
    assert scalars["seam_excess"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("editor", "culprits", "innocent"),
    [
        (lazy, {"top1_accuracy", "control_linearity", "psnr_gain"}, {"identity_ratio"}),
        (swapped, {"top1_accuracy", "structural_confusion"}, {"base_top1_accuracy", "identity_ratio"}),
        (erratic, {"control_linearity"}, {"top1_accuracy", "structural_confusion", "paired_psnr"}),
    ],
)
def test_a_bad_editor_is_refused_by_the_right_metric(
    plan: Plan, truth: Gallery, editor: Editor, culprits: set[str], innocent: set[str]
) -> None:
    report = report_of(plan, truth, gallery(plan, editor))
    assert not report.verdict.passed
    assert culprits <= set(report.verdict.failed)
    assert not innocent & set(report.verdict.failed)
    for name in culprits:
        assert any(
            reason.startswith(f"{name} is ") and "required" in reason for reason in report.verdict.reasons
        )


def test_another_person_is_refused_by_identity(plan: Plan, truth: Gallery) -> None:
    stranger = gallery(plan, perfect, person=lambda index: (index + 1) % len(plan.subjects))
    report = report_of(plan, truth, stranger)
    assert {"identity_ratio", "paired_psnr"} <= set(report.verdict.failed)
    assert "top1_accuracy" not in report.verdict.failed


def test_a_base_that_knows_the_expressions_already_is_refused(plan: Plan, truth: Gallery) -> None:
    report = report_of(plan, truth, truth, base=truth)
    assert {"base_top1_accuracy", "psnr_gain"} <= set(report.verdict.failed)


def test_the_worst_cases_come_first(plan: Plan, truth: Gallery) -> None:
    def one_mistake(plan: Plan, index: int, ask: Ask) -> Ask:
        return single("sad", 1.0) if (index, ask) == (2, single("happy", 1.0)) else ask

    case = report_of(plan, truth, gallery(plan, one_mistake)).worst[0]
    assert (case.identity, case.expression, case.judged_as) == (plan.subjects[2].name, "happy", "sad")
    assert case.paired_psnr < 40


def test_confusion_and_curves_of_a_perfect_editor(plan: Plan, truth: Gallery) -> None:
    assert np.array_equal(measure.confusion(plan, truth), np.eye(12))
    for curve in measure.response_curves(plan, truth):
        assert [value.value for value in curve.judged] == pytest.approx(list(curve.asked))


def test_reports_are_the_same_every_time_and_survive_json(plan: Plan, truth: Gallery) -> None:
    report = report_of(plan, truth, gallery(plan, swapped))
    assert report == report_of(plan, truth, gallery(plan, swapped))
    assert EvaluationReport.model_validate_json(report.model_dump_json()) == report


def test_sheets_and_page_are_written(plan: Plan, truth: Gallery, tmp_path: Path) -> None:
    report = report_of(plan, truth, gallery(plan, swapped))
    folder = tmp_path / "out"
    folder.mkdir()
    pictures.write(folder, report, plan, truth, truth, subject="pixelsmile")
    assert {path.name for path in folder.iterdir()} == {
        pictures.CONTACT_SHEET, pictures.INTENSITY_STRIP, pictures.BLEND_STRIP, pictures.PAGE
    }  # fmt: skip
    page = (folder / pictures.PAGE).read_text("utf-8")
    assert "structural_confusion is" in page


def test_the_shipped_judges_know_true_renders_of_held_out_people(plan: Plan, truth: Gallery) -> None:
    judges = suite.load_judges()
    assert set(judges.digests) == {"expression", "identity"}
    asks = plan.full_strength()
    images = {(index, ask): truth.images[index, ask] for index in range(len(plan.subjects)) for ask in asks}
    judged = Gallery.of(images, judges.expression, judges.identity)
    found = measure.full_strength(plan, judged, judged)
    assert found["top1_accuracy"].values.mean() >= 0.9
    assert found["structural_confusion"].values.mean() <= 0.05
    assert found["identity_similarity"].values.mean() >= 0.5


# -- inputs ----------------------------------------------------------------------------------------------


def test_an_incomplete_adapter_folder_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no adapter folder"):
        suite.candidate(tmp_path)


def test_a_folder_without_a_base_model_is_explained(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"model_index\.json is missing"):
        suite.folder_digest(tmp_path)


def test_the_digest_of_a_base_covers_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "vae").mkdir()
    weights = tmp_path / "vae" / "weights.safetensors"
    weights.write_bytes(b"a")
    first = suite.folder_digest(tmp_path)
    assert suite.folder_digest(tmp_path) == first
    weights.write_bytes(b"b")
    assert suite.folder_digest(tmp_path) != first
    weights.write_bytes(b"a")
    weights.rename(tmp_path / "vae" / "other.safetensors")
    assert suite.folder_digest(tmp_path) != first
