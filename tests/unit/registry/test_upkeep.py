"""Clean-up: what a signed name needs stays, whatever happened before and whatever happens meanwhile."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fakes.adapters import card
from fakes.archives import site
from fakes.registries import BASE, NAME, adapter_folder, copy_registry, objects, one
from registry import intake, mirror, upkeep
from registry.client import Registry
from registry.digest import file_entry
from registry.errors import Conflict, DigestMismatch, NotFound
from registry.manifest import CARD_NAME, WEIGHTS_NAME, AdapterCard, AdapterManifest, canonical_json
from registry.reference import Reference
from registry.storage import shelf
from registry.storage.base import file_key, manifest_key, model_prefix
from registry.storage.local import LocalObjects
from registry.storage.mlmodel import write_model

#: Every example is a whole registry; making a failing one smaller would take minutes.
SLOW = settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)
NOW = timedelta(0)
DAY = timedelta(days=1)


def make_old(home: Path) -> None:
    """Everything in the store was written two days ago."""
    then = time.time() - 2 * 86400
    for path in objects(home).rglob("*"):
        if path.is_file():
            os.utime(path, (then, then))


def keys(home: Path) -> set[str]:
    """What a clean-up may look at."""
    store = LocalObjects(objects(home))
    return {key for prefix in upkeep.SWEPT for key in store.keys(prefix)}


@pytest.fixture
def registry(home: Path) -> Registry:
    return copy_registry(home)


# -- a push, step by step, without the parts that a clean-up does not see --


def draft(content: int, number: int) -> tuple[AdapterManifest, dict[str, bytes]]:
    """A version and its files; the same content is the same files under any number."""
    files = {
        CARD_NAME: canonical_json(card(BASE)) + b" " * content,
        WEIGHTS_NAME: b"weights %d" % content,
    }
    entries = tuple(file_entry(path, data) for path, data in files.items())
    parsed = AdapterCard.parse(files[CARD_NAME])
    return AdapterManifest.make(parsed, name=NAME, version=number, files=entries), files


def push(registry: Registry, content: int, number: int) -> Iterator[str]:
    """What a push does, a step at a time, in its order; it looks at its end whether all of it is there."""
    manifest, files = draft(content, number)

    def write() -> Iterator[str]:
        for entry in manifest.files:
            registry.store.put(file_key(entry), files[entry.path])
            yield f"file {entry.path}"
        shelf.put_manifest(registry.store, manifest)
        yield "manifest"
        shelf.put_statement(registry.store, manifest.digest, "training", b"statement %d" % number)
        yield "statement"
        write_model(registry.store, manifest)
        yield "model"

    yield from write()
    size = len(manifest.canonical_bytes())
    registry.authority.add_version(f"{NAME}:{number}", manifest.digest, size, {})
    yield "signed"
    for _ in write():
        pass


def run(steps: Iterator[str], count: int | None = None) -> None:
    for _ in steps:
        if count is not None:
            count -= 1
            if count <= 0:
                return


def needed(registry: Registry, *, revoked: bool = True) -> set[str]:
    """The objects without which a signed version is broken."""
    state, found = registry.authority.state(), set()
    for target in state.versions().values():
        manifest = shelf.read_manifest(registry.store, target.digest)
        found.add(manifest_key(target.digest))
        found |= set(registry.store.keys(f"statements/{target.digest.hex}/"))
        if revoked or not state.is_revoked(target.digest):
            found |= {file_key(entry) for entry in manifest.files}
            found.add(f"{model_prefix(manifest.file(WEIGHTS_NAME))}MLmodel")
    return found


class Interleaved(LocalObjects):
    """A store in which somebody else takes a step whenever it is asked for something."""

    def __init__(self, folder: Path, step: Callable[[], object]) -> None:
        super().__init__(folder)
        self._step, self._turn = step, threading.Lock()

    def _meanwhile(self, key: str) -> None:
        # While trust metadata is read, this machine's lock keeps others from doing the same.
        if key.startswith(upkeep.SWEPT) and self._turn.acquire(blocking=False):
            try:
                self._step()
            finally:
                self._turn.release()

    def stat(self, key: str) -> Any:
        self._meanwhile(key)
        return super().stat(key)

    def read(self, key: str, start: int, stop: int) -> bytes:
        self._meanwhile(key)
        return super().read(key, start, stop)

    def keys(self, prefix: str) -> Iterator[str]:
        self._meanwhile(prefix)
        return super().keys(prefix)

    def delete(self, key: str) -> None:
        self._meanwhile(key)
        super().delete(key)


EVENTS = st.one_of(
    st.tuples(st.just("push"), st.integers(0, 3)),
    st.tuples(st.just("killed push"), st.integers(0, 3), st.integers(1, 5)),
    st.tuples(st.just("alias"), st.integers(0, 9)),
    st.tuples(st.just("revoke"), st.integers(0, 9)),
    st.tuples(st.just("yank"), st.integers(0, 9)),
    st.tuples(st.just("time passes")),
    st.tuples(st.just("gc"), st.sampled_from([NOW, DAY]), st.booleans()),
)


@SLOW
@given(st.lists(EVENTS, min_size=3, max_size=9))
def test_no_history_makes_a_clean_up_remove_what_is_named(history: list[tuple[Any, ...]]) -> None:
    home = Path(tempfile.mkdtemp())
    try:
        registry, number, withdrawn = copy_registry(home), 1, False
        for event, *details in [*history, ("time passes",), ("gc", DAY, False)]:
            if event in ("push", "killed push"):
                number += 1
                run(push(registry, details[0], number), details[1] if event == "killed push" else None)
            elif event == "time passes":
                make_old(home)
            elif event == "gc":
                whole = not (details[1] or withdrawn)
                before = needed(registry, revoked=whole)
                upkeep.clean(registry, details[0], revoked=details[1])
                withdrawn = withdrawn or details[1]
                assert before <= keys(home)
            else:
                versions = list(registry.authority.state().versions().values())
                target = versions[details[0] % len(versions)]
                if event == "alias":
                    at = registry.authority.state().aliases().get(f"{NAME}@test")
                    expected = None if at is None else at.digest
                    registry.authority.set_alias(f"{NAME}@test", target.digest, 1, {}, expected)
                elif event == "revoke":
                    registry.authority.revoke(target.digest, "for a test")
                else:
                    registry.authority.yank(target.digest, "for a test")
        # Nothing that is old and not named is left, either.
        assert keys(home) == needed(registry) & keys(home)
    finally:
        shutil.rmtree(home)


@SLOW
@given(
    content=st.integers(1, 2),
    begun=st.integers(0, 6),
    wait=st.integers(0, 12),
    grace=st.sampled_from([NOW, DAY]),
)
def test_a_push_at_the_same_time_survives(content: int, begun: int, wait: int, grace: timedelta) -> None:
    """It takes up old objects that nobody named, and goes on while everything is marked and swept."""
    home = Path(tempfile.mkdtemp())
    try:
        publisher = copy_registry(home)
        run(push(publisher, 1, 2), 5)  # killed long ago
        make_old(home)
        steps, waiting = push(publisher, content, 2), iter(range(wait))
        run(steps, begun) if begun else None

        def step() -> None:
            if next(waiting, None) is None:
                next(steps, None)

        cleaner = Registry.open(home)
        cleaner.store = Interleaved(objects(home), step)
        try:
            upkeep.clean(cleaner, grace)
        except Conflict:  # the push looked just before the sweep; it is told, and the same push heals
            run(push(publisher, content, 2))
        run(steps)
        assert needed(publisher) <= keys(home)
        assert f"{NAME}:2" in publisher.authority.state().versions()
    finally:
        shutil.rmtree(home)


def test_a_name_that_is_signed_while_the_store_is_marked_keeps_its_objects(
    registry: Registry, home: Path
) -> None:
    """Without the second look at the signed names, these old objects would be swept."""
    steps = push(registry, 1, 2)
    run(steps, 5)
    make_old(home)
    cleaner, asked = Registry.open(home), iter(range(7))

    def sign_late() -> None:
        if next(asked, None) == 6:
            next(steps)

    cleaner.store = Interleaved(objects(home), sign_late)
    found = upkeep.clean(cleaner)
    assert next(asked, None) is None, "the name was signed while the clean-up was running"
    assert found.objects == ()
    assert needed(registry) <= keys(home)


@pytest.mark.parametrize("kind", ["MLmodel", "manifests/"])
def test_an_object_that_is_taken_up_while_it_is_swept_is_told(
    registry: Registry, home: Path, kind: str
) -> None:
    """The push signs and looks right before its object is removed: the worst moment there is."""
    run(push(registry, 1, 2), 5)
    make_old(home)

    class Unlucky(LocalObjects):
        def delete(self, key: str) -> None:
            if kind in key:
                run(push(registry, 1, 2))
            super().delete(key)

    cleaner = Registry.open(home)
    cleaner.store = Unlucky(objects(home))
    with pytest.raises(Conflict, match="while it was swept"):
        upkeep.clean(cleaner)
    run(push(registry, 1, 2))
    assert needed(registry) <= keys(home)
    assert f"{NAME}:2" in registry.authority.state().versions()


# -- one thing at a time --


def test_a_registry_that_was_only_used_has_no_garbage(registry: Registry, home: Path) -> None:
    make_old(home)
    before = keys(home)
    found = upkeep.clean(registry)
    assert (found.objects, found.unfinished, found.reachable, found.young) == ((), (), len(before), 0)
    assert keys(home) == before


def test_young_objects_stay_and_old_ones_go(registry: Registry, home: Path) -> None:
    run(push(registry, 1, 2), 5)
    young = upkeep.clean(registry)
    assert (young.objects, young.young) == ((), 5)
    make_old(home)
    looked = upkeep.clean(registry, dry_run=True)
    assert (len(looked.objects), looked.dry_run) == (5, True)
    manifest, files = draft(1, 2)
    assert manifest_key(manifest.digest) in {found.key for found in looked.objects}
    assert {found.size for found in looked.objects} >= {len(data) for data in files.values()}
    rows = registry.ledger.head().length
    assert upkeep.clean(registry).objects == looked.objects
    assert manifest_key(manifest.digest) not in keys(home)
    (row,) = registry.ledger.entries(after=rows)
    assert (row.action, '"objects":5' in row.details) == ("gc", True)
    registry.ledger.verify(None)


def test_trust_and_foreign_objects_are_not_looked_at(registry: Registry, home: Path) -> None:
    registry.store.put("notes/mine", b"mine")
    registry.store.put("trust/99.targets.json", b"left by an interrupted publish")
    make_old(home)
    assert upkeep.clean(registry, NOW).objects == ()
    assert {"notes/mine", "trust/99.targets.json"} <= {*registry.store.keys("")}


def test_killed_writes_are_removed(registry: Registry, home: Path) -> None:
    left = objects(home) / "models" / "abc" / ".incoming-x1"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    assert upkeep.clean(registry).unfinished == ()
    make_old(home)
    assert [(found.key, found.size) for found in upkeep.clean(registry).unfinished] == [
        ("models/abc/.incoming-x1", 4)
    ]
    assert not left.exists()


@pytest.mark.parametrize("revoked", [False, True])
def test_files_of_revoked_versions_go_only_on_demand(
    registry: Registry, home: Path, tmp_path: Path, revoked: bool
) -> None:
    registry.push(adapter_folder(tmp_path / "second", seed=1), NAME)
    weights = {version: registry.show(f"{NAME}:{version}").manifest for version in (1, 2)}
    registry.yank(f"{NAME}:1", "there is a better one")
    registry.revoke(f"{NAME}:2", "it leaks")
    make_old(home)
    removed = {found.key for found in upkeep.clean(registry, revoked=revoked).objects}
    prefix = model_prefix(weights[2].file(WEIGHTS_NAME))
    assert removed == (set() if not revoked else {f"{prefix}MLmodel", file_key(weights[2].files[1])})
    assert registry.verify(f"{NAME}:1").manifest.version == 1, "the card that both have stays, too"
    assert registry.show(f"{NAME}:2").listed.revoked == "it leaks"


def test_a_missing_or_changed_manifest_stops_everything(registry: Registry, home: Path) -> None:
    run(push(registry, 1, 2), 5)
    make_old(home)
    path = one(home, f"manifests/sha256/{registry.authority.state().aliases()[f'{NAME}@prod'].digest.hex}")
    before = keys(home)
    data = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(data[:-1] + b" ")
    with pytest.raises(DigestMismatch, match="not known what a signed version needs"):
        upkeep.clean(registry, NOW)
    path.unlink()
    with pytest.raises(NotFound, match="not known what a signed version needs"):
        upkeep.clean(registry, NOW)
    assert keys(home) == before - {path.relative_to(objects(home)).as_posix()}


# -- the cache --


def test_the_cache_keeps_what_is_named_and_not_revoked(
    registry: Registry, home: Path, tmp_path: Path
) -> None:
    digest = registry.pull(f"{NAME}@prod").digest
    assert upkeep.prune(registry).removed == {}
    foreign = home / "cache" / "sha256" / ("0" * 64)
    foreign.mkdir()
    (foreign / WEIGHTS_NAME).write_bytes(b"12345")
    assert upkeep.prune(registry, dry_run=True).removed == {"sha256:" + "0" * 64: 5}
    assert foreign.exists()
    found = upkeep.prune(registry)
    assert (found.removed, found.size) == ({"sha256:" + "0" * 64: 5}, 5)
    assert not foreign.exists()
    registry.revoke(f"{NAME}:1", "it leaks")
    assert [*upkeep.prune(registry).removed] == [str(digest)]
    assert not (home / "cache" / "sha256" / digest.hex).exists()


def test_the_oldest_go_when_there_is_too_much(registry: Registry, home: Path, tmp_path: Path) -> None:
    registry.push(adapter_folder(tmp_path / "second", seed=1), NAME, evaluation={"verdict": "pass"})
    registry.approve(f"{NAME}:2", "a person", "better")
    old, new = registry.pull(f"{NAME}:1").digest, registry.pull(f"{NAME}:2").digest
    then = time.time() - 1000
    os.utime(home / "cache" / "receipts" / f"{old.hex}.json", (then, then))
    size = upkeep.prune(registry, keep=1 << 30).kept
    found = upkeep.prune(registry, keep=size - 1)
    assert [*found.removed] == [str(old)]
    assert found.kept + found.size == size
    assert registry.pull(f"{NAME}:2").fetched_bytes == 0
    assert [*upkeep.prune(registry, keep=0).removed] == [str(new)]


def test_leftovers_of_pulls_go_unless_somebody_is_pulling(registry: Registry, home: Path) -> None:
    from registry.cache import AdapterCache

    digest = registry.authority.state().aliases()[f"{NAME}@prod"].digest
    cache = AdapterCache(home / "cache")
    with cache.incoming(digest) as folder:
        (folder / f"{WEIGHTS_NAME}.part").write_bytes(b"half")
        then = (datetime.now(UTC) - 2 * DAY).timestamp()
        for path in (folder / f"{WEIGHTS_NAME}.part", folder):
            os.utime(path, (then, then))
        assert upkeep.prune(registry).removed == {}, "it is locked"
    assert upkeep.prune(registry, grace=3 * DAY).removed == {}
    assert upkeep.prune(registry).removed == {f"incoming {digest}": 4}
    assert not folder.exists()


@pytest.mark.parametrize("what", ["file", "folder"])
@pytest.mark.parametrize("when", ["before it is looked at", "after it was looked at"])
@pytest.mark.parametrize("place", ["incoming", "sha256"])
def test_what_a_pull_moves_away_meanwhile_is_no_trouble(
    registry: Registry, home: Path, monkeypatch: pytest.MonkeyPatch, place: str, when: str, what: str
) -> None:
    folder = home / "cache" / place / ("0" * 64)
    folder.mkdir(parents=True)
    file = folder / WEIGHTS_NAME
    file.write_bytes(b"12345")

    def moving(look: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def moved(path: object, *options: Any, **more: Any) -> os.stat_result:
            gone = path == str(file) or path == file
            if gone and when == "before it is looked at":
                shutil.rmtree(folder) if what == "folder" else file.unlink()
            found = look(path, *options, **more)
            if gone and when == "after it was looked at":
                shutil.rmtree(folder) if what == "folder" else file.unlink()
            return found

        return moved

    monkeypatch.setattr(os, "lstat", moving(os.lstat))
    monkeypatch.setattr(os, "stat", moving(os.stat))
    upkeep.prune(registry)
    monkeypatch.undo()
    assert not file.exists()


def test_a_mirror_of_some_versions_is_cleaned_up_on_demand(
    registry: Registry, home: Path, tmp_path: Path
) -> None:
    """What is not mirrored cannot be told from what is lost, so somebody has to say it."""
    registry.push(adapter_folder(tmp_path / "second", seed=1), NAME)
    mirror.export(registry, tmp_path / "a.tar", [Reference.parse(f"{NAME}:1")])
    here = site(tmp_path / "site", home)
    intake.take(here, tmp_path / "a.tar")
    here.store.put("blobs/blake3/old", b"left behind")
    make_old(here.place.home)
    with pytest.raises(NotFound, match="not known what a signed version needs"):
        upkeep.clean(here)
    assert [found.key for found in upkeep.clean(here, partial=True).objects] == ["blobs/blake3/old"]
    assert here.pull(f"{NAME}:1").reference == f"{NAME}:1"
    assert here.ledger.head().length == 0, "the log belongs to whoever signs"
