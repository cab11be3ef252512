"""The sandboxes of the documents' commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from servers import warm


@pytest.fixture(scope="session")
def shims(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Our commands, started at once by one warm process."""
    with warm.running(tmp_path_factory.mktemp("warm")) as found:
        yield found


@pytest.fixture
def environment(shims: Path, tmp_path: Path, home: Path) -> dict[str, str]:
    """What a reader's shell has: the environment activated, a home of their own, nothing of this machine."""
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("ADAPTER_FOUNDRY_", "XDG_"))
    }
    own = tmp_path / "reader"
    own.mkdir()
    for name in ("PREFECT_HOME", "PYTEST_CURRENT_TEST", "PYTHONPATH"):
        kept.pop(name, None)
    programs = Path(sys.executable).parent
    return {**kept, "HOME": str(own), "PATH": f"{shims}:{programs}:{os.environ['PATH']}"}
