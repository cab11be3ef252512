"""What is recorded about an adapter, and how alike another one is: read from a real registry, no training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load, save

from fakes.registries import adapter_files
from registry.client import Registry
from registry.digest import digest_bytes
from registry.manifest import CARD_NAME, WEIGHTS_NAME, AdapterCard
from trainer.errors import NotReproducible, RecipeError
from trainer.evaluation.gates import rows
from trainer.evaluation.report import Digests, EvaluationReport, Suite, Value
from trainer.provenance import heard, provenance, said
from trainer.recipe import Recipe, change
from trainer.recipe import load as load_recipe
from trainer.reproduction import TOLERANCE, compare, identical, recorded


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("pixelsmile-portraits")


def folder(place: Path, recipe: Recipe | None, **lineage: Any) -> Path:
    """A clean adapter whose card records a recipe."""
    files = adapter_files(0)
    card = json.loads(files[CARD_NAME])
    if recipe is not None:
        made = provenance(recipe).model_dump(mode="json")
        card["training"] |= {"recipe": str(recipe.digest), "provenance": made}
    card["training"] |= lineage
    place.mkdir()
    (place / CARD_NAME).write_bytes(AdapterCard.parse(json.dumps(card).encode()).canonical_bytes())
    (place / WEIGHTS_NAME).write_bytes(files[WEIGHTS_NAME])
    return place


def stronger(place: Path, factor: float) -> Path:
    """The same folder with every update multiplied."""
    data = (place / WEIGHTS_NAME).read_bytes()
    length = int.from_bytes(data[:8], "little")
    tags = json.loads(data[8 : 8 + length])["__metadata__"]
    tensors = {
        name: (value.float() * factor).to(value.dtype) if "lora_B" in name else value
        for name, value in load(data).items()
    }
    (place / WEIGHTS_NAME).write_bytes(save(tensors, metadata=tags))
    return place


def measured(top1: float, **more: float) -> EvaluationReport:
    """What a comparison reads of a report with these figures."""
    values = {
        name: Value(value=mean, low=mean - 0.05, high=mean + 0.05, n=16, samples=192)
        for name, mean in {"top1_accuracy": top1, **more}.items()
    }
    digest = digest_bytes(b"judge")
    return EvaluationReport.model_construct(
        metrics=rows(values, {}, {}, {}),
        suite=Suite.model_construct(definitions="2"),
        digests=Digests.model_construct(suite=digest_bytes(b"suite"), judges={"expression": digest}),
    )


def evaluation(top1: float, **more: float) -> dict[str, Any]:
    return signed_form(measured(top1, **more))


def signed_form(found: EvaluationReport) -> dict[str, Any]:
    """What is signed of such a report."""
    suite, judges = found.digests.suite, found.digests.judges
    return {
        "schema_version": 2,
        "verdict": "pass",
        "suite": {"definitions": found.suite.definitions},
        "digests": {"suite": str(suite), "judges": {name: str(digest) for name, digest in judges.items()}},
        "metrics": [row.model_dump(mode="json") for row in found.metrics],
    }


def first_schema(top1: float) -> dict[str, Any]:
    """An evaluation as the versions before this one have signed them."""
    value = {"value": top1, "low": top1 - 0.05, "high": top1 + 0.05, "n": 16, "samples": 192}
    row = {
        "name": "top1_accuracy", "title": "Expression accuracy", "definition": "share", "direction": "higher",
        "unit": "", "value": value, "threshold": 0.85, "bound": "min", "passed": True, "references": {},
    }  # fmt: skip
    return {"schema_version": 1, "verdict": "pass", "suite": {"definitions": "1"}, "metrics": [row]}


@pytest.fixture
def registry(home: Path, tmp_path: Path, recipe: Recipe) -> Registry:
    found = Registry.init(home)
    found.push(folder(tmp_path / "released", recipe), "pixelsmile", evaluation=evaluation(0.9))
    return found


def test_the_recorded_recipe_is_the_recipe(registry: Registry, recipe: Recipe) -> None:
    known = recorded(registry, "pixelsmile:1")
    assert known.recipe == recipe
    assert known.recipe.model_fields_set == recipe.model_fields_set
    (signed,) = known.evaluations
    assert signed.figures == {"top1_accuracy": (0.9, pytest.approx(0.85), pytest.approx(0.95))}
    assert signed.like(measured(0.1))
    assert not known.asks_apis
    known.require_base(digest_bytes(b"any"))  # this card names no digest of the base


def test_an_adapter_from_before_says_so(home: Path, tmp_path: Path) -> None:
    registry = Registry.init(home)
    registry.push(folder(tmp_path / "old", None), "pixelsmile")
    with pytest.raises(NotReproducible, match="no signed recipe"):
        recorded(registry, "pixelsmile:1")


def test_a_recipe_with_other_defaults_is_another_recipe(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="the adapter was made from"):
        heard(said(change(recipe, {"seed": 8})), recipe.digest)
    with pytest.raises(RecipeError, match="none for this version"):
        heard('{"name": "x"}', recipe.digest)


def test_the_same_bytes_are_identical(registry: Registry, recipe: Recipe, tmp_path: Path) -> None:
    known, again = recorded(registry, "pixelsmile:1"), folder(tmp_path / "again", recipe)
    assert identical(known, again)
    found = compare(registry, known, again)
    assert (found.outcome, found.difference, found.notes) == ("identical", None, ())


@pytest.mark.parametrize(
    ("factor", "top1", "outcome"),
    [(1.05, 0.91, "equivalent"), (1.05, 0.7, "different"), (1.5, 0.9, "different"), (0.0, 0.9, "different")],
)
def test_other_bytes_are_judged_by_distance_and_figures(
    registry: Registry, recipe: Recipe, tmp_path: Path, factor: float, top1: float, outcome: str
) -> None:
    known = recorded(registry, "pixelsmile:1")
    again = stronger(folder(tmp_path / "again", recipe), factor)
    assert not identical(known, again)
    found = compare(registry, known, again, report=measured(top1))
    assert found.outcome == outcome
    assert found.difference is not None
    assert found.difference.relative == pytest.approx(abs(factor - 1), rel=0.02)
    assert found.difference.tolerance == TOLERANCE
    (row,) = found.metrics
    assert (row.released, row.rebuilt, row.within) == (0.9, top1, abs(top1 - 0.9) < 0.05)


def other_suite(found: EvaluationReport) -> EvaluationReport:
    digests = found.digests.model_copy(update={"suite": digest_bytes(b"others were asked")})
    return found.model_copy(update={"digests": digests})


def other_judges(found: EvaluationReport) -> EvaluationReport:
    digests = found.digests.model_copy(update={"judges": {"expression": digest_bytes(b"another judge")}})
    return found.model_copy(update={"digests": digests})


HALF: dict[str, tuple[list[dict[str, Any]], EvaluationReport, str]] = {
    "nothing is signed": ([], measured(0.9), "there is no signed evaluation"),
    "the first schema": ([first_schema(0.9)], measured(0.9), "its definitions are 2, the signed ones 1"),
    "another suite": ([evaluation(0.9)], other_suite(measured(0.9)), "no signed evaluation has the suite"),
    "other judges": ([evaluation(0.9)], other_judges(measured(0.9)), "no signed evaluation has the suite"),
    "a figure is gone": ([evaluation(0.9, paired_psnr=23.0)], measured(0.9), "has none for paired_psnr"),
}


@pytest.mark.parametrize("name", HALF)
def test_half_a_comparison_is_not_equivalent(home: Path, tmp_path: Path, recipe: Recipe, name: str) -> None:
    """The weights are close; whether the figures are cannot be told."""
    signed, rebuilt, note = HALF[name]
    registry = Registry.init(home)
    registry.push(folder(tmp_path / "released", recipe), "pixelsmile")
    for one in signed:
        registry.attest("pixelsmile:1", "evaluation", one)
    again = stronger(folder(tmp_path / "again", recipe), 1.05)
    found = compare(registry, recorded(registry, "pixelsmile:1"), again, report=rebuilt)
    assert (found.outcome, found.metrics) == ("different", ())
    assert note in " ".join(found.notes)


def test_weights_that_cannot_be_compared_are_not_equivalent(
    registry: Registry, recipe: Recipe, tmp_path: Path
) -> None:
    again = folder(tmp_path / "again", recipe)
    data = (again / WEIGHTS_NAME).read_bytes()
    tags = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    tensors = {name: value[:-1] if "lora_B" in name else value for name, value in load(data).items()}
    (again / WEIGHTS_NAME).write_bytes(save({k: v.contiguous() for k, v in tensors.items()}, metadata=tags))
    found = compare(registry, recorded(registry, "pixelsmile:1"), again, report=measured(0.9))
    assert (found.outcome, found.difference) == ("different", None)
    assert [row.within for row in found.metrics] == [True]
    assert "cannot be compared" in " ".join(found.notes)


@pytest.mark.parametrize("figures", [(0.9, 0.7), (0.7, 0.9)])
def test_of_several_signed_evaluations_all_must_agree(
    home: Path, tmp_path: Path, recipe: Recipe, figures: tuple[float, float]
) -> None:
    """Also one of another suite, which is about something else, is no reason to look away."""
    registry = Registry.init(home)
    registry.push(folder(tmp_path / "released", recipe), "pixelsmile")
    for one in (*map(measured, figures), other_suite(measured(0.2))):
        registry.attest("pixelsmile:1", "evaluation", signed_form(one))
    again = stronger(folder(tmp_path / "again", recipe), 1.05)
    found = compare(registry, recorded(registry, "pixelsmile:1"), again, report=measured(0.9))
    assert found.outcome == "different"
    assert [row.released for row in found.metrics] == [0.7]


def test_what_differs_around_the_weights_is_noted(registry: Registry, recipe: Recipe, tmp_path: Path) -> None:
    known = recorded(registry, "pixelsmile:1")
    again = folder(tmp_path / "again", recipe, dataset=str(digest_bytes(b"other")))
    card = json.loads((again / CARD_NAME).read_bytes())
    card["training"]["provenance"]["machine"]["threads"] += 1
    card["training"]["provenance"]["code"] = str(digest_bytes(b"other"))
    (again / CARD_NAME).write_text(json.dumps(card))
    notes = " ".join(compare(registry, known, again).notes)
    for words in ("code is not the recorded one", "dataset came out", "machine or its libraries"):
        assert words in notes
