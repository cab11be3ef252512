"""A registration that fails anywhere leaves no object, version or alias, and the next run publishes once.

Real S3 and a real MLflow server, each behind a proxy that refuses what the case says.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fakes.failing_proxy import FailingProxy, in_front_of
from fakes.registries import NAME, adapter_folder
from registry.client import Registry
from registry.errors import RegistryError
from registry.reconcile import reconcile
from registry.upkeep import clean
from servers.mlflow import MlflowServer
from servers.weed import Weed

pytestmark = [pytest.mark.integration, pytest.mark.slow]

#: What a push does in this order; each of them is refused once.
REFUSED = {
    "the weights": r"^PUT /.*/models/.*/adapter_weights/",
    "the card": r"^PUT /.*/blobs/",
    "the manifest": r"^PUT /.*/manifests/",
    "the first statement": r"^PUT /.*/statements/",
    "the model file": r"^PUT /.*/models/.*/MLmodel",
    "the signed name": r"^PUT /.*/trust/.*versions-",
    "the newest time": r"^PUT /.*/trust/timestamp",
}


@dataclass
class Place:
    """A registry behind two proxies, and an adapter that was evaluated."""

    home: Path
    s3: FailingProxy
    mlflow: FailingProxy
    adapter: Path
    evaluated: Path

    def push(self) -> dict[str, Any]:
        """What the flow's task does."""
        from flows.release import push

        found: dict[str, Any] = push.fn(
            home=self.home,
            adapter=self.adapter,
            evaluated=self.evaluated,
            name=NAME,
            progress=lambda *_: None,
        )
        return found

    @property
    def registry(self) -> Registry:
        return Registry.open(self.home)

    def left(self) -> list[str]:
        """Every object but the trust metadata."""
        return [key for key in self.registry.store.keys("") if not key.startswith("trust/")]

    def unreachable(self) -> list[str]:
        """What a clean-up without grace would remove."""
        found = clean(self.registry, timedelta(0), dry_run=True)
        return [one.key for one in (*found.objects, *found.unfinished)]


@pytest.fixture
def place(
    home: Path, tmp_path: Path, weed: Weed, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    from fakes.releases import report

    with in_front_of(weed.endpoint) as s3, in_front_of(mlflow_server.uri) as index:
        variables = weed.environment() | mlflow_server.environment()
        variables |= {"AWS_ENDPOINT_URL_S3": s3.url, "MLFLOW_TRACKING_URI": index.url}
        variables["ADAPTER_FOUNDRY_STORE"] = f"s3://{weed.bucket()}/{tmp_path.name}"
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        Registry.init(home)
        evaluated = tmp_path / "evaluated"
        evaluated.mkdir()
        (evaluated / "evaluation.json").write_text(report().model_dump_json())
        found = Place(home, s3, index, adapter_folder(tmp_path / "adapter", seed=1), evaluated)
        found.registry.catalog.remove(NAME)  # other tests of this server may have left one of that name
        yield found
        s3.refuse(None)
        index.refuse(None)
        found.registry.catalog.remove(NAME)


def test_what_is_refused_at_any_point_leaves_nothing_and_the_next_run_publishes_once(place: Place) -> None:
    for what, pattern in REFUSED.items():
        place.s3.refuse(pattern)
        with pytest.raises(RegistryError):
            place.push()
        assert any(re.search(pattern, line) for line in place.s3.requests), what
        place.s3.refuse(None)
        assert place.registry.list() == (), what
        assert place.left() == [], what
    assert place.push()["facts"]["reference"] == f"{NAME}:1"
    assert [row.reference for row in place.registry.list()] == [f"{NAME}:1"]
    assert place.unreachable() == []
    assert reconcile(place.registry, repair=False)[0] == ()
    assert place.push()["reused"]


def test_an_index_that_is_away_is_noticed_before_anything_is_written(place: Place) -> None:
    place.mlflow.refuse(".")
    with pytest.raises(RegistryError):
        place.push()
    assert place.left() == []


def test_an_index_that_fails_at_the_end_is_completed_by_the_next_run(place: Place) -> None:
    place.mlflow.refuse(r"^POST .*/model-versions/create")
    with pytest.raises(RegistryError):
        place.push()
    place.mlflow.refuse(None)
    assert [row.reference for row in place.registry.list()] == [f"{NAME}:1"], "its name was signed"
    assert place.push()["facts"]["reference"] == f"{NAME}:1"
    assert reconcile(place.registry, repair=False)[0] == ()
    assert place.unreachable() == []


def test_a_key_that_is_missing_is_noticed_before_anything_is_written(place: Place) -> None:
    key = place.home / "registry" / "keys" / "scanner.pem"
    data = key.read_bytes()
    key.unlink()
    with pytest.raises(RegistryError, match="scanner"):
        place.push()
    assert place.left() == []
    key.touch(0o600)
    key.write_bytes(data)
    assert place.push()["facts"]["reference"] == f"{NAME}:1"


def test_a_store_that_is_away_altogether_leaves_what_a_clean_up_finds(place: Place) -> None:
    place.s3.before(r"^PUT /.*/statements/", 1, lambda: place.s3.refuse("."))
    with pytest.raises(RegistryError):
        place.push()
    place.s3.refuse(None)
    assert place.registry.list() == ()
    assert set(place.unreachable()) == set(place.left()) != set()
    clean(place.registry, timedelta(0))
    assert place.left() == []
    assert place.push()["facts"]["reference"] == f"{NAME}:1"


@pytest.mark.parametrize("pattern", [r"^PUT /.*/manifests/", r"^PUT /.*/trust/timestamp"])
def test_a_run_that_is_killed_is_completed_by_the_next(place: Place, pattern: str) -> None:
    program = (
        "import json, sys; from pathlib import Path; from flows.release import push\n"
        "sys.stdin.read()\n"
        "given = {name: Path(value) for name, value in json.loads(sys.argv[1]).items()}\n"
        f"push.fn(**given, name={NAME!r}, progress=lambda *_: None)"
    )
    given = {"home": place.home, "adapter": place.adapter, "evaluated": place.evaluated}
    words = [sys.executable, "-c", program, json.dumps({name: str(path) for name, path in given.items()})]
    running = subprocess.Popen(words, env=os.environ, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    place.s3.before(pattern, 1, running.kill)
    running.communicate()  # the end of its input is what it waits for
    assert running.returncode == -9
    place.s3.settle()  # its last request goes through without it
    assert len(place.registry.list()) <= 1
    assert place.push()["facts"]["reference"] == f"{NAME}:1"
    assert [row.reference for row in place.registry.list()] == [f"{NAME}:1"]
    assert place.unreachable() == []
