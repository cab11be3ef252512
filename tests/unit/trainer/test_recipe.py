"""Recipes: what is wrong is refused with the nearest right key; the digest names what counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer import recipe as recipes
from trainer.errors import DataError, RecipeError


def shipped() -> str:
    return (Path(recipes.__file__).parent / "recipes" / "pixelsmile-portraits.yaml").read_text("utf-8")


def test_the_shipped_recipe_is_found_by_name_and_by_path(tmp_path: Path) -> None:
    copy = tmp_path / "copy.yaml"
    copy.write_text(shipped(), "utf-8")
    assert recipes.load("pixelsmile-portraits").digest == recipes.load(copy).digest
    assert len(recipes.load("pixelsmile-portraits").conditioning.expressions) == 12


@pytest.mark.parametrize(
    ("right", "wrong", "expected"),
    [
        ("rank: 32", "rnak: 32", "did you mean 'rank'?"),
        ("seed: 7", "sead: 7", "did you mean 'seed'?"),
        ("temperature: 0.07", "temprature: 0.07", "did you mean 'temperature'?"),
        ("neutral: neutral", "nuetral: neutral", "did you mean 'neutral'?"),
        (
            "flow_matching:",
            "flow_match:",
            "losses.flow_match: there is no 'flow_match'; did you mean 'flow_matching'?",
        ),
        ("schedule: cosine", "schedule: cosin", "did you mean 'cosine'?"),
        ("encoder: portraits", "encoder: antelope", "did you mean 'antelopev2'?"),
        ("  rank: 32\n", "", "lora.rank: is missing"),
        ("targets: full", "targets: all", "lora.targets: qwen-image-edit has no 'all'"),
        ("batch_pairs: 16", "batch_pairs: many", "optimiser.batch_pairs"),
        ("warmup_steps: 30", "warmup_steps: 30000", "warmup_steps must be below steps"),
        ("[0.33, 0.67, 1.0]", "[1.0, 0.33]", "intensities must rise"),
        ("first_identity: 40000", "first_identity: 90010", "overlap"),
        ("template: show a {} expression", "template: show it", "exactly one {}"),
        ("dtype: F16", "dtype: F8", "lora.dtype"),
        ("adapter: pixelsmile", "adapter: ../up", "release.adapter"),
    ],
)
def test_a_wrong_recipe_is_explained(right: str, wrong: str, expected: str) -> None:
    text = shipped()
    assert right in text
    with pytest.raises(RecipeError, match="What to do") as caught:
        recipes.parse(text.replace(right, wrong))
    assert expected in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["", "- a list", "a: [", "a: !!python/object/apply:os.system [x]"])
def test_what_is_no_recipe_is_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        recipes.parse(text)


def test_a_missing_recipe_names_those_that_there_are() -> None:
    with pytest.raises(RecipeError, match="pixelsmile-portraits"):
        recipes.load("nothing-here")


def test_the_digest_follows_values_not_layout() -> None:
    text = shipped()
    assert recipes.parse(text).digest == recipes.parse("# another comment\n" + text).digest
    assert recipes.parse(text).digest != recipes.parse(text.replace("rank: 32", "rank: 16")).digest


def test_all_losses_off_is_refused() -> None:
    text = shipped().replace("weight: 1.0", "weight: 0").replace("weight: 0.05", "weight: 0")
    with pytest.raises(RecipeError, match="weight 0"):
        recipes.parse(text.replace("weight: 0.1,", "weight: 0,"))


def test_pictures_that_are_not_there_are_missed_before_anything_is_loaded(tmp_path: Path) -> None:
    text = shipped().replace("source: renderer", f"source: folder\n  path: {tmp_path / 'pictures'}")
    drawn = ("identities: {human: 42", "validation:", "first_identity: 40000", "intensities: [0.33")
    recipe = recipes.parse(
        "\n".join(line for line in text.splitlines() if not line.strip().startswith(drawn))
    )
    with pytest.raises(DataError, match=r"no file .*pairs\.jsonl") as caught:
        recipes.require_data(recipe)
    assert "data.path" in caught.value.mend
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "pairs.jsonl").touch()
    recipes.require_data(recipe)


def test_a_list_of_pairs_is_not_paired_at_random(tmp_path: Path) -> None:
    from trainer.sections import DataSection

    listed = {"source": "folder", "path": str(tmp_path)}
    assert DataSection(**listed).pairing == "confusing"
    with pytest.raises(ValueError, match="those that its list names"):
        DataSection(**listed, pairing="random")


@pytest.mark.parametrize("scorer", ["openai", "gemini"])
def test_samples_that_cannot_disagree_are_not_paid(scorer: str) -> None:
    asking = {"scorer": scorer, "model": "eyes-1", "license": "LicenseRef-terms", "samples": 3}
    plain = recipes.parse(shipped())
    for temperature in ({}, {"temperature": 0.0}):
        with pytest.raises(RecipeError, match="same answer paid several times") as caught:
            recipes.change(plain, {"scoring": {**asking, **temperature}})
        assert "temperature above 0" in str(caught.value)
    for right in ({"temperature": 0.7}, {"temperature": None}, {"samples": 1}):
        assert recipes.change(plain, {"scoring": {**asking, **right}}).scoring.scorer == scorer
    assert recipes.change(plain, {"scoring": {"samples": 3}}).scoring.scorer == "judge", "it costs nothing"
