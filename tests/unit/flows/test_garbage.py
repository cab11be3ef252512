"""Maintenance without Prefect: what a clean-up takes and leaves, and trust that is renewed in time."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fakes.registries import NAME, copy_registry, objects, resign
from flows.errors import FlowError
from flows.garbage import Collected, collect
from registry.client import Registry
from registry.digest import Digest, digest_bytes
from registry.errors import DigestMismatch, NotFound, RegistryError
from registry.reference import Reference
from trainer.apis import Reply, Request, Usage
from trainer.apis.answers import Answers
from trainer.evaluation.targets import fetch
from trainer.parts import folder_of
from trainer.stage import new_folder, used

DAY = 86_400
STAGE = "runs/pixelsmile/train-0123456789abcdef"


@pytest.fixture
def registry(home: Path) -> Registry:
    return copy_registry(home)


def old(path: Path, days: float = 40) -> Path:
    """A file that nobody has touched for so long, in folders that nobody has touched either."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * 100)
    then = time.time() - days * DAY
    for one in (path, path.parent):
        os.utime(one, (then, then))
    return path


def ends_in(**time: float) -> Callable[[Any], None]:
    """A change for `resign`: the metadata ends so soon."""

    def change(signed: Any) -> None:
        signed.expires = datetime.now(UTC).replace(microsecond=0) + timedelta(**time)

    return change


def clean(**options: Any) -> list[str]:
    """The names of what was removed; nothing else may be in the table."""
    found = collected(**options)
    assert found.refusal is None
    assert found.removed == [*found.rows]
    return [row["name"] for row in found.rows]


def collected(
    *,
    dry_run: bool = False,
    run_folders: int | None = None,
    evaluations: int | None = None,
    paid_answers: int | None = None,
) -> Collected:
    return collect(
        store=True,
        adapters=True,
        grace=timedelta(hours=1),
        run_folders=None if run_folders is None else timedelta(days=run_folders),
        evaluations=None if evaluations is None else timedelta(days=evaluations),
        paid_answers=None if paid_answers is None else timedelta(days=paid_answers),
        dry_run=dry_run,
    )


def test_what_is_work_or_money_stays_unless_somebody_asks(registry: Registry, home: Path) -> None:
    picture = old(home / STAGE / "blob.png")
    answer = old(home / "apis" / "answers" / "aa" / "answer.json")
    assert clean() == []
    assert clean(run_folders=30, paid_answers=30, dry_run=True) == [STAGE, "apis/answers/aa/answer.json"]
    assert picture.exists()
    assert answer.exists()
    assert clean(run_folders=30) == [STAGE]
    assert not picture.exists()
    assert answer.exists()
    assert clean(paid_answers=30) == ["apis/answers/aa/answer.json"]
    assert not answer.exists()


def test_what_somebody_uses_or_looks_at_stays(registry: Registry, home: Path) -> None:
    old(home / STAGE / "blob.png")
    (home / STAGE / "new.png").write_bytes(b"x")
    kept = [old(home / "runs/pixelsmile/latest/run.json"), old(home / "runs/pixelsmile/notes-of-mine/a.txt")]
    outside = old(home.parent / "elsewhere" / "a.txt")
    (home / "runs" / "pixelsmile" / "train-ffffffffffffffff").symlink_to(outside.parent)
    assert clean(run_folders=30, paid_answers=30) == []
    assert all(path.exists() for path in (*kept, outside))


def test_what_evaluations_keep_goes_when_none_has_used_it_for_long(registry: Registry, home: Path) -> None:
    place = home / "evaluations" / "measured"
    key = digest_bytes(b"parts")
    parts = [folder_of(place / name, key) for name in ("2" * 32, f"probes-{'6' * 32}", "safety")]
    gone = [place / ("0" * 32), place / f"truth-{'1' * 32}", *parts, home / f"evaluations/fetched/{'5' * 64}"]
    for folder in gone:
        old(folder / "readings.parquet")
    young, mine = place / ("4" * 32), old(place / "mine" / "a.txt")
    report = old(home / "evaluations" / "pixelsmile-3" / "evaluation.json")
    old(young / "readings.parquet")
    os.utime(young)
    assert clean() == []
    assert sorted(clean(evaluations=30)) == sorted(str(folder.relative_to(home)) for folder in gone)
    assert sorted(path.name for path in place.iterdir() if path.is_dir()) == ["4" * 32, "mine"]
    assert mine.exists()
    assert report.exists()


def test_what_killed_stages_and_earlier_versions_have_left_goes(registry: Registry, home: Path) -> None:
    root, key = home / "runs" / "pixelsmile", digest_bytes(b"parts")
    gone = [folder_of(root / f"{name}-{'0' * 16}", key) for name in ("synthesise", "score", "triplets")]
    gone += [root / name for name in ("scan", "pulled", "folder")]
    with new_folder(root / "latest") as of_a_killed_run:
        gone.append(of_a_killed_run)
        for folder in gone:
            old(folder / "blobs" / "a.png")
            os.utime(folder, (time.time() - 40 * DAY,) * 2)
        assert sorted(clean(run_folders=30)) == sorted(str(folder.relative_to(home)) for folder in gone)
        of_a_killed_run.mkdir()
    assert [path.name for path in root.iterdir() if path.is_dir()] == ["latest"]


def test_probes_that_somebody_asks_are_left_to_them(registry: Registry, home: Path) -> None:
    place = home / "evaluations" / "measured" / f"probes-{'6' * 32}"
    part = old(folder_of(place, digest_bytes(b"parts")) / "part-00000.json")
    with used(place):
        assert clean(evaluations=30) == []
    assert part.exists()
    assert clean(evaluations=30) == [str(part.parent.relative_to(home))]


class Busy(threading.Thread):
    """Somebody who writes, renames and removes files in a folder until it is told to stop."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self._folder = folder
        self.begun, self.stop = threading.Event(), threading.Event()

    def run(self) -> None:
        number = 0
        while not self.stop.is_set():
            number += 1
            inside = self._folder / f"step-{number % 7}"
            inside.mkdir(exist_ok=True)
            self.begun.set()
            for name in ("a", "b", "c", "d"):
                (inside / f"{name}.tmp").write_bytes(b"x")
                (inside / f"{name}.tmp").rename(inside / name)
            shutil.rmtree(inside)


def test_a_folder_that_somebody_writes_into_is_young(registry: Registry, home: Path) -> None:
    place = home / STAGE
    busy = Busy(place)
    answer = old(home / "apis" / "answers" / "aa" / "answer.json")
    old(place / "checkpoint")
    busy.start()
    try:
        assert busy.begun.wait(120), "until then the folder is old"
        for _ in range(200):
            assert clean(run_folders=30, paid_answers=30, dry_run=True) == ["apis/answers/aa/answer.json"]
    finally:
        busy.stop.set()
        busy.join()
    assert answer.exists()


def test_what_cannot_be_removed_is_told_beside_what_was(registry: Registry, home: Path) -> None:
    keeping, gone = old(home / "runs/a/train-0123456789abcdef/x"), old(home / STAGE / "blob.png")
    (home / "runs/a/.train-0123456789abcdef.gone").write_bytes(b"a file where a folder has to go")
    found = collected(run_folders=30)
    with pytest.raises(FlowError, match=r"1 things could not be removed.*runs/a/train-\w+: Not a directory"):
        raise found.refusal or AssertionError("it was not told")
    assert [row["name"] for row in found.rows] == ["runs/a/train-0123456789abcdef", STAGE]
    assert [row["name"] for row in found.removed] == [STAGE]
    assert keeping.exists(), "all of it is still there"
    assert not gone.exists()


def test_what_a_removal_that_was_killed_has_left_goes(registry: Registry, home: Path) -> None:
    again = old(home / STAGE / "x", days=2)
    left = home / "runs/pixelsmile/.train-0123456789abcdef.gone"
    (left / "blobs").mkdir(parents=True)
    assert clean(run_folders=30) == [str(left.relative_to(home))]
    assert not left.exists()
    assert again.exists()


def test_a_registry_that_cannot_be_read_halfway_leaves_the_table(registry: Registry, home: Path) -> None:
    left = old(objects(home) / "blobs" / "blake3" / ("0" * 64))
    (home / "cache").mkdir(exist_ok=True)
    (home / "cache" / "sha256").write_bytes(b"no folder")
    found = collected(run_folders=30)
    assert [row["name"] for row in found.rows] == [f"blobs/blake3/{'0' * 64}"]
    assert not left.exists()
    with pytest.raises(RegistryError, match="cannot be read"):
        raise found.refusal or AssertionError("it was not told")


def test_a_paid_answer_that_was_used_stays(registry: Registry, home: Path) -> None:
    answers, (kept, gone) = Answers(home / "apis"), [
        Request(
            provider="openai", kind="edit", model="m", endpoint=None, content={"n": number}, expected=Usage()
        )
        for number in range(2)
    ]  # fmt: skip
    for request in (kept, gone):
        answers.put(request, Reply(body=b"picture", media_type="image/png"))
        then = time.time() - 40 * DAY
        os.utime(answers.path(request.digest), (then, then))
    assert answers.get(kept.digest) is not None
    assert clean(paid_answers=30) == [str(answers.path(gone.digest).relative_to(home))]
    assert answers.get(kept.digest) is not None


def test_a_version_that_was_compared_with_again_stays(registry: Registry, home: Path) -> None:
    place = home / "evaluations" / "fetched"
    folder = fetch(registry, Reference.parse(f"{NAME}:1"), place).folder
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (time.time() - 40 * DAY,) * 2)
    assert clean(evaluations=30, dry_run=True) == [str(folder.relative_to(home))]
    fetch(registry, Reference.parse(f"{NAME}:1"), place)
    assert clean(evaluations=30) == []


def test_what_somebody_uses_at_this_moment_stays_however_old_it_is(registry: Registry, home: Path) -> None:
    stage, other = old(home / STAGE / "x"), old(home / "runs/other/train-0123456789abcdef/x")
    bench = home / "evaluations" / "measured" / ("0" * 32)
    parts = bench.with_name(f".{bench.name}-{'1' * 16}.parts")
    measured = [old(bench / "readings.parquet"), old(parts / "0.json")]
    with used(home / "runs" / "pixelsmile"), used(home / "runs" / "pixelsmile"), used(bench):
        assert clean(run_folders=30, evaluations=30) == [str(other.parent.relative_to(home))]
    assert all(path.exists() for path in (stage, *measured))
    left = [str(path.parent.relative_to(home)) for path in (stage, measured[1], measured[0])]
    assert clean(run_folders=30, evaluations=30) == left


def test_an_object_that_nothing_signed_names_goes_after_its_time(registry: Registry, home: Path) -> None:
    left = old(objects(home) / "blobs" / "blake3" / ("0" * 64))
    young = objects(home) / "blobs" / "blake3" / ("1" * 64)
    young.write_bytes(b"x")
    assert clean() == [f"blobs/blake3/{'0' * 64}"]
    assert young.exists()
    assert not left.exists()
    assert registry.verify(f"{NAME}@prod").reference == f"{NAME}:1"


def test_trust_is_renewed_long_before_it_ends(registry: Registry, home: Path) -> None:
    from flows.maintenance import _renew

    before = registry.authority.state().version("timestamp")
    rows = {row["metadata"]: row for row in _renew()}
    assert registry.authority.client.refresh().version("timestamp") == before, "it was young"
    assert rows["timestamp"]["by"] == "online"
    assert rows["root"]["left_hours"] > 24 * 300

    resign(home, {"timestamp": ends_in(hours=13)})
    assert {row["metadata"]: row for row in _renew()}["timestamp"]["left_hours"] > 20


def test_a_worker_without_the_online_key_says_so_before_everything_ends(
    registry: Registry, home: Path
) -> None:
    from flows.maintenance import _refuse_late, _renew

    _refuse_late(_renew())  # the timestamp lives a day, and is renewed here
    for key in registry.place.keys.glob("*.pem"):
        key.unlink()
    with pytest.raises(FlowError, match=r"ends soon.*timestamp on") as caught:
        _refuse_late(_renew())
    assert "ADAPTER_FOUNDRY_KEYS" in caught.value.mend


def test_names_that_end_soon_are_renewed_with_the_keys_that_are_here(registry: Registry, home: Path) -> None:
    from flows.maintenance import _renew

    resign(home, {"targets": ends_in(hours=100)})
    rows = {row["metadata"]: row for row in _renew()}
    assert rows["targets"]["left_hours"] > 24 * 80
    assert [row.reference for row in registry.list() if row.aliases] == [f"{NAME}:1"]


@pytest.mark.parametrize("role", ["targets", "names"])
def test_a_renewal_without_the_key_for_it_is_no_line_of_the_log(
    registry: Registry, home: Path, role: str
) -> None:
    """The keys that sign for long are elsewhere; the online key of this machine cannot stand in for them."""
    from flows.maintenance import _renew

    resign(home, {role: ends_in(days=20)})
    for key in registry.place.keys.glob("*.pem"):
        if key.stem != "online":
            key.unlink()
    log = registry.ledger.head().length
    assert {row["metadata"]: row for row in _renew()}[role]["left_hours"] < 24 * 21
    assert registry.ledger.head().length == log
    assert registry.authority.state().version("timestamp"), "readers accept it all the same"


def test_what_was_promoted_is_verified_and_fetched(registry: Registry, home: Path) -> None:
    from flows.maintenance import _verify

    told = _verify(f"{NAME}@prod")
    assert told["version"] == f"{NAME}:1"
    assert (home / "cache" / "sha256" / Digest(told["digest"]).hex).is_dir()
    with pytest.raises(NotFound):
        _verify(f"{NAME}@canary")
    (weights,) = (home / "registry" / "objects").glob("models/*/adapter_weights/*")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.unlink()
    weights.write_bytes(bytes(data))
    with pytest.raises(DigestMismatch):
        _verify(f"{NAME}@prod")
