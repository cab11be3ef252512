"""The renderer: deterministic, continuous, keeps the person, and confuses where it should."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from trainer.portraits.expressions import DIRECTIONS, EXPRESSIONS, NEUTRAL, UNITS, action_units
from trainer.portraits.renderer import CONFUSING_PAIRS, DOMAINS, identity, one_hot, pose, render

PEOPLE = [identity(seed, domain) for domain in DOMAINS for seed in (3, 11)]


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


@pytest.mark.parametrize("size", [64, 65, 128, 256, 512])
def test_it_draws_at_every_size(size: int) -> None:
    picture = render(PEOPLE[0], one_hot("happy"), size)
    assert picture.shape == (size, size, 3)
    assert picture.dtype == np.uint8


@pytest.mark.parametrize("size", [0, 63, 513])
def test_other_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="64 to 512"):
        render(PEOPLE[0], one_hot("happy"), size)


@pytest.mark.parametrize("person", PEOPLE)
def test_the_same_arguments_give_the_same_pixels(person: object) -> None:
    again = identity(person.seed, person.domain)
    assert again == person
    assert np.array_equal(
        render(person, one_hot("sad"), place=pose(4)), render(again, one_hot("sad"), place=pose(4))
    )


def test_sizes_show_the_same_picture() -> None:
    small, large = render(PEOPLE[0], one_hot("angry"), 64), render(PEOPLE[0], one_hot("angry"), 256)
    shrunk = large.reshape(64, 4, 64, 4, 3).mean((1, 3))
    assert distance(shrunk, small) < 4


@pytest.mark.parametrize(("person", "name"), itertools.product(PEOPLE[::2], EXPRESSIONS))
def test_an_expression_grows_with_its_intensity(person: object, name: str) -> None:
    neutral = render(person, np.zeros(12))
    away = [
        distance(render(person, one_hot(name, amount)), neutral) for amount in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert away[0] == 0
    assert all(low < high for low, high in itertools.pairwise(away))


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_an_expression_changes_the_face_and_not_the_background(name: str) -> None:
    change = np.abs(
        render(PEOPLE[0], one_hot(name)).astype(int) - render(PEOPLE[0], np.zeros(12)).astype(int)
    )
    assert change[:6].sum() == 0
    assert change[:, :4].sum() == 0


def test_edges_are_smooth() -> None:
    """An aliased drawing has few colours; an anti-aliased one mixes them at every edge."""
    assert len(np.unique(render(PEOPLE[0], one_hot("happy")).reshape(-1, 3), axis=0)) > 200


def test_confusing_pairs_share_more_than_other_pairs() -> None:
    paired = {frozenset(pair) for pair in CONFUSING_PAIRS}
    unit = DIRECTIONS / np.linalg.norm(DIRECTIONS, axis=1, keepdims=True)
    cosine = unit @ unit.T
    alike: dict[bool, list[float]] = {True: [], False: []}
    for i, j in itertools.combinations(range(12), 2):
        alike[frozenset((EXPRESSIONS[i], EXPRESSIONS[j])) in paired].append(float(cosine[i, j]))
    assert np.mean(alike[True]) > np.mean(alike[False]) + 0.2


def test_every_expression_has_one_confusing_partner() -> None:
    assert sorted(name for pair in CONFUSING_PAIRS for name in pair) == sorted(EXPRESSIONS)


def test_action_units_are_linear_in_the_expression() -> None:
    neutral, happy, sad, both = (
        np.array(list(action_units(vector).values()))
        for vector in (
            np.zeros(12),
            one_hot("happy"),
            one_hot("sad"),
            0.5 * one_hot("happy") + 0.3 * one_hot("sad"),
        )
    )
    assert tuple(action_units(np.zeros(12))) == UNITS
    assert neutral == pytest.approx(list(NEUTRAL.values()))
    assert both == pytest.approx(neutral + 0.5 * (happy - neutral) + 0.3 * (sad - neutral), abs=1e-5)


def test_people_differ() -> None:
    drawn = [render(identity(seed, "human"), np.zeros(12)) for seed in range(12)]
    assert min(distance(a, b) for a, b in itertools.combinations(drawn, 2)) > 4
