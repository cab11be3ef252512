"""A folder of one's own pictures: what is right becomes a dataset, what is wrong is told with its line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from registry.digest import digest_bytes
from trainer.data import Dataset, cache_dataset, folder_key, read_folder
from trainer.data.listing import read_listing
from trainer.errors import DataError
from trainer.launch import train
from trainer.portraits.renderer import identity, one_hot, pose, render
from trainer.recipe import Recipe, parse

PEOPLE = {"anna": "train", "ben": "train", "cleo": "validation"}
FACES = {"neutral": 0.0, "fear": 1.0, "surprised": 0.8}
SIZES = {"anna": (96, 64), "ben": (64, 96), "cleo": (80, 80)}  # width, height
FOLDER = """
name: own
seed: 3
base: {id: adapter-foundry/portraits-base, revision: "1", family: qwen-image-edit, license: Apache-2.0}
data: {source: folder, path: PATH, max_aspect: 2.0}
lora: {rank: 4, alpha: 8, targets: attention, dtype: F32}
optimiser: {learning_rate: 0.01, warmup_steps: 1, steps: 3, batch_pairs: 2}
losses: {flow_matching: {weight: 1.0}}
conditioning: {template: "show a {} expression", expressions: [fear, surprised, angry]}
release: {adapter: own, license: Apache-2.0}
"""


def picture(number: int, face: str, size: tuple[int, int]) -> Image.Image:
    vector = one_hot(face, FACES[face]) if face != "neutral" else one_hot(face)
    pixels = render(identity(number, "human"), vector, 64, pose(number))
    return Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)


def line(name: str, split: str, suffix: str = "png") -> dict:
    a, b = (
        {"image": f"{name}/{face}.{suffix}", "expression": face, "intensity": FACES[face]}
        for face in ("fear", "surprised")
    )
    return {"split": split, "identity": name, "source": f"{name}/neutral.{suffix}", "a": a, "b": b}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that is right: three people, pictures of three sizes and formats."""
    place = tmp_path / "own"
    lines = []
    for number, ((name, split), suffix) in enumerate(
        zip(PEOPLE.items(), ("png", "webp", "jpg"), strict=True)
    ):
        (place / name).mkdir(parents=True)
        for face in FACES:
            picture(number, face, SIZES[name]).save(place / name / f"{face}.{suffix}", lossless=True)
        lines.append(line(name, split, suffix))
    write(place, lines)
    (place / "license.txt").write_text("CC-BY-4.0\n")
    return place


def write(place: Path, lines: list) -> None:
    (place / "pairs.jsonl").write_text(
        "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines), "utf-8"
    )


def lines_of(place: Path) -> list[dict]:
    return [json.loads(one) for one in (place / "pairs.jsonl").read_text().splitlines()]


def recipe_of(place: Path, **data: object) -> Recipe:
    recipe = parse(FOLDER.replace("PATH", str(place)))
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=data)})


def test_a_folder_becomes_a_dataset(folder: Path, tmp_path: Path) -> None:
    result = read_folder(recipe_of(folder), tmp_path / "dataset")
    counts = {"triplets": 2, "validation": 1, "rejected": 0, "pictures": 9}
    assert {name: result.facts[name] for name in counts} == counts
    assert result.facts["license"] == "CC-BY-4.0"
    data = Dataset.open(tmp_path / "dataset")
    assert data.digest == result.digest
    assert data.provenance["license"] == "CC-BY-4.0"
    assert data.sizes[:6] == ((64, 96),) * 3 + ((96, 64),) * 3
    anna, ben = data.triplets[:2]
    shown = data.pictures([ben.a.image, anna.source])
    assert np.array_equal(shown[1], np.asarray(Image.open(folder / "anna/neutral.png")))
    assert np.array_equal(shown[0], np.asarray(Image.open(folder / "ben/fear.webp").convert("RGB")))
    assert (ben.a.expression, ben.b.intensity) == ("fear", 0.8)


def test_the_same_folder_is_read_once_and_a_changed_picture_again(folder: Path, tmp_path: Path) -> None:
    recipe, out = recipe_of(folder), tmp_path / "dataset"
    first = read_folder(recipe, out)
    assert read_folder(recipe, out).reused
    picture(0, "fear", (96, 60)).save(folder / "anna/fear.png")
    again = read_folder(recipe, out)
    assert not again.reused
    assert again.digest != first.digest


def test_a_folder_that_is_no_longer_what_was_asked_for_is_not_read(folder: Path, tmp_path: Path) -> None:
    recipe, out = recipe_of(folder), tmp_path / "dataset"
    key = folder_key(recipe)
    first = read_folder(recipe, out, wanted=key)
    assert first.key == key
    picture(0, "fear", (96, 60)).save(folder / "anna/fear.png")
    with pytest.raises(DataError, match="was changed while it was read"):
        read_folder(recipe, out, wanted=key)
    assert Dataset.open(out).digest == first.digest, "what was made of it before is still there"


def test_what_the_dataset_says_of_its_folder_and_expressions_decides_it_too(
    folder: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(folder)
    words = recipe.conditioning.model_copy(update={"expressions": ("fear", "surprised")})
    elsewhere = shutil.copytree(folder, tmp_path / "other")
    others = (recipe.model_copy(update={"conditioning": words}), recipe_of(elsewhere))
    results = [read_folder(one, tmp_path / "dataset") for one in (recipe, *others)]
    assert len({one.digest for one in results}) == len({one.key for one in results}) == 3


def test_what_a_line_repeats_is_left_out_with_the_reason(folder: Path, tmp_path: Path) -> None:
    write(folder, [*lines_of(folder), lines_of(folder)[0]])
    assert read_folder(recipe_of(folder), tmp_path / "dataset").facts["rejected"] == 1
    rejects = Dataset.open(tmp_path / "dataset").table("rejects").to_pylist()
    assert [(one["filter"], one["number"]) for one in rejects] == [("repeated", 4)]


Change = Callable[[list[dict]], None]
WRONG: list[tuple[Change, str]] = [
    (lambda p: p[1].update(idenity="x"), r"line 2: idenity: there is no such key; did you mean 'identity'"),
    (lambda p: p[1]["a"].update(expresion="x"), r"a\.expresion: .*did you mean 'expression'"),
    (lambda p: p[0].pop("source"), r"line 1: source: Field required"),
    (lambda p: p[0]["a"].update(intensity=1.6), r"line 1: a\.intensity: .*less than or equal to 1\.5"),
    (lambda p: p[0]["a"].update(intensity="1"), r"line 1: a\.intensity: .*valid number"),
    (lambda p: p[0].update(split="test"), r"line 1: split: .*'train' or 'validation'"),
    (lambda p: p[0]["a"].update(expression="surprise"), r"line 1: .*did you mean 'surprised'"),
    (lambda p: p[0]["a"].update(expression="surprised"), r"line 1: both members show 'surprised'"),
    (lambda p: p[0]["a"].update(image="anna/surprised.png"), r"line 1: both members are the picture"),
    (lambda p: p[0]["a"].update(image="anna/neutral.png"), r"line 1: 'anna/neutral.png' is the neutral"),
    (lambda p: p[0]["a"].update(image="anna/none.png"), r"line 1: there is no picture 'anna/none.png'"),
    (lambda p: p[2].update(identity="anna"), r"line 3: 'anna' is in both splits"),
    (lambda p: p[2].update(source="anna/neutral.png"), r"line 3: the picture 'anna/neutral.png' is in both"),
    (lambda p: p[2].update(split="train"), r"has no pairs for validation"),
    (lambda p: [one.update(split="validation") for one in p], r"has no pairs for train"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_what_is_wrong_is_told_with_its_line(
    folder: Path, tmp_path: Path, change: Change, message: str
) -> None:
    lines = lines_of(folder)
    change(lines)
    write(folder, lines)
    with pytest.raises(DataError, match=message):
        read_folder(recipe_of(folder), tmp_path / "dataset")
    assert not (tmp_path / "dataset").exists()


def test_all_mistakes_are_told_at_once_and_not_without_end(folder: Path) -> None:
    write(folder, ["{", "[1]", '{"split": "train", "split": "train"}', *["{}"] * 100])
    with pytest.raises(DataError) as caught:
        read_listing(folder)
    text = str(caught.value)
    assert "line 1: this is no JSON object" in text
    assert "line 2: this is no JSON object: it is something else" in text
    assert "line 3: this is no JSON object: a key is there twice" in text
    assert text.count("Field required") == 5
    assert len(text.splitlines()) < 30


@pytest.mark.parametrize("other", ["surprised", "neutral"])
def test_equal_pixels_under_two_names_are_one_picture(folder: Path, tmp_path: Path, other: str) -> None:
    (folder / "anna/fear.png").write_bytes((folder / f"anna/{other}.png").read_bytes())
    with pytest.raises(DataError, match="line 1: two of its pictures are the same, pixel by pixel"):
        read_folder(recipe_of(folder), tmp_path / "dataset")


def test_somebody_has_to_name_a_licence(folder: Path, tmp_path: Path) -> None:
    (folder / "license.txt").unlink()
    with pytest.raises(DataError, match="nobody says under which licence the pictures of line 1"):
        read_folder(recipe_of(folder), tmp_path / "dataset")
    lines = lines_of(folder)
    for one, license in zip(lines, ("CC0-1.0", "MIT OR Apache-2.0", "CC0-1.0"), strict=True):
        one["license"] = license
    write(folder, lines)
    read_folder(recipe_of(folder), tmp_path / "dataset")
    found = Dataset.open(tmp_path / "dataset").provenance["license"]
    assert found == "CC0-1.0 AND (MIT OR Apache-2.0)"
    (folder / "license.txt").write_text("All rights\nreserved")
    with pytest.raises(DataError, match="is not one line"):
        read_folder(recipe_of(folder), tmp_path / "other")


@pytest.mark.parametrize("copied", [False, True])
def test_a_picture_is_under_the_licences_of_all_its_lines(folder: Path, tmp_path: Path, copied: bool) -> None:
    """Whoever lists a picture again, under its own or another name, makes no stricter terms void."""
    lines = lines_of(folder)
    for one in lines:
        one["license"] = "CC0-1.0"
    again = line("anna", "train")
    again["license"] = "CC-BY-NC-4.0"
    again["a"]["intensity"] = 0.9
    if copied:
        for face in FACES:
            shutil.copyfile(folder / f"anna/{face}.png", folder / f"anna/{face}-again.png")
        again = json.loads(json.dumps(again).replace(".png", "-again.png"))
    both = "CC-BY-NC-4.0 AND CC0-1.0"
    for number, some in enumerate(([*lines, again], [again, *lines])):
        write(folder, some)
        result = read_folder(recipe_of(folder), tmp_path / f"dataset-{number}")
        data = Dataset.open(tmp_path / f"dataset-{number}")
        assert data.provenance["license"] == result.facts["license"] == both
        found = {(one["identity"], one["license"]) for one in data.table("images").to_pylist()}
        assert found == {("anna", both), ("ben", "CC0-1.0"), ("cleo", "CC0-1.0")}


def test_the_pictures_of_a_folder_are_named_as_ingredients(folder: Path, tmp_path: Path) -> None:
    lines = lines_of(folder)
    lines[1]["license"] = "CC0-1.0"
    write(folder, lines)
    read_folder(recipe_of(folder), tmp_path / "dataset")
    assert [(one.kind, one.name, one.license, one.source)
            for one in Dataset.open(tmp_path / "dataset").ingredients] == [
        ("identity-images", "folder own", "CC-BY-4.0", "anna/fear.png and 5 more"),
        ("identity-images", "folder own", "CC0-1.0", "ben/fear.webp, ben/neutral.webp, ben/surprised.webp"),
    ]  # fmt: skip


def test_another_licence_for_some_is_seen_though_all_together_are_the_same(
    folder: Path, tmp_path: Path
) -> None:
    lines = lines_of(folder)
    lines[0]["license"], lines[1]["license"] = "CC-BY-4.0", "CC0-1.0"
    write(folder, lines)
    of_cleo = []
    for license in ("CC-BY-4.0", "CC0-1.0"):
        (folder / "license.txt").write_text(license)
        assert not read_folder(recipe_of(folder), tmp_path / "dataset").reused
        rows = Dataset.open(tmp_path / "dataset").table("images").to_pylist()
        of_cleo.append({one["license"] for one in rows if one["identity"] == "cleo"})
    assert of_cleo == [{"CC-BY-4.0"}, {"CC0-1.0"}]


def test_a_recipe_that_was_written_out_is_read_again(folder: Path) -> None:
    recipe = recipe_of(folder)
    assert Recipe.model_validate(recipe.model_dump(mode="json")).digest == recipe.digest


def test_a_folder_trains_in_its_aspects(folder: Path, tmp_path: Path, tiny_base: Path, tiny_pipeline) -> None:
    recipe = recipe_of(folder)
    read_folder(recipe, tmp_path / "dataset")
    cached = cache_dataset(
        recipe, tmp_path / "dataset", tiny_base, tmp_path / "cache", pipeline=tiny_pipeline
    )
    assert cached.facts["encoded_images"] == 9
    assert cached.facts["encoded_prompts"] == 3 * 4
    places = (tmp_path / "dataset", tmp_path / "cache", tiny_base, tmp_path / "train")
    result = train(recipe, *places, pipeline=tiny_pipeline, track=False)
    assert result.facts["steps"] == 3
    card = json.loads((tmp_path / "train" / "adapter" / "adapter.json").read_bytes())
    named = [(one["kind"], one["name"], one["license"]) for one in card["ingredients"]]
    assert ("identity-images", "folder own", "CC-BY-4.0") in named
    assert (tmp_path / "train" / "adapter" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("family", ["sdxl", "flux-kontext"])
def test_other_families_see_the_same_buckets(folder: Path, tmp_path: Path, family: str) -> None:
    """Pooled vectors, prompts without a picture, and a prediction of the shape of the bucket."""
    from trainer.data.batches import TrainingSet
    from trainer.data.cache import TensorCache, View, load_base
    from trainer.portraits.bases import build

    recipe, base = recipe_of(folder), build(family, tmp_path / "base")
    recipe = recipe.model_copy(update={"base": recipe.base.model_copy(update={"family": family})})
    read_folder(recipe, tmp_path / "dataset")
    pipeline = load_base(base, recipe)
    places = (tmp_path / "dataset", base, tmp_path / "cache")
    assert cache_dataset(recipe, *places, pipeline=pipeline).facts["encoded_prompts"] == 4
    assert cache_dataset(recipe, *places).reused
    view = View.of(pipeline, base, recipe)
    data = TrainingSet(Dataset.open(tmp_path / "dataset"), TensorCache(tmp_path / "cache"), view, recipe)
    seen = set()
    for step in range(8):
        batch = data.batch(data.plan(1, step, 1), [0])
        noisy = pipeline.process.noisy(batch.target, batch.noise, batch.sigma)
        with torch.no_grad():
            found = pipeline.predict(noisy, batch.source, batch.prompts, batch.sigma, batch.size)
        assert found.shape == batch.target.shape
        assert batch.prompts.pooled is not None
        seen.add(batch.size)
    assert seen == {(48, 80), (80, 48)}


def test_the_command_line_trains_on_a_folder(
    folder: Path, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from trainer.cli import cli

    monkeypatch.setenv("ADAPTER_FOUNDRY_HOME", str(tmp_path / "home"))
    path = tmp_path / "own.yaml"
    path.write_text(FOLDER.replace("PATH", str(folder)))
    words = ["train", str(path), "--base", str(tiny_base), "--out", str(tmp_path / "run"), "--json"]
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    stages = json.loads(result.stdout)["stages"]
    assert [stage["stage"] for stage in stages] == ["triplets", "cache", "train"]
    assert stages[0]["facts"]["triplets"] == 2
    assert (tmp_path / "run" / "train" / "adapter" / "pytorch_lora_weights.safetensors").is_file()


def test_the_files_stay_as_they_are(folder: Path, tmp_path: Path) -> None:
    read_folder(recipe_of(folder), tmp_path / "dataset")
    data = Dataset.open(tmp_path / "dataset")
    own = {digest_bytes(path.read_bytes()) for path in folder.rglob("*") if path.parent != folder}
    assert {*data.files} == own
    told = data.table("images").to_pylist()
    assert {one["media_type"] for one in told} == {"image/png", "image/webp", "image/jpeg"}
    assert [one["origin"] for one in told[:2]] == ["anna/neutral.png", "anna/fear.png"]
    assert {(one["identity"], one["expression"], one["number"]) for one in told[3:5]} == {
        ("ben", None, 2), ("ben", "fear", 2)
    }  # fmt: skip


def blur(path: Path) -> None:
    Image.open(path).filter(ImageFilter.GaussianBlur(3)).save(path)


def add_twin(folder: Path) -> None:
    """Anna is also called anne."""
    shutil.copytree(folder / "anna", folder / "anne")
    for face in FACES:
        picture = Image.open(folder / "anne" / f"{face}.png")
        picture.resize((192, 128)).save(folder / "anne" / f"{face}.png")
    write(folder, [*lines_of(folder), line("anne", "train")])


def unedit(folder: Path) -> None:
    changed = np.array(Image.open(folder / "anna/neutral.png"))
    changed[0, 0] ^= 1
    Image.fromarray(changed).save(folder / "anna/fear.png")


FILTERED: list[tuple[Callable[[Path], None], dict[str, Any], str, str]] = [
    (lambda folder: blur(folder / "anna/fear.png"), {"min_sharpness": 30.0}, "sharpness", "anna"),
    (unedit, {"max_unchanged": 0}, "unchanged", "anna"),
    (add_twin, {"max_duplicate": 31}, "duplicate", "anne"),
    (lambda folder: picture(1, "fear", SIZES["anna"]).save(folder / "anna/fear.png"),
     {"min_identity": 0.7, "face_encoder": "portraits"}, "identity", "anna"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "asked", "name", "who"), FILTERED, ids=[case[2] for case in FILTERED])
def test_filters_that_need_no_scores_apply(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], None], asked: dict[str, Any], name: str, who: str
) -> None:
    lines = lines_of(folder)
    other = {**line("dora", "train"), "identity": "dora"}
    shutil.copytree(folder / "anna", folder / "dora")
    for face in FACES:
        picture(7, face, (96, 64)).save(folder / "dora" / f"{face}.png")
    write(folder, [*lines, other])
    recipe = recipe_of(folder)
    before = read_folder(recipe, tmp_path / "before")
    assert before.facts["rejected"] == 0
    spoil(folder)
    recipe = recipe_of(folder, filters=recipe.data.filters.model_copy(update=asked))
    result = read_folder(recipe, tmp_path / "dataset")
    (missed,) = [one for one in Dataset.open(tmp_path / "dataset").table("rejects").to_pylist()
                 if one["what"] == "triplet"]  # fmt: skip
    assert (missed["filter"], missed["identity"]) == (name, who)
    assert result.facts["rejected"] == 1
    off = read_folder(recipe_of(folder), tmp_path / "off")
    assert off.facts["rejected"] == 0


def test_faces_of_real_people_need_an_encoder(folder: Path, tmp_path: Path) -> None:
    filters = recipe_of(folder).data.filters.model_copy(update={"min_identity": 0.5})
    with pytest.raises(DataError, match="needs to know who tells real people apart"):
        read_folder(recipe_of(folder, filters=filters), tmp_path / "dataset")


def test_filters_that_leave_nothing_say_so(folder: Path, tmp_path: Path) -> None:
    filters = recipe_of(folder).data.filters.model_copy(update={"min_sharpness": 1e6})
    with pytest.raises(DataError, match=r"no triplet for train is left; .*: it is blurred"):
        read_folder(recipe_of(folder, filters=filters), tmp_path / "dataset")


def test_the_same_pictures_may_show_other_intensities(folder: Path, tmp_path: Path) -> None:
    """Who says that knows it; and a picture may be its own edit to nothing."""
    again = line("anna", "train")
    again["a"]["intensity"] = 0.5
    itself = line("anna", "train")
    itself["b"] = {"image": itself["source"], "expression": "angry", "intensity": 0.0}
    write(folder, [*lines_of(folder), again, itself])
    result = read_folder(recipe_of(folder), tmp_path / "dataset")
    assert (result.facts["triplets"], result.facts["rejected"]) == (4, 0)
    last = Dataset.open(tmp_path / "dataset").triplets[-1]
    assert last.b.image == last.source
