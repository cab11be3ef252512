"""Objects are whole, written once, and what their digest says; the cache keeps admitted adapters only."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.cache import AdapterCache, Parcel
from registry.digest import digest_bytes, file_entry
from registry.errors import DigestMismatch, NotFound, UsageError
from registry.manifest import CARD_NAME, WEIGHTS_NAME
from registry.storage.base import blob_key, read
from registry.storage.local import LocalObjects
from registry.transfer import download, upload


@pytest.fixture
def store(tmp_path: Path) -> LocalObjects:
    return LocalObjects(tmp_path / "objects")


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_an_object_is_written_once(store: LocalObjects) -> None:
    assert store.put("a/b", [b"one", b"two"])
    assert not store.put("a/b", [b"other"])
    assert read(store, "a/b") == b"onetwo"
    assert stat.S_IMODE(store.path("a/b").stat().st_mode) == 0o444


def test_an_interrupted_write_leaves_nothing(store: LocalObjects, tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.put("a/b", broken())
    assert not files_of(tmp_path)
    assert list(store.keys("")) == []


def test_replace_overwrites_whole(store: LocalObjects) -> None:
    store.replace("trust/timestamp.json", b"1")
    store.replace("trust/timestamp.json", b"2")
    assert read(store, "trust/timestamp.json") == b"2"
    assert list(store.keys("trust/")) == ["trust/timestamp.json"]


def test_copy_costs_no_bytes_and_never_overwrites(store: LocalObjects) -> None:
    store.put("a", [b"data"])
    assert store.copy("a", "b/c")
    assert os.path.samefile(store.path("a"), store.path("b/c"))
    assert not store.copy("a", "b/c")
    with pytest.raises(NotFound):
        store.copy("missing", "d")


def test_keys_are_listed_by_prefix_in_order(store: LocalObjects) -> None:
    for key in ("b/2", "b/1", "a/1", "b1/x"):
        store.put(key, [b""])
    assert list(store.keys("b/")) == ["b/1", "b/2"]
    assert list(store.keys("b/1")) == ["b/1"]
    assert list(store.keys("")) == ["a/1", "b/1", "b/2", "b1/x"]
    store.delete("b/1")
    store.delete("b/1")
    assert list(store.keys("b/")) == ["b/2"]


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../x", "a/../b", "a//b", ".hidden", "a/.x", "a\n", "ä", "a b"]
)
def test_a_key_cannot_leave_the_store(store: LocalObjects, key: str) -> None:
    for action in (store.open, store.delete, lambda k: store.put(k, [b""])):
        with pytest.raises(UsageError):
            action(key)


def test_a_missing_object_and_a_huge_document_are_explained(store: LocalObjects) -> None:
    with pytest.raises(NotFound, match="no object a"):
        store.open("a")
    store.put("a", [b"12345"])
    with pytest.raises(DigestMismatch, match="larger"):
        read(store, "a", limit=4)


# -- transfer --

FILES = {"a.bin": b"a" * 10_000_000, "b.bin": b"b"}
ENTRIES = tuple(file_entry(name, data) for name, data in FILES.items())


def test_up_and_down_and_nothing_sent_twice(store: LocalObjects) -> None:
    heard: list[tuple[str, int, int]] = []
    assert upload(store, FILES, ENTRIES, lambda *at: heard.append(at)) == 10_000_001
    assert upload(store, FILES, ENTRIES) == 0
    assert heard[0] == ("upload", 0, 10_000_001)
    assert heard[-1] == ("upload", 10_000_001, 10_000_001)
    heard.clear()
    assert download(store, ENTRIES, lambda *at: heard.append(at)) == FILES
    assert heard[-1] == ("download", 10_000_001, 10_000_001)


def test_bytes_that_are_not_the_entry_are_not_stored(store: LocalObjects, tmp_path: Path) -> None:
    with pytest.raises(DigestMismatch):
        upload(store, FILES | {"b.bin": b"c"}, ENTRIES[1:])
    assert not files_of(tmp_path)


@pytest.mark.parametrize("data", [b"", b"c", b"bb"])
def test_a_damaged_object_is_noticed_both_ways(store: LocalObjects, data: bytes) -> None:
    store.put(blob_key(ENTRIES[1].sha256), [data])
    with pytest.raises(DigestMismatch):
        download(store, ENTRIES[1:])
    with pytest.raises(DigestMismatch):
        upload(store, FILES, ENTRIES[1:])


# -- cache --

DIGEST = digest_bytes(b"manifest")
PARCEL = Parcel(manifest=b"manifest", files={WEIGHTS_NAME: b"weights", CARD_NAME: b"{}"})


def test_the_cache_gives_back_what_it_got(tmp_path: Path) -> None:
    cache = AdapterCache(tmp_path / "cache")
    assert cache.read(DIGEST) is None
    folder = cache.write(DIGEST, PARCEL)
    assert folder == tmp_path / "cache" / "sha256" / DIGEST.hex
    assert cache.read(DIGEST) == PARCEL
    assert {stat.S_IMODE(path.stat().st_mode) for path in files_of(folder)} == {0o444}
    cache.write(DIGEST, PARCEL)  # a second process was as fast
    assert cache.read(DIGEST) == PARCEL
    cache.drop(DIGEST)
    assert not files_of(tmp_path)


def test_an_incomplete_entry_is_none(tmp_path: Path) -> None:
    cache = AdapterCache(tmp_path)
    (cache.write(DIGEST, PARCEL) / CARD_NAME).unlink()
    assert cache.read(DIGEST) is None


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    cache = AdapterCache(tmp_path)
    bad = Parcel(manifest=b"manifest", files={WEIGHTS_NAME: b"weights", CARD_NAME: None})  # type: ignore[dict-item]
    with pytest.raises(TypeError):
        cache.write(DIGEST, bad)
    assert not files_of(tmp_path)
