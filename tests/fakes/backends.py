"""A backend that draws instead of denoising: real pictures are opened, every result says who made it.

It keeps the promises of `serving.backend.Backend` (step 0 at once, the version is decided then, closing the
stream cancels it), and tests can hold it, fill it, drain it and promote another version under its feet.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from registry.digest import Digest, digest_bytes
from registry.manifest import BaseModelRef
from registry.reference import Reference
from serving.backend import AdapterStatus, Device, Health, Progress
from serving.conditioning import usual_strength
from serving.errors import Draining, NotServed, Overloaded, UnknownExpression
from serving.images import open_portrait
from serving.schema import DEFAULT_STEPS, EditResult, SweepRequest, Used

EXPRESSIONS = ("happy", "sad", "surprised")
BASE = BaseModelRef(
    id="adapter-foundry/portraits-base", revision="test", family="qwen-image-edit", license="Apache-2.0"
)
FACTS: dict[str, Any] = {
    "base": BASE.model_dump(),
    "license": "Apache-2.0",
    "description": "Draws.",
    "expressions": list(EXPRESSIONS),
    "neutral": "neutral",
    "template": "show a {} expression",
    "strength_min": 0.0,
    "strength_max": 1.5,
    "rank": 4,
    "ingredients": [],
    "scan": {"verdict": "pass", "findings": 0},
    "statements": [],
}


def digest_of(version: int) -> Digest:
    """The digest of a version of ``pixelsmile``."""
    return digest_bytes(f"pixelsmile:{version}".encode())


class DrawingBackend:
    """Serves ``pixelsmile@prod``.

    Attributes:
        version: that ``prod`` means.
        facts: of its signed card.
        asked: every request that was taken, with its key.
        cancelled: requests whose stream was closed before its end.
        go: cleared, steps wait; any thread may set it.
        full: seconds that a full queue asks for; None has room.
        failure: raised at the first step.
        refusal: raised when a request comes.
        refused: how often it was.
    """

    def __init__(self, *, step_seconds: float = 0.0) -> None:
        self.version = 1
        self.facts = FACTS
        self.asked: list[tuple[SweepRequest, str]] = []
        self.cancelled = 0
        self.running = 0
        self.go = threading.Event()
        self.go.set()
        self.full: float | None = None
        self.draining = False
        self.problem: str | None = None
        self.device: Device = "works"
        self.failure: Exception | None = None
        self.refusal: Exception | None = None
        self.refused = 0
        self._step_seconds = step_seconds

    async def start(self) -> None:
        """Nothing to load."""

    async def close(self, grace: float) -> None:
        """Take nothing more, and wait for what runs."""
        self.draining = True
        end = time.monotonic() + grace
        while self.running and time.monotonic() < end:
            await asyncio.sleep(0.01)

    async def health(self) -> Health:
        """As the attributes say."""
        ready = not self.draining and self.problem is None
        return Health(
            ready=ready,
            draining=self.draining,
            waiting=0,
            running=self.running,
            problem="draining" if self.draining else self.problem,
            retry_after=self.full,
            device=self.device,
        )

    async def adapters(self) -> Sequence[AdapterStatus]:
        """The one that is followed."""
        return [await self.adapter("pixelsmile@prod")]

    async def adapter(self, reference: str) -> AdapterStatus:
        """What a reference means now."""
        version = self._resolve(reference)
        return AdapterStatus(
            reference=reference,
            followed=reference == "pixelsmile@prod",
            state="ready",
            name="pixelsmile",
            version=version,
            digest=digest_of(version),
            facts=self.facts,
            since=1_700_000_000.0,
            checked=1_700_000_001.0,
        )

    async def stream(
        self, request: SweepRequest, *, key: str, previews: int = 0
    ) -> AsyncIterator[Progress | list[EditResult]]:
        """Draw; see `serving.backend.Backend`."""
        if self.draining:
            raise Draining("going down", "ask another")
        if self.full is not None:
            raise Overloaded("full", "wait", self.full)
        if self.refusal is not None:
            self.refused += 1
            raise self.refusal
        version = self._resolve(request.adapter or "pixelsmile@prod")
        for name in {name for row in request.rows for name in row}:
            if name not in EXPRESSIONS:
                raise UnknownExpression(f"the adapter has no expression {name!a}", "did you mean 'happy'?")
        size, steps = request.size or (64, 64), request.steps or DEFAULT_STEPS
        source = open_portrait(request.image).resize(size[::-1])
        self.asked.append((request, key))
        self.running += 1
        done = False
        try:
            yield Progress(
                step=0,
                steps=steps,
                adapter=f"pixelsmile:{version}",
                adapter_digest=digest_of(version),
            )
            rows = self._results(request, version, source, steps)
            shown = {round((index + 1) * steps / (previews + 1)) for index in range(previews)}
            for step in range(1, steps + 1):
                while not self.go.is_set():
                    await asyncio.sleep(0.01)
                await asyncio.sleep(self._step_seconds)
                if self.failure is not None:
                    raise self.failure
                pictures = [one.image for one in rows] if step in shown else None
                yield Progress(step=step, steps=steps, pictures=pictures)
            done = True
            yield rows
        finally:
            self.cancelled += not done
            self.running -= 1  # the last: tests in other threads wait for it

    def _resolve(self, reference: str) -> int:
        wanted = Reference.parse(reference)
        if wanted.name != "pixelsmile":
            raise NotServed(f"no adapter {reference!a} is served here", "GET /v1/adapters lists them")
        if wanted.alias not in (None, "prod"):
            raise NotServed(f"pixelsmile has no alias {wanted.alias!a}", "use prod")
        known = {digest_of(version): version for version in range(1, self.version + 1)}
        if wanted.digest is not None and wanted.digest not in known:
            raise NotServed("no such digest", "use prod")
        if wanted.digest is not None:
            return known[wanted.digest]
        if wanted.version is not None and wanted.version > self.version:
            raise NotServed(f"pixelsmile has no version {wanted.version}", "use prod")
        return wanted.version or self.version

    def _results(
        self, request: SweepRequest, version: int, source: Image.Image, steps: int
    ) -> list[EditResult]:
        """Rows whose pixels depend on everything that was asked."""
        seeds = request.seeds or (request.seed,) * len(request.rows)
        strength = self._strength(request.strength)
        results = []
        for row, seed in zip(request.rows, seeds, strict=True):
            tint = digest_bytes(repr((version, sorted(row.items()), seed, strength)).encode()).hex
            shift = np.frombuffer(bytes.fromhex(tint[:6]), np.uint8)
            pixels = (np.asarray(source).astype(np.uint16) + shift) % 256
            results.append(
                EditResult(
                    image=Image.fromarray(pixels.astype(np.uint8)),
                    adapter=f"pixelsmile:{version}",
                    adapter_digest=digest_of(version),
                    base=BASE,
                    expressions=dict(row),
                    strength=strength,
                    seed=seed,
                    steps=steps,
                    size=(source.height, source.width),
                    stacked=tuple(
                        Used(
                            adapter=one.adapter,
                            digest=digest_bytes(b"stacked"),
                            strength=self._strength(one.strength),
                        )
                        for one in request.stacked or ()
                    ),
                )
            )
        return results

    def _strength(self, asked: float | None) -> float:
        usual = usual_strength(self.facts["strength_min"], self.facts["strength_max"])
        return usual if asked is None else asked
