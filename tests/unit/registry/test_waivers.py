"""Waivers: strict to read, bound to bytes, rules, places and time, counted by keys."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry import waivers
from registry.digest import digest_bytes
from registry.errors import InvalidDocument, UsageError
from registry.scanning.report import Finding, ScanReport, finding, report
from registry.scanning.rules import RULES
from registry.waivers import Waiver, Waivers, in_force, parse, waiver_predicate

WEIGHTS = digest_bytes(b"weights")
NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)
QUIET, HALF = "ADP-NUM-004", "ADP-STR-008"
BLOCKING = "ADP-CON-002"


def predicate(*rules: str, days: int = 30, at: datetime = NOW, **more: Any) -> dict[str, Any]:
    given = {"reason": "explained", "by": "Kim", "max_days": 90, **more}
    return waiver_predicate(WEIGHTS, rules or (QUIET,), days=days, at=at, **given)


def waiver(*rules: str, key: str = "a", **more: Any) -> Waiver:
    return parse(predicate(*rules, **more), frozenset({key}))


def counted(*found: Waiver, at: datetime | None = NOW, needed: int = 1, max_days: int = 90) -> Waivers:
    return in_force(found, WEIGHTS, at, max_days=max_days, needed=needed)


def scanned(*findings: Finding) -> ScanReport:
    return report(WEIGHTS, findings, {})


def test_what_is_written_is_read() -> None:
    found = parse(predicate(HALF, QUIET, HALF, where="transformer.x"), frozenset({"k"}))
    assert found == Waiver(
        weights=WEIGHTS,
        rules=frozenset({QUIET, HALF}),
        where="transformer.x",
        reason="explained",
        by="Kim",
        issued=NOW,
        expires=NOW + 30 * DAY,
        keys=frozenset({"k"}),
    )


def test_a_waiver_counts_from_its_first_to_before_its_last_second() -> None:
    found, second = waiver(days=2), timedelta(seconds=1)
    for at, counts in (
        (NOW - second, False),
        (NOW, True),
        (NOW + 2 * DAY - second, True),
        (NOW + 2 * DAY, False),
        (None, False),
    ):
        assert bool(counted(found, at=at).granted) is counts, at


def test_only_waivers_of_these_bytes_and_of_an_allowed_length_count() -> None:
    assert not in_force([waiver()], digest_bytes(b"others"), NOW, max_days=90, needed=1).granted
    assert counted(waiver(days=30), max_days=30).granted
    assert not counted(waiver(days=30), max_days=29).granted
    assert not counted(waiver(days=1), max_days=0).granted


def test_the_first_to_end_decides_when_to_look_again() -> None:
    assert counted().until is None
    assert counted(waiver(days=9), waiver(days=3), waiver(days=5)).until == NOW + 3 * DAY


def test_a_place_narrows_a_waiver() -> None:
    everywhere, here = counted(waiver()), counted(waiver(where="block 1"))
    assert everywhere.covers(QUIET, "block 1")
    assert here.covers(QUIET, "block 1")
    assert not here.covers(QUIET, "block 2")
    assert not everywhere.covers(HALF, "block 1")
    assert here.mentions(QUIET)
    assert not here.mentions(HALF)


def test_keys_are_counted_over_waivers_and_each_key_once() -> None:
    assert not counted(waiver(key="a"), waiver(key="a"), needed=2).covers(QUIET, "x")
    assert counted(waiver(key="a"), waiver(key="b", where="x"), needed=2).covers(QUIET, "x")
    assert not counted(waiver(key="a"), waiver(key="b", where="x"), needed=2).covers(QUIET, "y")
    assert not Waivers(granted=(parse(predicate()),), needed=1).covers(QUIET, "x"), "nobody signed it"
    assert not waivers.NONE.covers(QUIET, "x")


def test_a_rule_that_blocks_is_never_covered() -> None:
    """Also not by a waiver from a time when the rule asked for a review only."""
    forged = parse({**predicate(), "rules": [BLOCKING, "ADP-XXX-999"]}, frozenset({"a"}))
    found = counted(forged)
    assert found.granted
    assert not found.covers(BLOCKING, "x")
    assert not found.mentions("ADP-XXX-999")


def test_every_finding_has_to_be_covered() -> None:
    findings = [finding(QUIET, "a", ""), finding(QUIET, "b", ""), finding(HALF, "c", "")]
    said = scanned(*findings)
    assert [one.where for one in counted(waiver(where="a")).uncovered(said)] == ["b", "c"]
    assert [one.where for one in counted(waiver()).uncovered(said)] == ["c"]
    assert not counted(waiver(), waiver(HALF, where="c")).uncovered(said)
    assert not counted(waiver(QUIET, HALF)).uncovered(said)


def test_findings_that_a_report_left_out_need_a_waiver_for_every_place() -> None:
    """A file may break a rule in more places than a report names: those could hide behind named ones."""
    said = scanned(*(finding(QUIET, str(number), "") for number in range(30)), finding(HALF, "c", ""))
    assert said.omitted
    narrow = [waiver(where=found.where) for found in said.findings if found.rule == QUIET]
    assert {one.rule for one in counted(*narrow, waiver(HALF, where="c")).uncovered(said)} == {QUIET}
    assert not counted(waiver(), waiver(HALF, where="c")).uncovered(said)


@given(st.lists(st.sampled_from([QUIET, HALF, "ADP-NUM-007"]), max_size=4), st.integers(0, 3))
def test_what_is_covered_is_never_left_uncovered(rules: list[str], kept: int) -> None:
    said = scanned(*(finding(rule, str(number), "") for number, rule in enumerate(rules)))
    found = counted(*(waiver(rule) for rule in rules[:kept]))
    assert {one.rule for one in found.uncovered(said)} == set(rules) - set(rules[:kept])


@pytest.mark.parametrize("rule", sorted(RULES))
def test_exactly_the_rules_that_ask_for_a_review_can_be_waived(rule: str) -> None:
    if RULES[rule].severity == "review":
        assert predicate(rule)["rules"] == [rule]
    else:
        with pytest.raises(UsageError, match="cannot be waived"):
            predicate(rule)


@pytest.mark.parametrize(
    "more",
    [
        {"reason": " "},
        {"by": ""},
        {"days": 0},
        {"days": 91},
        {"reason": "x" * 3000},
        {"by": "x" * 300},
        {"where": ""},
    ],
)
def test_a_waiver_that_would_not_count_is_not_written(more: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        predicate(**more)
    assert caught.value.mend


def test_an_unknown_rule_is_not_waived() -> None:
    with pytest.raises(UsageError, match="no rule"):
        predicate("ADP-NUM-999")


GOOD = predicate(where="here")
BAD: dict[str, dict[str, Any]] = {
    "nothing": {},
    **{f"no {name}": {key: GOOD[key] for key in GOOD if key != name} for name in GOOD if name != "where"},
    "another key": {**GOOD, "scope": "all"},
    "no rules": {**GOOD, "rules": []},
    "a pattern for a rule": {**GOOD, "rules": ["ADP-*"]},
    "a rule in other digits": {**GOOD, "rules": ["ADP-NUM-\u0660\u0660\u0664"]},
    "a hundred rules": {**GOOD, "rules": [QUIET] * 100},
    "another digest": {**GOOD, "weights": {"sha512": "0" * 128}},
    "two digests": {**GOOD, "weights": {"sha256": "0" * 64, "sha1": "0" * 40}},
    "a time without a zone": {**GOOD, "expires": "2026-06-01T12:00:00"},
    "another zone": {**GOOD, "expires": "2026-06-01T12:00:00+14:00"},
    "fractions": {**GOOD, "expires": "2026-06-01T12:00:00.5Z"},
    "no such day": {**GOOD, "expires": "2026-02-30T12:00:00Z"},
    "other digits": {**GOOD, "expires": "\u0662026-06-01T12:00:00Z"},
    "a number for a time": {**GOOD, "expires": 4102444800},
    "never": {**GOOD, "expires": None},
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_waiver_is_refused(name: str) -> None:
    with pytest.raises(InvalidDocument, match="waiver") as caught:
        parse(BAD[name])
    assert caught.value.mend
