"""What is nearest, what counts as a memory, and what the figures mean."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from fakes.copying import Stage, copying, drawn, honest, training_data
from trainer.data.measures import BITS
from trainer.evaluation import copies, memorisation
from trainer.evaluation.copies import MATCH, Pictures, Training, nearest, remembered, seen, shows_another
from trainer.evaluation.memorisation import at_most, verdict
from trainer.evaluation.plan import Ask, Plan, Portrait

WORDS = arrays.arrays(
    np.uint64, st.tuples(st.integers(1, 30), st.just(4)), elements=st.integers(0, 2**64 - 1)
)


def pictures(hashes: NDArray[np.uint64]) -> Pictures:
    return Pictures(hashes=hashes, clear=np.ones(len(hashes), bool))


# -- distances ---------------------------------------------------------------------------------------------


@given(some=WORDS, training=WORDS, block=st.integers(1, 50))
def test_the_nearest_is_that_of_the_definition_however_it_is_cut(
    some: NDArray[np.uint64], training: NDArray[np.uint64], block: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copies, "_PAIRS", block)
        places, bits = nearest(pictures(some), training)
    away = [
        [sum((int(a) ^ int(b)).bit_count() for a, b in zip(x, y, strict=True)) for y in training]
        for x in some
    ]
    assert bits.tolist() == [min(row) for row in away]
    assert places.tolist() == [row.index(min(row)) for row in away]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No block of comparisons is larger than allowed, whatever is compared with whatever."""
    monkeypatch.setattr(copies, "_PAIRS", 500)
    largest, count = [0], np.bitwise_count

    def counting(values: NDArray[np.uint64]) -> NDArray[np.uint8]:
        largest[0] = max(largest[0], values.size)
        return count(values)

    monkeypatch.setattr(np, "bitwise_count", counting)
    nearest(pictures(np.zeros((300, 4), np.uint64)), np.zeros((100, 4), np.uint64))
    assert largest[0] == 500


def test_a_picture_without_a_clear_hash_is_near_to_nothing() -> None:
    flat = seen([np.full((64, 64, 3), 90, np.uint8)])
    assert not flat.clear[0]
    assert nearest(flat, flat.hashes)[1].tolist() == [BITS]


@pytest.mark.parametrize(
    ("bits", "own", "memory"),
    [
        (0, 60, True), (MATCH, MATCH + 1, True), (MATCH + 1, 200, False),
        (20, 20, False), (20, 4, False),
    ],
)  # fmt: skip
def test_a_memory_is_near_to_training_and_nearer_than_to_its_source(
    bits: int, own: int, memory: bool
) -> None:
    assert remembered(np.array([bits]), np.array([own])).tolist() == [memory]


# -- faces -------------------------------------------------------------------------------------------------


def unit(*values: float) -> NDArray[np.float32]:
    found = np.array(values, np.float32)
    return found / np.linalg.norm(found)


def trained(*faces: NDArray[np.float32], same: float = 0.8) -> Training:
    return Training(hashes=np.zeros((1, 4), np.uint64), files=(), faces=np.stack(faces), same=same)


def test_a_face_of_a_training_person_is_told_from_ones_own_and_from_nobody() -> None:
    training = trained(unit(1, 0, 0))
    sources = np.stack([unit(0, 1, 0), unit(0.5, 0, 1)])
    edits = np.stack([unit(1, 0.1, 0), unit(0, 1, 0.2), unit(0.6, 0.5, 0.6), np.full(3, np.nan, np.float32)])
    whose = np.array([0, 0, 1, 1])
    limit, another = shows_another(edits, sources, whose, training, np.array([True, True]))
    assert limit == pytest.approx(0.8)
    assert another.tolist() == [True, False, False, False]


def test_people_of_the_suite_who_look_like_training_people_raise_the_limit() -> None:
    training, sources = trained(unit(1, 0, 0), same=0.5), np.stack([unit(0, 1, 0), unit(1, 0.1, 0)])
    edits, whose = np.stack([unit(1, 0.5, 0)]), np.array([0])
    assert not shows_another(edits, sources, whose, training, np.array([True, True]))[1].any()
    assert shows_another(edits, sources, whose, training, np.array([True, False]))[1].all()


def test_without_faces_there_are_no_memories_of_faces() -> None:
    limit, another = shows_another(None, None, np.array([0, 0]), trained(unit(1, 0)), np.array([True]))
    assert limit == 1.0
    assert not another.any()


# -- figures -----------------------------------------------------------------------------------------------


@given(found=st.integers(0, 60), more=st.integers(0, 2000))
def test_the_upper_end_lies_above_the_rate_and_falls_with_more_people(found: int, more: int) -> None:
    people = max(1, found + more)
    end = at_most(found, people)
    assert found / people <= end <= 1
    assert at_most(found, people + 10) <= end


@pytest.mark.parametrize(
    ("found", "of", "end"), [(0, 96, 0.0307), (0, 1, 0.95), (1, 10, 0.3942), (5, 5, 1.0)]
)
def test_the_upper_end_is_that_of_clopper_and_pearson(found: int, of: int, end: float) -> None:
    assert at_most(found, of) == pytest.approx(end, abs=1e-4)


FIGURES = {
    "edits": 100.0, "memory_rate": 0.0, "chance_rate": 0.0, "above_chance": 0.0, "above_chance_low": 0.0,
    "above_chance_high": 0.0, "p": 1.0, "people_at_most": 0.03, "copies": 0.0, "known_people": 0.0,
    "median_bits": 60.0, "median_bits_honest": 61.0, "training_pictures": 1000.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"copies": 1.0}, "1 edits are verbatim copies"),
        ({"known_people": 2.0}, "2 of the suite's people are in the training data"),
        ({"above_chance_low": 0.011}, "more frequent than by chance"),
    ],
)
def test_each_finding_fails_by_itself(change: dict[str, float], words: str) -> None:
    outcome, told = verdict(FIGURES | change)
    assert outcome == "fail"
    assert words in told


def test_within_what_is_tolerated_it_passes() -> None:
    assert verdict(FIGURES | {"above_chance_low": 0.01, "memory_rate": 0.02})[0] == "pass"


# -- the whole ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_data(tmp_path_factory.mktemp("memory") / "data")


@pytest.fixture
def stage(data: Path, tmp_path: Path) -> Stage:
    return Stage(folder=tmp_path, data=data)


def test_without_training_data_it_is_skipped_and_says_why(stage: Stage) -> None:
    found = memorisation.probe(stage.bench, stage.measured(honest), None)
    assert found.probe.outcome == "skipped"
    assert "was not given" in found.probe.found
    assert found.pairs() == []


def test_nothing_at_full_intensity_is_skipped(stage: Stage) -> None:
    measured = stage.measured(honest)
    neutral = {key: digest for key, digest in measured.edited.items() if not key[1]}
    found = memorisation.probe(stage.bench, replace(measured, edited=neutral), stage.data)
    assert found.probe.outcome == "skipped"


class Unanswered:
    """Pictures of a suite that knows no true answers."""

    def __init__(self, plan: Plan) -> None:
        self._pictures = plan.pictures

    def source(self, index: int) -> Portrait:
        return self._pictures.source(index)

    def truth(self, index: int, ask: Ask) -> None:
        return None

    def outside(self, index: int) -> NDArray[np.bool_]:
        return self._pictures.outside(index)


@pytest.mark.parametrize(("share", "outcome"), [(0.0, "pass"), (0.9, "fail")])
def test_where_no_true_answers_are_known_the_sources_stand_for_them(
    stage: Stage, share: float, outcome: str
) -> None:
    measured = stage.measured(copying(stage.training, share))
    plan = replace(stage.bench.plan, pictures=Unanswered(stage.bench.plan))
    found = memorisation.probe(replace(stage.bench, plan=plan), measured, stage.data)
    assert found.probe.outcome == outcome, found.probe.found
    assert found.probe.figures["chance_rate"] == 0


def test_pairs_show_memories_first_and_one_of_a_person(stage: Stage) -> None:
    found = memorisation.probe(stage.bench, stage.measured(copying(stage.training, every=3)), stage.data)
    shown = [near.memory for near in found.nearest]
    assert shown == sorted(shown, reverse=True)
    assert shown[0]
    assert len({near.subject for near in found.nearest}) == len(found.nearest) == memorisation.SHOWN


def test_the_same_edits_give_the_same_figures(stage: Stage) -> None:
    answers = [
        memorisation.probe(
            stage.bench, stage.measured(copying(stage.training, every=5), name=name), stage.data
        )
        for name in ("once", "twice")
    ]
    assert answers[0].probe == answers[1].probe


def test_training_people_are_known_by_their_own_pictures(stage: Stage) -> None:
    from trainer.data.dataset import Dataset

    known = copies.trained_on(Dataset.open(stage.data), stage.bench.judges.faces)
    assert len(known.files) == 33
    assert len(known.faces) == 11
    assert 0.7 < known.same < 1
    others = stage.bench.judges.faces.vectors([drawn(number) for number in range(700, 720)])
    assert max(float((known.faces @ one).max()) for one in others if one is not None) < 0.95
