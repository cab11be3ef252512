"""What a candidate is compared with, found in a real registry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fakes.registries import NAME, PASSING, adapter_files, adapter_folder, copy_registry
from flows.production import standing
from registry.client import Registry
from registry.digest import digest_bytes
from registry.manifest import WEIGHTS_NAME
from trainer.progress import silent
from trainer.recipe import Recipe, change
from trainer.recipe import load as load_recipe


def weights(seed: int) -> str:
    return str(digest_bytes(adapter_files(seed)[WEIGHTS_NAME]))


@pytest.fixture
def registry(home: Path) -> Registry:
    """Of which `pixelsmile@prod` is version 1, which was compared with nothing."""
    return copy_registry(home)


@pytest.fixture
def recipe() -> Recipe:
    """One for the expressions that the fake adapters have."""
    known = json.loads(adapter_files(0)["adapter.json"])["conditioning"]["expressions"]
    return change(load_recipe("pixelsmile-portraits"), {"conditioning.expressions": known})


def released(registry: Registry, folder: Path, seed: int, **said: Any) -> Path:
    """Push an adapter with an evaluation that says something more, and promote it."""
    adapter = adapter_folder(folder / f"adapter-{seed}", seed)
    evaluation: Mapping[str, Any] = {**PASSING, **said}
    pushed = registry.push(adapter, NAME, evaluation=evaluation)
    registry.approve(pushed.reference, "a person", "looks right")
    registry.promote(pushed.reference, "prod")
    return adapter


def test_without_a_registry_or_an_alias_there_is_nothing_to_compare_with(
    home: Path, recipe: Recipe, tmp_path: Path
) -> None:
    found = standing(Registry.open(home), recipe, adapter_folder(tmp_path / "new", 1))
    assert (found.reference, found.taken) == (None, False)
    assert f"{NAME}@prod means nothing yet" in found.why
    assert found.fetch(Registry.open(home), silent) is None


def test_a_candidate_is_compared_with_what_the_alias_means_now(
    registry: Registry, recipe: Recipe, tmp_path: Path
) -> None:
    candidate = adapter_folder(tmp_path / "new", 9)
    found = standing(registry, recipe, candidate)
    assert (found.reference, str(found.weights), found.taken) == (f"{NAME}:1", weights(0), True)
    fetched = found.fetch(registry, silent)
    assert fetched is not None
    assert (fetched[0] / WEIGHTS_NAME).read_bytes() == adapter_files(0)[WEIGHTS_NAME]
    released(registry, tmp_path, 1)
    assert str(standing(registry, recipe, candidate).weights) == weights(1), "somebody promoted in between"


def test_its_own_promotion_changes_nothing(registry: Registry, recipe: Recipe, tmp_path: Path) -> None:
    first = adapter_folder(tmp_path / "first", 0)
    assert (standing(registry, recipe, first).reference, standing(registry, recipe, first).taken) == (
        None,
        False,
    )
    before = standing(registry, recipe, adapter_folder(tmp_path / "candidate", 1))
    against = {"reference": before.reference, "weights": str(before.weights)}
    adapter = released(registry, tmp_path, 1, against=against)
    assert registry.show(f"{NAME}@prod").listed.reference == f"{NAME}:2"
    assert standing(registry, recipe, adapter) == before


@pytest.mark.parametrize(
    "against", ["pixelsmile:1", {"reference": "/an/adapter"}, {"reference": "pixelsmile:1"}]
)
def test_a_signed_comparison_that_names_nothing_is_none(
    registry: Registry, recipe: Recipe, tmp_path: Path, against: Any
) -> None:
    adapter = released(registry, tmp_path, 1, against=against)
    assert standing(registry, recipe, adapter).reference is None


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("base.revision", "2", "it is for the base"),
        ("conditioning.expressions", ["happy", "sleepy"], "it has no expression sleepy"),
    ],
)
def test_what_cannot_be_compared_is_said_and_the_alias_is_taken(
    registry: Registry, recipe: Recipe, tmp_path: Path, key: str, value: Any, words: str
) -> None:
    other = change(recipe, {key: value})
    found = standing(registry, other, adapter_folder(tmp_path / "new", 1))
    assert (found.reference, found.taken) == (None, True)
    assert words in found.why
