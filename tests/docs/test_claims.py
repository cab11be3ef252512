"""The tests that pages name as backing for a claim are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGES = ("comparison.md", "operations/capacity.md", "threat-model.md")


@pytest.mark.parametrize("page", PAGES)
def test_each_test_that_a_page_names_exists(page: str, repository: Path) -> None:
    named = set(re.findall(r"`(test_\w+)`", (repository / "docs" / page).read_text("utf-8")))
    code = "".join(path.read_text("utf-8") for path in (repository / "tests").rglob("test_*.py"))
    assert named - set(re.findall(r"def (test_\w+)\(", code)) == set()
    assert named or page == "operations/capacity.md"
