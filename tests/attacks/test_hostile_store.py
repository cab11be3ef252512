"""A store that is slow, broken or hostile: all ends in time, in little memory and with its exit code."""

from __future__ import annotations

import itertools
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fakes import hostile_http as http
from registry.content import CHUNK_BYTES
from registry.digest import FileEntry, file_entry
from registry.errors import DigestMismatch, NetworkError, NotFound, RegistryError, UsageError
from registry.storage import s3
from registry.storage.base import file_key, read
from registry.storage.s3 import S3Objects
from registry.storage.wire import Patience
from registry.transfer import download, fetch, publish

NAME = "adapter.json"
DATA = b"0123456789" * 100
BIG = b"1" * CHUNK_BYTES + b"2" * CHUNK_BYTES + b"the end"
#: An honest answer may take long, as on a machine that is busy, and a request three attempts.
PATIENCE = Patience(answer=30.0, attempts=3, pause=0.01, longest_pause=0.5)
#: For servers that never answer well.
HASTE = Patience(answer=0.5, rate=64 << 20, attempts=3, pause=0.01, longest_pause=0.5)
#: Less than these servers take where nobody gives them up: they hang for a minute an attempt.
SECONDS = 60


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[http.HostileS3]:
    import botocore.auth  # noqa: F401 - its import is not what the tests measure

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something")
    with http.running() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
        yield server


@pytest.fixture
def store(server: http.HostileS3) -> S3Objects:
    return S3Objects("s3://bucket", patience=PATIENCE)


@pytest.fixture
def hasty(server: http.HostileS3) -> S3Objects:
    return S3Objects("s3://bucket", patience=HASTE)


@contextmanager
def bounded(megabytes: float = 4) -> Iterator[None]:
    """The block takes neither long nor much memory."""
    tracemalloc.start()
    begun = time.monotonic()
    try:
        yield
    finally:
        seconds = time.monotonic() - begun
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert seconds < SECONDS
    assert peak < megabytes * 1e6


def serve(server: http.HostileS3, data: bytes, name: str = NAME) -> FileEntry:
    entry = file_entry(name, data)
    server.objects[f"bucket/{file_key(entry)}"] = data
    return entry


UNREACHABLE = {
    "500": http.status(500),
    "502": http.status(502),
    "503": http.status(503, b"<Error><Code>SlowDown</Code></Error>"),
    "429": http.status(429),
    "429 for an hour": http.status(429, Retry_After="3600"),
    "half a body": http.half,
    "a body that drips": http.dripping_body,
    "headers that drip": http.dripping_headers,
    "endless headers": http.endless_headers,
    "endless continue": http.endless_continue,
    "no answer": http.hang,
    "a cut connection": http.reset,
    "no http": http.garbage,
    "another range": http.status(206, DATA, Content_Range="bytes 5-1004/2000"),
    "no range": http.status(206, DATA),
}


@pytest.mark.parametrize("fault", UNREACHABLE.values(), ids=UNREACHABLE)
def test_a_read_from_a_broken_store_ends_as_a_network_error(
    server: http.HostileS3, hasty: S3Objects, fault: http.Fault
) -> None:
    entry = serve(server, DATA)
    server.misbehave(fault)
    with bounded(), pytest.raises(NetworkError) as failed:
        fetch(hasty, entry)
    assert failed.value.exit_code == 20
    assert failed.value.mend


@pytest.mark.parametrize("fault", UNREACHABLE.values(), ids=UNREACHABLE)
def test_a_write_to_a_broken_store_ends_in_time(
    server: http.HostileS3, hasty: S3Objects, fault: http.Fault
) -> None:
    server.misbehave(fault)
    with bounded(), pytest.raises(RegistryError) as failed:
        hasty.put("key", DATA)
    assert failed.value.exit_code in (1, 20)


PASSING = {
    "500": http.status(500),
    "503": http.status(503),
    "429 for a moment": http.status(429, Retry_After="0.2"),
    "half a body": http.half,
    "a cut connection": http.reset,
    "no http": http.garbage,
    "no answer": http.hang,
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_what_passes_is_tried_again(server: http.HostileS3, fault: http.Fault) -> None:
    # What never answers is waited for to the end, twice; everything else may take its time.
    patience = replace(PATIENCE, answer=15.0) if fault is http.hang else PATIENCE
    store = S3Objects("s3://bucket", patience=patience)
    entry = serve(server, DATA)
    server.misbehave(fault, times=2)
    assert fetch(store, entry) == DATA
    assert len(server.requests) == 3


def test_the_server_is_given_the_time_that_it_asks_for(server: http.HostileS3, store: S3Objects) -> None:
    entry = serve(server, DATA)
    server.misbehave(http.status(503, Retry_After="0.4"), times=1)
    begun = time.monotonic()
    assert fetch(store, entry) == DATA
    assert time.monotonic() - begun >= 0.4


def test_a_connection_is_kept_and_a_bad_one_is_not(server: http.HostileS3, store: S3Objects) -> None:
    entry = serve(server, DATA)
    for number in range(3):
        assert store.put("a", b"1") is (number == 0)
        assert fetch(store, entry) == DATA
        assert store.stat("a").size == 1
        assert len(list(store.keys(""))) == 2
        store.delete("b")
    assert server.connections == 1
    server.misbehave(http.half, times=1)
    assert fetch(store, entry) == DATA
    assert server.connections == 2


def test_an_endless_body_is_cut_where_the_range_ends(server: http.HostileS3, store: S3Objects) -> None:
    server.misbehave(http.endless)
    with bounded():
        assert store.read("key", 0, 1000) == b"y" * 1000
    entry = file_entry(NAME, DATA)
    with bounded(), pytest.raises(DigestMismatch) as refused:
        fetch(store, entry)
    assert refused.value.exit_code == 13


def test_an_endless_refusal_is_read_only_to_its_beginning(server: http.HostileS3, store: S3Objects) -> None:
    server.misbehave(http.endless_error)
    for work in (
        lambda: store.read("key", 0, 10),
        lambda: store.put("key", DATA),
        lambda: list(store.keys("")),
    ):
        with bounded(), pytest.raises(RegistryError, match="may not do that"):
            work()


def test_an_endless_list_is_refused(server: http.HostileS3, store: S3Objects) -> None:
    server.misbehave(http.endless, times=1)
    with bounded(megabytes=20), pytest.raises(RegistryError):
        list(store.keys(""))
    server.misbehave(http.status(200, http.listing(["a", "b"], token="more")))
    with bounded(), pytest.raises(DigestMismatch, match="does not end"):
        list(store.keys(""))


def test_a_list_of_ever_new_keys_is_refused(
    server: http.HostileS3, store: S3Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = itertools.count()

    def page(handler: http.Handler) -> None:
        keys = [f"key-{next(numbers):06}" for _ in range(100)]
        handler.send(200, http.listing(keys, token="more"))

    server.misbehave(page)
    monkeypatch.setattr(s3, "MAX_LIST_CHARACTERS", 10_000)
    with bounded(), pytest.raises(DigestMismatch, match="does not end"):
        list(store.keys(""))
    assert next(numbers) <= 1_100
    monkeypatch.setattr(s3, "MAX_LIST_CHARACTERS", 1 << 40)
    monkeypatch.setattr(s3, "MAX_LIST_SECONDS", 0.3)
    with bounded(megabytes=100), pytest.raises(DigestMismatch, match="does not end"):
        list(store.keys(""))


@pytest.mark.parametrize(
    "key",
    ["../../etc/passwd", "/etc/passwd", "a/../../b", "elsewhere", "statements/x/../../trust", "a\x1b[2J"],
)
def test_a_list_names_nothing_outside(server: http.HostileS3, key: str) -> None:
    store = S3Objects("s3://bucket/registry", patience=PATIENCE)
    for named in (key, f"registry/{key}") if key != "elsewhere" else (key,):
        server.misbehave(http.status(200, http.listing([named])), times=1)
        with pytest.raises(DigestMismatch) as refused:
            list(store.keys(""))
        assert "\x1b" not in str(refused.value)


def test_a_list_names_nothing_of_another_prefix(server: http.HostileS3, store: S3Objects) -> None:
    server.misbehave(http.status(200, http.listing(["statements/of-another/x"])))
    with pytest.raises(DigestMismatch, match="no key of a registry"):
        list(store.keys("statements/of-this/"))


BOMB = b"""<!DOCTYPE r [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">
<!ENTITY x SYSTEM "file:///etc/passwd">]><R><Contents><Key>&b;&x;</Key></Contents></R>"""


ENTITY = b'<!DOCTYPE r [<!ENTITY a "trust">]><R><Contents><Key>&a;</Key></Contents></R>'


@pytest.mark.parametrize("answer", [BOMB, ENTITY, b"<R>", b"", b"\xff\xfe", b"<R>" + b"<a>" * 100_000])
def test_a_list_that_is_no_list_is_refused(server: http.HostileS3, store: S3Objects, answer: bytes) -> None:
    server.misbehave(http.status(200, answer))
    with bounded(megabytes=40), pytest.raises(NetworkError, match="cannot be read"):
        list(store.keys(""))


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(server: http.HostileS3, store: S3Objects, code: int) -> None:
    with http.running() as elsewhere:
        server.misbehave(
            http.status(code, Location=f"{elsewhere.endpoint}/bucket/key", X_Amz_Bucket_Region="eu-north-1")
        )
        with pytest.raises(UsageError, match="eu-north-1"):
            store.read("key", 0, 10)
        with pytest.raises(UsageError, match="not followed"):
            store.put("key", DATA)
        assert elsewhere.requests == []  # above all not with our signature


def test_a_refusal_cannot_write_on_the_terminal(server: http.HostileS3, store: S3Objects) -> None:
    server.misbehave(
        http.status(403, "<Error><Code>\u202eevil\u001b</Code></Error>".encode("utf-8", "replace"))
    )
    server.misbehave(http.status(403, b"<Error><Code>::set-output name=x::\xe2\x80\xaey</Code></Error>"))
    with pytest.raises(RegistryError) as refused:
        store.read("key", 0, 1)
    assert str(refused.value).isascii()
    assert "::" not in str(refused.value)


# -- wrong bytes --


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


WRONG: dict[str, Callable[[bytes], bytes]] = {
    "first byte": lambda data: flipped(data, 0),
    "a byte of the second chunk": lambda data: flipped(data, CHUNK_BYTES + 5),
    "last byte": lambda data: flipped(data, len(data) - 1),
    "a byte less": lambda data: data[:-1],
    "a byte more": lambda data: data + b"x",
    "a chunk less": lambda data: data[:CHUNK_BYTES],
    "nothing": lambda data: b"",
    "chunks in another order": lambda data: data[CHUNK_BYTES:-7] + data[:CHUNK_BYTES] + data[-7:],
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_wrong_bytes_never_get_the_name_of_the_file(
    server: http.HostileS3, store: S3Objects, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    entry = serve(server, BIG)
    server.misbehave(http.altered(change), method="GET")
    with pytest.raises(DigestMismatch) as refused:
        download(store, [entry], tmp_path)
    assert refused.value.exit_code == 13
    assert NAME in str(refused.value)
    assert not (tmp_path / NAME).exists()


def test_a_chunk_that_was_damaged_on_its_way_is_fetched_once_more(
    server: http.HostileS3, store: S3Objects, tmp_path: Path
) -> None:
    entry = serve(server, BIG)
    server.misbehave(http.altered(lambda data: bytes(len(data))), times=1)
    download(store, [entry], tmp_path)
    assert (tmp_path / NAME).read_bytes() == BIG
    assert len(server.requests) == len(entry.chunks) + 1


# -- writing --


def test_a_write_that_was_done_before_the_cut_is_known_to_be_done(
    server: http.HostileS3, store: S3Objects
) -> None:
    server.misbehave(http.done_and_reset, times=1)
    assert store.put("key", DATA)
    assert server.objects["bucket/key"] == DATA
    assert not store.put("key", DATA)


def test_a_part_with_a_wrong_tag_is_no_object(server: http.HostileS3, store: S3Objects) -> None:
    server.misbehave(http.status(200, ETag='"0123"'), times=1, method="PUT")
    with bounded(megabytes=60), pytest.raises(RegistryError):
        publish(store, {NAME: BIG})
    assert server.objects == {}


def test_an_upload_that_fails_at_its_end_has_failed(server: http.HostileS3, store: S3Objects) -> None:
    server.misbehave(http.status(200, b"<R><UploadId>upload-0</UploadId></R>"), times=1, method="POST")
    server.uploads["upload-0"] = {}
    server.misbehave(http.status(200, b"<Error><Code>InternalError</Code></Error>"), method="POST")
    with pytest.raises(NetworkError, match="InternalError"):
        publish(store, {NAME: BIG})


def test_a_server_that_does_not_read_is_given_up(server: http.HostileS3, hasty: S3Objects) -> None:
    server.misbehave(http.deaf, method="PUT")
    with bounded(megabytes=80), pytest.raises(NetworkError):
        publish(hasty, {NAME: BIG})


def test_a_store_that_lies_about_having_it_is_found_out(server: http.HostileS3, store: S3Objects) -> None:
    entry = file_entry(NAME, DATA)
    server.objects[f"bucket/{file_key(entry)}"] = DATA[:-1]
    with pytest.raises(DigestMismatch, match="999 bytes"):
        publish(store, {NAME: DATA})


def test_a_store_without_conditional_writes_is_refused(server: http.HostileS3, store: S3Objects) -> None:
    server.misbehave(http.status(501, b"<Error><Code>NotImplemented</Code></Error>"))
    with pytest.raises(UsageError, match="NotImplemented") as refused:
        store.put("key", DATA)
    assert "conditional" in refused.value.mend


def test_a_document_is_never_larger_than_its_limit(server: http.HostileS3, store: S3Objects) -> None:
    server.misbehave(http.endless)
    with bounded(), pytest.raises(DigestMismatch, match="larger than 100000"):
        read(store, "key", limit=100_000)


def test_what_is_not_there_is_not_found(server: http.HostileS3, store: S3Objects, tmp_path: Path) -> None:
    with pytest.raises(NotFound) as missing:
        download(store, [file_entry(NAME, BIG)], tmp_path)
    assert missing.value.exit_code == 11
