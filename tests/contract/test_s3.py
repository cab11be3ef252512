"""What only a bucket has: unfinished uploads, permissions, and a server with a back door."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from registry.content import CHUNK_BYTES
from registry.errors import NetworkError, NotFound, RegistryError, UsageError
from registry.storage import multipart
from registry.storage.s3 import S3Objects
from registry.storage.wire import Patience

if TYPE_CHECKING:
    from servers.weed import Weed

DATA = b"".join(os.urandom(CHUNK_BYTES) for _ in range(3)) + b"end"


@pytest.fixture
def bucket(weed: Weed, monkeypatch: pytest.MonkeyPatch) -> str:
    act_as(weed, "publisher", monkeypatch)
    return weed.bucket()


def act_as(weed: Weed, identity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in weed.environment(identity).items():
        monkeypatch.setenv(name, value)


class Stops(Exception):
    pass


class Interrupted:
    """Content that is not there any more from its last chunk on, as for a process that dies."""

    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, where: slice, /) -> bytes:
        if where.start >= 3 * CHUNK_BYTES:
            raise Stops
        return DATA[where]


def uploads(weed: Weed, bucket: str) -> list[str]:
    return [
        found["UploadId"] for found in weed.client().list_multipart_uploads(Bucket=bucket).get("Uploads", ())
    ]


def begin(store: S3Objects) -> None:
    """Leaves an upload unfinished. An error that is none of the registry's is what a crash looks like."""
    with pytest.raises(Stops):
        store.put("big", Interrupted())


class Counting:
    """Counts what goes over the wire."""

    def __init__(self, store: S3Objects, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent = 0
        bucket = store._bucket
        send = bucket.send

        def counted(method: str, key: str, **options: object) -> object:
            if method == "PUT":
                self.sent += len(options["body"])  # type: ignore[arg-type]
            return send(method, key, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(bucket, "send", counted)


def test_only_the_missing_parts_are_sent(
    weed: Weed, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = tmp_path / "notes"
    begin(S3Objects(f"s3://{bucket}", records=notes))
    assert len(uploads(weed, bucket)) == 1
    store = S3Objects(f"s3://{bucket}", records=notes)
    counting = Counting(store, monkeypatch)
    assert store.put("big", DATA)
    assert counting.sent == len(b"end")
    assert store.read("big", 0, len(DATA)) == DATA
    assert uploads(weed, bucket) == []
    assert list(notes.iterdir()) == []


def test_an_upload_of_another_machine_is_left_alone_while_it_may_be_alive(
    weed: Weed, bucket: str, tmp_path: Path
) -> None:
    begin(S3Objects(f"s3://{bucket}", records=tmp_path / "there"))
    (alive,) = uploads(weed, bucket)
    assert S3Objects(f"s3://{bucket}", records=tmp_path / "here").put("big", DATA)
    assert uploads(weed, bucket) == [alive]


def test_an_abandoned_upload_of_another_machine_is_taken_over(
    weed: Weed, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(S3Objects(f"s3://{bucket}", records=tmp_path / "there"))
    monkeypatch.setattr(multipart, "QUIET", timedelta(seconds=-5))
    store = S3Objects(f"s3://{bucket}")
    counting = Counting(store, monkeypatch)
    assert store.put("big", DATA)
    assert counting.sent == len(b"end")
    assert uploads(weed, bucket) == []


def test_an_upload_that_somebody_cleans_up_begins_again(weed: Weed, bucket: str, tmp_path: Path) -> None:
    begin(S3Objects(f"s3://{bucket}", records=tmp_path))
    (lost,) = uploads(weed, bucket)
    weed.client().abort_multipart_upload(Bucket=bucket, Key="big", UploadId=lost)
    store = S3Objects(f"s3://{bucket}", records=tmp_path)
    assert store.put("big", DATA)
    assert store.read("big", 0, len(DATA)) == DATA


def test_a_machine_without_a_place_for_notes_can_write(weed: Weed, bucket: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    assert S3Objects(f"s3://{bucket}", records=tmp_path / "file" / "records").put("big", DATA)


def test_a_reader_can_read_and_no_more(
    weed: Weed, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    S3Objects(f"s3://{bucket}").put("a", b"1")
    act_as(weed, "reader", monkeypatch)
    store = S3Objects(f"s3://{bucket}", records=tmp_path)
    assert store.read("a", 0, 1) == b"1"
    assert list(store.keys("")) == ["a"]
    for work in (
        lambda: store.put("b", b""),
        lambda: store.put("big", DATA),
        lambda: store.replace("a", b"2", store.stat("a").tag),
        lambda: store.delete("a"),
    ):
        with pytest.raises(RegistryError, match="may not do that") as refused:
            work()
        assert refused.value.exit_code == 1
        assert refused.value.mend
    assert store.read("a", 0, 2) == b"1"


def test_a_stranger_sees_nothing(weed: Weed, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    S3Objects(f"s3://{bucket}").put("a", b"1")
    act_as(weed, "stranger", monkeypatch)
    store = S3Objects(f"s3://{bucket}")
    for work in (lambda: store.read("a", 0, 1), lambda: list(store.keys("")), lambda: store.stat("a")):
        with pytest.raises(RegistryError, match="may not do that"):
            work()


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_explained(bucket: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "wrong")
    with pytest.raises(UsageError, match="does not accept the credentials") as refused:
        S3Objects(f"s3://{bucket}").read("a", 0, 1)
    assert "AWS_ACCESS_KEY_ID" in refused.value.mend


def test_no_credentials_are_explained(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UsageError, match="no credentials"):
        S3Objects(f"s3://{bucket}").read("a", 0, 1)


def test_credentials_come_from_a_profile_too(
    weed: Weed, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "credentials"
    file.write_text(
        f"[team]\naws_access_key_id = publisher\naws_secret_access_key = {weed.secrets['publisher']}\n"
    )
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "team")
    assert S3Objects(f"s3://{bucket}").put("a", b"1")


def test_a_missing_bucket_is_named(bucket: str) -> None:
    store = S3Objects("s3://there-is-none/x")
    with pytest.raises(NotFound, match="there is no bucket there-is-none"):
        list(store.keys(""))
    with pytest.raises(NotFound, match="there is no bucket there-is-none"):
        store.put("a", b"")


def test_nobody_listens(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    store = S3Objects(f"s3://{bucket}", patience=Patience(attempts=2, pause=0.01))
    with pytest.raises(NetworkError, match=r"127\.0\.0\.1:9 failed"):
        store.stat("a")


def test_a_key_with_odd_signs_is_the_key_that_others_see(weed: Weed, bucket: str) -> None:
    store = S3Objects(f"s3://{bucket}/prefix")
    store.put("a/b.c-d_e/~f"[:9] + "f", b"1")
    names = [found["Key"] for found in weed.client().list_objects_v2(Bucket=bucket)["Contents"]]
    assert names == ["prefix/a/b.c-d_ef"]


@pytest.mark.parametrize("key", ["prefix/a b", "prefix/ä", "prefix/.hidden", "prefix/x/-y"])
def test_foreign_keys_in_the_list_are_refused(weed: Weed, bucket: str, key: str) -> None:
    weed.client().put_object(Bucket=bucket, Key=key, Body=b"")
    with pytest.raises(RegistryError, match="no key of a registry") as refused:
        list(S3Objects(f"s3://{bucket}/prefix").keys(""))
    assert refused.value.exit_code == 13


def test_the_marker_of_a_folder_is_no_key(weed: Weed, bucket: str) -> None:
    weed.client().put_object(Bucket=bucket, Key="prefix/", Body=b"")
    store = S3Objects(f"s3://{bucket}/prefix")
    store.put("a", b"")
    assert list(store.keys("")) == ["a"]


def test_the_server_behind_the_bucket_lets_nobody_in(weed: Weed, bucket: str) -> None:
    S3Objects(f"s3://{bucket}").put("a", b"1")
    for method in ("GET", "DELETE", "POST"):
        request = urllib.request.Request(f"{weed.filer}/buckets/{bucket}/a", method=method, data=b"")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=120)
        assert refused.value.code == 401
    assert S3Objects(f"s3://{bucket}").read("a", 0, 1) == b"1"


@pytest.mark.parametrize(
    "uri",
    ["s3://", "s3://B", "s3://bucket?x", "s3://bucket/../x", "s3://bucket/a b", "gs://bucket", "s3:bucket"],
)
def test_a_uri_that_is_no_bucket(uri: str) -> None:
    with pytest.raises(UsageError):
        S3Objects(uri)


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "ftp://x", "http://", "http://x:y", "http://a@b"])
def test_an_endpoint_that_is_none(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    with pytest.raises(UsageError, match="AWS_ENDPOINT_URL_S3"):
        S3Objects("s3://bucket")
