"""The script for a GPU runs on a CPU with a tiny model, so that it works when there is a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def measured(repository: Path, out: Path, *options: str) -> dict[str, Any]:
    """The line that the script prints, which is also in its file."""
    command = [sys.executable, "tests/gpu/full_size.py", "--small", "--steps", "3", "--out", str(out)]
    found = subprocess.run(
        [*command, *options],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": "tests"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    line: dict[str, Any] = json.loads(found.stdout)
    assert json.loads(out.read_text()) == line
    return line


@pytest.mark.slow
def test_the_full_size_script_measures_both_loops(repository: Path, tmp_path: Path) -> None:
    wanted = [text for name in ("micro-batches", "published", "fp8") for text in ("--only", name)]
    line = measured(repository, tmp_path / "x", *wanted)
    assert "serving" not in line
    assert set(line["runs"]) == {"micro-batches", "published", "fp8"}
    assert all(run["step_s"] > 0 for run in line["runs"].values()), line
    assert line["ratios"]["published"] == 1.0


@pytest.mark.slow
def test_the_full_size_script_measures_every_run_of_serving(repository: Path, tmp_path: Path) -> None:
    names = (
        "published", "step", "adapter", "pair", "mixed", "swap", "cold", "single-edits", "sweep",
        "fp8", "nf4", "models", "blocks",
    )  # fmt: skip
    line = measured(repository, tmp_path / "x", *(text for name in names for text in ("--serve", name)))
    assert "runs" not in line
    runs = line["serving"]["runs"]
    assert set(runs) == set(names)
    assert not any("failed" in run for run in runs.values()), runs
    timed = [run[key] for run in runs.values() for key in ("step_s", "eight_s") if key in run]
    assert len(timed) == len(names) - 1  # all but the cold adapter
    assert min(timed) > 0
    assert {"swap_ms", "step_s"} == set(runs["swap"])
    assert {"attach_s", "read_s", "bytes", "cold_ratio"} == set(runs["cold"])
    assert {"adapter_overhead", "mixed_overhead", "sweep", "nf4_step", "blocks_step"} <= set(
        line["serving"]["ratios"]
    )
