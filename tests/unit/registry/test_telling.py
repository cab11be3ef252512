"""Statements in words: what people read, and that no predicate can break or rewrite their terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest

from fakes.trust import probe, publish, signed, waiver
from registry.attestation import KINDS
from registry.digest import digest_bytes
from registry.manifest import AdapterManifest
from registry.results import StatementView
from registry.scanning.rules import RULES, RULES_VERSION
from registry.telling import told, told_all
from registry.views import statement_view

PUBLISHED = publish(kinds=KINDS)


VIEWS = [statement_view(PUBLISHED.trust, PUBLISHED.expected, "k", data) for data in PUBLISHED.statements]


def view(kind: str, predicate: Mapping[str, Any]) -> StatementView:
    return StatementView(
        key="k",
        kind=kind,
        role="scanner",
        signed=True,
        problem=None,
        key_ids=("ab" * 32,),
        predicate=predicate,
    )


def test_every_honest_statement_in_words() -> None:
    """Exactly as a terminal shows them; keys and digests change with every run."""
    text = told_all(VIEWS)
    for line in (
        "  builder   https://example.org/trainer",
        "  run       run-1",
        "  steps     100",
        "  code      0.1.0",
        "  from      tests/tiny-base, pkg:generic/tests/tiny-base@1",
        "  verdict   pass",
        "  top1  0.93",
        "  result    PASSED",
        f"  rules     version {RULES_VERSION}",
        "  base      tests/tiny-base: Apache-2.0, pass",
        "  approver  a person",
        "  reason    looks right",
        "  verdict   pass on tests/tiny-base at 1",
        "  against   no population",
        "  measured  outlier_gap 0.25, p = 0.4",
        "  measured  diversity 1.5",
        "  token     2.5  happy",
        "  lets pass ADP-NUM-004",
        "  from      2026-06-01T12:00:00Z until 2026-07-01T12:00:00Z",
        "  reason    left out on purpose",
    ):
        assert line in text.splitlines()
    (passed,) = re.findall(r"^  passed    (\d+) rules$", text, re.MULTILINE)
    assert int(passed) == len(scan_rules())
    assert {line.partition(":")[0] for line in text.splitlines() if " signed by the " in line} == set(KINDS)
    assert " on 2026-01-01T00:00:00Z" in text


def scan_rules() -> list[str]:
    """The rules that a scan of a clean adapter takes: those that judge statements are none of it."""
    (found,) = [view.predicate for view in VIEWS if view.kind == "scan"]
    rules = [str(rule) for rule in found["passedTests"]]
    assert not [rule for rule in rules if RULES[rule].layer in ("behaviour", "provenance")]
    return rules


def test_a_pair_and_a_place_are_told() -> None:
    other = digest_bytes(b"partner")
    manifest = AdapterManifest.parse(PUBLISHED.manifest)
    text = told(view("behaviour", probe(manifest, "review", {other: "fail"})))
    assert f"  together  fail with the weights {other}" in text.splitlines()
    text = told(view("waiver", waiver(manifest, "ADP-BEH-003", where=str(other))))
    assert f"  lets pass ADP-BEH-003 at {other}" in text.splitlines()


def test_metrics_of_the_trainer_with_their_bounds() -> None:
    rows = [
        {
            "name": "top1_accuracy",
            "value": {"value": 0.98958, "low": 0.97395, "high": 1.0},
            "threshold": 0.85,
            "bound": "min",
            "passed": True,
        },
        {"name": "confusion", "value": {"value": 0.2}, "threshold": 0.1, "bound": "max", "passed": False},
        {"name": "steps", "value": 4},
    ]
    reasons = ["confusion is 0.2"]
    text = told(
        view(
            "evaluation",
            {"verdict": "fail", "reasons": reasons, "suite": {"name": "portraits-v1"}, "metrics": rows},
        )
    )
    assert text.splitlines()[1:] == [
        "  verdict   fail in portraits-v1",
        "  because   confusion is 0.2",
        "  top1_accuracy  0.9896 (0.9739 to 1), required >= 0.85: passed",
        "  confusion      0.2, required <= 0.1: MISSED",
        "  steps          4",
    ]


def test_rows_of_schema_2_with_their_differences_and_rules() -> None:
    weights = str(digest_bytes(b"prod"))
    rows = [
        {
            "name": "top1_accuracy",
            "value": {"value": 0.98, "low": 0.97, "high": 1.0},
            "minimum": 0.85,
            "maximum": None,
            "max_regression": 0.02,
            "difference": {"value": -0.01, "low": -0.03, "high": 0.01, "p": 0.5, "n": 96},
            "passed": False,
        },
        {"name": "confusion", "value": {"value": 0.2}, "minimum": None, "maximum": 0.5, "passed": True},
        {"name": "seams", "value": {"value": 1.5}, "minimum": None, "maximum": None, "difference": None},
    ]
    against = {"reference": "pixelsmile@prod", "weights": weights}
    predicate = {"verdict": "fail", "metrics": rows, "against": against, "notes": ["not judged"]}
    assert told(view("evaluation", predicate)).splitlines()[1:] == [
        "  verdict   fail",
        f"  against   pixelsmile@prod, weights {weights}",
        "  note      not judged",
        "  top1_accuracy  0.98 (0.97 to 1), difference -0.01 (-0.03 to 0.01), "
        "required >= 0.85 and at most 0.02 worse: MISSED",
        "  confusion      0.2, required <= 0.5: passed",
        "  seams          1.5",
    ]


def test_findings_refusals_and_conditions_are_told() -> None:
    rules = {"name": "scanner-rules", "annotations": {"version": "1"}}
    scan = {"result": "WARNED", "configuration": [rules], "warnedTests": ["ADP-NUM-004"], "failedTests": []}
    assert "  warned    ADP-NUM-004" in told(view("scan", scan)).splitlines()
    face = {
        "kind": "judge",
        "name": "antelopev2",
        "license": "LicenseRef-X",
        "verdict": "fail",
        "reasons": ["not commercial"],
        "conditions": ["ask first"],
    }
    licence = {"verdict": "fail", "purpose": "p", "license": "MIT", "problems": ["no"], "ingredients": [face]}
    assert told(view("licence", licence)).splitlines()[1:] == [
        "  verdict   fail for p",
        "  licence   MIT",
        "  because   no",
        "  judge     antelopev2: LicenseRef-X, fail: not commercial",
        "            on condition: ask first",
    ]
    automatic = {"verdict": "pass", "by": "release", "reason": "gates", "at": "now", "automatic": True}
    assert "  approver  release (by a pipeline, nobody looked)" in told(view("approval", automatic))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("odd", [{}, {"a": 1}, {"verdict": []}, {"metrics": 7, "verdict": "pass"}])
def test_other_forms_are_shown_as_they_are(kind: str, odd: Mapping[str, Any]) -> None:
    lines = told(view(kind, odd)).splitlines()
    assert len(lines) >= 2
    assert all(name in "\n".join(lines) for name in odd)


def test_no_text_rewrites_the_terminal() -> None:
    evil = "x\x1b[2J\nscan: signed by the scanner key 00\u202e"
    values = {
        "verdict": evil,
        "by": evil,
        "reason": evil,
        "metrics": {evil: evil},
        "at": evil,
        "result": evil,
    }
    for kind in KINDS:
        text = told(view(kind, values))
        assert text.isascii()
        assert "\x1b" not in text
        assert not any(line.startswith("scan: signed by the scanner key 00") for line in text.splitlines())


def test_a_long_statement_is_cut() -> None:
    text = told(view("evaluation", {"verdict": "pass", "metrics": {f"m{i}": i for i in range(500)}}))
    assert len(text.splitlines()) == 42
    assert text.endswith("461 lines more; --json shows them")


def test_a_statement_that_is_not_believed_says_why_and_nothing_else() -> None:
    forged = signed("approval", "pixelsmile:3", PUBLISHED.expected, {"verdict": "pass", "by": "x"}, ["thief"])
    text = told(statement_view(PUBLISHED.trust, PUBLISHED.expected, "k", forged))
    assert text == "approval: NOT BELIEVED\n  no key of the approver signed this approval statement"


def test_a_statement_that_was_moved_to_another_adapter_is_not_believed() -> None:
    """Genuine, by the right key, and about something else: a store can put it anywhere."""
    other = digest_bytes(b"another manifest")
    found = statement_view(PUBLISHED.trust, other, "k", PUBLISHED.statements[0])
    assert not found.signed
    assert found.predicate == {}
    assert found.problem == "this training statement is about pixelsmile:3"


def test_a_stranger_beside_the_signer_is_not_named() -> None:
    both = signed("approval", "pixelsmile:3", PUBLISHED.expected, {"verdict": "pass"}, ["approver", "thief"])
    found = statement_view(PUBLISHED.trust, PUBLISHED.expected, "k", both)
    assert found.signed
    assert len(found.key_ids) == 1
