"""Datasets: the same again, nothing damaged believed; each filter leaves out what it is for and counts it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from fakes import faces as dots
from fakes.datasets import Row, drawn, resigned, rewritten, true_scores, write_stages
from registry.digest import digest_bytes
from registry.manifest import Ingredient
from trainer.data import Dataset, build_triplets, cache_dataset
from trainer.data.blobs import Blobs, encode_png
from trainer.data.cache import TensorCache, View
from trainer.data.digests import pixel_digest
from trainer.data.filters import FILTERS
from trainer.data.likeness import faces
from trainer.data.provenance import combined
from trainer.errors import CacheError, DataError
from trainer.parts import here
from trainer.portraits import judges
from trainer.recipe import Recipe
from trainer.scoring import score
from trainer.synthesis import synthesise

PEOPLE = {"human-100": "train", "human-101": "train", "anime-102": "train", "human-103": "validation"}
NAMES, LEVELS = ("fear", "surprised", "angry", "disgust"), (0.5, 1.0)
EACH = 1 + len(NAMES) * len(LEVELS)
_ROWS = drawn(PEOPLE, NAMES, LEVELS)


def rows() -> list[Row]:
    return [dict(row) for row in _ROWS]


def row_of(found: list[Row], who: int, name: str | None, level: float = 0.0) -> Row:
    person = list(PEOPLE)[who]
    return next(row for row in found if (row["identity"], row["expression"], row["intensity"]) ==
                (person, name, level))  # fmt: skip


def with_filters(recipe: Recipe, **filters: object) -> Recipe:
    asked = recipe.data.filters.model_copy(update=filters)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"filters": asked})})


def built(recipe: Recipe, folder: Path, made: list[Row], scores: list[Row] | None = None, **options: Any):
    """Write the stages and build; return the result and the opened dataset."""
    places = write_stages(folder, made, true_scores(made, NAMES) if scores is None else scores, NAMES)
    result = build_triplets(recipe, *places, folder / "dataset", **options)
    return result, Dataset.open(folder / "dataset")


def rejects(data: Dataset, what: str) -> list[dict[str, Any]]:
    return [row for row in data.table("rejects").to_pylist() if row["what"] == what]


# The same again


def test_the_dataset_is_a_function_of_its_inputs(tiny_recipe: Recipe, tmp_path: Path) -> None:
    result, data = built(tiny_recipe, tmp_path / "a", rows())
    assert built(tiny_recipe, tmp_path / "b", rows())[0].digest == result.digest == data.digest
    assert data.digest == digest_bytes((tmp_path / "a/dataset/manifest.json").read_bytes())
    found = {name: result.facts[name] for name in ("triplets", "validation", "rejected")}
    assert found == {"triplets": 3 * 2 * 2, "validation": 2 * 2, "rejected": 0}
    stages = (tmp_path / "a" / "images", tmp_path / "a" / "scored")
    assert build_triplets(tiny_recipe, *stages, tmp_path / "a" / "dataset").reused
    people = {split: {t.identity for t in data.triplets if t.split == split}
              for split in ("train", "validation")}  # fmt: skip
    assert people == {"train": {*PEOPLE} - {"human-103"}, "validation": {"human-103"}}
    assert {(t.a.expression, t.b.expression) for t in data.triplets} == {NAMES[:2], NAMES[2:]}
    assert all(t.a.intensity == t.b.intensity for t in data.triplets)


def test_pictures_come_back_as_they_were_made(tiny_recipe: Recipe, tmp_path: Path) -> None:
    _, data = built(tiny_recipe, tmp_path, rows())
    for row, shown in zip(rows(), data.pictures(range(len(_ROWS))), strict=True):
        assert np.array_equal(shown, row["pixels"])
    files = [Blobs(tmp_path / "images" / "blobs").read(one) for one in data.files]
    assert files == [data.blobs.read(one) for one in data.files]
    told = data.table("images").to_pylist()
    assert [one["truth_fear"] for one in told] == [float(np.float32(row["truth"][5])) for row in rows()]
    assert [one["score_fear"] for one in told] == [one["truth_fear"] for one in told]
    assert [one["pdq_distance"] is None for one in told] == [row["expression"] is None for row in rows()]
    assert {(one["width"], one["height"]) for one in told} == {(64, 64)}


def test_other_packing_of_the_same_rows_is_the_same_version(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """As another pyarrow would write them: other pages, statistics, no dictionaries."""
    _, data = built(tiny_recipe, tmp_path, rows())
    folder = tmp_path / "dataset"
    before = (folder / "images.parquet").read_bytes()
    for name in ("images", "triplets", "rejects"):
        resigned(folder, name, pq.read_table(folder / f"{name}.parquet"), manifest=False,
                 row_group_size=7, use_dictionary=False)  # fmt: skip
    assert (folder / "images.parquet").read_bytes() != before
    again = Dataset.open(folder)
    assert again.digest == data.digest
    assert again.triplets == data.triplets


def test_other_bytes_of_the_same_pixels_are_another_version_with_the_same_cache(
    tiny_recipe: Recipe, tmp_path: Path
) -> None:
    def smaller(pixels: np.ndarray) -> bytes:
        path = tmp_path / "one.png"
        Image.fromarray(pixels).save(path, optimize=True)
        return path.read_bytes()

    _, data = built(tiny_recipe, tmp_path / "a", rows())
    stages = write_stages(tmp_path / "b", rows(), true_scores(rows(), NAMES), NAMES, encode=smaller)
    build_triplets(tiny_recipe, *stages, tmp_path / "b" / "dataset")
    other = Dataset.open(tmp_path / "b" / "dataset")
    assert other.digest != data.digest
    assert (other.image_digests, other.triplets) == (data.image_digests, data.triplets)


def test_a_build_that_was_stopped_goes_on_where_it_was(tiny_recipe: Recipe, tmp_path: Path) -> None:
    made = write_stages(tmp_path, rows(), true_scores(rows(), NAMES), NAMES)

    def fails(stage: str, function: Callable[..., Any], parts: Any) -> Iterator[None]:
        yield from here(stage, function, parts)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_triplets(tiny_recipe, *made, tmp_path / "dataset", mapper=fails)
    assert not (tmp_path / "dataset").exists()
    asked: list[int] = []

    def counting(stage: str, function: Callable[..., Any], parts: Any) -> Iterator[None]:
        asked.append(len(parts))
        return here(stage, function, parts)

    result = build_triplets(tiny_recipe, *made, tmp_path / "dataset", mapper=counting)
    assert asked == [0]
    assert result.digest == built(tiny_recipe, tmp_path / "other", rows())[0].digest
    assert {path.name for path in tmp_path.glob(".*")} == {".dataset.lock"}


def test_the_stages_before_fit(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """The renderer and the shipped judge; what they are is named for the adapter's card."""
    synthesise(tiny_recipe, tmp_path / "images")
    score(tiny_recipe, tmp_path / "images", tmp_path / "scored")
    recipe = with_filters(tiny_recipe, min_score=0.01, min_identity=0.75, max_duplicate=16)
    result = build_triplets(recipe, tmp_path / "images", tmp_path / "scored", tmp_path / "dataset")
    data = Dataset.open(tmp_path / "dataset")
    assert result.facts["triplets"] + result.facts["validation"] + result.facts["rejected"] == 16
    assert {one.kind for one in data.ingredients} == {"identity-images", "judge", "auxiliary-model"}
    assert {one.license for one in data.ingredients} == {"Apache-2.0"}
    assert {one.split("-")[0] for one in data.manifest.splits["train"]} == {"human", "anime"}
    told = data.table("images").to_pylist()
    assert all(one["similarity"] > 0.75 for one in told if one["expression"] is not None)


# Filters


def blurred(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(2)))


def spoil_refused(made: list[Row], scores: list[Row]) -> None:
    row = row_of(made, 0, "fear", 0.5)
    row.pop("pixels")
    row["refused"] = "the vendor refuses to edit this person"
    del scores[row["number"]]


def spoil_status(status: str) -> Callable[[list[Row], list[Row]], None]:
    def spoil(made: list[Row], scores: list[Row]) -> None:
        one = scores[row_of(made, 0, "fear", 0.5)["number"]]
        one |= {"status": status, "reason": "samples differ by 0.4", "confidence": 0.1}
        if status == "quarantined":
            one |= {name: None for name in one if name.startswith("score_")}

    return spoil


def spoil_score(column: str, value: float, level: float = 0.5) -> Callable[[list[Row], list[Row]], None]:
    def spoil(made: list[Row], scores: list[Row]) -> None:
        scores[row_of(made, 0, "fear", level)["number"]][column] = value

    return spoil


def spoil_picture(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[list[Row], list[Row]], None]:
    def spoil(made: list[Row], scores: list[Row]) -> None:
        row = row_of(made, 0, "fear", 0.5)
        row["pixels"] = change(row["pixels"])

    return spoil


def swap_person(made: list[Row], scores: list[Row]) -> None:
    """The second person's fear at 0.5 shows the third one."""
    row_of(made, 1, "fear", 0.5)["pixels"] = row_of(made, 2, "fear", 0.5)["pixels"]


def nearly_the_source(made: list[Row], scores: list[Row]) -> None:
    pixels = row_of(made, 0, None)["pixels"].copy()
    pixels[0, 0] ^= 1
    row_of(made, 0, "fear", 0.5)["pixels"] = pixels


Spoil = Callable[[list[Row], list[Row]], None]
#: Filter -> what is wrong with one picture, the settings that mind it, and what is written about it.
CASES: list[tuple[str, Spoil, dict[str, Any], str, float | None]] = [
    ("refused", spoil_refused, {}, "the vendor refuses to edit this person", None),
    ("quarantined", spoil_status("quarantined"), {}, "in quarantine: samples differ by 0.4", None),
    ("review", spoil_status("review"), {}, "waits for a review: samples differ by 0.4", None),
    ("confidence", spoil_score("confidence", 0.25), {"min_confidence": 0.5}, "sure to 0.25 only", 0.25),
    ("score", spoil_score("score_fear", 0.01), {}, "fear at 0.5 is seen at 0.01 only", 0.01),
    ("strongest", spoil_score("score_angry", 2.0, 1.0), {}, "fear at 1 is taken for angry", -1.0),
    ("strongest", spoil_score("score_angry", 0.75, 1.0), {"min_margin": 0.5}, "only 0.25 above angry", 0.25),
    ("identity", swap_person, {"min_identity": 0.75}, "like the source's", None),
    ("sharpness", spoil_picture(blurred), {"min_sharpness": 200.0}, "it is blurred", None),
    ("unchanged", nearly_the_source, {"max_unchanged": 0}, "but for 0 bits", 0.0),
]  # fmt: skip
OFF: dict[str, dict[str, Any]] = {
    "confidence": {"min_confidence": 0.0}, "score": {"min_score": 0.0}, "strongest": {"min_margin": 0.0},
    "identity": {"min_identity": None}, "sharpness": {"min_sharpness": 0.0},
    "unchanged": {"max_unchanged": None},
}  # fmt: skip


@pytest.mark.parametrize(("name", "spoil", "asked", "reason", "value"), CASES, ids=[c[3] for c in CASES])
def test_each_filter_leaves_out_what_it_is_for(
    tiny_recipe: Recipe, tmp_path: Path, name: str, spoil: Spoil, asked: dict[str, Any], reason: str,
    value: float | None,
) -> None:  # fmt: skip
    made = rows()
    scores = true_scores(made, NAMES)
    spoil(made, scores)
    result, data = built(with_filters(tiny_recipe, **asked), tmp_path / "on", made, scores)
    (left_out,) = rejects(data, "picture")
    assert (left_out["filter"], left_out["identity"]) == (
        name,
        list(PEOPLE)[1 if spoil is swap_person else 0],
    )
    assert reason in left_out["reason"]
    if value is not None:
        assert left_out["value"] == pytest.approx(value)
        assert left_out["threshold"] is not None
    (missed,) = rejects(data, "triplet")
    assert (missed["filter"], missed["reason"]) == (name, left_out["reason"])
    assert (missed["expression"], missed["other"]) == ("fear", "surprised")
    assert result.facts["rejected"] == 1
    counted = {one["filter"]: one for one in result.facts["filters"]["pictures"]}
    assert counted[name]["left_out"] == 1
    assert sum(one["left_out"] for one in counted.values()) == 1
    if name in OFF and (name, asked) not in (("strongest", {}), ("score", {})):
        result, data = built(with_filters(tiny_recipe, **OFF[name]), tmp_path / "off", made, scores)
        assert result.facts["rejected"] == 0
        assert name == "strongest" or name not in {one.filter for one in data.manifest.pictures}


def test_every_filter_has_a_case() -> None:
    elsewhere = {"face", "duplicate"}  # below
    assert {judge.__name__ for judge, _ in FILTERS} == {case[0] for case in CASES} | elsewhere


def test_who_is_there_twice_is_left_out_whatever_the_name_and_the_split(
    tiny_recipe: Recipe, tmp_path: Path
) -> None:
    """The person of the validation is one of the training under another name, saved as a JPEG before."""
    made = rows()
    for row in made[-EACH:]:
        twin = row_of(made, 0, row["expression"], row["intensity"])["pixels"]
        Image.fromarray(twin).save(tmp_path / "one.jpg", quality=90)
        row["pixels"] = np.asarray(Image.open(tmp_path / "one.jpg"))
    result, data = built(with_filters(tiny_recipe, max_duplicate=16), tmp_path / "on", made)
    assert result.facts["validation"] == 0
    assert {one["identity"] for one in rejects(data, "picture")} == {"human-103"}
    assert len(rejects(data, "picture")) == EACH
    assert all("human-103 is human-100" in one["reason"] and one["value"] <= 16
               for one in rejects(data, "triplet"))  # fmt: skip
    assert data.manifest.splits["validation"] == ()
    result, _ = built(tiny_recipe, tmp_path / "off", made)
    assert result.facts["validation"] == 4


def test_of_a_chain_of_people_not_all_are_left_out(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """Three times one person: the first stays."""
    made = rows()
    for who in (1, 2):
        for row in made[who * EACH : (who + 1) * EACH]:
            row["pixels"] = row_of(made, 0, row["expression"], row["intensity"])["pixels"].copy()
            row["pixels"][who, 0] ^= 1
    _, data = built(with_filters(tiny_recipe, max_duplicate=16), tmp_path, made)
    assert data.manifest.splits["train"] == ("human-100",)


@pytest.fixture
def pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A model pack whose detector finds faces of dots."""
    folder = tmp_path / "insightface" / "models" / "antelopev2"
    folder.mkdir(parents=True)
    shutil.copy(judges.path("identity"), folder / "glintr100.onnx")
    dots.detector(folder / "scrfd_10g_bnkps.onnx")
    monkeypatch.setenv("ADAPTER_FOUNDRY_TRAINER_INSIGHTFACE_ROOT", str(tmp_path / "insightface"))
    faces.cache_clear()
    yield
    faces.cache_clear()


def test_pictures_without_a_face_are_left_out_and_the_encoder_is_named(
    tiny_recipe: Recipe, tmp_path: Path, pack: None
) -> None:
    made = rows()
    for number, row in enumerate(made):
        row["pixels"] = dots.drawn(dots.posed(number, 0.8, (60, 60)), 120, 120)
    row_of(made, 0, "fear", 0.5)["pixels"] = dots.nobody(120, 120)
    recipe = with_filters(tiny_recipe, face_encoder="antelopev2")
    _, data = built(recipe, tmp_path, made)
    (left_out,) = rejects(data, "picture")
    assert (left_out["filter"], left_out["reason"]) == ("face", "no face was found in it")
    told = data.table("images").to_pylist()
    assert all(one["face"] for one in told)
    assert all((one["similarity"] is None) == (one["expression"] is None) for one in told)
    assert {("antelopev2/glintr100.onnx", "LicenseRef-InsightFace-Non-Commercial")} <= {
        (one.name, one.license) for one in data.ingredients
    }


def test_a_source_without_a_face_takes_its_edits_with_it(
    tiny_recipe: Recipe, tmp_path: Path, pack: None
) -> None:
    made = rows()
    for number, row in enumerate(made):
        row["pixels"] = dots.drawn(dots.posed(number, 0.8, (60, 60)), 120, 120)
    row_of(made, 0, None)["pixels"] = dots.nobody(120, 120)
    recipe = with_filters(tiny_recipe, face_encoder="antelopev2", min_identity=-1.0)
    _, data = built(recipe, tmp_path, made)
    assert [one["expression"] for one in rejects(data, "picture")] == [None]
    assert [one["filter"] for one in rejects(data, "triplet")] == ["face"] * 4


def test_a_missing_intensity_is_not_replaced_by_the_nearest(tiny_recipe: Recipe, tmp_path: Path) -> None:
    made = [row for row in rows() if row is not None]
    gone = row_of(made, 0, "surprised", 0.5)["number"]
    made = [row for row in made if row["number"] != gone]
    _, data = built(tiny_recipe, tmp_path, made)
    (missed,) = rejects(data, "triplet")
    assert (missed["filter"], missed["reason"]) == ("missing", "there is no picture of surprised at 0.5")
    assert not any(t.a.intensity != t.b.intensity for t in data.triplets)


def test_people_with_several_pictures_are_grouped_by_pose(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """As edited people are: no domain, a number for each portrait."""
    made = rows()
    for row in made:
        row["domain"], row["pose"] = None, list(PEOPLE).index(row["identity"]) % 2
        row["identity"] = "anna" if row["split"] == "train" else "ben"
    for row in made[2 * EACH : 3 * EACH]:
        row["pose"] = 2
    _, data = built(tiny_recipe, tmp_path / "a", made)
    assert len({(t.identity, t.source) for t in data.triplets}) == 4
    made[2 * EACH]["pose"] = 0
    with pytest.raises(DataError, match="anna has two neutral pictures in one pose"):
        built(tiny_recipe, tmp_path / "b", made)


def test_equal_pictures_are_kept_out(tiny_recipe: Recipe, tmp_path: Path) -> None:
    made = rows()
    row_of(made, 0, "surprised", 0.5)["pixels"] = row_of(made, 0, "fear", 0.5)["pixels"]
    made[-EACH]["pixels"] = row_of(made, 1, None)["pixels"]  # and the person of the validation is the second
    _, data = built(tiny_recipe, tmp_path, made)
    assert [(one["split"], one["filter"]) for one in rejects(data, "triplet")] == [
        ("train", "alike"), *[("validation", "other-split")] * 4
    ]  # fmt: skip
    assert len(data.files) == len(set(data.image_digests)) == 3 * EACH - 2


def test_a_person_in_both_splits_is_refused(tiny_recipe: Recipe, tmp_path: Path) -> None:
    made = rows()
    row_of(made, 0, "fear", 0.5)["split"] = "validation"
    with pytest.raises(DataError, match="'human-100' is in both splits"):
        built(tiny_recipe, tmp_path, made)


def test_nothing_left_is_an_explained_error(tiny_recipe: Recipe, tmp_path: Path) -> None:
    scores = true_scores(rows(), NAMES)
    for one in scores:
        one |= {f"score_{name}": 0.0 for name in NAMES}
    with pytest.raises(
        DataError, match=r"no triplet is left of 16; why the first was left out: fear at 0\.5"
    ):
        built(tiny_recipe, tmp_path, rows(), scores)
    assert not (tmp_path / "dataset").exists()


def test_scores_of_other_pictures_are_refused(tiny_recipe: Recipe, tmp_path: Path) -> None:
    scores = true_scores(rows(), NAMES)
    with pytest.raises(DataError, match="are not those of picture 35"):
        built(tiny_recipe, tmp_path / "a", rows(), scores[:-1])
    scores[0]["image"] = str(digest_bytes(b"another"))
    with pytest.raises(DataError, match="are not those of picture 0"):
        built(tiny_recipe, tmp_path / "b", rows(), scores)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_what_filters_let_through_adds_up(
    tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """With any pictures refused, scores and settings: nothing is counted twice, nothing is lost."""
    made = rows()
    scores = true_scores(made, NAMES)
    rate = st.sampled_from((0.0, 0.3, 0.6, 1.0))
    for one in scores:
        status = data.draw(st.sampled_from(("scored", "scored", "scored", "review", "quarantined")))
        one |= {"status": status, "confidence": data.draw(rate), "score_fear": data.draw(rate)}
    asked = {
        "min_confidence": data.draw(rate), "min_score": data.draw(rate), "min_margin": data.draw(rate),
        "min_sharpness": data.draw(st.sampled_from((0.0, 2000.0))),
        "max_unchanged": data.draw(st.sampled_from((None, 0, 20))),
        "max_duplicate": data.draw(st.sampled_from((None, 16, 128))),
    }  # fmt: skip
    recipe, folder = with_filters(tiny_recipe, **asked), tmp_path_factory.mktemp("any")
    try:
        result, found = built(recipe, folder, made, scores)
    except DataError:
        with pytest.raises(DataError, match="no triplet is left of 16"):
            built(recipe, folder, made, scores)
        return
    left = len(made)
    for one in found.manifest.pictures:
        assert one.kept + one.left_out == left
        left = one.kept
    assert len(rejects(found, "picture")) == len(made) - left
    left = len(PEOPLE) * len(LEVELS) * 2
    for one in found.manifest.triplets:
        assert one.kept + one.left_out == left
        left = one.kept
    assert left == len(found.triplets)
    assert len(rejects(found, "triplet")) == result.facts["rejected"] == 16 - left
    assert len(found.files) == len({row for t in found.triplets for row in t.rows})


# Where it comes from


def test_licences_and_ingredients_are_those_of_the_kept_pictures(tiny_recipe: Recipe, tmp_path: Path) -> None:
    made = rows()
    for row in made:
        row |= {"license": "CC-BY-4.0", "source": "portraits/1", "origin": f"people of {row['identity']}"}
        if row["expression"] is not None:
            row |= {"license": "CC-BY-4.0 AND LicenseRef-terms", "source": "gemini/1", "model": "banana",
                    "prompt": "make her smile", "request": "sha256:" + "1" * 64}  # fmt: skip
    made[0] |= {"license": "MIT OR Apache-2.0"}
    stages = write_stages(tmp_path, made, true_scores(made, NAMES), NAMES)
    judge = {"name": "judge", "kind": "judge", "license": "MIT", "source": "here", "digest": None}
    (stages[1] / "stage.json").write_text(json.dumps({"facts": {"ingredients": [judge]}}))
    terms = {"provider": "gemini", "model": "banana", "license": "LicenseRef-terms"}
    values = tiny_recipe.model_dump(mode="json", exclude_unset=True)
    values["data"] = {"source": "edited", "path": "x", "intensities": list(LEVELS)}
    recipe = Recipe.model_validate({**values, "synthesis": terms})
    build_triplets(recipe, *stages, tmp_path / "dataset")
    data = Dataset.open(tmp_path / "dataset")
    assert data.provenance["license"] == "CC-BY-4.0 AND LicenseRef-terms AND (MIT OR Apache-2.0)"
    assert [(one.kind, one.name, one.license) for one in data.ingredients] == [
        ("api", "banana", "LicenseRef-terms"),
        ("identity-images", "portraits/1", "CC-BY-4.0"),
        ("identity-images", "portraits/1", "MIT OR Apache-2.0"),
        ("judge", "judge", "MIT"),
    ]
    assert data.ingredients[1].source == "people of anime-102, people of human-101, people of human-103"
    assert data.ingredients[3] == Ingredient.model_validate(judge)
    first = data.table("images").to_pylist()[1]
    assert (first["prompt"], first["model"], first["request"][:9]) == (
        "make her smile",
        "banana",
        "sha256:11",
    )


@pytest.mark.parametrize(
    ("licenses", "whole"),
    [
        (["MIT"], "MIT"),
        (["MIT OR Apache-2.0"], "MIT OR Apache-2.0"),
        (["MIT", "CC-BY-4.0 AND MIT"], "CC-BY-4.0 AND MIT"),
        (["MIT OR Apache-2.0", "CC0-1.0"], "CC0-1.0 AND (MIT OR Apache-2.0)"),
        (["(MIT OR A) AND B", "B"], "((MIT OR A) AND B) AND B"),
    ],
)
def test_licences_apply_together(licenses: list[str], whole: str) -> None:
    assert combined(licenses) == whole


# What lies on disk


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [flip, cut, link, Path.unlink, replace_by_folder])
@pytest.mark.parametrize(
    "which", ["images.parquet", "triplets.parquet", "manifest.json", "SHA256SUMS", "blob"]
)
def test_a_changed_dataset_is_refused(tiny_run: Path, tmp_path: Path, damage: Any, which: str) -> None:
    folder = shutil.copytree(tiny_run / "dataset", tmp_path / "dataset")
    path = next((folder / "blobs").rglob("*.png")) if which == "blob" else folder / which
    if which == "SHA256SUMS" and damage is cut:
        pytest.skip("without its last line's end it says the same")
    damage(path)
    with pytest.raises(DataError):
        Dataset.open(folder)


def test_a_picture_that_is_changed_later_is_noticed_when_it_is_read(tiny_run: Path, tmp_path: Path) -> None:
    data = Dataset.open(shutil.copytree(tiny_run / "dataset", tmp_path / "dataset"))
    flip(data.blobs.path(data.files[3]))
    assert len(data.pictures([2])) == 1
    with pytest.raises(DataError, match="is not the one that its name says"):
        data.pictures([3])
    data.blobs.path(data.files[4]).write_bytes(encode_png(np.zeros((64, 64, 3), np.uint8)))
    with pytest.raises(DataError, match="is not the one that its name says"):
        data.fitted([4], (64, 64))


def test_a_dataset_of_another_version_is_told_apart(tiny_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_run / "dataset", tmp_path / "dataset")
    rewritten(folder, lambda value: value.update(format=2))
    with pytest.raises(DataError, match="was made by another version"):
        Dataset.open(folder)


def test_sha256sum_agrees(tiny_run: Path) -> None:
    for line in (tiny_run / "dataset" / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert digest_bytes((tiny_run / "dataset" / name).read_bytes()).hex == digest
    assert name == "rejects.parquet"


def test_the_pixels_that_the_dataset_names_are_checked(tiny_run: Path, tmp_path: Path) -> None:
    """Cached latents are kept under the digest of the pixels: a lie would poison the cache."""
    folder = shutil.copytree(tiny_run / "dataset", tmp_path / "dataset")
    table = pq.read_table(folder / "images.parquet")
    lies = table.column("pixels").to_pylist()
    lies[5] = str(pixel_digest(np.ones((64, 64, 3), np.uint8)))
    resigned(folder, "images", table.set_column(table.column_names.index("pixels"), "pixels", [lies]))
    with pytest.raises(DataError, match="other pixels than the dataset says"):
        Dataset.open(folder).pictures([5])


# The cache of it


def test_a_second_run_encodes_nothing(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tiny_pipeline
) -> None:
    again = cache_dataset(tiny_recipe, tiny_run / "dataset", tiny_base, tiny_run / "cache")
    assert again.reused
    assert (again.facts["encoded_images"], again.facts["encoded_prompts"]) == (0, 0)
    assert again.facts["found"] == 36 + 4 * 5


def test_the_cache_fills_only_what_is_missing(
    tiny_recipe: Recipe,
    tiny_run: Path,
    tiny_base: Path,
    tiny_pipeline,
    tmp_path: Path,
) -> None:
    shutil.copytree(tiny_run / "cache", tmp_path / "cache")
    files = sorted((tmp_path / "cache").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    files[0].write_bytes(files[0].read_bytes()[:-5])  # cut short: not believed
    again = cache_dataset(
        tiny_recipe, tiny_run / "dataset", tiny_base, tmp_path / "cache", pipeline=tiny_pipeline
    )
    assert sorted((again.facts["encoded_images"], again.facts["encoded_prompts"])) in ([0, 20], [0, 36])


def test_cached_latents_are_the_encoders(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tiny_pipeline
) -> None:
    import torch

    data, view = Dataset.open(tiny_run / "dataset"), View.of(tiny_pipeline, tiny_base, tiny_recipe)
    cached = TensorCache(tiny_run / "cache").get([view.latent_key(data.image_digests[5], (64, 64))])[0]
    encoded = tiny_pipeline.encode_images([Image.fromarray(data.pictures([5])[0])])[0]
    assert torch.allclose(cached, encoded, atol=1e-5)


def test_a_missing_latent_is_an_explained_error(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="1 of 1 tensors"):
        TensorCache(tmp_path).get(["0" * 64])


def test_random_pairs_hold_each_expression_once_and_are_not_the_confusing_ones(
    tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = with_filters(tiny_recipe, min_score=0.0)
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"pairing": "random"})})
    _, confusing = built(recipe, tmp_path / "confusing", rows())
    _, random = built(other, tmp_path / "random", rows())
    seen = {frozenset((t.a.expression, t.b.expression)) for t in confusing.triplets}
    mixed = [frozenset((t.a.expression, t.b.expression)) for t in random.triplets]
    assert seen == {frozenset(("fear", "surprised")), frozenset(("angry", "disgust"))}
    assert set(mixed) - seen, "other pairs than the confusing ones"
    assert len(random.triplets) == len(confusing.triplets)
    by_picture: dict[tuple[object, float], list[str]] = {}
    for one in random.triplets:
        by_picture.setdefault((one.source, one.a.intensity), []).extend((one.a.expression, one.b.expression))
    assert all(sorted(names) == sorted(NAMES) for names in by_picture.values())
