"""How a service of `make up` becomes a process: what is in its way, and how long it may take to stop."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.local import place, postgres, stack
from infra.local.passwords import passwords
from infra.local.place import Place
from infra.local.service import Service, launch_text, python
from infra.local.settings import PlatformSettings
from serving.settings import load

SQLITE = PlatformSettings(database="sqlite")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder with a short path: there are sockets in it."""
    with tempfile.TemporaryDirectory(prefix="p-") as made:
        yield Path(made)


@pytest.fixture
def where(tmp_path: Path) -> Place:
    return claimed(tmp_path / "p")


def claimed(home: Path) -> Place:
    """A platform's folder."""
    found = Place(home=home)
    place.claim(found)
    return found


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that names the folder of the note, as a server does that has its data there."""
    command = [sys.executable, "-c", "import time; time.sleep(600)", str(tmp_path)]
    with subprocess.Popen(command) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("whose", ["nobody's", "somebody else's", "none", "its own"])
def test_a_note_of_a_process_that_is_no_such_service_is_in_nobody_s_way(
    where: Place, tmp_path: Path, holder: subprocess.Popen[bytes], whose: str
) -> None:
    """After a loss of power the number in PostgreSQL's postmaster.pid is anybody's."""
    numbers = {
        "nobody's": "4194304",
        "somebody else's": str(os.getpid()),
        "none": "",
        "its own": str(holder.pid),
    }
    note = tmp_path / "postmaster.pid"
    note.write_text(f"{numbers[whose]}\n/data\n")
    service = Service(name="x", command=["ls", str(tmp_path)], folder=tmp_path, pid_file=note)
    file = where.run / "x.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(launch_text(service, where))
    ran = subprocess.run(python("infra.local.launch", str(file)), capture_output=True, text=True, check=True)
    assert (note.name in ran.stdout.split()) is (whose == "its own")


def test_postgresql_names_its_note(where: Place) -> None:
    engine = postgres.Engine(folder=Path("/nowhere"), major=15)
    found = postgres.service(where, engine, {"postgres": 1}, passwords(where))
    data = found.command[found.command.index("-D") + 1]
    assert found.pid_file == Path(data) / "postmaster.pid"


@pytest.mark.parametrize("grace", [None, "0", "300.5"])
def test_serving_is_not_killed_before_its_own_grace_is_over(where: Place, grace: str | None) -> None:
    own = {} if grace is None else {"ADAPTER_FOUNDRY_SERVING_GRACE_SECONDS": grace}
    found = stack.build(where, SQLITE, variables=own)["serving"]
    assert found.environment.get("ADAPTER_FOUNDRY_SERVING_GRACE_SECONDS") == grace
    assert found.stop_seconds >= math.ceil(load(own, where.home).grace_seconds) + 5


def test_names_of_ray_s_sockets_fit_into_the_longest_home_that_is_taken(tmp_path: Path) -> None:
    """Ray's own check, in the environment of the worker's runs."""
    room = place.LONGEST_SOCKET - len(str(Place(home=tmp_path / "x").socket))
    where = claimed(tmp_path / ("x" * (1 + room)))
    worker = stack.build(where, SQLITE)["prefect-worker"]
    script = """
import os
from ray._common.utils import get_default_ray_temp_dir
from ray._private.utils import validate_socket_filepath
session = "session_2026-11-22_15-15-15_123456_4194304"
validate_socket_filepath(os.path.join(get_default_ray_temp_dir(), session, "sockets", "plasma_store"))
"""
    environment = {"PATH": os.environ["PATH"], **worker.environment}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
