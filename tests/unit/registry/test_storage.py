"""What only the store in a folder has; the rest is in tests/contract/test_object_store.py."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from registry.errors import RegistryError, UsageError
from registry.storage.local import LocalObjects
from registry.storage.s3 import S3Objects
from registry.storage.stores import open_store


@pytest.fixture
def store(tmp_path: Path) -> LocalObjects:
    return LocalObjects(tmp_path / "objects")


def test_an_object_is_a_read_only_file(store: LocalObjects) -> None:
    store.put("a/b", b"data")
    assert store.path("a/b").read_bytes() == b"data"
    assert stat.S_IMODE(store.path("a/b").stat().st_mode) == 0o444


def test_an_interrupted_write_leaves_no_file(store: LocalObjects, tmp_path: Path) -> None:
    class Broken:
        def __len__(self) -> int:
            return 10

        def __getitem__(self, where: slice, /) -> bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.put("a/b", Broken())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_symbolic_link_is_no_object(store: LocalObjects, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    store.put("a", b"")
    os.symlink(secret, store.path("b"))
    with pytest.raises(RegistryError, match="symbolic link"):
        store.read("b", 0, 6)


def test_a_folder_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RegistryError, match="cannot be written") as refused:
        LocalObjects(tmp_path / "file" / "objects").put("a", b"")
    assert refused.value.mend


def test_a_uri_opens_its_store(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    assert isinstance(open_store(folder.as_uri()), LocalObjects)
    assert open_store(folder.as_uri()).uri == folder.as_uri()
    bucket = open_store("s3://bucket/some/prefix/")
    assert isinstance(bucket, S3Objects)
    assert bucket.uri == "s3://bucket/some/prefix"


@pytest.mark.parametrize(
    ("uri", "hint"),
    [
        ("S3s://bucket", "did you mean s3://"),
        ("files:///x", "did you mean file:///"),
        ("gs://bucket/x", "write file:///"),
        ("/srv/adapters", "write file:///"),
        ("file://host/x", "file:///srv/adapters"),
        ("file:relative", "file:///srv/adapters"),
        ("", "write file:///"),
    ],
)
def test_another_uri_is_told_the_nearest_right_one(uri: str, hint: str) -> None:
    with pytest.raises(UsageError) as refused:
        open_store(uri)
    assert hint in refused.value.mend
