"""Which stages a recipe's data go through: drawn people are drawn and judged, one's own pictures are read."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flows.dataset import make_dataset
from flows.display import Display
from flows.job import FEWER_OF_FOLDER, STAGES
from flows.stages import Job
from flows.training import make_adapter
from registry.digest import digest_bytes
from trainer.recipe import Recipe, load
from trainer.stage import StageResult


@dataclass(kw_only=True)
class Notebook(Job):
    """A job that writes down its stages, with what their results hang on, and does none of them.

    Attributes:
        stages: name -> what it was called with.
        terms: licence that each stage says of the one ingredient it names.
    """

    terms: str = "Apache-2.0"
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    def cached(self, task: Any, *, key: dict[str, Any], **parameters: Any) -> StageResult:
        self.stages[task.name] = {**parameters, "key": key}
        return StageResult(
            stage=task.name,
            folder=self.root / task.name,
            key=digest_bytes(b"k"),
            digest=digest_bytes(task.name.encode()),
            facts={"ingredients": [{"license": self.terms}]},
        )

    def always(self, task: Any, **parameters: Any) -> StageResult:
        return self.cached(task, key={}, **parameters)


def stages_of(recipe: Recipe, tmp_path: Path, **about: Any) -> dict[str, dict[str, Any]]:
    base = tmp_path / "base"
    base.mkdir(parents=True)
    notebook = Notebook(home=tmp_path, root=tmp_path, display=Display(5, io.StringIO()), **about)
    make_adapter(notebook, recipe, base, make_dataset(notebook, recipe))
    return notebook.stages


@pytest.fixture(scope="module")
def drawn() -> Recipe:
    return load("pixelsmile-portraits")


def test_drawn_people_are_drawn_and_judged(drawn: Recipe, tmp_path: Path) -> None:
    assert list(stages_of(drawn, tmp_path)) == ["synthesise", "score", "triplets", "cache", "train"]


def test_own_pictures_are_read_and_neither_drawn_nor_judged(drawn: Recipe, tmp_path: Path) -> None:
    own = drawn.data.model_copy(update={"source": "folder", "path": "mine"})
    stages = stages_of(drawn.model_copy(update={"data": own}), tmp_path)
    assert list(stages) == ["folder", "cache", "train"]
    assert stages["cache"]["dataset"] == stages["train"]["dataset"] == tmp_path / "folder"
    assert len(stages_of(drawn, tmp_path / "other")) - len(stages) == FEWER_OF_FOLDER
    assert STAGES["training"] == len(stages_of(drawn, tmp_path / "again"))


def test_another_training_size_fills_the_cache_anew(drawn: Recipe, tmp_path: Path) -> None:
    larger = drawn.model_copy(update={"data": drawn.data.model_copy(update={"sizes": (128,)})})
    keys = []
    for number, recipe in enumerate((drawn, larger)):
        place = tmp_path / str(number)
        place.mkdir()
        keys.append(stages_of(recipe, place)["cache"]["key"])
    assert keys[0] != keys[1]


def test_the_same_scores_under_other_terms_make_another_dataset(drawn: Recipe, tmp_path: Path) -> None:
    keys = [
        stages_of(drawn, tmp_path / terms, terms=terms)["triplets"]["key"]
        for terms in ("Apache-2.0", "LicenseRef-other-terms")
    ]
    assert keys[0]["scores"] == keys[1]["scores"]
    assert keys[0] != keys[1]
