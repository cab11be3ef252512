"""The licence policy, case by case."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fakes.adapters import card, changed
from registry import licenses
from registry.errors import LicenseRefused
from registry.licenses import Purpose
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


EVERYTHING: tuple[Purpose, ...] = licenses.PURPOSES
RESEARCH: tuple[Purpose, ...] = ("internal-research", "research-redistribution")


@pytest.mark.parametrize(
    ("expression", "purposes"),
    [
        ("Apache-2.0", EVERYTHING),
        ("CC-BY-NC-4.0", RESEARCH),
        ("CC-BY-NC-4.0 OR MIT", EVERYTHING),
        ("CC-BY-NC-4.0 AND MIT", RESEARCH),
        ("(MIT OR CC-BY-NC-4.0) AND (CC-BY-ND-4.0 OR CC0-1.0)", EVERYTHING),
        ("CC-BY-NC-4.0 AND CC-BY-ND-4.0", ("internal-research",)),
        ("CC-BY-ND-4.0", ("internal-research", "commercial-use")),
        ("GPL-2.0-only WITH Classpath-exception-2.0", EVERYTHING),
        ("LicenseRef-Stability-AI-Community", RESEARCH),
        ("LicenseRef-OpenAI-Terms", ()),
        ("CC-BY-NC-4.0 OR LicenseRef-Whatever", ()),
        ("MIT AND Aladdin", ()),
        ("MIT OR Aladdin", EVERYTHING),
        (" AND ".join(f"({a} OR {b})" for a, b in [("MIT", "ISC"), ("0BSD", "Zlib")] * 8), EVERYTHING),
    ],
)
def test_what_expressions_allow(expression: str, purposes: tuple[Purpose, ...]) -> None:
    assert licenses.allows(expression) == purposes


def test_an_expression_with_too_many_alternatives_is_unknown() -> None:
    pairs = ["(MIT OR ISC)", "(0BSD OR Zlib)", "(MIT-0 OR PDDL-1.0)", "(CC0-1.0 OR BSL-1.0)"]
    pairs += ["(Unlicense OR MPL-2.0)", "(CC-BY-4.0 OR CC-BY-3.0)", "(GPL-3.0-only OR ODbL-1.0)"]
    assert licenses.allows(" AND ".join(pairs[:6])) == EVERYTHING
    assert licenses.allows(" AND ".join(pairs)) == ()


@pytest.mark.parametrize(
    ("license", "declaration", "always"),
    [
        ("LicenseRef-Stability-AI-Community", "annual-revenue-below-1m-usd", RESEARCH),
        ("LicenseRef-OpenAI-Terms", "does-not-compete-with-openai", ()),
        ("LicenseRef-Gemini-API-Terms", "does-not-compete-with-gemini-api", ()),
    ],
)
def test_conditions_that_no_program_can_check_are_declared(
    license: str, declaration: str, always: tuple[Purpose, ...]
) -> None:
    assert licenses.allows(license) == always
    assert licenses.allows(license, (declaration,)) == EVERYTHING
    assert any("only if" in text for text in licenses.conditions(license))


ALLOWED: dict[str, dict[str, Any]] = {
    "proprietary over Apache-2.0": {},
    "open over Apache-2.0": {"own": "Apache-2.0"},
    "non-commercial from non-commercial": {"own": "CC-BY-NC-4.0", "dataset": "CC-BY-NC-4.0"},
    "non-commercial from free": {"own": "CC-BY-NC-4.0", "dataset": "CC0-1.0"},
    "either licence permits it": {"dataset": "CC-BY-NC-4.0 OR Apache-2.0"},
    "a declared alternative": {"own": "CC-BY-4.0", "dataset": "CC-BY-SA-4.0 OR CC-BY-4.0"},
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


@pytest.mark.parametrize(
    ("own", "dataset", "purpose", "allowed"),
    [
        ("LicenseRef-Proprietary", "CC-BY-NC-4.0", "internal-research", True),
        ("LicenseRef-Proprietary", "CC-BY-NC-4.0", "research-redistribution", True),
        ("LicenseRef-Proprietary", "CC-BY-NC-4.0", "commercial-use", False),
        ("LicenseRef-Proprietary", "CC-BY-ND-4.0", "commercial-use", True),
        ("LicenseRef-Proprietary", "CC-BY-ND-4.0", "commercial-redistribution", False),
        ("LicenseRef-Proprietary", "LicenseRef-Whatever", "internal-research", False),
        # What the adapter's licence promises to others counts whatever the policy asks for.
        ("Apache-2.0", "CC-BY-NC-4.0", "internal-research", False),
        ("CC-BY-NC-4.0", "CC-BY-NC-4.0", "internal-research", True),
        ("CC-BY-NC-4.0", "CC-BY-NC-4.0", "research-redistribution", True),
        ("CC-BY-NC-4.0", "CC0-1.0", "commercial-use", False),
        ("CC-BY-NC-4.0", "CC-BY-ND-4.0", "internal-research", False),
        # Whoever takes the adapter may choose the free side.
        ("CC-BY-NC-4.0 OR MIT", "CC-BY-NC-4.0", "internal-research", False),
    ],
)
def test_purposes(own: str, dataset: str, purpose: Purpose, allowed: bool) -> None:
    values = changed(changed(card(), "license", own), "ingredients.1.license", dataset)
    found = licenses.judge(AdapterCard.parse(json.dumps(values).encode()), purpose=purpose)
    assert found.allowed is allowed, found.problems
    assert found.purpose == purpose


def test_each_ingredient_has_its_own_answer() -> None:
    verdict = judged(dataset="CC-BY-NC-4.0")
    base, dataset = verdict.ingredients
    assert (base.allowed, base.reasons, base.allows) == (True, (), EVERYTHING)
    assert (dataset.allowed, dataset.name, dataset.allows) == (False, "tiny portraits", RESEARCH)


def test_a_policys_refusal_names_the_purpose() -> None:
    values = changed(card(), "license", "CC-BY-NC-4.0")
    found = licenses.judge(AdapterCard.parse(json.dumps(values).encode()), purpose="commercial-use")
    with pytest.raises(LicenseRefused, match=r"for commercial-use.*own licence"):
        licenses.require(found)
