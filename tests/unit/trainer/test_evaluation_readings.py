"""Readings: known pictures give known figures, files come back as they were, paid judges are paid once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fakes import faces as dots
from fakes.tasks import photograph, write_list
from fakes.vendors import KEY, Fault, Vendor
from fakes.vlm import answer, vlm
from registry.digest import digest_bytes
from registry.manifest import ConditioningSpec
from trainer.apis.ledger import Ledger
from trainer.data import likeness
from trainer.data.blobs import Blobs, encode_png
from trainer.errors import BudgetSpent, DataError
from trainer.evaluation import background
from trainer.evaluation.judges import judges_of
from trainer.evaluation.plan import NEUTRAL, Plan, mixed, plan_of, single
from trainer.evaluation.reading import read, resized
from trainer.evaluation.readings import VALUES, Readings
from trainer.portraits.renderer import EXPRESSIONS
from trainer.progress import silent
from trainer.scoring.stage import _scorer
from trainer.sections import SuiteSection

HAPPY = single("happy", 1.0)


def plan_for(expressions: Sequence[str] = ("happy", "fear"), **changes: Any) -> Plan:
    value = {
        "name": "few",
        "identities": {"human": 2},
        "first_identity": 900,
        "intensities": [0, 1],
        **changes,
    }
    spec = ConditioningSpec(template="show a {} expression", expressions=tuple(expressions))
    return plan_of(SuiteSection.model_validate(value), spec)


Answer = Callable[[int, tuple[tuple[str, float], ...]], np.ndarray]


def readings_of(plan: Plan, folder: Path, answer: Answer) -> Readings:
    """What the suite's judges say of pictures that somebody makes."""
    blobs = Blobs(folder / "blobs")
    edited = {
        (index, ask): blobs.add(encode_png(answer(index, ask)), "image/png")
        for index, subject in enumerate(plan.subjects)
        for ask in subject.asks
    }
    return read(plan, judges_of(plan.suite, folder), edited, blobs, silent)


# -- drawn people ----------------------------------------------------------------------------------------


def test_true_answers_read_as_such(tmp_path: Path) -> None:
    plan = plan_for(EXPRESSIONS)
    found = readings_of(plan, tmp_path, lambda index, ask: plan.pictures.truth(index, ask))
    assert len(found) == 2 * 13
    full = found.singles(1.0)
    named = [EXPRESSIONS[best] for best in full.judged.argmax(axis=1)]
    assert np.mean([name == ask[0][0] for name, ask in zip(named, full.asks, strict=True)]) > 0.9
    assert (found.values["psnr"] == 60).all()
    assert (found.values["source_face"] == 1).all()
    assert np.allclose(found.values["seam"], found.values["seam_truth"])
    assert (found.values["background_ssim"] > 0.999).all()
    assert (found.values["background_lpips"] < 1e-6).all()
    neutral = found.where(row for row, ask in enumerate(found.asks) if not ask)
    assert np.allclose(neutral.values["identity"], 1.0, atol=1e-5)
    assert (full.values["identity"] > 0.6).all()


def test_the_source_for_every_request_is_lazy_and_keeps_the_background(tmp_path: Path) -> None:
    plan = plan_for()
    found = readings_of(plan, tmp_path, lambda index, ask: plan.pictures.source(index)).singles(1.0)
    assert np.allclose(found.values["identity"], 1.0, atol=1e-5)
    assert (found.values["background_ssim"] == 1.0).all()
    assert (found.values["psnr"] < 40).all()
    assert (found.judged < 0.5).all()


def test_another_person_is_seen_by_identity_and_background(tmp_path: Path) -> None:
    plan = plan_for()
    found = readings_of(plan, tmp_path, lambda index, ask: plan.pictures.truth(1 - index, ask))
    assert (found.values["identity"] < 0.6).all()
    assert (found.values["background_ssim"] < 0.9).all()
    assert (found.values["background_lpips"] > 0.05).all()


def test_pictures_are_read_alike_alone_and_among_others(tmp_path: Path) -> None:
    plan = plan_for(EXPRESSIONS)
    blobs, judges = Blobs(tmp_path / "blobs"), judges_of(plan.suite, tmp_path)
    keys = [(index, ask) for index, one in enumerate(plan.subjects) for ask in one.asks]
    edited = {key: blobs.add(encode_png(plan.pictures.truth(*key)), "image/png") for key in keys}
    whole = read(plan, judges, edited, blobs, silent)
    mixed_up = dict(reversed(edited.items()))
    turned = read(plan, judges, mixed_up, blobs, silent).where(reversed(range(len(keys))))
    assert turned.asks == whole.asks
    assert np.allclose(turned.judged, whole.judged, atol=1e-5)
    for name in VALUES:
        assert np.allclose(turned.values[name], whole.values[name], atol=1e-5)


def test_edits_in_another_size_are_compared_in_theirs(tmp_path: Path) -> None:
    plan = plan_for()
    found = readings_of(plan, tmp_path, lambda index, ask: resized(plan.pictures.source(index), (128, 128)))
    assert (found.values["background_ssim"] == 1.0).all()
    assert np.allclose(found.values["identity"], 1.0, atol=1e-5)


# -- backgrounds -----------------------------------------------------------------------------------------


def half(side: int = 64) -> np.ndarray:
    outside = np.ones((side, side), bool)
    outside[side // 4 :, side // 4 : 3 * side // 4] = False
    return outside


@pytest.mark.parametrize("measure", ["ssim", "lpips"])
def test_the_face_may_change_and_the_background_may_not(measure: str) -> None:
    source, outside, other = photograph(64, 64), half(), photograph(64, 64, 3)
    network = background.perceptual(True)
    assert network is not None
    compare = background.background_ssim if measure == "ssim" else network.distance
    face = np.where(outside[..., None], source, other)
    faint, strong = (
        np.where(outside[..., None], (source * (1 - x) + other * x).astype(np.uint8), source)
        for x in (0.2, 0.9)
    )
    same, changed_face, little, much = compare(source, np.stack([source, face, faint, strong]), outside)
    assert same == pytest.approx(changed_face, abs=1e-9)
    if measure == "ssim":
        assert same == 1.0
        assert 1 > little > much >= -1
    else:
        assert same == pytest.approx(0.0, abs=1e-9)
        assert 0 < little < much


@pytest.mark.parametrize("seed", range(4))
def test_ssim_is_that_of_the_paper(seed: int) -> None:
    from skimage.metrics import structural_similarity

    source, edits = photograph(48, 40, seed), np.stack([photograph(48, 40, seed + n) for n in range(3)])
    found = background.background_ssim(source, edits, np.ones((40, 48), bool))
    luma = np.array([0.299, 0.587, 0.114])
    for edit, figure in zip(edits, found, strict=True):
        whole = structural_similarity(
            source @ luma, edit @ luma, full=True, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False, data_range=255,
        )[1]  # fmt: skip
        assert figure == pytest.approx(whole.mean(), abs=1e-4)


def test_nothing_outside_has_no_figure() -> None:
    picture, nowhere = photograph(32, 32), np.zeros((32, 32), bool)
    network = background.perceptual(True)
    assert network is not None
    assert np.isnan(background.background_ssim(picture, picture[None], nowhere)).all()
    assert np.isnan(network.distance(picture, picture[None], nowhere)).all()


def test_small_and_large_faces_are_comparable() -> None:
    source, other = photograph(64, 64), photograph(64, 64, 5)
    network = background.perceptual(True)
    assert network is not None
    outside = half()
    seen = background.outside_only(source, other[None], outside)
    whole = network.distance(source, seen, np.ones((64, 64), bool))
    assert network.distance(source, other[None], outside) == pytest.approx(whole / outside.mean(), rel=1e-5)


# -- photographs -----------------------------------------------------------------------------------------


class Pack:
    """An InsightFace pack: finds faces of dots, and knows people by the colours around them."""

    @staticmethod
    def write(root: Path) -> None:
        import torch

        class Colours(torch.nn.Module):
            def forward(self, pixels: torch.Tensor) -> torch.Tensor:
                return torch.nn.functional.avg_pool2d(pixels, 28).flatten(1)

        folder = root / "models" / "buffalo_l"
        folder.mkdir(parents=True)
        dots.detector(folder / "det_10g.onnx")
        torch.onnx.export(
            Colours(), (torch.zeros(2, 3, 112, 112),), str(folder / "w600k_r50.onnx"), dynamo=False,
            input_names=["input.1"], dynamic_axes={"input.1": {0: "N"}}, opset_version=17,
        )  # fmt: skip


@pytest.fixture
def pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    Pack.write(tmp_path / "insightface")
    monkeypatch.setenv("ADAPTER_FOUNDRY_TRAINER_INSIGHTFACE_ROOT", str(tmp_path / "insightface"))
    likeness.faces.cache_clear()
    background.perceptual.cache_clear()
    yield
    likeness.faces.cache_clear()
    background.perceptual.cache_clear()


PLACE = (90.0, 80.0)


@pytest.fixture
def vendor() -> Iterator[Vendor]:
    with Vendor() as running:
        yield running


@pytest.fixture
def photographs(tmp_path: Path, vendor: Vendor) -> Plan:
    """Two pictures: one shows a face, in the other nobody is; judged by a model that says happy 0.8."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, pixels in (
        ("face.png", dots.drawn(dots.posed(0, 0.8, PLACE), 160, 200)),
        ("nobody.png", dots.nobody(160, 200)),
    ):
        Image.fromarray(pixels).save(folder / name)
    write_list(
        folder / "tasks.jsonl",
        [{"image": name, "face_box": [65, 60, 115, 120], "expression": "happy", "prompt": "smile"}
         for name in ("face.png", "nobody.png")],
    )  # fmt: skip
    vlm(vendor, lambda pixels, seed: answer({"happy": 0.8, "shy": 0.1}))
    return plan_for(
        ["happy"], source="tasks", identities={}, path=str(folder), faces="buffalo_l",
        judge={"scorer": "openai", "model": "seer-1", "license": "LicenseRef-terms",
               "endpoint": vendor.openai},
        api={"parallel": 1, "per_minute": 1e6, "timeout": 120, "requests": 4},
    )  # fmt: skip


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    _scorer.cache_clear()


@pytest.mark.usefixtures("pack")
def test_photographs_are_judged_by_a_model_and_by_faces(
    photographs: Plan, tmp_path: Path, vendor: Vendor
) -> None:
    plan, rng = photographs, np.random.default_rng(0)

    def edit(index: int, ask: object) -> np.ndarray:
        """The same face; the background becomes noise when somebody shall be happy."""
        source = plan.pictures.source(index)
        noise = rng.integers(0, 60, source.shape, np.uint8)
        return np.where(plan.pictures.outside(index)[..., None] & bool(ask), noise, source)

    found = readings_of(plan, tmp_path, edit)
    assert [plan.subjects[index].name for index in found.subjects] == ["face.png"] * 2 + ["nobody.png"] * 2
    assert (found.judged[:, EXPRESSIONS.index("happy")] == 0.8).all()
    assert found.values["source_face"].tolist() == [1, 1, 0, 0]
    assert np.allclose(found.values["identity"][:2], 1.0, atol=0.02)
    assert np.isnan(found.values["identity"][2:]).all()
    assert np.isnan(found.values["psnr"]).all()
    assert np.isnan(found.values["background_lpips"]).all()
    assert found.values["background_ssim"][0] == 1.0
    assert found.values["background_ssim"][1] < 0.6

    lines = list(Ledger(tmp_path / "apis").lines())
    paid = sum(line.status == "ok" for line in lines)
    assert paid == vendor.billed()["answers"] == 4
    assert {line.run for line in lines} == {"evaluation of few"}
    _scorer.cache_clear()
    rng = np.random.default_rng(0)
    again = readings_of(plan, tmp_path, edit)  # the answers are kept: another request would be one too many
    assert vendor.billed()["answers"] == 4
    assert (again.judged == found.judged).all()


@pytest.mark.usefixtures("pack")
def test_a_judge_over_the_net_stays_in_its_budget(photographs: Plan, tmp_path: Path, vendor: Vendor) -> None:
    numbers = iter(range(9))

    def edit(index: int, ask: object) -> np.ndarray:
        return photograph(160, 160, next(numbers))

    limited = photographs.suite.model_copy(
        update={"api": photographs.suite.api.model_copy(update={"requests": 3})}
    )
    plan = plan_of(limited, ConditioningSpec(template="show a {} expression", expressions=("happy",)))
    with pytest.raises(BudgetSpent):
        readings_of(plan, tmp_path, edit)
    assert vendor.billed()["answers"] == 3


@pytest.mark.usefixtures("pack")
def test_an_edit_without_a_face_has_no_identity(photographs: Plan, tmp_path: Path) -> None:
    found = readings_of(photographs, tmp_path, lambda index, ask: dots.nobody(160, 160))
    assert np.isnan(found.values["identity"]).all()
    assert found.values["source_face"].tolist() == [1, 1, 0, 0]


@pytest.mark.usefixtures("pack")
def test_somebody_else_in_the_picture_is_not_looked_at(photographs: Plan, tmp_path: Path) -> None:
    other = dots.drawn(dots.posed(90, 0.3, (135.0, 20.0)), 160, 160)

    def edit(index: int, ask: object) -> np.ndarray:
        beside = (other != dots.nobody(160, 160)).any(axis=2)
        assert photographs.pictures.outside(index)[beside].all()
        return np.where(beside[..., None], other, photographs.pictures.source(index))

    found = readings_of(photographs, tmp_path, edit)
    assert np.allclose(found.values["identity"][:2], 1.0, atol=1e-3)


@pytest.mark.usefixtures("pack")
def test_the_digest_of_faces_covers_both_networks(photographs: Plan, tmp_path: Path) -> None:
    before = judges_of(photographs.suite, tmp_path).digests["identity"]
    folder = tmp_path / "insightface" / "models" / "buffalo_l"
    dots.detector(folder / "det_10g.onnx", everywhere=True)
    likeness.faces.cache_clear()
    assert judges_of(photographs.suite, tmp_path).digests["identity"] != before


def test_what_the_judge_does_not_answer_is_a_row_of_nothing(tmp_path: Path, vendor: Vendor) -> None:
    vlm(vendor, lambda pixels, seed: answer({"happy": 0.8}))
    plan = plan_for(
        ["happy"], identities={"human": 1},
        judge={"scorer": "openai", "model": "seer-1", "license": "LicenseRef-terms",
               "endpoint": vendor.openai},
        api={"parallel": 1, "per_minute": 1e6, "timeout": 120},
    )  # fmt: skip
    vendor.faults[1] = Fault(kind="refusal")
    found = readings_of(plan, tmp_path, lambda index, ask: plan.pictures.truth(index, ask))
    assert np.isnan(found.judged[0]).all()
    assert np.isfinite(found.judged[1:]).all()


# -- files -----------------------------------------------------------------------------------------------

level = st.floats(0.001, 1.5).map(lambda x: round(x, 6))
requests = st.dictionaries(st.sampled_from(EXPRESSIONS), level, max_size=3).map(mixed)
numbers = st.one_of(st.floats(-60, 60), st.just(float("nan")))


@st.composite
def some_readings(draw: st.DrawFn) -> Readings:
    count = draw(st.integers(1, 6))
    row = st.lists(numbers, min_size=count, max_size=count)
    return Readings(
        subjects=np.array(draw(st.lists(st.integers(0, 200), min_size=count, max_size=count)), np.int64),
        asks=tuple(draw(st.lists(requests, min_size=count, max_size=count))),
        judged=np.array([draw(row) for _ in EXPRESSIONS]).T,
        values={name: np.array(draw(row)) for name in VALUES},
    )


def same(first: Readings, second: Readings) -> bool:
    return (
        first.asks == second.asks
        and np.array_equal(first.subjects, second.subjects)
        and np.array_equal(first.judged, second.judged, equal_nan=True)
        and all(np.array_equal(first.values[name], second.values[name], equal_nan=True) for name in VALUES)
    )


@given(some_readings(), st.data())
@settings(max_examples=40, deadline=None)
def test_readings_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, readings: Readings, data: st.DataObject
) -> None:
    file = tmp_path_factory.mktemp("readings") / "readings.parquet"
    readings.write(file, EXPRESSIONS)
    assert same(Readings.read(file, EXPRESSIONS), readings)
    cut = data.draw(st.integers(1, len(readings)))
    parts = [readings.where(range(cut)), readings.where(range(cut, len(readings)))]
    assert same(Readings.joined([part for part in parts if len(part)]), readings)


def test_rows_are_found_by_what_was_asked() -> None:
    asks = (NEUTRAL, HAPPY, single("happy", 0.5), mixed({"happy": 0.7, "fear": 0.7}), HAPPY)
    readings = Readings(
        subjects=np.array([0, 0, 0, 0, 1]), asks=asks, judged=np.zeros((5, 12)),
        values={name: np.arange(5.0) for name in VALUES},
    )  # fmt: skip
    assert readings.singles().asks == (HAPPY, single("happy", 0.5), HAPPY)
    assert readings.singles(1.0).subjects.tolist() == [0, 1]
    assert readings.row_of()[1, HAPPY] == 4


@pytest.mark.parametrize("how", ["gone", "cut", "other", "older"])
def test_a_damaged_file_is_explained(tmp_path: Path, how: str) -> None:
    import pyarrow.parquet as pq

    file = tmp_path / "readings.parquet"
    readings = Readings(
        subjects=np.array([0]),
        asks=(HAPPY,),
        judged=np.zeros((1, 12)),
        values=dict.fromkeys(VALUES, np.zeros(1)),
    )
    readings.write(file, EXPRESSIONS)
    if how == "gone":
        file.unlink()
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-20])
    elif how == "other":
        file.write_text("nothing of the kind")
    else:
        pq.write_table(pq.read_table(file).drop_columns(["seam"]), file)
    with pytest.raises(DataError, match="cannot be read") as caught:
        Readings.read(file, EXPRESSIONS)
    assert "evaluate again" in caught.value.mend


def test_a_picture_that_is_gone_is_explained(tmp_path: Path) -> None:
    plan = plan_for(["happy"])
    missing = digest_bytes(b"nothing")
    edited = {(0, NEUTRAL): missing}
    with pytest.raises(DataError):
        read(plan, judges_of(plan.suite, tmp_path), edited, Blobs(tmp_path / "blobs"), silent)
