"""The licence policy, case by case."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fakes.adapters import card, changed
from registry import licenses
from registry.errors import LicenseRefused
from registry.manifest import AdapterCard

COMMERCIAL = "LicenseRef-Proprietary"


def judged(**changes: Any) -> licenses.LicenseVerdict:
    """Judge the clean card with the dataset's licence, the adapter's licence or other fields changed."""
    paths = {"own": "license", "dataset": "ingredients.1.license", "base": "ingredients.0.license"}
    values = card()
    for name, value in changes.items():
        values = changed(values, paths.get(name, name), value)
    return licenses.judge(AdapterCard.parse(json.dumps(values).encode()), "Apache-2.0")


def ingredient(kind: str, license: str) -> dict[str, Any]:
    base, dataset = card()["ingredients"]
    return {
        "ingredients": [base, dataset, {"name": "the thing", "kind": kind, "license": license, "source": "x"}]
    }


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        ("apache-2.0", "Apache-2.0"),
        ("mit or APACHE-2.0", "MIT OR Apache-2.0"),
        ("MIT AND (CC0-1.0 OR BSD-3-Clause)", "MIT AND (CC0-1.0 OR BSD-3-Clause)"),
        ("LicenseRef-Proprietary", "LicenseRef-Proprietary"),
        ("GPL-2.0", "GPL-2.0-only"),
        ("LicenseRef-Whatever", None),
        ("MIT OR", None),
        ("(MIT", None),
        ("Apache 2.0", None),
        ("", None),
        ("proprietary", None),
        ("MIT OR " * 100 + "MIT", None),
    ],
)
def test_normalize(written: str, normal: str | None) -> None:
    assert licenses.normalize(written) == normal


@pytest.mark.parametrize(
    ("expression", "commercial"),
    [
        ("Apache-2.0", True),
        ("CC-BY-NC-4.0", False),
        ("CC-BY-NC-4.0 OR MIT", True),
        ("CC-BY-NC-4.0 AND MIT", False),
        ("GPL-2.0-only WITH Classpath-exception-2.0", True),
        ("CC-BY-NC-4.0 OR LicenseRef-Whatever", None),
        ("MIT AND Aladdin", None),
    ],
)
def test_facts_of_expressions(expression: str, commercial: bool | None) -> None:
    found = licenses.facts(expression)
    assert (None if found is None else found.commercial) is commercial


ALLOWED: dict[str, dict[str, Any]] = {
    "proprietary over Apache-2.0": {},
    "open over Apache-2.0": {"own": "Apache-2.0"},
    "non-commercial from non-commercial": {"own": "CC-BY-NC-4.0", "dataset": "CC-BY-NC-4.0"},
    "non-commercial from free": {"own": "CC-BY-NC-4.0", "dataset": "CC0-1.0"},
    "either licence permits it": {"dataset": "CC-BY-NC-4.0 OR Apache-2.0"},
    "share-alike stays": {"own": "CC-BY-SA-4.0", "dataset": "CC-BY-SA-4.0"},
    "copyleft code does not flow into weights": ingredient("code", "GPL-3.0-only"),
    "another spelling": {"base": "apache-2.0"},
}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "non-commercial dataset": ({"dataset": "CC-BY-NC-4.0"}, "dataset 'tiny portraits': CC-BY-NC-4.0 forbids"),
    "non-commercial dataset, open adapter": ({"own": "MIT", "dataset": "CC-BY-NC-SA-4.0"}, "tiny portraits"),
    "both licences apply": ({"dataset": "CC-BY-NC-4.0 AND Apache-2.0"}, "tiny portraits"),
    "unknown dataset licence": ({"dataset": "LicenseRef-Whatever"}, "'LicenseRef-Whatever' is not known"),
    "unknown licence, even for research": ({"own": "CC-BY-NC-4.0", "dataset": "see website"}, "not known"),
    "unknown own licence": ({"own": "LicenseRef-Mine"}, "own licence"),
    "non-commercial judge": (
        ingredient("judge", "LicenseRef-InsightFace-Non-Commercial"),
        "judge 'the thing'",
    ),
    "non-commercial adapter inside": (ingredient("adapter", "CC-BY-NC-4.0"), "adapter 'the thing'"),
    "no derivatives": (ingredient("identity-images", "CC-BY-ND-4.0"), "forbids changed versions"),
    "share-alike, closed adapter": ({"dataset": "CC-BY-SA-4.0"}, "demands the same licence"),
    "base under another licence": ({"base.license": "MIT"}, "is under Apache-2.0"),
    "two licences for the base": ({"base": "MIT"}, "two licences"),
    "base not named": ({"ingredients": [card()["ingredients"][1]]}, "is not among the ingredients"),
    "dataset not named": ({"ingredients": [card()["ingredients"][0]]}, "no dataset"),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed(name: str) -> None:
    verdict = judged(**ALLOWED[name])
    assert verdict.problems == ()
    assert licenses.require(verdict) is verdict


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_ingredient_named(name: str) -> None:
    changes, evidence = REFUSED[name]
    verdict = judged(**changes)
    with pytest.raises(LicenseRefused, match="refuses an adapter") as caught:
        licenses.require(verdict)
    assert evidence in str(caught.value)


def test_commercial_is_what_the_adapters_licence_permits() -> None:
    assert judged().commercial
    assert not judged(own="CC-BY-NC-4.0").commercial


def test_every_fact_is_about_a_licence_that_the_parser_knows() -> None:
    assert all(licenses.normalize(name) is not None for name in licenses.FACTS)
