"""Which stages a recipe's data go through: drawn people are drawn and judged, one's own pictures are read."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fakes.plain_jobs import PlainJob
from flows.dataset import make_dataset
from flows.display import Display
from flows.job import FEWER_OF_FOLDER, STAGES
from flows.stages import Job
from flows.training import make_adapter
from registry.digest import digest_bytes
from trainer.data import Dataset
from trainer.portraits.renderer import identity, one_hot, pose, render
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


@pytest.fixture
def own(drawn: Recipe, tmp_path: Path) -> Recipe:
    """A recipe with pictures of two people of one's own."""
    place, lines = tmp_path / "mine", []
    place.mkdir()
    for number, split in ((1, "train"), (2, "validation")):
        for name in ("neutral", "fear", "surprised"):
            draw(place / f"{number}-{name}.png", number, name)
        a, b = (
            {"image": f"{number}-{name}.png", "expression": name, "intensity": 1.0}
            for name in ("fear", "surprised")
        )
        source = {"split": split, "identity": str(number), "source": f"{number}-neutral.png"}
        lines.append(json.dumps({**source, "a": a, "b": b, "license": "CC0-1.0"}))
    (place / "pairs.jsonl").write_text("\n".join(lines))
    data = drawn.data.model_copy(update={"source": "folder", "path": str(place)})
    return drawn.model_copy(update={"data": data})


def draw(path: Path, number: int, expression: str) -> None:
    pixels = render(identity(number, "human"), one_hot(expression), 64, pose(number))
    Image.fromarray(pixels).save(path)


def test_own_pictures_are_read_and_neither_drawn_nor_judged(
    drawn: Recipe, own: Recipe, tmp_path: Path
) -> None:
    stages = stages_of(own, tmp_path)
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


def test_pictures_that_somebody_adds_later_leave_alone_what_a_run_trains_on(
    own: Recipe, tmp_path: Path
) -> None:
    def made() -> StageResult:
        return make_dataset(PlainJob(home=tmp_path, root=tmp_path / "runs" / "mine", display=quiet), own)

    quiet = Display(5, io.StringIO())
    first = made()
    picture = Path(own.data.path or "") / "1-fear.png"
    before = picture.read_bytes()
    draw(picture, 3, "fear")
    second = made()
    assert second.digest != first.digest
    assert Dataset.open(second.folder).digest == second.digest
    assert Dataset.open(first.folder).digest == first.digest, "the run before goes on with what it began with"
    picture.write_bytes(before)
    again = made()
    assert again.reused
    assert (again.folder, again.digest) == (first.folder, first.digest)
