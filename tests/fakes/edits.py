"""Small recipes that have a vendor edit portraits, and folders of portraits for them."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainer import recipe as recipes
from trainer.portraits.renderer import identity, one_hot, pose, render
from trainer.recipe import Recipe

EDITED: Mapping[str, Any] = {
    "provider": "gemini",
    "model": "fake-image",
    "endpoint": "http://127.0.0.1:1",
    "license": "LicenseRef-fake-terms",
}
PRICE = 0.05  # dollars an image


def edited(
    folder: Path,
    endpoint: str,
    *,
    data: Mapping[str, Any] | None = None,
    synthesis: Mapping[str, Any] | None = None,
    api: Mapping[str, Any] | None = None,
    running: Mapping[str, Any] | None = None,
    expressions: tuple[str, ...] = ("fear", "surprised"),
) -> Recipe:
    """Return a recipe whose people lie in a folder and are edited by a fake vendor."""
    limits = {"per_minute": 1e6, "parallel": 1, "timeout": 120, "prices": {"fake-image": {"image": PRICE}}}
    value = {
        "name": "edited",
        "base": {"id": "adapter-foundry/portraits-base", "revision": "1", "family": "qwen-image-edit",
                 "license": "Apache-2.0"},
        "data": {"source": "edited", "path": str(folder), "intensities": [0.5, 1.0], **(data or {})},
        "synthesis": {**EDITED, "endpoint": endpoint, **(synthesis or {})},
        "lora": {"rank": 4, "alpha": 8, "targets": ["attn.to_q"]},
        "optimiser": {"learning_rate": 0.01, "warmup_steps": 2, "steps": 12, "batch_pairs": 2},
        "losses": {"flow_matching": {"weight": 1.0}},
        "conditioning": {"template": "show a {} expression", "expressions": list(expressions)},
        "release": {"adapter": "edited", "license": "Apache-2.0"},
        "running": {"api": {**limits, **(api or {})}, **(running or {})},
    }  # fmt: skip
    return recipes.parse(json.dumps(value))


def portraits(folder: Path, *names: str) -> Path:
    """Put a plain picture under each name, another colour each; other files hold a few words."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(path.suffix.lower())
        if kind is None:
            path.write_text("some words")
            continue
        colour = zlib.crc32(name.encode()) % (1 << 24)
        Image.new("RGB", (40, 56), (colour >> 16, colour >> 8 & 255, colour & 255)).save(path, kind)
    return folder


def drawn_people(folder: Path, seeds: range, size: int = 64, license: str = "CC0-1.0") -> Path:
    """Put the neutral portraits of drawn people, ``<seed>.png``, and their licence into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        Image.fromarray(drawn(seed, None, 0.0, size)).save(folder / f"{seed}.png")
    (folder / "license.txt").write_text(license + "\n")
    return folder


def drawn(seed: int, expression: str | None, intensity: float, size: int) -> np.ndarray:
    """Return a drawn person's picture, uint8 [size, size, 3]."""
    return render(identity(seed, "human"), one_hot(expression or "neutral", intensity), size, pose(seed))


def knowing(folder: Path, recipe: Recipe) -> Callable[[bytes, str], bytes]:
    """Return an editor that draws what it is asked for, of the people of `drawn_people`."""
    from trainer.synthesis.prompts import prompts

    faces = {one.expression: face for face, one in prompts(recipe).items()}
    seeds = {pixels(path.read_bytes()): int(path.stem) for path in folder.glob("*.png")}

    def edit(picture: bytes, prompt: str) -> bytes:
        (face,) = [face for text, face in faces.items() if text in prompt]
        made = drawn(seeds[pixels(picture)], *face, Image.open(io.BytesIO(picture)).width)
        buffer = io.BytesIO()
        Image.fromarray(made).save(buffer, "PNG")
        return buffer.getvalue()

    return edit


def pixels(data: bytes) -> bytes:
    """Return the pixels of a picture's file."""
    return Image.open(io.BytesIO(data)).convert("RGB").tobytes()
