"""An engine of a cluster, as Ray Serve makes and asks it, without a cluster."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fakes.followed import PROD, three_versions
from fakes.registries import NAME
from registry.families import KNOWN_BASES
from registry.manifest import BaseModelRef
from serving.backend import AdapterStatus
from serving.bases import register
from serving.errors import ServingError
from serving.logs import LOGGER
from serving.ray_app import Engine
from serving.schema import SweepRequest
from serving.settings import ServingSettings
from trainer.portraits.base import base_path

SOON = 300.0
"""Whatever has to happen happens in these seconds, also on a machine that is busy."""
BASE_ID = "adapter-foundry/portraits-base"


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    """An engine decides how its process logs; the next test has a process of its own."""
    loggers = [logging.getLogger(name) for name in (None, LOGGER, "uvicorn")]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers
    logging.captureWarnings(False)


class Made(Engine):
    """One without what Ray Serve gives: the test closes it, and no router hears of what it has admitted."""

    async def admitted(self, model: str) -> AdapterStatus:
        return await self._backend.adapter(model)

    def __del__(self) -> None: ...  # type: ignore[override]


async def made(home: Path) -> Engine:
    """An engine that serves ``pixelsmile@prod``."""
    base = KNOWN_BASES[BASE_ID]
    reference = BaseModelRef(id=base.id, revision=base.revision, family=base.family, license=base.license)
    register(base_path(), reference, home)
    three_versions(home)
    engine = Made.__new__(Made)
    await engine.__init__(ServingSettings(adapters=(PROD,), follow_seconds=0.1))  # type: ignore[misc]
    return engine


def test_an_engine_whose_device_is_dead_fails_its_health_check(
    home: Path, portrait: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.pulse.TRY_SECONDS", 0.01)
    monkeypatch.setattr("serving.pulse.DEAD_SECONDS", 1e9)

    def gone(runs: Sequence[Any]) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    async def run() -> None:
        engine = await made(home)
        backend = engine._backend
        await engine.check_health()
        assert await engine.admit(f"{NAME}:1") is None
        refused = await engine.admit(f"{NAME}:9")
        assert (refused is not None, refused and refused.broken) == (True, False)
        assert backend._device is not None
        backend._device.engine.advance = gone  # type: ignore[method-assign]
        request = SweepRequest.make(image=portrait, rows=({"happy": 0.8},), steps=2)
        for _ in range(3):
            with pytest.raises(ServingError):
                [one async for one in backend.stream(request, key="me")]
        health = await engine.health()
        assert (health.ready, health.device) == (False, "broken")
        refused = await engine.admit(f"{NAME}:2")
        assert refused is not None
        assert refused.broken, "it has no say in a promotion"
        assert not await engine.admitting(f"{NAME}:2")
        await engine.check_health()  # it may work again
        monkeypatch.setattr("serving.pulse.DEAD_SECONDS", 0.0)
        with pytest.raises(ServingError, match="started again"):
            await engine.check_health()
        del backend._device.engine.advance
        async with asyncio.timeout(SOON):
            while (await engine.health()).device != "works":
                await asyncio.sleep(0.02)
        await engine.check_health()
        await Engine.__del__(engine)

    asyncio.run(run())
