"""Pictures, scores, triplets and the cache: the same again, nothing twice, nothing damaged believed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from trainer.data import Dataset, build_triplets, cache_dataset
from trainer.data.cache import TensorCache, View
from trainer.data.shards import read_images, read_lines
from trainer.errors import CacheError, DataError
from trainer.recipe import Recipe
from trainer.scoring import score
from trainer.synthesis import synthesise
from trainer.synthesis.renderer import PortraitRenderer
from trainer.synthesis.stage import plan


def test_every_person_is_drawn_neutral_and_with_every_expression(tiny_recipe: Recipe, tiny_run: Path) -> None:
    lines = read_lines(tiny_run / "images" / "index.jsonl")
    assert len(lines) == 4 * (1 + 4 * 2)
    assert read_images(tiny_run / "images").shape == (36, 64, 64, 3)
    happy = lines[1]
    assert happy["truth"][5] == happy["intensity"] == 0.5  # fear is the sixth of the twelve
    assert {line["license"] for line in lines} == {"Apache-2.0"}
    assert {line["identity"] for line in lines if line["split"] == "validation"} == {103}


def test_pictures_are_the_same_again_and_on_any_number_of_processes(
    tiny_recipe: Recipe, tmp_path: Path
) -> None:
    first = synthesise(tiny_recipe, tmp_path / "a", generator=PortraitRenderer(1))
    assert synthesise(tiny_recipe, tmp_path / "a").reused
    assert synthesise(tiny_recipe, tmp_path / "b").digest == first.digest
    requests = [request for _, request in plan(tiny_recipe)] * 15
    shared = list(PortraitRenderer(2).generate(requests))
    alone = list(PortraitRenderer(1).generate(requests))
    assert all(np.array_equal(a, b) for a, b in zip(shared, alone, strict=True))


def test_the_dataset_is_a_function_of_its_inputs(tiny_recipe: Recipe, tiny_run: Path, tmp_path: Path) -> None:
    again = build_triplets(tiny_recipe, tiny_run / "images", tiny_run / "scored", tmp_path / "dataset")
    data = Dataset.open(tiny_run / "dataset")
    assert again.digest == data.digest
    assert again.facts == {"triplets": 3 * 2 * 2, "validation": 2 * 2, "rejected": 0}
    assert build_triplets(tiny_recipe, tiny_run / "images", tiny_run / "scored", tmp_path / "dataset").reused
    people = {
        split: {t.identity for t in data.triplets if t.split == split} for split in ("train", "validation")
    }
    assert {split: len(found) for split, found in people.items()} == {"train": 3, "validation": 1}
    assert not people["train"] & people["validation"]
    assert {(t.a.expression, t.b.expression) for t in data.triplets} == {
        ("fear", "surprised"),
        ("angry", "disgust"),
    }


def scored_with(tiny_run: Path, out: Path, change) -> Path:
    """Copy the scores and let ``change(scores, lines)`` spoil them."""
    shutil.copytree(tiny_run / "scored", out)
    scores = np.load(out / "scores.npy")
    change(scores, read_lines(tiny_run / "images" / "index.jsonl"))
    np.save(out / "scores.npy", scores)
    return out


def test_what_the_judge_does_not_see_is_kept_out_with_the_reason(
    tiny_recipe: Recipe, tiny_run: Path, tmp_path: Path
) -> None:
    def spoil(scores: np.ndarray, lines: list[dict]) -> None:
        scores[1, 0] = 0.01  # the first person's fear at 0.5
        scores[4, 0] = 2.0  # the first person's surprise at 1.0 is taken for fear

    scored = scored_with(tiny_run, tmp_path / "scored", spoil)
    result = build_triplets(tiny_recipe, tiny_run / "images", scored, tmp_path / "dataset")
    reasons = [line["reason"] for line in read_lines(tmp_path / "dataset" / "rejects.jsonl")]
    assert result.facts["rejected"] == 2
    assert reasons == ["fear at 0.5 is seen at 0.01 only", "surprised at 1 is taken for fear"]


def test_equal_pictures_are_kept_out(tiny_recipe: Recipe, tiny_run: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(tiny_run / "images", images)
    lines = read_lines(images / "index.jsonl")
    lines[3]["digest"] = lines[1]["digest"]  # surprised at 0.5 looks like fear at 0.5
    for number in range(9):  # and the validation person looks like the first one
        lines[27 + number]["digest"] = lines[number]["digest"]
    (images / "index.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    build_triplets(tiny_recipe, images, tiny_run / "scored", tmp_path / "dataset")
    rejects = read_lines(tmp_path / "dataset" / "rejects.jsonl")
    assert {line["reason"] for line in rejects if line["split"] == "train"} == {
        "two of its pictures are the same"
    }
    assert len([line for line in rejects if line["split"] == "validation"]) == 4


def test_nothing_left_is_an_explained_error(tiny_recipe: Recipe, tiny_run: Path, tmp_path: Path) -> None:
    scored = scored_with(tiny_run, tmp_path / "scored", lambda scores, lines: scores.fill(0))
    with pytest.raises(DataError, match="no triplet is left"):
        build_triplets(tiny_recipe, tiny_run / "images", scored, tmp_path / "dataset")
    assert not (tmp_path / "dataset").exists()


def test_a_changed_dataset_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run / "dataset", tmp_path / "dataset")
    path = tmp_path / "dataset" / "images-000.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"images-000\.npy is not the file"):
        Dataset.open(tmp_path / "dataset")


class BlindScorer:
    name, expressions = "blind/1", ("happy",)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return np.zeros((len(images), 1), np.float32)


def test_a_scorer_must_see_the_recipes_expressions(
    tiny_recipe: Recipe, tiny_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="cannot see fear"):
        score(tiny_recipe, tiny_run / "images", tmp_path / "scored", scorer=BlindScorer())


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
    from PIL import Image

    data, view = Dataset.open(tiny_run / "dataset"), View.of(tiny_pipeline, tiny_base, tiny_recipe)
    cached = TensorCache(tiny_run / "cache").get([view.latent_key(data.image_digests[5], (64, 64))])[0]
    encoded = tiny_pipeline.encode_images([Image.fromarray(data.pictures([5])[0])])[0]
    assert torch.allclose(cached, encoded, atol=1e-5)


def test_a_missing_latent_is_an_explained_error(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="1 of 1 tensors"):
        TensorCache(tmp_path).get(["0" * 64])
