"""The reader of headers against a few thousand mutations; ``tests/bench/fuzz_header.py`` runs a million.

The watchman is watched, too: a reader with a hole is caught by these cases.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import fuzz_header
from bench.fuzz_header import Tally, by_mutations, judge, mutated, parsed, seeds
from registry import formats
from registry.formats import FormatError, Header, Rules

CASES = 4000


def test_no_mutation_breaks_the_reader() -> None:
    tally = by_mutations(CASES, seed=1)
    figures = json.loads(tally.line("mutations"))
    assert figures["cases"] == CASES == tally.accepted + sum(tally.refused.values())
    assert tally.accepted > CASES / 20
    assert tally.compared > CASES / 20
    assert {
        "json",
        "duplicate-key",
        "entry",
        "dtype",
        "offsets",
        "layout",
        "metadata",
    } <= tally.refused.keys()


FILES = [(data, parsed(data)) for data in seeds()]


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=False))
def test_no_mutation_that_is_chosen_breaks_the_reader(random: Any) -> None:
    """Hypothesis turns the dice, so that a case that breaks something becomes a small one."""
    judge(mutated(random, FILES), Tally())


def test_cases_are_the_same_for_the_same_seed() -> None:
    one, two, other = (list(zip(fuzz_header.cases(seed), range(300), strict=False)) for seed in (5, 5, 6))
    assert one == two
    assert one != other


def _without(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """The reader without one of its checks."""
    return lambda patch: patch.setattr(formats, name, lambda *_: None)


def _lenient_keys(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(formats, "_pairs", dict)


def _any_text(patch: pytest.MonkeyPatch) -> None:
    """Halves of characters, which the reference refuses."""
    patch.setattr(formats, "_SURROGATE", re.compile("a^"))


def _whole_file(patch: pytest.MonkeyPatch) -> None:
    """A reader that looks at the data, too."""
    read = formats._header_length

    def careless(content: Any) -> int:
        assert content[: len(content)]
        return read(content)

    patch.setattr(formats, "_header_length", careless)


def _wrong_shape(patch: pytest.MonkeyPatch) -> None:
    read = fuzz_header.read_header

    def turned(content: Any, rules: Rules) -> Header:
        header = read(content, rules)
        if len({len(info.shape) for info in header.tensors.values()}) == 1:
            raise FormatError("entry", "turned\x1b around")
        return header

    patch.setattr(fuzz_header, "read_header", turned)


@pytest.mark.parametrize(
    "broken", [_without("_check_layout"), _lenient_keys, _any_text, _whole_file, _wrong_shape]
)
def test_a_reader_with_a_hole_is_caught(
    monkeypatch: pytest.MonkeyPatch, broken: Callable[[pytest.MonkeyPatch], None], capsys: Any
) -> None:
    broken(monkeypatch)
    with pytest.raises(Exception):  # noqa: B017  # whatever notices first
        by_mutations(CASES, seed=1)
    assert "the case is in" in capsys.readouterr().err


def test_a_hang_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(data: bytes) -> None:
        while True:
            pass

    monkeypatch.setattr(fuzz_header, "HANG_S", 0.2)
    monkeypatch.setattr(fuzz_header, "_layers", endless)
    with pytest.raises(TimeoutError, match=r"0\.2 s"):
        by_mutations(1)
