"""The run folder: one place with everything that a person wants to look at after a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.portraits import EDITS_NAME
from registry.digest import Digest
from trainer.stage import STAGE_NAME, StageResult, new_folder

LATEST = "latest"
ADAPTER = "adapter"
EDITS = "edits"
PORTRAIT = "portrait.png"
RUN_NAME = "run.json"


def gather(home: Path, root: Path, stages: Mapping[str, StageResult], summary: Mapping[str, Any]) -> Path:
    """Copy the results of a run into ``<root>/latest``, which appears at once and replaces the one before.

    Args:
        home: data folder with the registry.
        root: folder of the recipe's stage folders.
        stages: the stages of the run by name; ``train``, ``evaluate``, ``scan``, ``pull`` and ``edit`` are
            looked into.
        summary: becomes ``run.json``.

    Returns:
        the run folder.
    """
    latest = root / LATEST
    with new_folder(latest) as folder:
        shutil.copytree(stages["train"].folder / "adapter", folder / ADAPTER)
        for path in (*_files(stages["evaluate"].folder), *_files(stages["scan"].folder)):
            shutil.copyfile(path, folder / path.name)
        # The pulled copy is the verified one: its manifest is the one that was signed.
        shutil.copyfile(stages["pull"].folder / "manifest.json", folder / "manifest.json")
        copy_statements(stages["pull"].digest, home, folder / "statements")
        (folder / EDITS).mkdir()
        for path in _files(stages["edit"].folder):
            shutil.copyfile(path, folder / EDITS / path.name)
        first = json.loads((folder / EDITS / EDITS_NAME).read_bytes())[0]["portrait"]
        shutil.copyfile(folder / EDITS / first, folder / PORTRAIT)
        (folder / RUN_NAME).write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n", "utf-8")
    return latest


def copy_statements(manifest: Digest, home: Path, out: Path) -> None:
    """Copy the signed statements about a manifest out of the registry's store, as they are."""
    from registry.client import Registry
    from registry.storage.shelf import read_statements

    out.mkdir()
    for key, data in read_statements(Registry.open(home).store, manifest).items():
        (out / Path(key).name).write_bytes(data)


def _files(folder: Path) -> Sequence[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != STAGE_NAME]
