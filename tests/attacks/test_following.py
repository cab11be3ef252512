"""Whoever controls the store, and some keys, wants a running server to serve something else: it does not."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fakes.followed import PROD, follower, meant, soon, three_versions, wait_until
from fakes.registries import (
    NAME,
    PASSING,
    adapter_files,
    adapter_folder,
    forget_trust,
    objects,
    overwrite,
    resign,
)
from registry.client import Registry
from registry.digest import Digest
from registry.errors import Explained, NotFound, Revoked
from registry.manifest import WEIGHTS_NAME
from registry.reference import Reference
from registry.settings import layout
from registry.storage.base import statements_prefix
from serving.following import Follower
from serving.metrics import Metrics

Make = Callable[..., Follower]


@pytest.fixture
def registry(home: Path) -> Registry:
    return three_versions(home)


@pytest.fixture
def make(registry: Registry) -> Iterator[Make]:
    """Makes followers of the registry as its settings are now, after their first round."""
    made: list[Follower] = []

    def new(**options: Any) -> Follower:
        made.append(follower(registry, **options))
        made[-1].poll()
        return made[-1]

    yield new
    for one in made:
        one.stop()


def move(digest: Digest, alias: str = PROD) -> Callable[[Any], None]:
    """A change of signed metadata: an alias means something else."""
    from tuf.api.metadata import TargetFile

    def change(targets: Any) -> None:
        targets.targets[alias] = TargetFile(1, {"sha256": digest.hex}, alias)

    return change


def digest_of(registry: Registry, reference: str) -> Digest:
    """What a reference means."""
    return registry.authority.state().resolve(Reference.parse(reference)).digest


def still(found: Follower, number: int, problem: str) -> None:
    """Three rounds later the same version answers, and the status says why no other does."""
    for _ in range(3):
        found.poll()
    assert found.resolve(PROD).reference == f"{NAME}:{number}"
    status = found.statuses()[0]
    assert (status.state, status.version) == ("ready", number)
    assert problem in str(status.problem)


# -- bytes --


def test_weights_replaced_in_the_store_do_not_go_live(make: Make, registry: Registry, home: Path) -> None:
    metrics = Metrics()
    found = make(metrics=metrics)
    (path,) = (
        path
        for path in objects(home).glob(f"models/*/adapter_weights/{WEIGHTS_NAME}")
        if path.read_bytes() == adapter_files(2)[WEIGHTS_NAME]
    )
    honest = path.read_bytes()
    registry.promote(f"{NAME}:2", "prod")
    overwrite(path, adapter_files(3)[WEIGHTS_NAME])
    still(found, 1, "are not the bytes that were signed")
    refusals = metrics.registry.get_sample_value(
        "foundry_serving_verification_failures_total", {"reason": "digest_mismatch"}
    )
    assert refusals is not None
    assert refusals >= 1
    overwrite(path, honest)
    wait_until(lambda: [found.poll(), meant(found, PROD).number][1] == 2)


def test_swapped_statements_do_not_help_a_version_that_nobody_approved(
    make: Make, registry: Registry, home: Path, tmp_path: Path
) -> None:
    found = make()
    digest = registry.push(adapter_folder(tmp_path / "4", seed=4), NAME).digest
    first = found.resolve(PROD).digest
    for path in (objects(home) / statements_prefix(first)).iterdir():
        if path.name.startswith(("approval.", "evaluation.")):
            shutil.copy(path, objects(home) / statements_prefix(digest))
    resign(home, {"targets": move(digest)})
    still(found, 1, "is about")


# -- names --


@pytest.mark.parametrize("thief", ["publisher", "scanner", "evaluator", "online"])
def test_an_alias_moved_with_another_key_moves_nothing(
    make: Make, registry: Registry, home: Path, thief: str
) -> None:
    found = make()
    resign(home, {"targets": move(digest_of(registry, f"{NAME}:2"))}, {"targets": thief})
    still(found, 1, "the registry cannot be believed: trust metadata is not signed by the keys")


def test_an_alias_moved_in_mlflow_moves_nothing(make: Make, home: Path) -> None:
    found = make()
    with sqlite3.connect(home / "registry" / "mlflow.db") as database:
        moved = database.execute("UPDATE registered_model_aliases SET version = 2 WHERE alias = 'prod'")
        assert moved.rowcount == 1
    found.poll()
    assert meant(found, PROD).number == 1
    assert found.statuses()[0].problem is None


def test_an_approver_cannot_move_an_alias_past_admission(
    make: Make, registry: Registry, home: Path, tmp_path: Path
) -> None:
    found = make()
    resign(home, {"targets": move(registry.push(adapter_folder(tmp_path / "4", seed=4), NAME).digest)})
    still(found, 1, "lacks signed statements: evaluation, approval")


def test_what_was_admitted_for_one_alias_is_not_served_for_a_stricter_one(
    make: Make, registry: Registry, home: Path, tmp_path: Path
) -> None:
    """It is in memory already, admitted by the gate of versions; the gate of the alias asks for more."""
    policy = home / "registry" / "policy.toml"
    strict = '["training", "evaluation", "scan", "licence", "approval"]'
    policy.write_text(
        '[gates.default]\nrequire = ["training", "scan", "licence"]\napprovals = 0\n'
        f"[gates.prod]\nrequire = {strict}\napprovals = 1\n"
    )
    registry = Registry(layout(home))
    digest = registry.push(adapter_folder(tmp_path / "4", seed=4), NAME).digest
    found = make()
    assert meant(found, f"{NAME}:4").digest == digest
    resign(home, {"targets": move(digest)})
    still(found, 1, "lacks signed statements: evaluation, approval")


def test_what_was_admitted_as_one_adapter_is_not_served_as_another(
    make: Make, registry: Registry, home: Path, tmp_path: Path
) -> None:
    """It is in memory already, admitted by the very same gate, but under its own name."""
    digest = registry.push(adapter_folder(tmp_path / "4", seed=4), "grumpy", evaluation=PASSING).digest
    registry.approve("grumpy:1", "a person", "fine")
    registry.promote("grumpy:1", "prod")
    found = make(adapters=(PROD, "grumpy@prod"))
    assert meant(found, "grumpy@prod").number == 1
    resign(home, {"targets": move(digest)})
    still(found, 1, "asked for")


def test_another_name_for_what_is_followed_is_not_believed(
    make: Make, registry: Registry, home: Path
) -> None:
    """An approver signs that another adapter's alias means the digest that is served: its name is wrong."""
    found = make()
    resign(home, {"targets": move(found.resolve(PROD).digest, "grumpy@prod")})
    found.poll()
    with pytest.raises(Explained, match="asked for"):
        meant(found, "grumpy@prod")


# -- time --


@pytest.mark.parametrize("forgets", [False, True])
def test_a_store_set_back_does_not_set_back_what_is_served(
    make: Make, registry: Registry, home: Path, tmp_path: Path, forgets: bool
) -> None:
    """Also where the machine's own memory of what it has seen was lost under the running server."""
    shutil.copytree(objects(home), tmp_path / "before")
    found = make()
    registry.promote(f"{NAME}:2", "prod")
    found.poll()
    held = found.resolve(PROD)
    shutil.rmtree(objects(home))
    shutil.copytree(tmp_path / "before", objects(home))
    if forgets:
        forget_trust(home)
    still(found, 2, "older trust metadata")
    assert found.resolve(PROD) is held


@pytest.mark.parametrize("forgets", [False, True])
def test_a_revocation_is_not_undone_by_a_store_set_back(
    make: Make, registry: Registry, home: Path, tmp_path: Path, forgets: bool
) -> None:
    shutil.copytree(objects(home), tmp_path / "before")
    found = make()
    held = found.resolve(PROD)
    registry.revoke(f"{NAME}:1", "bad")
    found.poll()
    shutil.rmtree(objects(home))
    shutil.copytree(tmp_path / "before", objects(home))
    if forgets:
        forget_trust(home)
    for _ in range(3):
        found.poll()
        for asked in (lambda: found.resolve(PROD), lambda: found.check(held)):
            with pytest.raises(Revoked):
                asked()


def test_a_revoked_version_in_memory_is_not_handed_out_by_its_digest(make: Make, registry: Registry) -> None:
    """It is kept there for a rollback, and no reference means it."""
    found = make()
    digest = found.resolve(PROD).digest
    registry.promote(f"{NAME}:2", "prod")
    found.poll()
    assert str(meant(found, str(digest))) == f"{NAME}:1"
    registry.revoke(f"{NAME}:1", "bad")
    found.poll()
    with pytest.raises(Revoked):
        meant(found, str(digest))


def test_a_frozen_store_is_found_out_when_its_time_is_over(
    make: Make, registry: Registry, home: Path, tmp_path: Path
) -> None:
    """Who withholds news can do so until the timestamp ends, and can change nothing meanwhile."""
    began = time.monotonic()
    make()
    ends = (datetime.now(UTC) + soon(time.monotonic() - began)).replace(microsecond=0)
    resign(home, {"timestamp": lambda signed: setattr(signed, "expires", ends)})
    (home / "registry" / "keys" / "online.pem").unlink()
    found = make()
    assert found.statuses()[0].problem is None
    wait_until(lambda: datetime.now(UTC) > ends)
    still(found, 1, "has expired")
    with pytest.raises(Explained, match="has expired"):
        meant(found, f"{NAME}:2")


def test_names_invented_by_callers_never_reach_the_store(make: Make, home: Path) -> None:
    found = make()
    objects(home).rename(home / "away")  # whatever asked for something now would fail otherwise
    for number in range(100):
        with pytest.raises(NotFound):
            meant(found, f"invented-{number}@prod")
        with pytest.raises(NotFound):
            meant(found, f"{NAME}:{number + 100}")
    assert len(found.statuses()) == 1
