"""The pipeline as a user runs it, on a recipe that takes half a minute."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml


def small_recipe(repository: Path, file: Path, **thresholds: float) -> Path:
    """The shipped recipe with two expressions, few people and few steps."""
    recipe = yaml.safe_load((repository / "trainer/recipes/pixelsmile-portraits.yaml").read_text())
    recipe["name"] = "small"
    recipe["data"] |= {"identities": {"human": 3, "anime": 1}, "validation": {"human": 1, "anime": 1}}
    recipe["lora"] |= {"rank": 4, "alpha": 4}
    recipe["optimiser"] |= {"steps": 6, "batch_pairs": 2, "warmup_steps": 2}
    recipe["running"] = {"checkpoint_every": 3}
    recipe["conditioning"]["expressions"] = ["fear", "surprised"]
    recipe["evaluation"] |= {"identities": {"human": 2, "anime": 1}, "intensities": [0.0, 1.0]}
    recipe["evaluation"] |= {"steps": 1, "thresholds": thresholds}
    file.write_text(yaml.safe_dump(recipe))
    return file


def command(data_folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ADAPTER_FOUNDRY_HOME": str(data_folder), "OMP_NUM_THREADS": "1"}
    environment.pop("PREFECT_HOME", None)
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, check=False
    )


def registry(data_folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return command(data_folder, "-m", "registry.cli", *words)
