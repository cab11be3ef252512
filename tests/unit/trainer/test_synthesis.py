"""The images stage: what the renderer draws, who is edited, and what an API would be told."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fakes.edits import EDITED, edited, portraits
from registry.digest import Digest
from trainer import recipe as recipes
from trainer.apis import Request
from trainer.apis.prices import Prices
from trainer.data.blobs import Blobs
from trainer.errors import DataError, RecipeError
from trainer.parts import here, processes
from trainer.portraits.expressions import EXPRESSIONS
from trainer.portraits.renderer import identity, one_hot, pose, render
from trainer.recipe import Recipe
from trainer.sections import SynthesisSection
from trainer.synthesis import inputs, synthesise
from trainer.synthesis.people import open_portrait, portraits_of
from trainer.synthesis.prompts import DESCRIPTIONS, in_words, prompt, prompts
from trainer.synthesis.renderer import PortraitRenderer
from trainer.templates import check, fill


def rows(images: Path) -> list[dict[str, object]]:
    return pq.read_table(images / "images.parquet").to_pylist()


# -- drawn people --


def test_the_pictures_are_those_that_the_renderer_draws_of_the_plan(
    tmp_path: Path, tiny_recipe: Recipe
) -> None:
    synthesise(tiny_recipe, tmp_path / "images", data_folder=tmp_path)
    found, blobs = rows(tmp_path / "images"), Blobs(tmp_path / "images" / "blobs")
    faces = [(None, 0.0)]
    faces += [(name, level) for name in tiny_recipe.conditioning.expressions for level in (0.5, 1.0)]
    people = [("train", "anime", 100), ("train", "human", 101), ("train", "human", 102)]
    people += [("validation", "human", 103)]
    wanted = [(*one, *face) for one in people for face in faces]
    assert [row["number"] for row in found] == list(range(len(wanted)))
    for row, (split, domain, seed, expression, intensity) in zip(found, wanted, strict=True):
        vector = one_hot(expression or "neutral", intensity)
        drawn = render(identity(seed, domain), vector, 64, pose(seed))
        assert (row["split"], row["identity"], row["domain"]) == (split, f"{domain}-{seed}", domain)
        assert (row["expression"], row["intensity"], row["pose"]) == (expression, intensity, seed)
        assert row["truth"] == [float(value) for value in vector]
        np.testing.assert_array_equal(blobs.pixels(Digest(str(row["image"]))), drawn)


def test_every_column_says_what_is_known_of_a_drawn_picture(tmp_path: Path, tiny_recipe: Recipe) -> None:
    result = synthesise(tiny_recipe, tmp_path / "images", data_folder=tmp_path)
    row = rows(tmp_path / "images")[1]
    assert (row["media_type"], row["width"], row["height"]) == ("image/png", 64, 64)
    assert (row["source"], row["license"]) == ("portrait-renderer/1", "Apache-2.0")
    assert row["origin"] == result.facts["origin"]
    assert {row[name] for name in ("model", "prompt", "request", "refused")} == {None}
    assert (result.facts["images"], result.facts["people"]) == (36, 4)


def test_the_shipped_recipe_asks_for_the_same_people_as_ever() -> None:
    shipped = recipes.load("pixelsmile-portraits")
    plan, data = PortraitRenderer(shipped).plan(), shipped.data
    faces = 1 + len(shipped.conditioning.expressions) * len(data.intensities)
    count = sum(data.identities.values()) + sum(data.validation.values())
    assert len(plan) == count * faces
    assert [one.seed for one in plan[::faces]] == list(
        range(data.first_identity, data.first_identity + count)
    )
    assert all(one.pose == one.seed for one in plan)
    first = sorted(data.identities)[0]
    assert {one.domain for one in plan[: data.identities[first] * faces]} == {first}


def test_the_same_recipe_makes_the_same_pictures_however_they_are_shared(
    tmp_path: Path, tiny_recipe: Recipe
) -> None:
    first = synthesise(tiny_recipe, tmp_path / "a", data_folder=tmp_path)
    small = recipes.Recipe.model_validate(
        {**tiny_recipe.model_dump(mode="json", exclude_unset=True), "running": {"batch": 10}}
    )
    other = synthesise(small, tmp_path / "b", mapper=processes(2), data_folder=tmp_path)
    assert (other.key, other.digest) == (first.key, first.digest)
    assert synthesise(small, tmp_path / "a", data_folder=tmp_path).reused
    assert not list(tmp_path.glob(".*.parts"))


def test_a_stage_that_was_stopped_goes_on_with_the_parts_that_are_missing(
    tmp_path: Path, tiny_recipe: Recipe
) -> None:
    done: list[int] = []

    def stopping(stage, function, parts):
        for part in list(parts)[:2]:
            done.append(part["number"])
            function(**part)
            yield
        if len(done) == 2:
            raise KeyboardInterrupt
        yield from here(stage, function, list(parts)[2:])

    small = tiny_recipe.model_copy(update={"running": tiny_recipe.running.model_copy(update={"batch": 8})})
    with pytest.raises(KeyboardInterrupt):
        synthesise(small, tmp_path / "images", mapper=stopping, data_folder=tmp_path)
    result = synthesise(small, tmp_path / "images", mapper=stopping, data_folder=tmp_path)
    assert done == [0, 1, 2, 3]
    assert result.facts["images"] == 36


def test_filters_and_limits_do_not_make_new_pictures(tiny_recipe: Recipe) -> None:
    told = tiny_recipe.model_dump(mode="json", exclude_unset=True)
    other = {**told, "data": {**told["data"], "filters": {"min_score": 0.5}}, "running": {"batch": 5}}
    assert inputs(Recipe.model_validate(other)) == inputs(tiny_recipe)
    dearer = {**told, "data": {**told["data"], "intensities": [0.5]}}
    assert inputs(Recipe.model_validate(dearer)) != inputs(tiny_recipe)


# -- people in a folder --


def people(folder: Path, **data: object) -> list[tuple[str, str, str]]:
    recipe = edited(folder, "http://127.0.0.1:1", data=data)
    return [(one.identity, one.place, one.license) for one in portraits_of(recipe)]


def test_names_are_those_of_files_or_of_their_first_folder(tmp_path: Path) -> None:
    portraits(
        tmp_path, "zoe.png", "anna/1.jpg", "anna/deep/2.webp", "Ben.JPEG", ".hidden/no.png", "notes.txt"
    )
    found = sorted(people(tmp_path, license="CC0-1.0"))
    assert [(name, place) for name, place, _ in found] == [
        ("Ben", "Ben.JPEG"), ("anna", "anna/1.jpg"), ("anna", "anna/deep/2.webp"), ("zoe", "zoe.png"),
    ]  # fmt: skip
    recipe = edited(tmp_path, "http://127.0.0.1:1", data={"license": "CC0-1.0"})
    assert {(one.place, one.number) for one in portraits_of(recipe) if one.identity == "anna"} == {
        ("anna/1.jpg", 0),
        ("anna/deep/2.webp", 1),
    }


def test_everybody_is_in_one_split_and_both_have_somebody(tmp_path: Path) -> None:
    portraits(tmp_path, *(f"p{number}.png" for number in range(60)), "p0/again.png")
    recipe = edited(tmp_path, "http://127.0.0.1:1", data={"license": "x", "validation_share": 0.25})
    splits: dict[str, set[str]] = {}
    for one in portraits_of(recipe):
        splits.setdefault(one.identity, set()).add(one.split)
    assert all(len(found) == 1 for found in splits.values())
    assert 5 <= sum(found == {"validation"} for found in splits.values()) <= 25
    (tmp_path / "p7.png").unlink()
    later = {one.identity: one.split for one in portraits_of(recipe)}
    assert all({later[name]} == splits[name] for name in later)


@pytest.mark.parametrize("names", [("a", "b"), ("b", "c"), ("x1", "x2", "x3")])
@pytest.mark.parametrize("share", [0.01, 0.99])
def test_few_people_are_in_both_splits(tmp_path: Path, names: tuple[str, ...], share: float) -> None:
    portraits(tmp_path, *(f"{name}.png" for name in names))
    recipe = edited(tmp_path, "http://127.0.0.1:1", data={"license": "x", "validation_share": share})
    assert {one.split for one in portraits_of(recipe)} == {"train", "validation"}


def test_licences_come_from_the_line_the_folder_or_the_recipe(tmp_path: Path) -> None:
    portraits(tmp_path, "a.png", "b.png")
    with pytest.raises(DataError, match="nobody says under which licence"):
        people(tmp_path)
    assert {license for *_, license in people(tmp_path, license="CC0-1.0")} == {"CC0-1.0"}
    (tmp_path / "license.txt").write_text("CC-BY-4.0\n")
    assert {license for *_, license in people(tmp_path, license="CC0-1.0")} == {"CC-BY-4.0"}
    lines = [{"image": "a.png", "identity": "A", "license": "MIT"}, {"image": "b.png", "identity": "B"}]
    (tmp_path / "people.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert sorted(people(tmp_path)) == [("A", "a.png", "MIT"), ("B", "b.png", "CC-BY-4.0")]


GOOD = {"image": "a.png", "identity": "A"}
LISTS = {
    "unknown key": ([GOOD, {**GOOD, "image": "b.png", "licence": "MIT"}], "line 2: .*did you mean 'license'"),
    "wrong split": ([{**GOOD, "split": "test"}], "line 1: split"),
    "twice": ([GOOD, GOOD], "line 2: 'a.png' is in line 1 already"),
    "both splits": (
        [{**GOOD, "split": "train"}, {**GOOD, "image": "b.png", "split": "validation"}],
        "line 2: 'A' has another split",
    ),
    "no object": (["[1]"], "line 1: this is no JSON object"),
    "a key twice": (['{"image": "a.png", "image": "b.png", "identity": "A"}'], "a key is there twice"),
    "deep": (["[" * 5000], "this is no JSON object"),
    "nothing": ([], "is empty"),
    "no picture": ([{**GOOD, "image": "notes.txt"}], "'notes.txt' is no picture"),
    "not there": ([{**GOOD, "image": "c.png"}], "there is no portrait 'c.png'"),
}


@pytest.mark.parametrize("case", LISTS)
def test_a_list_is_read_strictly(tmp_path: Path, case: str) -> None:
    portraits(tmp_path, "a.png", "b.png", "notes.txt")
    lines, told = LISTS[case]
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (tmp_path / "people.jsonl").write_text(text)
    with pytest.raises(DataError, match=told):
        people(tmp_path, license="x")


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_list_is_read_or_refused_with_an_explanation(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    folder = tmp_path_factory.mktemp("people")
    (folder / "people.jsonl").write_bytes(data)
    with pytest.raises(DataError) as caught:
        people(folder, license="x")
    assert caught.value.mend


@pytest.mark.parametrize(
    ("names", "told"), [((), "has nobody for people"), (("a.png",), "nobody for train|nobody for validation")]
)
def test_one_person_is_too_few(tmp_path: Path, names: tuple[str, ...], told: str) -> None:
    portraits(tmp_path, *names)
    with pytest.raises(DataError, match=told):
        people(tmp_path, license="x")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        people(tmp_path / "nowhere")


def test_portraits_are_sent_upright_small_and_without_metadata(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "GPS of the garden"  # turn it a quarter; a description
    Image.new("RGB", (3000, 1000), "red").save(tmp_path / "a.jpg", exif=exif)
    picture = open_portrait(tmp_path, "a.jpg")
    assert picture.size == (683, 2048)
    assert not picture.info
    assert not picture.getexif()


# -- prompts --


def section(**values: object) -> SynthesisSection:
    return SynthesisSection.model_validate({**EDITED, "endpoint": None, **values})


def test_a_prompt_has_two_parts_with_the_expression_in_words() -> None:
    told = prompt(section(), "fear", 0.5)
    assert "identity" in told.identity
    assert DESCRIPTIONS["fear"] in told.expression
    assert "moderately" in told.expression
    assert told.text == f"{told.identity}\n\n{told.expression}"
    own = prompt(section(descriptions={"fear": "terrified {really}"}), "fear", 1.0)
    assert "very" in own.expression
    assert "terrified {really}" in own.expression
    assert "smirking" in prompt(section(), "smirking", 1.0).expression


def test_all_twelve_expressions_are_described() -> None:
    assert set(DESCRIPTIONS) == set(EXPRESSIONS)
    assert len(set(DESCRIPTIONS.values())) == len(EXPRESSIONS)


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 1.5), min_size=2, max_size=2, unique=True))
def test_a_stronger_intensity_is_told_so(pair: list[float]) -> None:
    weaker, stronger = sorted(pair)
    if f"{weaker * 100:g}" != f"{stronger * 100:g}":
        assert in_words(weaker) != in_words(stronger)


TEMPLATES = {
    "unknown": ("make {expresion} {intensity}", r"\{expresion\} is unknown; did you mean \{expression\}\?"),
    "attribute": ("{expression.__class__} {expression}", "is unknown"),
    "index": ("{expression[0]}", "is unknown"),
    "conversion": ("{expression!r}", r"\{expression!r\} is unknown"),
    "width": ("{expression:>99999999}", "is unknown"),
    "nothing in it": ("{} {expression}", "is unknown"),
    "open": ("{expression", "braces are not right"),
    "missing": ("look {intensity}", r"\{expression\} is missing"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_templates_are_checked(case: str, tmp_path: Path) -> None:
    template, told = TEMPLATES[case]
    with pytest.raises(RecipeError, match=told):
        edited(tmp_path, "http://127.0.0.1:1", synthesis={"expression_prompt": template})


def test_nothing_may_stand_in_the_braces_of_the_identity_part(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"identity_prompt: \{expression\} is unknown; nothing may"):
        edited(tmp_path, "http://127.0.0.1:1", synthesis={"identity_prompt": "keep {expression}"})


@settings(deadline=None)
@given(st.text(max_size=40))
def test_a_template_that_passes_can_be_filled(template: str) -> None:
    try:
        check(template, ("a", "b"))
    except ValueError:
        return
    assert fill(template, {"a": "{x}", "b": ""}) == template.format(a="{x}", b="")


RESOLUTIONS = [("gemini", "1024x1024"), ("openai", "2K"), ("gemini", "big"), ("openai", "0x9")]


@pytest.mark.parametrize(("provider", "resolution"), RESOLUTIONS)
def test_resolutions_are_those_of_the_provider(tmp_path: Path, provider: str, resolution: str) -> None:
    with pytest.raises(RecipeError, match="resolution"):
        edited(tmp_path, "http://h", synthesis={"provider": provider, "resolution": resolution})


def test_two_intensities_need_two_prompts(tmp_path: Path) -> None:
    portraits(tmp_path, "a.png", "b.png")
    recipe = edited(tmp_path, "http://h", synthesis={"expression_prompt": "show {expression}"})
    with pytest.raises(RecipeError, match=r"fear at 0.5 and for fear at 1 with the same words"):
        prompts(recipe)


# -- the document --


def recipes_in_the_document() -> list[str]:
    page = Path(__file__).parents[3] / "docs" / "how-to" / "image-apis.md"
    return re.findall(r"```yaml\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


@pytest.mark.parametrize("text", recipes_in_the_document())
def test_the_sections_of_the_document_fit_into_a_recipe(text: str) -> None:
    whole = recipes.load("pixelsmile").model_dump(mode="json", exclude_unset=True)
    sections = yaml.safe_load(text)
    whole |= {name: {**whole["running"], **value} if name == "running" else value
              for name, value in sections.items()}  # fmt: skip
    asked = Recipe.model_validate(whole)
    assert asked.synthesis is not None
    assert len(prompts(asked)) == 36
    request = Request(
        provider=asked.synthesis.provider, kind="edit", model=asked.synthesis.model,
        endpoint=asked.synthesis.endpoint, content={}, resolution=asked.synthesis.resolution,
    )  # fmt: skip
    assert Prices(asked.running.api.prices).of(request) is not None
