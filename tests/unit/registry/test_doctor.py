"""The doctor: finds what is wrong, says what to do, and changes nothing."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fakes.archives import appearance, site
from fakes.followed import wait_until
from fakes.registries import (
    NAME,
    adapter_folder,
    copy_registry,
    expire,
    forget_trust,
    objects,
    one,
    overwrite,
    resign,
)
from registry import doctor, intake, mirror, upkeep
from registry.client import Registry
from registry.doctor import Finding, examine, exit_code
from registry.manifest import WEIGHTS_NAME
from registry.reconcile import reconcile
from registry.reference import Reference
from registry.signing.refresh import TrustClient
from registry.storage.local import LocalObjects

OTHER = "foreign"


@pytest.fixture
def registry(home: Path) -> Registry:
    registry = copy_registry(home)
    reconcile(registry, repair=True)  # a copy lies elsewhere than the index says
    return Registry.open(home)


def problems(found: tuple[Finding, ...]) -> dict[str, int]:
    return {finding.check: finding.exit_code for finding in found if finding.outcome == "fail"}


def warnings(found: tuple[Finding, ...]) -> dict[str, str]:
    return {finding.check: finding.detail for finding in found if finding.outcome == "warn"}


@pytest.mark.parametrize("deep", [False, True])
def test_a_healthy_registry_is_healthy_and_stays_untouched(
    registry: Registry, home: Path, deep: bool
) -> None:
    registry.pull(f"{NAME}@prod")
    before = appearance(home)
    times = {path: path.stat().st_mtime_ns for path in objects(home).rglob("*")}
    found = examine(Registry.open(home), deep=deep)
    assert (problems(found), warnings(found), exit_code(found)) == ({}, {}, 0)
    checks = {finding.check for finding in found}
    assert {"settings", "libraries", "trust metadata", "online key", "store", "versions", "index",
            "audit log", "cache", "clock"} <= checks  # fmt: skip
    assert appearance(home) == before
    assert {path: path.stat().st_mtime_ns for path in objects(home).rglob("*")} == times


def test_nothing_is_made_where_nothing_is(home: Path) -> None:
    found = examine(Registry.open(home))
    assert problems(found)["trust metadata"] == 11
    assert exit_code(found) == 11
    assert [*home.iterdir()] == []


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    overwrite(path, bytes(data))


def cut_the_log(home: Path) -> None:
    import sqlite3

    with sqlite3.connect(home / "registry" / "ledger.db") as connection:
        connection.execute("DELETE FROM adapter_foundry_ledger WHERE number = 4")


def move_the_alias(home: Path) -> None:
    from mlflow.tracking import MlflowClient

    uri = Registry.open(home).place.tracking_uri
    MlflowClient(tracking_uri=uri, registry_uri=uri).delete_registered_model_alias(NAME, "prod")


def publish_the_key(home: Path) -> None:
    (home / "registry" / "keys" / "publisher.pem").chmod(0o644)


def break_the_cache(home: Path) -> None:
    path = Registry.open(home).pull(f"{NAME}@prod").path
    assert path is not None
    overwrite(path / WEIGHTS_NAME, b"short")


WRONG: dict[str, tuple[Callable[[Path], object], str, int]] = {
    "a policy that is none": (
        lambda home: (home / "registry" / "policy.toml").write_text("gates = 3"), "policy", 2
    ),
    "a key that others can read": (publish_the_key, "publisher key", 2),
    "a key that is none": (
        lambda home: (home / "registry" / "keys" / "online.pem").write_text("x"), "online key", 2
    ),
    "no pinned root": (lambda home: shutil.rmtree(home / "trust"), "trust metadata", 11),
    "changed names": (lambda home: flip(one(home, "trust/*.names.json")), "trust metadata", 13),
    "no timestamp": (lambda home: one(home, "trust/timestamp.json").unlink(), "trust metadata", 16),
    "no manifest": (lambda home: one(home, "manifests/*/*").unlink(), f"versions {NAME}:1", 11),
    "a changed manifest": (lambda home: flip(one(home, "manifests/*/*")), f"versions {NAME}:1", 13),
    "no weights": (lambda home: one(home, f"models/*/*/{WEIGHTS_NAME}").unlink(), f"versions {NAME}:1", 11),
    "short weights": (
        lambda home: overwrite(one(home, f"models/*/*/{WEIGHTS_NAME}"), b"x"), f"versions {NAME}:1", 13
    ),
    "a changed statement": (
        lambda home: flip(one(home, "statements/*/approval.*")), f"versions {NAME}:1", 13
    ),
    "a changed MLmodel": (lambda home: flip(one(home, "models/*/MLmodel")), f"versions {NAME}:1", 13),
    "an alias that somebody took away in MLflow": (move_the_alias, "index", 13),
    "no index": (lambda home: [path.unlink() for path in home.glob("**/mlflow.db")], "index", 11),
    "a log without its last row": (cut_the_log, "audit log", 13),
    "a broken cache": (break_the_cache, "cache", 13),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_found_and_has_a_mend(registry: Registry, home: Path, case: str) -> None:
    spoil, check, code = WRONG[case]
    spoil(home)
    found = examine(Registry.open(home))
    assert problems(found).get(check) == code, problems(found)
    assert exit_code(found) in problems(found).values()
    assert all(finding.mend for finding in found if finding.outcome != "ok")
    assert len([*doctor.to_do(found)]) == sum(finding.outcome != "ok" for finding in found)


def test_only_a_deep_look_finds_a_flipped_byte(registry: Registry, home: Path) -> None:
    flip(one(home, f"models/*/*/{WEIGHTS_NAME}"))
    assert problems(examine(registry)) == {}
    assert problems(examine(registry, deep=True)) == {f"versions {NAME}:1": 13}


def test_only_a_deep_look_finds_a_flipped_byte_in_the_cache(registry: Registry, home: Path) -> None:
    path = registry.pull(f"{NAME}@prod").path
    assert path is not None
    flip(path / WEIGHTS_NAME)
    assert problems(examine(registry)) == {}
    assert problems(examine(registry, deep=True)) == {"cache": 13}


def test_expired_trust_is_a_problem_only_where_nobody_can_renew_it(registry: Registry, home: Path) -> None:
    began = time.monotonic()
    examine(registry)
    ends = soon(15 + math.ceil(10 * (time.monotonic() - began)))
    resign(home, {"timestamp": lambda signed: setattr(signed, "expires", ends)})
    TrustClient(registry.store, registry.place.trust).refresh()  # it was seen while it was good
    wait_until(lambda: datetime.now(UTC) > ends)
    assert "expired" in warnings(examine(Registry.open(home)))["trust metadata"]
    shutil.rmtree(home / "registry" / "keys")
    assert problems(examine(Registry.open(home)))["trust metadata"] == 16


def soon(seconds: int) -> datetime:
    return datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=seconds)


def test_what_expires_soon_is_told(registry: Registry, home: Path) -> None:
    resign(home, {"targets": lambda signed: setattr(signed, "expires", soon(86400))})
    found = examine(Registry.open(home))
    assert "targets expires on" in warnings(found)["trust metadata"]
    assert "trust metadata" not in problems(found)
    resign(home, {"targets": expire})
    forget_trust(home)
    assert problems(examine(Registry.open(home)))["trust metadata"] == 16


def test_a_key_of_another_registry_is_told(registry: Registry, home: Path, tmp_path: Path) -> None:
    other = Registry.init(tmp_path / OTHER)
    theirs = other.keys.folder / "scanner.pem"
    mine = home / "registry" / "keys" / "scanner.pem"
    mine.unlink()
    shutil.copy2(theirs, mine)
    assert "not trusted" in warnings(examine(registry))["scanner key"]


def test_a_clock_that_differs_is_told(registry: Registry, home: Path) -> None:
    class Late(LocalObjects):
        def clock(self) -> datetime:
            return datetime.now(UTC) - timedelta(minutes=10)

    registry.store = Late(objects(home))
    assert "+600 s" in warnings(examine(registry))["clock"]


def test_leftovers_are_told_and_gc_removes_them(registry: Registry, home: Path) -> None:
    left = objects(home) / "models" / ".incoming-1"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    registry.pull(f"{NAME}@prod")
    registry.revoke(f"{NAME}:1", "it leaks")
    found = warnings(examine(registry))
    assert "unfinished writes" in found["store"]
    assert "nobody may load" in found["cache"]
    upkeep.clean(registry)
    upkeep.prune(registry)
    assert warnings(examine(registry)) == {}


def test_a_pull_that_ends_meanwhile_is_no_trouble(
    registry: Registry, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, listed = home / "cache" / "incoming" / ("0" * 64), os.listdir
    folder.mkdir(parents=True)
    (folder / WEIGHTS_NAME).write_bytes(b"half")

    def ending(path: str | os.PathLike[str]) -> list[str]:
        if Path(path) == folder:
            shutil.rmtree(folder)
        return listed(path)

    monkeypatch.setattr(os, "listdir", ending)
    assert "1 pulls that did not end" in warnings(examine(registry))["cache"]


def test_files_of_a_revoked_version_may_be_gone(registry: Registry, home: Path) -> None:
    registry.revoke(f"{NAME}:1", "it leaks")
    upkeep.clean(registry, timedelta(0), revoked=True)
    assert not [*objects(home).glob("models/*/*/*")]
    assert problems(examine(registry)) == {}


def test_a_reader_has_no_index_and_no_log(registry: Registry, home: Path, tmp_path: Path) -> None:
    registry.push(adapter_folder(tmp_path / "second", seed=1), NAME)
    mirror.export(registry, tmp_path / "a.tar", [Reference.parse(f"{NAME}:1")])
    here = site(tmp_path / "site", home)
    intake.take(here, tmp_path / "a.tar")
    before = appearance(tmp_path / "site")
    found = examine(here, deep=True)
    assert problems(found) == {}
    assert warnings(found) == {"versions": f"1 are not mirrored here, such as {NAME}:2"}
    assert appearance(tmp_path / "site") == before
