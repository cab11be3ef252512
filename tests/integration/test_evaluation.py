"""The whole evaluation on an untrained base: real admission, engine and files; only the judges are fakes."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fakes.adapters import card, container, factors, folder, rescaled
from registry.digest import digest_bytes
from registry.errors import RegistryError
from registry.families import KNOWN_BASES
from registry.manifest import WEIGHTS_NAME
from serving.errors import AdapterMismatch
from trainer.errors import DataError
from trainer.evaluation import EvaluationReport, Judges, evaluate
from trainer.evaluation.editing import edit_part
from trainer.parts import Part, PartFunction
from trainer.portraits.base import BASE_ID, build
from trainer.portraits.renderer import EXPRESSIONS
from trainer.recipe import Recipe, change, parse
from trainer.stage import STAGE_NAME

pytestmark = [pytest.mark.integration]

BASE = KNOWN_BASES[BASE_ID]
ASKED = ("fear", "happy", "surprised")
RECIPE = f"""
name: tiny
base: {{id: {BASE.id}, revision: "{BASE.revision}", family: {BASE.family}, license: {BASE.license}}}
data: {{identities: {{human: 2}}, validation: {{human: 1}}, first_identity: 0, intensities: [1.0]}}
lora: {{rank: 4, alpha: 8, targets: [attn.to_q]}}
optimiser: {{learning_rate: 0.01, steps: 100, batch_pairs: 2}}
losses: {{flow_matching: {{weight: 1}}}}
conditioning: {{template: "show a {{}} expression", expressions: [{", ".join(ASKED)}]}}
evaluation:
  identities: {{human: 1, anime: 1}}
  first_identity: 900
  intensities: [0.0, 1.0]
  steps: 1
  thresholds: {{top1_accuracy: 0.99, paired_psnr: 40}}
release: {{adapter: tiny, license: Apache-2.0}}
"""


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return parse(RECIPE)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("base") / "portraits")


@pytest.fixture(scope="module")
def judges() -> Judges:
    """Judges that look at the pixels and know nothing: fixed random projections."""
    rng = np.random.default_rng(0)
    projection = rng.normal(size=(192, 12))

    def regions(pixels: np.ndarray) -> np.ndarray:
        assert pixels.dtype == np.uint8
        return pixels.reshape(len(pixels), 8, 8, 8, 8, 3).mean(axis=(2, 4)).reshape(len(pixels), -1) / 255

    def expression(pixels: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-regions(pixels) @ projection))

    def identity(pixels: np.ndarray) -> np.ndarray:
        rows = regions(pixels)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    return Judges(expression=expression, identity=identity, digests={"expression": digest_bytes(b"fake")})


def write_adapter(path: Path, seed: int, size: float = 1.0) -> Path:
    values = card(BASE)
    values["conditioning"]["expressions"] = list(ASKED)
    tensors = {key: value * size for key, value in factors(BASE, seed=seed).items()}
    path.mkdir()
    for name, data in folder(container(tensors), values).items():
        (path / name).write_bytes(data)
    return path


@pytest.fixture(scope="module")
def evaluated(
    tmp_path_factory: pytest.TempPathFactory, recipe: Recipe, base: Path, judges: Judges
) -> tuple[Path, EvaluationReport, list[tuple[int, int]]]:
    """One evaluation: its folder, its report and the progress that it told."""
    place = tmp_path_factory.mktemp("evaluation")
    steps: list[tuple[int, int]] = []
    report = evaluate(
        recipe,
        write_adapter(place / "ema", seed=1),
        base,
        place / "out",
        raw_dir=write_adapter(place / "raw", seed=2),
        progress=lambda stage, done, total, note="": steps.append((done, total)),
        judges=judges,
    )
    return place, report, steps


def test_every_file_is_there_and_says_the_same(
    evaluated: tuple[Path, EvaluationReport, list[tuple[int, int]]],
) -> None:
    place, report, _ = evaluated
    out = place / "out"
    assert {path.name for path in out.iterdir()} == {
        "evaluation.json", "report.html", "contact_sheet.png", "intensity_strip.png", "blend_strip.png",
        STAGE_NAME,
    }  # fmt: skip
    assert EvaluationReport.model_validate_json((out / "evaluation.json").read_bytes()) == report
    assert json.loads((out / STAGE_NAME).read_text())["facts"]["verdict"] == "refused"
    width, height = Image.open(out / "contact_sheet.png").size
    assert width > 4 * 128
    assert height > 2 * 128


@pytest.mark.parametrize("batch", [1, 8])
def test_the_report_is_the_same_whoever_edits(
    evaluated: tuple[Path, EvaluationReport, list[tuple[int, int]]],
    recipe: Recipe,
    base: Path,
    judges: Judges,
    batch: int,
) -> None:
    place, report, _ = evaluated
    done: list[int] = []

    def backwards(stage: str, function: PartFunction, parts: Sequence[Part]) -> Iterator[None]:
        for part in reversed(parts):
            sent = pickle.loads(pickle.dumps(dict(part)))
            function(**sent)
            done.append(sent["number"])
            yield

    again = evaluate(
        change(recipe, {"running.batch": batch}), place / "ema", base, place / f"parts-{batch}",
        raw_dir=place / "raw", judges=judges, mapper=backwards,
    )  # fmt: skip
    assert again == report
    assert done == sorted(done, reverse=True)
    assert len(done) > 1
    for name in ("evaluation.json", "contact_sheet.png"):
        assert (place / f"parts-{batch}" / name).read_bytes() == (place / "out" / name).read_bytes()
    assert not list(place.glob(".parts-*")), "the parts are gone"


def test_a_part_refuses_an_adapter_that_was_changed(
    evaluated: tuple[Path, EvaluationReport, list[tuple[int, int]]], recipe: Recipe, base: Path
) -> None:
    place, report, _ = evaluated
    with pytest.raises(DataError, match="not the one"):
        edit_part(
            place,
            recipe=recipe.model_dump(mode="json", exclude_unset=True),
            candidates=[["adapter", str(place / "raw"), str(report.digests.adapter)]],
            base=str(base),
            units=[["adapter", 0]],
        )


def test_the_report_names_what_was_judged(
    evaluated: tuple[Path, EvaluationReport, list[tuple[int, int]]], recipe: Recipe
) -> None:
    place, report, _ = evaluated
    assert report.digests.adapter == digest_bytes((place / "ema" / WEIGHTS_NAME).read_bytes())
    assert report.digests.raw == digest_bytes((place / "raw" / WEIGHTS_NAME).read_bytes())
    assert report.suite.expressions == ASKED
    assert report.suite.judged == EXPRESSIONS
    assert report.suite.confusing_pairs == (("fear", "surprised"),)
    assert report.suite.identities == ("human 900", "anime 901")
    assert set(report.metric("top1_accuracy").references) == {"raw", "base", "renders"}
    assert set(report.metric("paired_psnr").references) == {"raw", "base"}
    assert report.metric("psnr_gain").references.keys() == {"raw"}


def test_an_adapter_that_learned_nothing_is_refused_with_reasons(
    evaluated: tuple[Path, EvaluationReport, list[tuple[int, int]]],
) -> None:
    _, report, _ = evaluated
    assert report.verdict.failed == ("top1_accuracy", "paired_psnr")
    page = (evaluated[0] / "out" / "report.html").read_text("utf-8")
    assert all(reason in page for reason in report.verdict.reasons)


def test_adapter_base_and_raw_are_really_different_edits(
    evaluated: tuple[Path, EvaluationReport, list[tuple[int, int]]],
) -> None:
    psnr = evaluated[1].metric("paired_psnr")
    assert len({psnr.value.value, psnr.references["raw"].value, psnr.references["base"].value}) == 3


def test_progress_counts_every_person_of_every_editor(
    evaluated: tuple[Path, EvaluationReport, list[tuple[int, int]]],
) -> None:
    steps = evaluated[2]
    assert [done for done, _ in steps] == list(range(7))
    assert {total for _, total in steps} == {6}


def test_the_same_evaluation_again_is_reused_and_another_one_is_not(
    evaluated: tuple[Path, EvaluationReport, list[tuple[int, int]]],
    recipe: Recipe,
    base: Path,
    judges: Judges,
    tmp_path: Path,
) -> None:
    place, report, _ = evaluated
    before = (place / "out" / "evaluation.json").stat().st_mtime_ns

    def never(stage: str, done: int, total: int, note: str = "") -> None:
        raise AssertionError("nothing had to be edited")

    again = evaluate(recipe, place / "ema", base, place / "out", place / "raw", never, judges)
    assert again == report
    assert (place / "out" / "evaluation.json").stat().st_mtime_ns == before
    with pytest.raises(AssertionError, match="nothing had to be edited"):
        evaluate(recipe, place / "raw", base, place / "out", place / "raw", never, judges)
    assert (place / "out" / "evaluation.json").stat().st_mtime_ns == before


def test_an_adapter_that_fails_the_scan_is_never_edited_with(
    recipe: Recipe, base: Path, judges: Judges, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", seed=1)
    weights = adapter / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes() + b"\0")
    with pytest.raises(RegistryError):
        evaluate(recipe, adapter, base, tmp_path / "out", judges=judges)
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_somebody_has_to_review_can_be_evaluated(
    recipe: Recipe, base: Path, judges: Judges, tmp_path: Path
) -> None:
    """The scan cannot bound DoRA; what it does to pictures is in the report that the reviewer reads."""
    adapter = write_adapter(tmp_path / "adapter", seed=1)
    (adapter / WEIGHTS_NAME).write_bytes(container(rescaled(factors(BASE, seed=1))))
    report = evaluate(recipe, adapter, base, tmp_path / "out", judges=judges)
    assert (tmp_path / "out" / "evaluation.json").exists()
    assert report.digests.adapter == digest_bytes((adapter / WEIGHTS_NAME).read_bytes())


def test_an_adapter_of_another_shape_is_refused_and_leaves_nothing(
    recipe: Recipe, judges: Judges, tmp_path: Path
) -> None:
    other = build(tmp_path / "narrow", width=64)
    adapter = write_adapter(tmp_path / "adapter", seed=1)
    with pytest.raises(AdapterMismatch):
        evaluate(recipe, adapter, other, tmp_path / "out", judges=judges)
    assert {path.name for path in tmp_path.iterdir()} == {"home", "narrow", "adapter"}
