"""Files go up and come down whole, from a folder and from a real S3 server, whatever is killed or changed."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from registry import partfile
from registry.content import CHUNK_BYTES, FileContent, VerifiedContent
from registry.digest import FileEntry, Fingerprint, file_entry
from registry.errors import DigestMismatch, NetworkError, NotFound, RegistryError
from registry.manifest import CARD_NAME, WEIGHTS_NAME
from registry.storage.base import ObjectStore, file_key
from registry.storage.stores import open_store
from registry.transfer import StoredContent, download, fetch, publish, upload

CHUNKS = 5
CARD = b'{"name": "smile"}'
SIZE = (CHUNKS - 1) * CHUNK_BYTES + 12_345


@pytest.fixture
def store(uri: str) -> ObjectStore:
    return open_store(uri)


@pytest.fixture(scope="module")
def bytes_of_weights() -> bytes:
    return os.urandom(SIZE)


@pytest.fixture
def weights(tmp_path: Path, bytes_of_weights: bytes) -> Path:
    path = tmp_path / WEIGHTS_NAME
    path.write_bytes(bytes_of_weights)
    return path


@pytest.fixture
def entries(store: ObjectStore, weights: Path) -> tuple[FileEntry, ...]:
    """An adapter in the store."""
    with FileContent(weights) as content:
        return publish(store, {CARD_NAME: CARD, WEIGHTS_NAME: content}).entries


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "incoming"
    made.mkdir()
    return made


class Counting:
    """A store that counts what is read from it, and can be told to damage chunks."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.read_starts: list[int] = []
        self.damaged: dict[int, int] = {}
        self._lock = threading.Lock()

    def read(self, key: str, start: int, stop: int) -> bytes:
        data = self._store.read(key, start, stop)
        with self._lock:
            if key.endswith(WEIGHTS_NAME):
                self.read_starts.append(start)
                if self.damaged.get(start, 0) > 0:
                    self.damaged[start] -= 1
                    return bytes([data[0] ^ 1]) + data[1:]
        return data

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)


# -- up --


def test_publishing_computes_the_entries_and_sends_nothing_twice(
    store: ObjectStore, weights: Path, bytes_of_weights: bytes
) -> None:
    heard: list[tuple[str, int, int]] = []
    contents = {CARD_NAME: CARD, WEIGHTS_NAME: FileContent(weights)}
    published = publish(store, contents, progress=lambda *at: heard.append(at))
    assert published.sent == SIZE + len(CARD)
    assert published.entries == (file_entry(CARD_NAME, CARD), file_entry(WEIGHTS_NAME, bytes_of_weights))
    assert heard[0] == ("upload", 0, SIZE + len(CARD))
    assert heard[-1] == ("upload", SIZE + len(CARD), SIZE + len(CARD))
    again = publish(store, contents)
    assert (again.entries, again.sent) == (published.entries, 0)
    assert upload(store, contents, published.entries) == 0


def test_a_fingerprint_that_was_taken_before_is_used(store: ObjectStore, weights: Path) -> None:
    with FileContent(weights) as content:
        print_ = Fingerprint.of(content)
        published = publish(store, {WEIGHTS_NAME: content}, {WEIGHTS_NAME: print_})
    assert published.entries[0].chunks == print_.chunks


@pytest.mark.parametrize("at", [0, 2 * CHUNK_BYTES + 1, SIZE - 1])
def test_a_file_that_is_changed_while_it_is_sent_is_not_stored(
    store: ObjectStore, weights: Path, at: int
) -> None:
    with FileContent(weights) as content:
        print_ = Fingerprint.of(content)
        change(weights, at)
        with pytest.raises(DigestMismatch, match="not the bytes that were signed"):
            publish(store, {WEIGHTS_NAME: content}, {WEIGHTS_NAME: print_})
    assert list(store.keys("")) == []


def test_a_file_that_shrinks_while_it_is_sent_is_not_stored(store: ObjectStore, weights: Path) -> None:
    with FileContent(weights) as content:
        print_ = Fingerprint.of(content)
        os.truncate(weights, SIZE - 1)
        with pytest.raises(DigestMismatch, match="shorter"):
            publish(store, {WEIGHTS_NAME: content}, {WEIGHTS_NAME: print_})
    assert list(store.keys("")) == []


def test_what_is_added_to_a_file_while_it_is_sent_is_not_stored(
    store: ObjectStore, weights: Path, bytes_of_weights: bytes
) -> None:
    with FileContent(weights) as content:
        print_ = Fingerprint.of(content)
        with weights.open("ab") as stream:
            stream.write(b"more")
        (entry,) = publish(store, {WEIGHTS_NAME: content}, {WEIGHTS_NAME: print_}).entries
    assert store.stat(file_key(entry)).size == SIZE
    assert entry == file_entry(WEIGHTS_NAME, bytes_of_weights)


def test_bytes_that_are_not_the_entry_are_not_stored(store: ObjectStore) -> None:
    with pytest.raises(DigestMismatch):
        upload(store, {CARD_NAME: b"other"}, [file_entry(CARD_NAME, CARD)])
    with pytest.raises(DigestMismatch):
        upload(store, {CARD_NAME: CARD.upper()}, [file_entry(CARD_NAME, CARD)])
    assert list(store.keys("")) == []


def test_an_object_of_another_size_is_found_out(store: ObjectStore) -> None:
    store.put(file_key(file_entry(CARD_NAME, CARD)), CARD + b"x")
    with pytest.raises(DigestMismatch, match=f"{len(CARD) + 1} bytes"):
        publish(store, {CARD_NAME: CARD})


# -- down --


def test_a_download_is_whole_read_only_and_alone(
    store: ObjectStore, entries: tuple[FileEntry, ...], folder: Path, bytes_of_weights: bytes
) -> None:
    heard: list[tuple[str, int, int]] = []
    download(store, entries, folder, lambda *at: heard.append(at))
    assert (folder / WEIGHTS_NAME).read_bytes() == bytes_of_weights
    assert (folder / CARD_NAME).read_bytes() == CARD
    assert sorted(path.name for path in folder.iterdir()) == sorted([CARD_NAME, WEIGHTS_NAME])
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o444}
    total = SIZE + len(CARD)
    assert heard[0] == ("download", 0, total)
    assert heard[-1] == ("download", total, total)
    assert [at[1] for at in heard] == sorted(at[1] for at in heard)


def test_an_empty_file_comes_down(store: ObjectStore, folder: Path) -> None:
    published = publish(store, {CARD_NAME: b""})
    download(store, published.entries, folder)
    assert (folder / CARD_NAME).read_bytes() == b""


def test_what_is_there_is_not_fetched_again(
    store: ObjectStore, entries: tuple[FileEntry, ...], folder: Path
) -> None:
    download(store, entries, folder)
    counting = Counting(store)
    download(counting, entries, folder)  # type: ignore[arg-type]
    assert counting.read_starts == []


@pytest.mark.parametrize("suffix", ["", partfile.SUFFIX])
def test_one_damaged_chunk_on_the_disk_is_fetched_again(
    store: ObjectStore, entries: tuple[FileEntry, ...], folder: Path, suffix: str, bytes_of_weights: bytes
) -> None:
    download(store, entries, folder)
    path = folder / WEIGHTS_NAME
    path.chmod(0o600)
    change(path, 2 * CHUNK_BYTES + 7)
    if suffix:
        path.rename(folder / (WEIGHTS_NAME + suffix))
    counting = Counting(store)
    download(counting, entries, folder)  # type: ignore[arg-type]
    assert counting.read_starts == [2 * CHUNK_BYTES]
    assert path.read_bytes() == bytes_of_weights


def test_one_chunk_that_comes_damaged_is_fetched_again(
    store: ObjectStore, entries: tuple[FileEntry, ...], folder: Path, bytes_of_weights: bytes
) -> None:
    counting = Counting(store)
    counting.damaged = {CHUNK_BYTES: 1}
    download(counting, entries, folder)  # type: ignore[arg-type]
    assert sorted(counting.read_starts) == sorted([*range(0, SIZE, CHUNK_BYTES), CHUNK_BYTES])
    assert (folder / WEIGHTS_NAME).read_bytes() == bytes_of_weights


def test_a_chunk_that_stays_damaged_is_named(
    store: ObjectStore, entries: tuple[FileEntry, ...], folder: Path
) -> None:
    counting = Counting(store)
    counting.damaged = {CHUNK_BYTES: 9}
    with pytest.raises(DigestMismatch, match=rf"bytes {CHUNK_BYTES} to {2 * CHUNK_BYTES} of {WEIGHTS_NAME}"):
        download(counting, entries, folder)  # type: ignore[arg-type]
    assert counting.read_starts.count(CHUNK_BYTES) == 2
    assert not (folder / WEIGHTS_NAME).exists()


def test_what_the_store_lacks_is_not_found(
    store: ObjectStore, entries: tuple[FileEntry, ...], folder: Path
) -> None:
    store.delete(file_key(entries[1]))
    with pytest.raises(NotFound):
        download(store, entries, folder)
    assert not (folder / WEIGHTS_NAME).exists()


READER = """
import sys, time
from pathlib import Path
from registry import transfer
from registry.content import CHUNK_BYTES
from registry.digest import FileEntry
from registry.storage.stores import open_store

class Slow:
    def __init__(self, store):
        self.store = store

    def read(self, key, start, stop):
        if start >= 3 * CHUNK_BYTES:
            time.sleep(600)
        return self.store.read(key, start, stop)

def progress(stage, done, total):
    print(done, flush=True)

entries = [FileEntry.model_validate_json(line) for line in sys.argv[3:]]
transfer.download(Slow(open_store(sys.argv[1])), entries, Path(sys.argv[2]), progress)
"""


@pytest.fixture
def killed_reader(uri: str, entries: tuple[FileEntry, ...], folder: Path, repository: Path) -> None:
    """A process was killed when it had three chunks of five."""
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, uri, str(folder), *(entry.model_dump_json() for entry in entries)],
        stdout=subprocess.PIPE,
        cwd=repository,
        env=dict(os.environ),
    )
    assert reader.stdout is not None
    for line in reader.stdout:
        if int(line) > 3 * CHUNK_BYTES:
            break
    reader.send_signal(signal.SIGKILL)
    reader.communicate()
    assert reader.returncode == -signal.SIGKILL


@pytest.mark.usefixtures("killed_reader")
def test_a_killed_download_goes_on_where_it_was(
    store: ObjectStore, entries: tuple[FileEntry, ...], folder: Path, bytes_of_weights: bytes
) -> None:
    assert not (folder / WEIGHTS_NAME).exists()
    counting = Counting(store)
    heard: list[int] = []
    download(counting, entries, folder, lambda stage, done, total: heard.append(done))  # type: ignore[arg-type]
    assert (folder / WEIGHTS_NAME).read_bytes() == bytes_of_weights
    assert sorted(counting.read_starts) == [3 * CHUNK_BYTES, 4 * CHUNK_BYTES]
    assert heard[-1] == SIZE + len(CARD)


def test_two_downloads_at_once_do_the_work_of_one(
    store: ObjectStore, entries: tuple[FileEntry, ...], folder: Path, bytes_of_weights: bytes
) -> None:
    counting = Counting(store)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            download(counting, entries, folder)  # type: ignore[arg-type]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(counting.read_starts) == CHUNKS
    assert (folder / WEIGHTS_NAME).read_bytes() == bytes_of_weights


# -- the folder of a download --


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("name", [WEIGHTS_NAME, WEIGHTS_NAME + partfile.SUFFIX])
def test_nothing_is_written_through_a_link(
    store: ObjectStore, entries: tuple[FileEntry, ...], folder: Path, tmp_path: Path, name: str, link: object
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    link(victim, folder / name)  # type: ignore[operator]
    download(store, entries, folder)
    assert victim.read_bytes() == b"precious"
    assert stat.S_IMODE(victim.stat().st_mode) != 0o444
    assert not (folder / WEIGHTS_NAME).is_symlink()
    assert (folder / WEIGHTS_NAME).stat().st_nlink == 1


def test_a_full_disk_is_explained_and_the_download_goes_on_later(
    store: ObjectStore, entries: tuple[FileEntry, ...], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(RegistryError, match="No space left") as refused:
            download(store, entries, folder)
    assert "free some space" in refused.value.mend
    assert refused.value.exit_code == 1
    download(store, entries, folder)
    assert (folder / WEIGHTS_NAME).stat().st_size == SIZE


def test_a_flush_that_fails_is_an_error(
    store: ObjectStore, entries: tuple[FileEntry, ...], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(RegistryError, match="Input/output error"):
        download(store, entries, folder)
    assert not (folder / WEIGHTS_NAME).exists()


# -- without a disk --


def test_a_small_file_is_fetched_into_memory(store: ObjectStore, entries: tuple[FileEntry, ...]) -> None:
    assert fetch(store, entries[0]) == CARD
    with pytest.raises(DigestMismatch, match="more than the limit"):
        fetch(store, entries[1], limit=1000)


def test_the_stores_bytes_are_read_in_any_order(
    store: ObjectStore, entries: tuple[FileEntry, ...], bytes_of_weights: bytes
) -> None:
    content = VerifiedContent(StoredContent(store, entries[1]), entries[1])
    assert len(content) == SIZE
    assert content[SIZE - 10 : SIZE + 10] == bytes_of_weights[-10:]
    assert content[CHUNK_BYTES - 5 : CHUNK_BYTES + 5] == bytes_of_weights[CHUNK_BYTES - 5 : CHUNK_BYTES + 5]
    assert content[5:5] == b""


def test_an_unreachable_store_is_told_from_a_wrong_one(
    entries: tuple[FileEntry, ...], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from registry.storage.s3 import S3Objects
    from registry.storage.wire import Patience

    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    away = S3Objects("s3://bucket", patience=Patience(attempts=1))
    with pytest.raises(NetworkError):
        download(away, entries, folder)


def change(path: Path, at: int) -> None:
    """Flips one bit of a file in place."""
    with path.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)
        stream.seek(at)
        stream.write(bytes([byte[0] ^ 1]))
