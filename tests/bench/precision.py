"""What a base loses and saves when it is stored in fewer bits, against bf16 on the same weights and inputs.

``PYTHONPATH=tests python tests/bench/precision.py`` prints one JSON line: for each format of
``precision.base`` the relative error of the portraits base's prediction, computed in fp32, and the bytes of
the frozen denoiser.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from fakes.tiny_bases import inputs
from serving import pipelines
from trainer import placement
from trainer import recipe as recipes
from trainer.portraits import base_path


def predicted(stored: str, compute: str = "fp32") -> tuple[torch.Tensor, int]:
    """Return a prediction of the base in a format, and the bytes that it takes."""
    recipe = recipes.load("pixelsmile-portraits")
    precision = recipe.precision.model_copy(update={"base": stored, "compute": compute})
    pipeline = pipelines.load(recipe.base.family, base_path())
    given: dict[str, Any] = inputs(pipeline, 8)
    changed = recipe.model_copy(update={"precision": precision})
    with placement.training(pipeline, changed, "cpu") as placed, torch.no_grad():
        return pipeline.predict(**given).float(), placed.held_bytes


def main() -> None:
    """Measure and print the line."""
    truth, _ = predicted("bf16")
    _, plain = predicted("bf16", "bf16")
    line: dict[str, Any] = {"bench": "precision", "bytes": {"fp32": predicted("fp32")[1], "bf16": plain}}
    line["error"] = {}
    for stored in ("fp8", "nf4"):
        found, held = predicted(stored)
        line["bytes"][stored] = held
        line["error"][stored] = round(float((found - truth).norm() / truth.norm()), 4)
    line["ratio"] = {name: round(held / plain, 2) for name, held in line["bytes"].items()}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
