"""A data folder that can be served from, and what its answers have to look like, pixel for pixel."""

from __future__ import annotations

import atexit
import base64
import functools
import io
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fakes import reference_adapters
from fakes.reference_adapters import Fault
from fakes.registries import NAME, PASSING
from registry.client import Registry
from registry.manifest import CARD_NAME, AdapterCard
from serving.bases import register
from serving.conditioning import strength_of
from serving.engine import EditEngine
from serving.schema import SweepRequest
from trainer.portraits.base import base_path

REF = AdapterCard.model_validate_json((reference_adapters.GOOD / CARD_NAME).read_bytes()).base

VERSIONS: tuple[Fault, ...] = ("good", "half", "over-edited")
"""What the versions 1, 2 and 3 are: one adapter at three strengths, so their pictures are far apart."""


@functools.cache
def _template() -> Path:
    root = Path(tempfile.mkdtemp(prefix="served-template-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    registry = Registry.init(root / "home")
    register(base_path(), REF, root / "home")
    for number, fault in enumerate(VERSIONS, start=1):
        registry.push(reference_adapters.adapter(fault, root / fault), NAME, evaluation=PASSING)
        registry.approve(f"{NAME}:{number}", "a person", "looks right")
    registry.promote(f"{NAME}:1", "prod")
    return root / "home"


def served_home(home: Path) -> Registry:
    """Puts the base that ships into a data folder, and a registry with `VERSIONS`, the first at ``prod``."""
    shutil.copytree(_template(), home, dirs_exist_ok=True)
    return Registry.open(home)


@functools.cache
def portrait(number: int = 0) -> bytes:
    """A PNG file with some structure; every number gives another one."""
    rows = np.linspace(0, 255, 64)[:, None, None]
    columns = np.linspace(255, 0, 64)[None, :, None]
    pixels = np.broadcast_to((rows + columns) / 2 * [1.0, 0.7, 0.4 + number % 7 / 12], (64, 64, 3))
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def pixels_of(png: bytes) -> np.ndarray:
    """The pixels of a picture [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(np.int16)


@dataclass(frozen=True, slots=True)
class Ask:
    """A request with everything that decides on its pixels.

    Attributes:
        happy: intensity.
        seed, steps, size: as in the request.
        picture: number of the `portrait`.
    """

    happy: float = 0.5
    seed: int = 0
    steps: int = 2
    picture: int = 0
    size: tuple[int, int] | None = None

    def body(self, adapter: str, **more: Any) -> dict[str, Any]:
        """The body of ``POST /v1/edits``."""
        return {
            "image": base64.b64encode(portrait(self.picture)).decode(),
            "expressions": {"happy": self.happy},
            "adapter": adapter,
            "seed": self.seed,
            "steps": self.steps,
            "size": self.size,
            **more,
        }


class Truth:
    """What each version answers, by an engine of this process that nothing else uses.

    Args:
        registry: from which the versions are loaded.
    """

    def __init__(self, registry: Registry) -> None:
        self._engine = EditEngine.load(REF, home=registry.place.home)
        self._adapters = {number: registry.load(f"{NAME}:{number}") for number in (1, 2, 3)}
        self._known: dict[tuple[int, Ask], np.ndarray] = {}

    def digest(self, version: int) -> str:
        """The digest of a version's manifest."""
        return str(self._adapters[version].digest)

    def pixels(self, version: int, ask: Ask) -> np.ndarray:
        """The pixels that a version has to answer with."""
        if (version, ask) not in self._known:
            adapter = self._adapters[version]
            request = SweepRequest.make(
                image=portrait(ask.picture), rows=({"happy": ask.happy},),
                seed=ask.seed, steps=ask.steps, size=ask.size,
            )  # fmt: skip
            run = self._engine.begin(request, ((adapter, strength_of(adapter.card.conditioning, None)),))
            while not run.done:
                self._engine.advance([run])
            (result,) = self._engine.finish(run)
            self._known[version, ask] = np.asarray(result.image).astype(np.int16)
        return self._known[version, ask]

    def off(self, digest: str, ask: Ask, png: bytes) -> int:
        """The largest difference of a picture to what the version of that digest answers, of 255 levels.

        One level is rounding: a row's numbers depend a little on how many share its forward pass. Versions
        are apart by many.
        """
        (version,) = (number for number in self._adapters if self.digest(number) == digest)
        return int(np.abs(self.pixels(version, ask) - pixels_of(png)).max())
