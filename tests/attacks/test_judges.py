"""Attacks on judges: whoever labelled the training data asks to judge what came of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fakes.adapters import card
from fakes.tasks import write_tasks
from fakes.vendors import Vendor
from fakes.vlm import answer, vlm
from registry.digest import digest_bytes
from registry.manifest import AdapterCard
from trainer.errors import BaseModelError, EvaluationError
from trainer.evaluation.bench import Bench
from trainer.evaluation.editing import Editor
from trainer.evaluation.judges import judges_of
from trainer.evaluation.plan import plan_of
from trainer.sections import SuiteSection


@pytest.fixture
def vendor() -> Iterator[Vendor]:
    with vlm(Vendor(), lambda pixels, seed: answer({"happy": 1.0})) as running:
        yield running


def bench(place: Path, vendor: Vendor, made: AdapterCard) -> Bench:
    write_tasks(place / "tasks")
    suite = SuiteSection.model_validate(
        {"name": "own", "source": "tasks", "path": str(place / "tasks"), "intensities": [0, 1], "steps": 1,
         "judge": {"scorer": "openai", "model": "seer-1", "endpoint": vendor.openai, "license": "MIT"}}
    )  # fmt: skip
    return Bench(
        plan=plan_of(suite, made.conditioning), judges=judges_of(suite, place), base=made.base,
        base_path=place / "nothing", place=place / "measured",
    )  # fmt: skip


def trained_with(*ingredients: dict[str, Any]) -> AdapterCard:
    return AdapterCard.model_validate({**card(), "ingredients": ingredients})


@pytest.mark.parametrize("name", ["seer-1", "SEER-1", "openrouter/vendor/seer-1"])
@pytest.mark.parametrize("kind", ["api", "judge"])
def test_who_labelled_the_data_is_not_asked(tmp_path: Path, vendor: Vendor, name: str, kind: str) -> None:
    made = trained_with({"name": name, "kind": kind, "license": "MIT", "source": "scored the pictures"})
    who = Editor(name="adapter", folder=tmp_path, weights=digest_bytes(b"weights"), card=made)
    with pytest.raises(EvaluationError, match="cannot judge it"):
        bench(tmp_path, vendor, made).measure(who)
    assert not vendor.log
    assert not (tmp_path / "measured").exists()


def test_somebody_else_goes_on_to_the_edits(tmp_path: Path, vendor: Vendor) -> None:
    made = trained_with({"name": "seer-2", "kind": "api", "license": "MIT", "source": "scored the pictures"})
    who = Editor(name="adapter", folder=tmp_path, weights=digest_bytes(b"weights"), card=made)
    with pytest.raises(BaseModelError, match="holds no base model"):
        bench(tmp_path, vendor, made).measure(who)
