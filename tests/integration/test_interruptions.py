"""kill -9 at any moment: nothing half is ever seen, and the same command completes what was begun."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fakes.registries import NAME, PASSING, adapter_folder, copy_registry
from registry.client import Registry
from registry.errors import RegistryError

pytestmark = [pytest.mark.integration, pytest.mark.slow]

KILLS = 6


def run(*arguments: str, kill_after: float | None = None) -> int:
    """Run the real command in its own process, and kill it after some seconds if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "registry.cli", *arguments],
        env=dict(os.environ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        return process.wait(kill_after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        return process.wait()


def seen(home: Path) -> list[str]:
    """What a consumer sees, each version of it whole: shown, with every object in the store."""
    registry = Registry.open(home)
    rows = registry.list()
    for row in rows:
        manifest = registry.show(row.reference).manifest
        assert f"{manifest.name}:{manifest.version}" == row.reference
    return [row.reference for row in rows]


def test_a_push_killed_at_any_moment_is_completed_by_the_next(home: Path, tmp_path: Path) -> None:
    copy_registry(home)
    folder = adapter_folder(tmp_path / "second", seed=1)
    command = ("push", str(folder), "--name", NAME)
    started = time.monotonic()
    assert run("push", str(adapter_folder(tmp_path / "third", seed=2)), "--name", "whole") == 0
    whole = time.monotonic() - started
    moments = random.Random(7)
    for _ in range(KILLS):
        run(*command, kill_after=whole * moments.uniform(0.2, 1.0))
        assert set(seen(home)) <= {f"{NAME}:1", f"{NAME}:2", "whole:1"}
    assert run(*command) == 0
    assert seen(home) == [f"{NAME}:1", f"{NAME}:2", "whole:1"]
    registry = Registry.open(home)
    registry.attest(f"{NAME}:2", "evaluation", PASSING)
    registry.approve(f"{NAME}:2", "a person", "looks right")
    assert registry.verify(f"{NAME}:2").reference == f"{NAME}:2"
    registry.ledger.verify(None)


def test_a_promotion_killed_at_any_moment_leaves_the_old_or_the_new(home: Path, tmp_path: Path) -> None:
    registry = copy_registry(home)
    reference = registry.push(adapter_folder(tmp_path / "second", seed=1), NAME, evaluation=PASSING).reference
    registry.approve(reference, "a person", "better")
    moments = random.Random(11)
    for _ in range(KILLS):
        run("promote", reference, "--to", "prod", kill_after=moments.uniform(0.4, 2.5))
        assert Registry.open(home).load(f"{NAME}@prod").reference in (f"{NAME}:1", reference)
    assert run("promote", reference, "--to", "prod") == 0
    assert Registry.open(home).load(f"{NAME}@prod").reference == reference


def test_a_pull_killed_at_any_moment_leaves_nothing_that_is_believed(home: Path) -> None:
    copy_registry(home)
    moments = random.Random(13)
    for _ in range(KILLS):
        run("pull", f"{NAME}@prod", kill_after=moments.uniform(0.2, 1.5))
        for folder in (home / "cache" / "sha256").glob("*"):
            assert {path.name for path in folder.iterdir()} >= {"manifest.json", "adapter.json"}
    assert run("pull", f"{NAME}@prod") == 0
    try:
        assert Registry.open(home).load(f"{NAME}@prod").reference == f"{NAME}:1"
    except RegistryError as error:
        pytest.fail(str(error))
