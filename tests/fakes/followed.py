"""A real registry with three approved versions, and what tests of following do with it."""

from __future__ import annotations

import asyncio
import atexit
import functools
import shutil
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from fakes.registries import NAME, PASSING, adapter_folder, copy_registry
from registry.client import Registry
from serving.following import Follower
from serving.settings import ServingSettings
from serving.versions import Version

PROD = f"{NAME}@prod"


@functools.cache
def _template() -> Path:
    root = Path(tempfile.mkdtemp(prefix="followed-template-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    registry = copy_registry(root / "home")
    for number in (2, 3):
        registry.push(adapter_folder(root / str(number), seed=number), NAME, evaluation=PASSING)
        registry.approve(f"{NAME}:{number}", "a person", "looks right")
    return root / "home"


def three_versions(home: Path) -> Registry:
    """Puts a registry into a data folder: ``pixelsmile:1`` at ``pixelsmile@prod``, 2 and 3 approved."""
    shutil.copytree(_template(), home, dirs_exist_ok=True)
    return Registry.open(home)


def follower(registry: Registry, **options: Any) -> Follower:
    """A follower of ``pixelsmile@prod`` that was not started; settings are told apart by their names."""
    given = {name: options.pop(name) for name in list(options) if name in ServingSettings.model_fields}
    settings = ServingSettings(**{"adapters": (PROD,), "follow_seconds": 0.1, **given})
    return Follower(registry, settings, **options)


def meant(found: Follower, reference: str) -> Version:
    """What answers to a reference now, loaded on demand where nobody follows it."""
    return asyncio.run(found.meant(reference))


def soon(seconds: float) -> timedelta:
    """When something may end that has to hold while a registry is read, which has just taken so long."""
    return timedelta(seconds=15 + 10 * seconds)


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> float:
    """Waits until something holds, and returns the seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it did not happen"
        time.sleep(0.005)
    return time.monotonic() - began
