"""`trainer doctor`: one case a rule, on drawn people, and nothing to say where nothing is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from fakes.tasks import write_list, write_tasks
from trainer.cli import cli
from trainer.data.dataset import Dataset
from trainer.doctor import data_rules, material, prompts, recipe_rules
from trainer.doctor.advice import Advice
from trainer.doctor.hashes import NEAR, dhash
from trainer.doctor.recipe_rules import Facts
from trainer.portraits.renderer import EXPRESSIONS, identity, one_hot, pose, render
from trainer.recipe import Recipe
from trainer.sections import LossSection

PAIR = ("fear", "surprised")
LEVELS = (0.3, 0.6, 1.0)
SHAPES = {f"transformer_blocks.{n}.attn.to_q": (3072, 3072) for n in range(57)}
FACTS = Facts(triplets=600, pictures=900, shapes=SHAPES)


def draw(number: int, face: str = "neutral", level: float = 1.0, side: int = 64) -> Image.Image:
    vector = one_hot(face, level) if face != "neutral" else one_hot(face)
    return Image.fromarray(render(identity(number, "human"), vector, side, pose(number)))


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """Four drawn people, each with two expressions at three intensities: nothing is wrong with them."""
    place = tmp_path / "sound"
    place.mkdir()
    for number in range(4):
        draw(number).save(place / f"{number}.png")
        for face in PAIR:
            for level in LEVELS:
                draw(number, face, level).save(place / f"{number}-{face}-{level}.png")
    write(place, [line(number, level) for number in range(4) for level in LEVELS])
    return place


def line(number: int, level: float, pair: tuple[str, str] = PAIR) -> dict:
    a, b = (
        {"image": f"{number}-{face}-{level}.png", "expression": face, "intensity": level} for face in pair
    )
    split = "validation" if number == 3 else "train"
    return {"split": split, "identity": f"person {number}", "source": f"{number}.png", "a": a, "b": b}


def write(place: Path, lines: list[dict]) -> None:
    (place / "pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))


def lines_of(place: Path) -> list[dict]:
    return [json.loads(one) for one in (place / "pairs.jsonl").read_text().splitlines()]


def findings(place: Path, expressions: tuple[str, ...] | None = PAIR) -> dict[str, Advice]:
    return {one.rule: one for one in data_rules.examine(material.look(place), expressions)}


def changed(recipe: Recipe, section: str, **values: object) -> Recipe:
    part = getattr(recipe, section)
    return recipe.model_copy(update={section: part.model_copy(update=values)})


def of_recipe(recipe: Recipe, facts: Facts = FACTS) -> dict[str, Advice]:
    return {one.rule: one for one in recipe_rules.examine(recipe, facts)}


@pytest.fixture
def calm(tiny_recipe: Recipe) -> Recipe:
    """A recipe that gives no rise to anything with `FACTS`."""
    recipe = changed(
        tiny_recipe, "optimiser", learning_rate=1e-4, steps=3000, warmup_steps=100, batch_pairs=4
    )
    return changed(recipe, "lora", rank=16, alpha=16.0)


def test_sound_pictures_give_no_rise_to_anything(sound: Path) -> None:
    assert findings(sound) == {}


def test_a_calm_recipe_gives_no_rise_to_anything(calm: Recipe) -> None:
    assert of_recipe(calm) == {}


def test_an_expression_without_pictures_is_an_error(sound: Path) -> None:
    found = findings(sound, (*PAIR, "angry"))["missing-expressions"]
    assert found.level == "error"
    assert "angry" in found.seen


def test_a_rare_expression_is_noticed(sound: Path) -> None:
    draw(0, "angry").save(sound / "0-angry-1.0.png")
    draw(0, "angry", 0.5).save(sound / "0-angry-0.5.png")
    write(sound, [*lines_of(sound), line(0, 1.0, ("fear", "angry"))])
    found = findings(sound, (*PAIR, "angry"))
    assert "angry (1)" in found["rare-expressions"].seen
    assert "fear and angry are paired" not in found["unbalanced-pairs"].seen
    assert "angry and fear 1 times" in found["unbalanced-pairs"].seen


@pytest.mark.parametrize(
    ("levels", "seen"),
    [((0.3, 0.6), "never shown at 0.9 or more: fear"), ((1.0,), "shown at one intensity only: fear")],
)
def test_missing_intensities_are_noticed(sound: Path, levels: tuple[float, ...], seen: str) -> None:
    write(sound, [line(number, level) for number in range(4) for level in levels])
    assert seen in findings(sound)["missing-intensities"].seen


def test_an_expression_with_few_of_the_intensities_is_noticed(sound: Path) -> None:
    lines = lines_of(sound)
    for number, level in enumerate((0.2, 0.4, 0.5, 0.7, 0.8)):
        draw(0, "surprised", level).save(sound / f"more-{number}.png")
        one = line(0, 1.0)
        one["b"] = {"image": f"more-{number}.png", "expression": "surprised", "intensity": level}
        lines.append(one)
    write(sound, lines)
    assert "fewer than half of the 8 intensities: fear" in findings(sound)["missing-intensities"].seen


def test_one_person_in_most_pairs_is_noticed(sound: Path) -> None:
    write(
        sound,
        [one for one in lines_of(sound) if one["identity"] in ("person 0", "person 3")] + [line(1, 1.0)],
    )
    assert "person 0 is in 3 of 4" in findings(sound)["unbalanced-people"].seen


def test_a_split_without_pairs_is_an_error(sound: Path) -> None:
    write(sound, [one for one in lines_of(sound) if one["split"] == "train"])
    found = findings(sound)["splits"]
    assert (found.level, found.seen) == ("error", "there are no pairs for validation")


def test_one_picture_in_two_files_is_noticed(sound: Path) -> None:
    (sound / "1-fear-0.6.png").write_bytes((sound / "1-fear-0.3.png").read_bytes())
    assert "1-fear-0.3.png = 1-fear-0.6.png" in findings(sound)["duplicates"].seen


def test_one_picture_under_two_expressions_is_an_error(sound: Path) -> None:
    (sound / "1-fear-0.6.png").write_bytes((sound / "1-surprised-1.0.png").read_bytes())
    found = findings(sound)["contradictions"]
    assert found.level == "error"
    assert "(fear, surprised)" in found.seen


def test_members_that_look_the_same_are_noticed(sound: Path) -> None:
    with Image.open(sound / "1-fear-1.0.png") as image:
        pixels = np.array(image)
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(sound / "1-surprised-1.0.png")
    found = findings(sound)["near-duplicates"]
    assert "1-fear-1.0.png and 1-surprised-1.0.png" in found.seen


def test_one_name_in_both_splits_is_an_error(sound: Path) -> None:
    lines = lines_of(sound)
    for one in lines:
        one["identity"] = {"person 3": "Person 0 "}.get(one["identity"], one["identity"])
    write(sound, lines)
    assert findings(sound)["identity-leak"].level == "error"


@pytest.mark.parametrize(("number", "rule"), [(3, "identity-leak"), (1, "near-duplicates")])
def test_a_neutral_picture_that_comes_again_is_noticed(sound: Path, number: int, rule: str) -> None:
    """Enlarged and compressed: another file, another size, the same person under another name."""
    draw(0).resize((96, 96)).save(sound / "again.jpg", quality=80)
    lines = lines_of(sound)
    for one in lines:
        if one["identity"] == f"person {number}":
            one["source"] = "again.jpg"
    write(sound, lines)
    found = findings(sound)
    assert rule in found
    assert "person 0" in found[rule].seen
    assert f"person {number}" in found[rule].seen


def test_people_differ_and_copies_do_not() -> None:
    people = np.array([dhash(np.asarray(draw(number))) for number in range(40)])
    far = np.bitwise_count(people[:, None] ^ people[None]).sum(-1)[np.triu_indices(40, 1)]
    assert far.min() > NEAR
    copies = [dhash(np.asarray(draw(number).resize((96, 96)))) for number in range(40)]
    assert (
        max(int(np.bitwise_count(one ^ two).sum()) for one, two in zip(people, copies, strict=True)) <= NEAR
    )


def test_people_of_the_evaluation_in_the_data_are_an_error(sound: Path, tiny_recipe: Recipe) -> None:
    lines = lines_of(sound)
    for one in lines:
        one["identity"] = {"person 1": "human-900"}.get(one["identity"], one["identity"])
    write(sound, lines)
    (found,) = data_rules.judged(material.look(sound), tiny_recipe)
    assert "human-900" in found.seen
    assert not list(
        data_rules.judged(material.look(sound), changed(tiny_recipe, "evaluation", first_identity=1))
    )


def test_pictures_of_tasks_in_the_data_are_an_error(sound: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    listed = write_tasks(tasks)
    recipe = changed(
        tiny_recipe, "evaluation", suite="ffe-bench", path=str(tasks), identities=None, first_identity=None
    )
    assert not list(data_rules.judged(material.look(sound), recipe))
    with Image.open(sound / lines_of(sound)[0]["source"]) as one:
        one.convert("RGB").resize((200, 200)).save(tasks / "anime" / "001.png")
    (found,) = data_rules.judged(material.look(sound), recipe)
    assert (found.rule, found.level) == ("identity-leak", "error")
    assert "anime/001.png is" in found.seen
    write_list(tasks / "tasks.jsonl", [{**listed[0], "expression": "hapy"}])
    (found,) = data_rules.judged(material.look(sound), recipe)
    assert found.rule == "judges"
    assert "did you mean 'happy'" in found.seen


def test_small_and_wide_pictures_are_noticed(sound: Path) -> None:
    assert not list(data_rules.sizes(material.look(sound), [[(64, 64)]]))
    (small,) = data_rules.sizes(material.look(sound), [[(512, 512)]])
    assert small.rule == "upscaling"
    assert "is 64 x 64" in small.seen
    draw(0).resize((200, 100)).save(sound / "0.png")
    (cut,) = data_rules.sizes(material.look(sound), [[(64, 64)]])
    assert cut.rule == "cropping"
    assert "1 of 21 pictures lose more than 20%" in cut.seen
    assert not list(data_rules.sizes(material.look(sound), [[(64, 64), (48, 96)]]))


def test_a_licence_that_permits_nothing_is_noticed(tiny_run: Path) -> None:
    data = material.look(tiny_run / "dataset")
    assert "license" not in {one.rule for one in data_rules.examine(data)}
    other = replace(data, license="LicenseRef-mine")
    assert "license" in {one.rule for one in data_rules.examine(other)}


Recipes = list[tuple[str, Callable[[Recipe], Recipe], Facts, str, str]]
OF_RECIPES: Recipes = [
    ("many parameters", lambda r: changed(r, "lora", rank=64, alpha=64.0),
     Facts(triplets=600, pictures=2, shapes=SHAPES), "capacity", "11,206,656 a picture"),
    ("few parameters", lambda r: changed(r, "lora", rank=1, alpha=1.0),
     Facts(triplets=600, pictures=9000, shapes=SHAPES), "capacity", "39 a picture"),
    ("rank above the layer", lambda r: changed(r, "lora", rank=64, alpha=64.0),
     Facts(triplets=600, pictures=900, shapes={"transformer_blocks.0.attn.to_q": (128, 128)}),
     "full-fine-tune", "the smallest is 128 x 128"),
    ("large alpha", lambda r: changed(r, "lora", alpha=128.0), FACTS, "alpha", "alpha / rank = 8"),
    ("small alpha", lambda r: changed(r, "lora", alpha=1.0), FACTS, "alpha", "alpha / rank = 0.0625"),
    ("rank-stabilised", lambda r: changed(r, "lora", rank=64, alpha=64.0, scaling="rank-stabilised"), FACTS,
     "alpha", "alpha / sqrt(rank) = 8"),
    ("prodigy", lambda r: changed(r, "optimiser", name="prodigy"), FACTS, "prodigy", "0.0001"),
    ("high rate", lambda r: changed(r, "optimiser", learning_rate=0.01), FACTS, "learning-rate", "0.01"),
    ("low rate", lambda r: changed(r, "optimiser", learning_rate=1e-6), FACTS, "learning-rate", "1e-06"),
    ("too short", lambda r: changed(r, "optimiser", steps=110), FACTS, "length", "0.733 passes over 600"),
    ("too long", lambda r: changed(r, "optimiser", steps=90_000), FACTS, "length", "600 passes over 600"),
    ("long warm-up", lambda r: changed(r, "optimiser", warmup_steps=900), FACTS, "warm-up", "900 of 3000"),
    ("average too slow", lambda r: changed(r, "ema", decay=0.9999, warmup=1.0), FACTS, "ema",
     "still the untrained start"),
    ("average too long", lambda r: changed(r, "ema", decay=0.9996), FACTS, "ema", "2500 of 3000"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "facts", "rule", "seen"),
    [case[1:] for case in OF_RECIPES],
    ids=[case[0] for case in OF_RECIPES],
)
def test_what_is_odd_in_a_recipe_is_noticed(
    calm: Recipe, change: Callable[[Recipe], Recipe], facts: Facts, rule: str, seen: str
) -> None:
    found = of_recipe(change(calm), facts)
    assert rule in found
    assert seen in found[rule].seen
    assert found[rule].level == "warning"
    assert found[rule].why
    assert found[rule].mend


def test_an_encoder_that_is_not_here_is_noticed(
    calm: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTER_FOUNDRY_HOME", str(tmp_path))
    loss = LossSection(weight=0.1, encoder="buffalo_l")
    assert "buffalo_l" in of_recipe(calm.model_copy(update={"losses": {"identity": loss}}))["encoders"].seen
    silent = calm.model_copy(update={"losses": {"identity": loss.model_copy(update={"weight": 0.0})}})
    assert of_recipe(silent) == {}


def test_a_narrow_base_bears_a_higher_rate(calm: Recipe) -> None:
    recipe = changed(calm, "optimiser", learning_rate=0.01)
    narrow = Facts(triplets=600, pictures=900, shapes={f"blocks.{n}": (128, 128) for n in range(200)})
    assert "learning-rate" not in of_recipe(recipe, narrow)


def test_prompts_of_different_lengths_are_noticed(tiny_recipe: Recipe, tiny_base: Path) -> None:
    assert not list(prompts.examine(tiny_recipe, tiny_base))
    odd = changed(
        tiny_recipe, "conditioning", expressions=(*tiny_recipe.conditioning.expressions, "very very sad")
    )
    (found,) = prompts.examine(odd, tiny_base)
    assert found.level == "error"
    assert "very very sad" in found.seen


def test_padded_prompts_of_different_lengths_are_a_warning(tiny_recipe: Recipe, tmp_path: Path) -> None:
    from trainer.portraits.bases import build

    base = build("sd15", tmp_path / "sd15")
    odd = changed(tiny_recipe, "base", family="sd15")
    odd = changed(odd, "conditioning", expressions=("fear", "extraordinarily odd"))
    (found,) = prompts.examine(odd, base)
    assert found.level == "warning"


def ask(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["doctor", *words])
    return result.exit_code, result.stdout


def test_the_command_says_what_it_saw_and_why_and_what_to_do(sound: Path) -> None:
    write(sound, [one for one in lines_of(sound) if one["split"] == "train"])
    code, text = ask(str(sound), "--json")
    content = json.loads(text)
    assert code == 1
    assert (content["errors"], content["warnings"]) == (1, 0)
    assert content["advice"][0].keys() == {"rule", "level", "seen", "why", "mend"}
    assert content["looked_at"] == {"pictures": 21, "pairs": 9}
    code, text = ask(str(sound))
    assert code == 1
    assert "splits" in text


def test_warnings_do_not_fail(sound: Path) -> None:
    write(sound, [line(number, 1.0) for number in range(4)])
    code, text = ask(str(sound), "--json")
    assert code == 0
    assert json.loads(text)["warnings"] == 1


def test_the_command_looks_at_a_recipe_its_pictures_and_its_base(tiny_run: Path, tiny_base: Path) -> None:
    code, text = ask("pixelsmile-portraits", "--data", str(tiny_run / "dataset"), "--json")
    content = json.loads(text)
    assert code == 1
    assert content["looked_at"]["pictures"] == len(Dataset.open(tiny_run / "dataset").sizes)
    rules = {one["rule"]: one for one in content["advice"]}
    missing = rules["missing-expressions"]["seen"]
    assert all(name not in missing for name in ("fear", "surprised", "disgust"))
    assert content["looked_at"]["base"]


@pytest.mark.parametrize(
    ("evaluation", "told", "mend"),
    [
        (
            {"suite": "portraits-v1", "identities": None, "first_identity": None},
            "draws portraits",
            "of tasks",
        ),
        ({"suite": "ffe-bench"}, "has only seen drawn faces", "vision-language model"),
        ({"suite": "ffe-bench", "judge": "seer"}, "has no folder of tasks", "evaluation.path"),
        ({"suite": "ffe-bench", "judge": "seer", "path": "tasks"}, None, None),
    ],
)
def test_an_evaluation_that_cannot_be_is_noticed_before_the_training(
    calm: Recipe, evaluation: dict[str, object], told: str | None, mend: str | None
) -> None:
    base = {"id": "Qwen/Qwen-Image-Edit-2511", "revision": "1", "family": "qwen-image-edit"}
    judge = {"scorer": "openai", "model": "seer-1", "license": "LicenseRef-terms"}
    if "judge" in evaluation:
        evaluation = {**evaluation, "judge": judge}
    value = calm.model_dump(mode="json", exclude_unset=True)
    recipe = Recipe.model_validate({**value, "base": {**value["base"], **base}, "evaluation": evaluation})
    found = of_recipe(recipe).get("judges")
    if told is None or mend is None:
        assert found is None
    else:
        assert found is not None
        assert told in found.seen
        assert mend in found.mend


def test_the_shipped_recipe_is_sound() -> None:
    code, text = ask("pixelsmile-portraits")
    assert code == 0
    assert "no errors, no warnings" in text


def test_something_else_is_an_explained_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["doctor", str(tmp_path)])
    assert result.exit_code == 1
    assert "is no dataset" in str(result.exception)


def test_every_expression_is_drawn() -> None:
    assert {*PAIR} < {*EXPRESSIONS}
