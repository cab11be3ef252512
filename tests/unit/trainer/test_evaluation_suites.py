"""Suites: who is asked for what, by whom they are judged, and what a wrong file or folder is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fakes.adapters import card
from fakes.tasks import TASKS, photograph, write_list, write_suite, write_tasks
from registry.manifest import AdapterCard, BaseModelRef, ConditioningSpec, Ingredient
from trainer.errors import DataError, EvaluationError, RecipeError
from trainer.evaluation import suites, tasks
from trainer.evaluation.judges import Judges, judges_of, require_able
from trainer.evaluation.plan import NEUTRAL, Plan, mixed, plan_of, single, vector
from trainer.evaluation.tasks import NAMES
from trainer.portraits.renderer import EXPRESSIONS
from trainer.recipe import Recipe
from trainer.scoring.local import LocalScorer
from trainer.sections import SuiteSection

WORDS = ConditioningSpec(template="show a {} expression", expressions=EXPRESSIONS)


def drawn(**changes: Any) -> SuiteSection:
    value = {"name": "few", "identities": {"human": 2, "anime": 3}, "first_identity": 900,
             "intensities": [0, 0.5, 1, 1.5], "steps": 1, **changes}  # fmt: skip
    return SuiteSection.model_validate(value)


def only(*expressions: str, **limits: float) -> ConditioningSpec:
    return ConditioningSpec(template="show a {} expression", expressions=expressions, **limits)


# -- drawn people ----------------------------------------------------------------------------------------


def test_everybody_is_asked_at_full_strength_and_the_first_for_the_sweep_and_for_blends() -> None:
    plan = plan_of(drawn(sweep_people=2, blend_people=1), WORDS)
    assert [one.name for one in plan.subjects] == [
        "human 900",
        "anime 902",
        "human 901",
        "anime 903",
        "anime 904",
    ]
    swept, mixed_too, plain = plan.subjects[1], plan.subjects[0], plan.subjects[-1]
    assert plain.asks == (NEUTRAL, *(single(name, 1.0) for name in EXPRESSIONS))
    assert set(swept.asks) == {NEUTRAL, *(single(n, x) for n in EXPRESSIONS for x in (0.5, 1.0, 1.5))}
    assert len(mixed_too.asks) == len(swept.asks) + 15
    assert all(len(set(one.asks)) == len(one.asks) and one.asks[0] == NEUTRAL for one in plan.subjects)
    assert all(one.full_strength == plain.asks for one in plan.subjects)
    assert plan.describe().pictures == sum(len(one.asks) for one in plan.subjects)


def test_an_adapter_is_asked_for_what_it_is_signed_for() -> None:
    plan = plan_of(drawn(blend_people=5), only("fear", "happy", "shy", strength_max=1.2))
    assert plan.suite.intensities == (0.0, 0.5, 1.0)
    assert plan.expressions == ("fear", "happy", "shy")
    assert plan.judged == EXPRESSIONS
    assert plan.pairs == (("happy", "shy"),)  # fear has no partner here
    blends = [ask for ask in plan.subjects[0].asks if len(ask) > 1]
    assert blends == [mixed({"fear": 0.7, "happy": 0.7})]  # shy is no basic one


@pytest.mark.parametrize(
    ("suite", "spec", "told", "mend"),
    [
        (drawn(intensities=[0, 1, 0.5]), WORDS, "the intensities of few are", "rise from 0"),
        (drawn(intensities=[0.5, 1]), WORDS, "the intensities of few are", "rise from 0"),
        (drawn(intensities=[0, 0.5]), WORDS, "the intensities of few are", "contain 1"),
        (drawn(), only("happy", "smug"), "cannot judge: smug", "can name: angry"),
        (drawn(), only("happy", strength_max=0.8), "is for 0 to 0.8", "widen"),
        (drawn(), only("happy", strength_min=0.2), "is for 0.2 to 1.5", "widen"),
        (drawn(identities={}), WORDS, "has nobody to judge", "how many identities"),
    ],
)
def test_a_suite_that_cannot_be_asked_is_explained(
    suite: SuiteSection, spec: ConditioningSpec, told: str, mend: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_of(suite, spec)
    assert told in caught.value.message
    assert mend in caught.value.mend


def test_the_digest_of_a_plan_changes_with_what_is_asked() -> None:
    plans = [
        plan_of(suite, WORDS)
        for suite in (
            drawn(), drawn(first_identity=901), drawn(intensities=[0, 1]), drawn(seed=1), drawn(steps=2),
            drawn(sweep_people=1), drawn(blend_people=1), drawn(identities={"human": 2}),
        )
    ]  # fmt: skip
    plans.append(plan_of(drawn(), only("happy", "fear")))
    assert len({plan.digest() for plan in plans}) == len(plans)
    assert plan_of(drawn(), WORDS).digest() == plans[0].digest()
    # Other words of a template are another adapter's business, and so are the limits of a paid judge.
    told = ConditioningSpec(template="be {}", expressions=EXPRESSIONS)
    assert plan_of(drawn(api={"money": 3}), told).digest() == plans[0].digest()


def test_nothing_is_drawn_differently_outside_of_the_face() -> None:
    plan = plan_of(drawn(), WORDS)
    for index in range(len(plan.subjects)):
        outside, source = plan.pictures.outside(index), plan.pictures.source(index)
        assert 0.3 < outside.mean() < 0.8
        for name in EXPRESSIONS:
            truth = plan.pictures.truth(index, single(name, 1.0))
            assert truth is not None
            assert np.abs(truth.astype(int) - source.astype(int)).max(axis=2)[outside].max() <= 2
            assert (truth != source).any()


asks = st.dictionaries(st.sampled_from(EXPRESSIONS), st.floats(0, 1.5), max_size=4)


@given(asks)
def test_a_request_does_not_depend_on_the_order_of_its_expressions(wanted: dict[str, float]) -> None:
    ask = mixed(wanted)
    assert ask == mixed(dict(reversed(wanted.items())))
    assert np.allclose(vector(ask), [round(wanted.get(name, 0.0), 6) for name in EXPRESSIONS])
    assert all(level > 0 for _, level in ask)


# -- files -----------------------------------------------------------------------------------------------


def test_the_shipped_suites_hold() -> None:
    assert suites.names() == ("ffe-bench", "portraits-v1")
    portraits = plan_of(suites.load("portraits-v1"), WORDS)
    assert len(portraits.subjects) == 96
    assert set(portraits.describe().groups) == {"human", "anime"}
    with pytest.raises(RecipeError, match="has no folder of tasks"):
        plan_of(suites.load("ffe-bench"), WORDS)


def test_a_path_in_a_file_is_relative_to_the_file(tmp_path: Path) -> None:
    write_tasks(tmp_path / "here" / "tasks")
    suite = suites.load(str(write_suite(tmp_path / "here" / "suite.yaml")))
    assert suite.path == str(tmp_path / "here" / "tasks")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: x\nidentites: {human: 1}", "identites: there is no such key; did you mean 'identities'?"),
        ("name: x\nidentities: {human: 0}", "identities.human"),
        ("name: x\nsource: tasc", "did you mean 'tasks'?"),
        ("name: x\nfaces: bufalo_l", "did you mean 'buffalo_l'?"),
        ("name: x\njudge: {scorer: openai}", "need a model and a license"),
        ("name: x\njudge: {scorr: judge}", "did you mean 'scorer'?"),
        ("name: x\nsource: tasks\nidentities: {human: 1}", "the source tasks has a path"),
        ("name: x\npath: tasks", "path: is for the source tasks"),
        ("name: x\nintensities: [0, 1, 2]", "intensities.2"),
        ("steps: 1", "name: is missing"),
        ("- a list", "Input should be"),
        ("name: [", "cannot be read"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "suite.yaml"
    file.write_text(text, "utf-8")
    with pytest.raises(RecipeError) as caught:
        suites.load(str(file))
    assert told in caught.value.message


def test_an_unknown_suite_is_explained() -> None:
    with pytest.raises(RecipeError, match="no suite 'portraits'") as caught:
        suites.load("portraits")
    assert "ffe-bench, portraits-v1" in caught.value.mend


def with_evaluation(recipe: Recipe, **evaluation: Any) -> Recipe:
    value = recipe.model_dump(mode="json", exclude_unset=True)
    return Recipe.model_validate({**value, "evaluation": evaluation})


def test_a_recipe_changes_what_it_names(tiny_recipe: Recipe, tmp_path: Path) -> None:
    shipped = suites.load("portraits-v1")
    assert suites.of_recipe(with_evaluation(tiny_recipe)) == shipped
    assert suites.of_recipe(with_evaluation(tiny_recipe, steps=4)) == shipped  # its own already
    changed = suites.of_recipe(with_evaluation(tiny_recipe, steps=2, identities={"human": 3}))
    assert changed.name == "portraits-v1, changed"
    assert changed.steps == 2
    assert changed.people == range(90_000, 90_003)
    assert changed.intensities == shipped.intensities
    found = suites.of_recipe(with_evaluation(tiny_recipe, suite="ffe-bench", path=str(tmp_path)))
    assert found.name == "ffe-bench"
    assert found.path == str(tmp_path)
    with pytest.raises(RecipeError, match="the source tasks has a path"):
        suites.of_recipe(with_evaluation(tiny_recipe, suite="ffe-bench", identities={"human": 3}))


def test_a_paid_judge_may_cost_what_the_recipe_says(tiny_recipe: Recipe) -> None:
    value = tiny_recipe.model_dump(mode="json", exclude_unset=True)
    value["running"] = {**value["running"], "api": {"money": 1.5}}
    assert suites.of_recipe(Recipe.model_validate(value)).api.money == 1.5


# -- folders of tasks ------------------------------------------------------------------------------------


def tasks_plan(folder: Path, spec: ConditioningSpec = WORDS, **changes: Any) -> Plan:
    value = {"name": "own", "source": "tasks", "path": str(folder), "intensities": [0, 0.5, 1], **changes}
    return plan_of(SuiteSection.model_validate(value), spec)


@pytest.mark.parametrize(
    ("name", "key"), [("tasks.jsonl", "image"), ("metadata.jsonl", "file_name"), ("tasks.json", "image")]
)
def test_tasks_on_one_picture_are_one_subject(tmp_path: Path, name: str, key: str) -> None:
    write_tasks(tmp_path, name=name, key=key)
    plan = tasks_plan(tmp_path)
    assert [one.group for one in plan.subjects] == [domain for domain, _ in TASKS]
    assert plan.subjects[0].name == "human/000.png"
    assert plan.subjects[0].seed == 0
    for one, (_, expressions) in zip(plan.subjects, TASKS, strict=True):
        assert set(one.asks) == {NEUTRAL, *(single(name, x) for name in expressions for x in (0.5, 1.0))}
        assert dict(one.prompts) == {name: f"show a {name} expression" for name in expressions}
    assert plan.expressions == tuple(name for name in EXPRESSIONS if any(name in asked for _, asked in TASKS))
    assert ("fear", "surprised") in plan.pairs
    assert ("happy", "shy") not in plan.pairs
    assert plan.pictures.truth(0, NEUTRAL) is None
    assert plan.notes == ()


def test_fewer_are_asked_for_the_sweep_and_for_blends(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    plan = tasks_plan(tmp_path, sweep_people=1, blend_people=1)
    assert sum(len(ask) > 1 for ask in plan.subjects[0].asks) == 15
    assert set(plan.subjects[1].asks) == {NEUTRAL, single("angry", 1.0), single("disgust", 1.0)}


def test_pictures_without_a_task_for_the_adapter_are_left_out(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    plan = tasks_plan(tmp_path, only("sad", "angry"))
    assert [one.name for one in plan.subjects] == ["anime/001.png", "human/002.png", "anime/003.png"]
    assert plan.pictures.source(1).shape == (64, 64, 3)
    with pytest.raises(RecipeError, match=r"no task of .* asks for an expression"):
        tasks_plan(tmp_path, only("shy"))


def test_prompts_that_say_it_otherwise_are_noticed(tmp_path: Path) -> None:
    write_tasks(tmp_path, template="make them look {}")
    (note,) = tasks_plan(tmp_path).notes
    assert "10 of 10 tasks say it otherwise" in note
    assert "'make them look fear' for 'show a fear expression'" in note


def test_the_digest_covers_pictures_boxes_and_prompts(tmp_path: Path) -> None:
    listed = write_tasks(tmp_path)
    digests = {tasks_plan(tmp_path).digest()}
    for place, value in (("prompt", "another"), ("face_box", [1, 1, 60, 60])):
        write_list(tmp_path / "tasks.jsonl", [{**one, place: value} for one in listed])
        digests.add(tasks_plan(tmp_path).digest())
    write_tasks(tmp_path)
    Image.fromarray(photograph(64, 64)).save(tmp_path / "human" / "000.png")
    digests.add(tasks_plan(tmp_path).digest())
    assert len(digests) == 4


def test_words_for_an_expression_are_understood(tmp_path: Path) -> None:
    write_tasks(tmp_path, [("human", ["Anger", " surprise ", "happiness"])])
    assert tasks_plan(tmp_path).expressions == ("angry", "happy", "surprised")


def test_wide_pictures_are_cut_to_a_square_around_the_face(tmp_path: Path) -> None:
    picture = photograph(300, 100)
    Image.fromarray(picture).save(tmp_path / "wide.png")
    task = {"image": "wide.png", "face_box": [220, 20, 280, 90], "expression": "happy", "prompt": "smile"}
    write_list(tmp_path / "tasks.jsonl", [task])
    plan = tasks_plan(tmp_path)
    assert (plan.pictures.source(0) == picture[:, 180:280]).all()
    inside = ~plan.pictures.outside(0)
    down, across = (inside.any(axis=axis).nonzero()[0] for axis in (1, 0))
    assert (down[0], down[-1] + 1) == (13, 97)  # seven pixels of margin
    assert (across[0], across[-1] + 1) == (34, 100)


@given(st.integers(8, 500), st.integers(8, 500), st.data())
def test_the_square_holds_the_face_and_stays_in_the_picture(
    width: int, height: int, data: st.DataObject
) -> None:
    left, right = sorted(data.draw(st.lists(st.integers(0, width), min_size=2, max_size=2, unique=True)))
    top, bottom = sorted(data.draw(st.lists(st.integers(0, height), min_size=2, max_size=2, unique=True)))
    x, y, side = tasks.square(width, height, (left, top, right, bottom))
    assert side == min(width, height)
    assert 0 <= x <= width - side
    assert 0 <= y <= height - side
    for start, low, high, length in ((x, left, right, width), (y, top, bottom, height)):
        middle = (length - side) // 2
        if high - low <= side:
            assert start <= low
            assert high <= start + side
            assert start == middle or low < middle or high > middle + side
        else:
            assert low <= start
            assert start + side <= high


def test_a_photograph_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    picture = Image.fromarray(photograph(80, 120))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    task = {"image": "turned.jpg", "face_box": [0, 0, 120, 80], "expression": "happy", "prompt": "smile"}
    write_list(tmp_path / "tasks.jsonl", [task])
    assert tasks_plan(tmp_path).pictures.source(0).shape == (80, 80, 3)


Change = Callable[[Path, list[dict[str, Any]]], object]


def changed(place: str, value: Any) -> Change:
    def change(folder: Path, listed: list[dict[str, Any]]) -> None:
        listed[1] = {**listed[1], place: value}
        write_list(folder / "tasks.jsonl", listed)

    return change


def without(place: str) -> Change:
    def change(folder: Path, listed: list[dict[str, Any]]) -> None:
        del listed[1][place]
        write_list(folder / "tasks.jsonl", listed)

    return change


def text(content: str) -> Change:
    return lambda folder, listed: (folder / "tasks.jsonl").write_text(content, "utf-8")


def link(folder: Path, listed: list[dict[str, Any]]) -> None:
    target = folder.parent / "elsewhere.png"
    Image.fromarray(photograph(64, 64)).save(target)
    (folder / "human" / "000.png").unlink()
    (folder / "human" / "000.png").symlink_to(target)


def bomb(folder: Path, listed: list[dict[str, Any]]) -> None:
    Image.new("1", (5_000, 5_000)).save(folder / "human" / "000.png")


def copy(folder: Path, listed: list[dict[str, Any]]) -> None:
    (folder / "human" / "002.png").write_bytes((folder / "human" / "000.png").read_bytes())


WRONG: dict[str, tuple[Change, str]] = {
    "no list": (lambda folder, _: (folder / "tasks.jsonl").unlink(), "has no list of tasks"),
    "two lists": (lambda folder, listed: write_list(folder / NAMES[2], listed), "tasks.jsonl and tasks.json"),
    "empty": (text(""), "is empty"),
    "no JSON": (text("{\n"), "line 1: this is no JSON object"),
    "a number": (text("7\n"), "line 1: this is no JSON object"),
    "a key twice": (text('{"image": "a", "image": "b"}\n'), "a key is there twice"),
    "wrong key": (changed("promt", "x"), "line 2: promt: there is no such key; did you mean 'prompt'?"),
    "missing key": (without("face_box"), "line 2: face_box: is missing"),
    "unknown expression": (changed("expression", "suprised"), "there is no expression 'suprised'; did you"),
    "neutral": (changed("expression", "neutral"), "neutral is asked of every picture anyway"),
    "asked twice": (changed("expression", "happy"), "is asked for 'happy' twice"),
    "another box": (changed("face_box", [1, 1, 9, 9]), "has another face_box or domain on line 1"),
    "another domain": (changed("domain", "anime"), "has another face_box or domain on line 1"),
    "three numbers": (changed("face_box", [1, 1, 9]), "line 2: face_box"),
    "words": (changed("face_box", ["1", "1", "9", "9"]), "line 2: face_box"),
    "no number": (changed("face_box", [1, 1, 9, float("nan")]), "line 2: face_box"),
    "up": (changed("image", "../elsewhere.png"), "is not a path inside the folder"),
    "absolute": (changed("image", "/etc/passwd"), "is not a path inside the folder"),
    "gone": (changed("image", "human/none.png"), "there is no picture 'human/none.png'"),
    "control characters": (changed("prompt", "a\x1b[31m"), "line 2: prompt"),
    "a link": (link, "goes through a symbolic link"),
    "a bomb": (bomb, "line 1: '000.png': the picture has 5000 x 5000 pixels"),
    "no picture": (lambda folder, _: (folder / "human" / "000.png").write_text("x"), "not a readable"),
    "a copy": (copy, "'human/002.png' is the same file as 'human/000.png'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_folder_is_explained(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "tasks"
    change, told = WRONG[kind]
    change(folder, write_tasks(folder))
    with pytest.raises(DataError) as caught:
        tasks_plan(folder)
    assert told in caught.value.message
    assert caught.value.mend


@pytest.mark.parametrize("box", [[0, 0, 65, 64], [0, 0, 64, 64.5], [30, 10, 30, 40], [40, 10, 30, 40]])
def test_a_box_lies_in_its_picture(tmp_path: Path, box: list[float]) -> None:
    listed = write_tasks(tmp_path, [("human", ["happy"])])
    write_list(tmp_path / "tasks.jsonl", [{**listed[0], "face_box": box}])
    with pytest.raises(DataError, match="64 x 64 pixels; write left, top, right, bottom"):
        tasks_plan(tmp_path)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    listed = write_tasks(tmp_path)
    listed[0]["expression"], listed[4]["prompt"], listed[5]["domain"] = "hapy", "", 3
    write_list(tmp_path / "tasks.jsonl", listed)
    with pytest.raises(DataError) as caught:
        tasks_plan(tmp_path)
    assert [f"line {number}:" in caught.value.message for number in range(1, 8)] \
        == [True, False, False, False, True, True, False]  # fmt: skip


def test_a_list_in_json_counts_tasks(tmp_path: Path) -> None:
    listed = write_tasks(tmp_path, name="tasks.json")
    (tmp_path / "tasks.json").write_text(json.dumps([listed[0], 7]), "utf-8")
    with pytest.raises(DataError, match="task 2"):
        tasks_plan(tmp_path)
    (tmp_path / "tasks.json").write_text(json.dumps({"tasks": listed}), "utf-8")
    with pytest.raises(DataError, match="is no JSON list"):
        tasks_plan(tmp_path)


def test_a_picture_that_changes_while_it_is_evaluated_is_refused(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    plan = tasks_plan(tmp_path)
    tasks._opened.cache_clear()
    Image.fromarray(photograph(64, 64)).save(tmp_path / "human" / "000.png")
    with pytest.raises(DataError, match="was changed since the evaluation began"):
        plan.pictures.source(0)


# -- judges ----------------------------------------------------------------------------------------------

VLM: dict[str, Any] = {"scorer": "openai", "model": "seer-1", "license": "LicenseRef-terms"}


def trained_with(*ingredients: Ingredient) -> AdapterCard:
    return AdapterCard.model_validate({**card(), "ingredients": ingredients})


def said(name: str, kind: str = "api", **more: Any) -> Ingredient:
    return Ingredient.model_validate(
        {"name": name, "kind": kind, "license": "MIT", "source": "scores", **more}
    )


def judges(tmp_path: Path, **judge: Any) -> Judges:
    return judges_of(drawn(judge=judge or {"scorer": "judge"}), tmp_path)


def test_who_labels_the_data_is_not_who_judges(tmp_path: Path) -> None:
    labels = LocalScorer("label").ingredient
    judges(tmp_path).require_independent(trained_with(labels))  # the shipped ones were trained apart
    own = judges(tmp_path).expression.ingredient
    assert own is not None
    assert own.digest not in (None, labels.digest)


@pytest.mark.parametrize(
    "ingredient",
    [
        said("seer-1"),
        said("Seer-1 "),
        said("gateway/seer-1"),
        said("seer-1", source="scored the pictures; openai at https://another.example/v1"),
        said("seer-1", kind="judge"),
    ],
    ids=["its name", "other letters", "by a gateway", "elsewhere", "as a judge"],
)
def test_a_model_that_scored_the_data_cannot_judge(tmp_path: Path, ingredient: Ingredient) -> None:
    with pytest.raises(EvaluationError, match="cannot judge it") as caught:
        judges(tmp_path, **VLM).require_independent(trained_with(ingredient))
    assert "another judge" in caught.value.mend


@pytest.mark.parametrize(
    "ingredient",
    [said("seer-2"), said("seer"), said("seer-1", kind="auxiliary-model"), said("seer-1", kind="dataset")],
)
def test_others_can(tmp_path: Path, ingredient: Ingredient) -> None:
    assert judges(tmp_path, **VLM).require_independent(trained_with(ingredient)) is None


def test_the_shipped_judge_under_another_name_is_known_by_its_digest(tmp_path: Path) -> None:
    own = judges(tmp_path).expression.ingredient
    assert own is not None
    with pytest.raises(EvaluationError, match="cannot judge it"):
        judges(tmp_path).require_independent(trained_with(said("my scorer", kind="judge", digest=own.digest)))


def test_names_and_digests_say_who_decided(tmp_path: Path) -> None:
    shipped, asked = judges(tmp_path), judges(tmp_path, **VLM)
    assert shipped.digests["expression"].hex[:16] in shipped.names["expression"]
    assert set(shipped.names) == set(shipped.digests) == {"expression", "identity", "background"}
    assert asked.names["expression"].startswith("openai/seer-1/")
    other = judges(tmp_path, **VLM, samples=3, temperature=0.5)
    digests = {one.digests["expression"] for one in (shipped, asked, other)}
    assert len(digests) == 3


PHOTOGRAPHS = BaseModelRef(
    id="Qwen/Qwen-Image-Edit-2511", revision="1", family="qwen-image-edit", license="MIT"
)
PORTRAITS = PHOTOGRAPHS.model_copy(update={"id": "adapter-foundry/portraits-base"})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "draws portraits"),
        ({"source": "tasks", "identities": {}}, "has only seen drawn faces"),
        ({"source": "tasks", "identities": {}, "judge": VLM}, "the encoder of faces"),
    ],
)
def test_who_has_only_seen_portraits_judges_no_photographs(changes: dict[str, Any], told: str) -> None:
    suite = drawn(**changes)
    require_able(suite, PORTRAITS)
    with pytest.raises(RecipeError, match=told) as caught:
        require_able(suite, PHOTOGRAPHS)
    assert caught.value.mend


def test_others_judge_photographs() -> None:
    able = drawn(source="tasks", identities={}, judge=VLM, faces="buffalo_l")
    assert require_able(able, PHOTOGRAPHS) is None
