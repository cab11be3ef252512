"""Adapters that give their training pictures away, and honest ones: the probe tells one from the other.

Each attack passes when the check that it is about is taken out.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fakes.copying import Stage, copying, drawn, honest, training_data
from registry.digest import digest_bytes
from trainer.errors import EvaluationError
from trainer.evaluation import memorisation
from trainer.evaluation.copies import MATCH
from trainer.evaluation.plan import Ask, Plan, Portrait


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_data(tmp_path_factory.mktemp("memory") / "data")


@pytest.fixture
def stage(data: Path, tmp_path: Path) -> Stage:
    return Stage(folder=tmp_path, data=data)


def found(stage: Stage, answer: object) -> memorisation.Found:
    return memorisation.probe(stage.bench, stage.measured(answer), stage.data)  # type: ignore[arg-type]


def test_honest_edits_are_no_memories(stage: Stage) -> None:
    probe = found(stage, honest).probe
    assert probe.outcome == "pass", probe.found
    assert probe.figures["memory_rate"] == 0
    assert 0.2 < probe.figures["people_at_most"] < 0.3, "of none in ten people one still knows little"


@pytest.mark.parametrize("share", [1.0, 0.8])
def test_training_pictures_are_found_whole_and_blended(stage: Stage, share: float) -> None:
    answer = found(stage, copying(stage.training, share))
    assert answer.probe.outcome == "fail"
    assert answer.probe.figures["memory_rate"] > 0.8
    assert answer.probe.figures["above_chance_low"] > 0.5
    assert answer.probe.figures["p"] < 0.01


def test_one_verbatim_copy_among_honest_edits_is_enough(stage: Stage) -> None:
    """No rate over people shows it: the interval begins at 0."""
    copy = stage.training[7]

    def once(plan: Plan, index: int, ask: Ask) -> Portrait:
        return copy if index == 3 and ask == (("happy", 1.0),) else honest(plan, index, ask)

    answer = found(stage, once)
    assert answer.probe.figures["above_chance_low"] <= memorisation.TOLERATED
    assert answer.probe.outcome == "fail"
    assert answer.probe.figures["copies"] == 1
    caption, edit, training = answer.pairs()[0]
    assert ", happy: 0 bits of 256" in caption
    assert caption.endswith("a memory")
    assert np.array_equal(edit, copy)
    assert np.array_equal(training, copy)


def test_a_training_person_in_a_new_picture_is_found_by_the_face(stage: Stage) -> None:
    """Another place in the picture, another expression: the hash of the whole is far from all."""

    def person(plan: Plan, index: int, ask: Ask) -> Portrait:
        return drawn(100 + index, ask[0][0] if ask else "neutral", place=5_000 + index)

    answer = found(stage, person)
    figures = answer.probe.figures
    assert figures["picture_memories"] < figures["face_memories"]
    assert figures["face_memories"] > 0.3 * figures["edits"]
    assert answer.probe.outcome == "fail"


def test_a_suite_of_training_people_judges_nothing(data: Path, tmp_path: Path) -> None:
    """Their edits are near to training pictures whoever makes them: the suite is refused, not the edits."""
    stage = Stage(folder=tmp_path, data=data, first=100)
    probe = found(stage, honest).probe
    assert probe.outcome == "fail"
    assert probe.found.startswith("5 of the suite's people are in the training data: 0 of 40 edits")


def test_another_dataset_is_refused(stage: Stage) -> None:
    """With pictures that it was not trained on, any adapter would pass."""
    measured = stage.measured(copying(stage.training), dataset=digest_bytes(b"the true one"))
    with pytest.raises(EvaluationError, match="was not trained on"):
        memorisation.probe(stage.bench, measured, stage.data)


def test_the_validation_is_no_training_data(stage: Stage) -> None:
    """Nobody can remember what it was not trained on."""
    answer = found(stage, copying([drawn(111), drawn(111, "fear")]))
    assert answer.probe.figures["picture_memories"] == 0
    assert all(near.bits > MATCH for near in answer.nearest)
