"""The cache holds whole adapters, is private, and puts nothing over something else."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from registry.cache import FILE_NAMES, AdapterCache
from registry.digest import digest_bytes
from registry.errors import DigestMismatch, NetworkError, NotFound, RegistryError, UsageError
from registry.manifest import CARD_NAME, WEIGHTS_NAME

MANIFEST = b"manifest"
DIGEST = digest_bytes(MANIFEST)
FILES = {WEIGHTS_NAME: b"weights", CARD_NAME: b"{}"}
FACTS = {"rules": "1", "statements": "sha256:x"}


@pytest.fixture
def cache(tmp_path: Path) -> AdapterCache:
    return AdapterCache(tmp_path / "cache")


@pytest.fixture
def kept(cache: AdapterCache) -> AdapterCache:
    """A cache with an adapter."""
    fill(cache)
    return cache


def fill(cache: AdapterCache) -> None:
    with cache.incoming(DIGEST) as folder:
        for name, data in FILES.items():
            (folder / name).write_bytes(data)
            (folder / name).chmod(0o444)
        cache.commit(DIGEST, MANIFEST)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


def test_the_cache_gives_back_what_it_got(cache: AdapterCache, tmp_path: Path) -> None:
    assert cache.read_documents(DIGEST) is None
    fill(cache)
    found = cache.read_documents(DIGEST)
    assert found is not None
    assert (found.manifest, found.card) == (MANIFEST, b"{}")
    with cache.content(DIGEST, WEIGHTS_NAME) as content:
        assert content[:] == b"weights"
    assert cache.path(DIGEST) == tmp_path / "cache" / "sha256" / DIGEST.hex
    assert {path.name for path in files_of(cache.path(DIGEST))} == set(FILE_NAMES)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files_of(cache.path(DIGEST))} == {0o444}
    cache.drop(DIGEST)
    assert cache.read_documents(DIGEST) is None
    assert not files_of(tmp_path)


@pytest.mark.parametrize("name", FILE_NAMES)
def test_an_incomplete_adapter_is_none(kept: AdapterCache, name: str) -> None:
    (kept.path(DIGEST) / name).unlink()
    assert kept.read_documents(DIGEST) is None


def test_a_damaged_adapter_is_replaced_whole(kept: AdapterCache) -> None:
    (kept.path(DIGEST) / CARD_NAME).unlink()
    (kept.path(DIGEST) / "stranger").write_text("")
    fill(kept)
    assert {path.name for path in files_of(kept.path(DIGEST))} == set(FILE_NAMES)


def test_incoming_is_private(cache: AdapterCache) -> None:
    with cache.incoming(DIGEST) as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("error", "remains"),
    [
        (NetworkError("down"), True),
        (RegistryError("disk full"), True),
        (KeyboardInterrupt(), True),
        (OSError("broken"), True),
        (DigestMismatch("wrong"), False),
    ],
)
def test_what_was_fetched_outlives_trouble_but_no_refusal(
    cache: AdapterCache, error: BaseException, remains: bool
) -> None:
    def interrupted() -> None:
        with cache.incoming(DIGEST) as folder:
            (folder / "x.part").write_bytes(b"half")
            raise error

    with pytest.raises(type(error)):
        interrupted()
    with cache.incoming(DIGEST) as folder:
        assert (folder / "x.part").exists() is remains


def test_a_second_pull_waits_and_finds_it_done(cache: AdapterCache) -> None:
    entered, found = threading.Event(), []

    def second() -> None:
        entered.wait()
        with cache.incoming(DIGEST):
            found.append(cache.read_documents(DIGEST))

    thread = threading.Thread(target=second)
    thread.start()
    with cache.incoming(DIGEST) as folder:
        entered.set()
        thread.join(0.2)
        assert thread.is_alive(), "the second pull did not wait"
        for name, data in FILES.items():
            (folder / name).write_bytes(data)
        cache.commit(DIGEST, MANIFEST)
    thread.join(120)
    assert found
    assert found[0] is not None
    assert cache.read_documents(DIGEST) is not None, "the second pull's empty folder took its place"


def test_pulls_that_begin_while_others_end_get_the_folder(cache: AdapterCache) -> None:
    """Whoever ends moves or removes the folder, which must not be what another has just made."""
    refused: list[BaseException] = []

    def pulling() -> None:
        try:
            for _ in range(200):
                with cache.incoming(DIGEST) as folder:
                    assert not list(folder.iterdir())
        except (RegistryError, OSError) as error:
            refused.append(error)

    threads = [threading.Thread(target=pulling) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not refused


def test_a_refusal_leaves_what_another_pull_fetches(cache: AdapterCache, tmp_path: Path) -> None:
    with cache.incoming(DIGEST) as folder:
        (folder / WEIGHTS_NAME).write_bytes(FILES[WEIGHTS_NAME])
        AdapterCache(tmp_path / "cache").drop(DIGEST)
        (folder / CARD_NAME).write_bytes(FILES[CARD_NAME])
        cache.commit(DIGEST, MANIFEST)
    assert {path.name for path in files_of(cache.path(DIGEST))} == set(FILE_NAMES)


def test_a_refusal_removes_what_was_fetched_by_a_pull_that_ended(cache: AdapterCache, tmp_path: Path) -> None:
    with cache.incoming(DIGEST) as folder:
        (folder / "x.part").write_bytes(b"half")
    assert files_of(tmp_path)
    cache.drop(DIGEST)
    assert not files_of(tmp_path)


def test_a_refusal_removes_a_whole_adapter_even_while_somebody_pulls_it(
    kept: AdapterCache, tmp_path: Path
) -> None:
    kept.write_receipt(DIGEST, FACTS)
    kept.write_statements(DIGEST, [b"{}"])
    with kept.incoming(DIGEST):
        kept.drop(DIGEST)
        assert not files_of(tmp_path)


# -- attacks through links and permissions --


def elsewhere(tmp_path: Path) -> Path:
    """A folder of the attacker with a complete adapter."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name, data in {**FILES, "manifest.json": MANIFEST}.items():
        (folder / name).write_bytes(data)
    return folder


def test_a_link_is_no_cached_adapter(cache: AdapterCache, tmp_path: Path) -> None:
    cache.path(DIGEST).parent.mkdir(parents=True, mode=0o700)
    cache.path(DIGEST).symlink_to(elsewhere(tmp_path))
    with pytest.raises(RegistryError, match="is a link"):
        cache.read_documents(DIGEST)
    fill(cache)
    assert not cache.path(DIGEST).is_symlink()
    assert (tmp_path / "elsewhere" / CARD_NAME).exists()


@pytest.mark.parametrize("name", FILE_NAMES)
def test_a_linked_file_is_no_cached_file(kept: AdapterCache, tmp_path: Path, name: str) -> None:
    (kept.path(DIGEST) / name).unlink()
    (kept.path(DIGEST) / name).symlink_to(elsewhere(tmp_path) / name)
    with pytest.raises(RegistryError, match="cannot be read"):
        kept.read_documents(DIGEST)


@pytest.mark.parametrize("kind", ["incoming", "sha256"])
def test_a_linked_folder_is_not_followed(cache: AdapterCache, tmp_path: Path, kind: str) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / kind).symlink_to(elsewhere(tmp_path))
    with pytest.raises(RegistryError, match="is a link"):
        fill(cache)
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir() if path.is_file()) == sorted(
        FILE_NAMES
    )


def test_a_folder_that_others_can_write_to_is_refused(kept: AdapterCache) -> None:
    kept.path(DIGEST).chmod(0o777)
    with pytest.raises(RegistryError, match="somebody else can write"):
        kept.read_documents(DIGEST)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_refused(kept: AdapterCache) -> None:
    os.chown(kept.path(DIGEST), 12_345, -1)
    with pytest.raises(RegistryError, match="somebody else"):
        kept.read_documents(DIGEST)


def test_dropping_a_link_leaves_its_target(cache: AdapterCache, tmp_path: Path) -> None:
    cache.path(DIGEST).parent.mkdir(parents=True)
    cache.path(DIGEST).symlink_to(elsewhere(tmp_path))
    cache.drop(DIGEST)
    assert not os.path.lexists(cache.path(DIGEST))
    assert len(files_of(tmp_path / "elsewhere")) == len(FILE_NAMES)


# -- output --


def test_the_output_is_the_cached_files(kept: AdapterCache, tmp_path: Path) -> None:
    kept.link(DIGEST, tmp_path / "a" / "out")
    for name in FILE_NAMES:
        assert os.path.samefile(kept.path(DIGEST) / name, tmp_path / "a" / "out" / name)
    kept.link(DIGEST, tmp_path / "a" / "out")  # again: nothing to do


def test_across_disks_the_output_is_a_copy(
    kept: AdapterCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "link", no_link)
    kept.link(DIGEST, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in files_of(tmp_path / "out")} == {
        **FILES,
        "manifest.json": MANIFEST,
    }
    assert not os.path.samefile(kept.path(DIGEST) / CARD_NAME, tmp_path / "out" / CARD_NAME)
    kept.link(DIGEST, tmp_path / "out")  # the same bytes are no obstacle


def a_file(path: Path) -> None:
    path.write_text("mine")


def a_link(path: Path) -> None:
    path.with_name("mine").write_bytes(b"weights")
    path.symlink_to(path.with_name("mine"))


def a_dangling_link(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def a_folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [a_file, a_link, a_dangling_link, a_folder])
def test_the_output_goes_over_nothing_else(
    kept: AdapterCache, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    make(output / WEIGHTS_NAME)
    before = sorted(output.iterdir())
    with pytest.raises(UsageError, match="is something else"):
        kept.link(DIGEST, output)
    assert sorted(output.iterdir()) == before


def test_an_output_that_cannot_be_is_explained(kept: AdapterCache, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RegistryError, match="cannot be written"):
        kept.link(DIGEST, tmp_path / "file" / "out")


# -- receipts --


def test_a_receipt_holds_while_nothing_changes(kept: AdapterCache, tmp_path: Path) -> None:
    assert kept.receipt(DIGEST) is None
    kept.write_receipt(DIGEST, FACTS)
    assert kept.receipt(DIGEST) == FACTS
    assert AdapterCache(tmp_path / "cache").receipt(DIGEST) == FACTS
    kept.link(DIGEST, tmp_path / "out")
    assert kept.receipt(DIGEST) == FACTS
    kept.drop(DIGEST)
    assert kept.receipt(DIGEST) is None


def later(path: Path) -> os.stat_result:
    """The status of a file, once the clock of its disk has moved on: some kernels count by milliseconds."""
    status, probe = path.stat(), path.with_name("probe")
    while not probe.exists() or probe.stat().st_ctime_ns <= status.st_ctime_ns:
        probe.touch()
    probe.unlink()
    return status


def rewrite(path: Path) -> None:
    later(path)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes())


def rewrite_and_hide(path: Path) -> None:
    """As somebody does who knows what a receipt compares, save for the time of the status."""
    status = later(path)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().swapcase())
    path.chmod(stat.S_IMODE(status.st_mode))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def exchange(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


@pytest.mark.parametrize("change", [rewrite, rewrite_and_hide, exchange, Path.unlink])
@pytest.mark.parametrize("name", FILE_NAMES)
def test_a_receipt_does_not_hold_for_a_changed_file(
    kept: AdapterCache, change: Callable[[Path], None], name: str
) -> None:
    kept.write_receipt(DIGEST, FACTS)
    change(kept.path(DIGEST) / name)
    assert kept.receipt(DIGEST) is None


def test_a_change_through_the_output_is_noticed(kept: AdapterCache, tmp_path: Path) -> None:
    kept.write_receipt(DIGEST, FACTS)
    kept.link(DIGEST, tmp_path / "out")
    rewrite(tmp_path / "out" / WEIGHTS_NAME)
    assert kept.receipt(DIGEST) is None
    kept.link(DIGEST, tmp_path / "out2")
    assert kept.receipt(DIGEST) is None, "a link made a receipt valid again"


@pytest.mark.parametrize("note", [b"", b"{}", b"[]", b'{"facts": 1, "files": {}}', b"\xff", b"[" * 100_000])
def test_a_receipt_that_is_none_does_not_hold(kept: AdapterCache, tmp_path: Path, note: bytes) -> None:
    kept.write_receipt(DIGEST, FACTS)
    (path,) = (tmp_path / "cache" / "receipts").iterdir()
    path.unlink()
    path.write_bytes(note)
    assert kept.receipt(DIGEST) is None


def test_envelopes_are_kept_byte_for_byte(kept: AdapterCache) -> None:
    assert kept.read_statements(DIGEST) is None
    envelopes = (b"{}", bytes(range(256)))
    kept.write_statements(DIGEST, envelopes)
    assert kept.read_statements(DIGEST) == envelopes
    kept.drop(DIGEST)
    assert kept.read_statements(DIGEST) is None


def test_a_file_that_is_not_there_is_not_found(cache: AdapterCache) -> None:
    with pytest.raises(NotFound):
        cache.content(DIGEST, WEIGHTS_NAME)


def test_a_cache_that_cannot_be_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RegistryError, match="cannot be used") as refused,
        AdapterCache(tmp_path / "file" / "cache").incoming(DIGEST),
    ):
        pass
    assert "ADAPTER_FOUNDRY_CACHE" in refused.value.mend
