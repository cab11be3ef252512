"""The script for a GPU runs on a CPU with a tiny model, so that it works when there is a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_full_size_script_measures_both_loops(repository: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "tests/gpu/full_size.py",
        "--small",
        "--steps",
        "3",
        "--out",
        str(tmp_path / "x"),
    ]
    found = subprocess.run(
        [*command, "--only", "micro-batches", "--only", "published", "--only", "fp8"],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": "tests"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    line = json.loads(found.stdout)
    assert json.loads((tmp_path / "x").read_text()) == line
    assert set(line["runs"]) == {"micro-batches", "published", "fp8"}
    assert all(run["step_s"] > 0 for run in line["runs"].values()), line
    assert line["ratios"]["published"] == 1.0
