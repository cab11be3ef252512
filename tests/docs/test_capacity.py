"""The table of the capacity plan is what its code computes; its sizes are what the code publishes today."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def page(repository: Path) -> str:
    return (repository / "docs" / "operations" / "capacity.md").read_text("utf-8")


def test_the_table_is_what_the_code_computes(page: str) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code + "\nprint(*table, sep='\\n')"],
        capture_output=True,
        text=True,
        check=True,
    )
    table = done.stdout.splitlines()
    assert len(table) > 20
    assert [line for line in table if line not in page.splitlines()] == []


def test_the_sizes_of_trust_metadata_are_still_those(page: str, repository: Path, tmp_path: Path) -> None:
    """Bytes for each alias, name and version, by the difference of two registries."""
    sys.path.insert(0, str(repository / "tests" / "bench"))
    try:
        from trust_scale import VERSIONS, filled
        from trust_sizes import sizes
    finally:
        sys.path.pop(0)
    found = []
    for adapters in (100, 200):
        filled(tmp_path / str(adapters), adapters)
        found.append(sizes(tmp_path / str(adapters) / "objects"))
    small, large = found
    constants = re.search(r"ALIAS_B, NAME_B, VERSION_B = (\d+), (\d+), (\d+)", page)
    assert constants is not None
    alias, name, version = map(int, constants.groups())
    assert abs((large["targets"] - small["targets"]) / 100 - alias) < 40  # new bins are in it, too
    assert abs((large["names"] - small["names"]) / 100 - name) < 2
    assert abs((large["bin_sum"] - small["bin_sum"]) / 100 / VERSIONS - version) < 20
