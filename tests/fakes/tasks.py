"""Folders of tasks as FFE-Bench describes them, with drawn portraits instead of photographs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from trainer.portraits.renderer import identity, one_hot, pose, render

FIRST = 95_000
"""Number of the first person; no recipe of the tests trains on those from here on."""
BOX = (0.2, 0.14, 0.8, 0.92)
"""Where the face of a drawn portrait is, as shares of its sides: left, top, right, bottom."""
TASKS: tuple[tuple[str, Sequence[str]], ...] = (
    ("human", ("happy", "fear", "surprised")),
    ("anime", ("angry", "disgust")),
    ("human", ("sad",)),
    ("anime", ("fear", "surprised", "happy", "angry")),
)
"""Domain of each picture, and what is asked of it: ragged, as real tasks are."""


def write_tasks(
    folder: Path,
    asked: Sequence[tuple[str, Sequence[str]]] = TASKS,
    *,
    size: int = 64,
    name: str = "tasks.jsonl",
    key: str = "image",
    template: str = "show a {} expression",
) -> list[dict[str, Any]]:
    """Write pictures and a list of tasks.

    Args:
        folder: is made.
        asked: domain and expressions of each picture.
        size: side of the pictures in pixels, 64 to 512.
        name: of the list: tasks.jsonl, metadata.jsonl or tasks.json.
        key: of the picture's path.
        template: of the prompts.

    Returns:
        the tasks.
    """
    tasks = []
    for number, (domain, expressions) in enumerate(asked):
        path = folder / domain / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        person = identity(FIRST + number, "anime" if domain == "anime" else "human")
        Image.fromarray(render(person, one_hot("neutral", 0.0), size, pose(FIRST + number))).save(path)
        box = [round(share * size, 1) for share in BOX]
        for expression in expressions:
            tasks.append(
                {key: f"{domain}/{path.name}", "face_box": box, "expression": expression,
                 "prompt": template.format(expression), "domain": domain}
            )  # fmt: skip
    write_list(folder / name, tasks)
    return tasks


def write_list(path: Path, tasks: Sequence[Mapping[str, Any]]) -> None:
    """Write a list of tasks in the form that its name says."""
    if path.suffix == ".json":
        path.write_text(json.dumps(list(tasks)), "utf-8")
    else:
        path.write_text("".join(json.dumps(task) + "\n" for task in tasks), "utf-8")


def write_suite(file: Path, tasks: str = "tasks", **changes: Any) -> Path:
    """Write a suite of tasks in a folder beside it, judged by the portraits' own judges."""
    suite = {
        "name": "drawn-tasks", "source": "tasks", "path": tasks, "intensities": [0.0, 0.5, 1.0], "steps": 1,
        "judge": {"scorer": "judge"}, "faces": "portraits", **changes,
    }  # fmt: skip
    file.write_text(yaml.safe_dump(suite), "utf-8")
    return file


def photograph(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Return a picture, uint8 [H, W, 3], of smooth colours that no two seeds share."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin((x * (3 + c) + y * (5 - c)) / 37 + seed + c) for c in range(3)]
    return np.round(127.5 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)
