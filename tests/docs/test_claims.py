"""The tests that pages name as backing for a claim are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from registry.families import FAMILIES

PAGES = ("comparison.md", "operations/capacity.md", "threat-model.md")


@pytest.mark.parametrize("page", PAGES)
def test_each_test_that_a_page_names_exists(page: str, repository: Path) -> None:
    named = set(re.findall(r"`(test_\w+)`", (repository / "docs" / page).read_text("utf-8")))
    code = "".join(path.read_text("utf-8") for path in (repository / "tests").rglob("test_*.py"))
    assert named - set(re.findall(r"def (test_\w+)\(", code)) == set()
    assert named or page == "operations/capacity.md"


@pytest.mark.parametrize("page", ["README.md", "docs/comparison.md"])
def test_pages_count_the_families_of_bases_that_there_are(page: str, repository: Path) -> None:
    numbers = ("five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
    told = re.findall(rf"\b({'|'.join(numbers)}) families", (repository / page).read_text("utf-8"))
    assert told == [numbers[len(FAMILIES) - 5]]
