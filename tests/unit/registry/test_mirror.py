"""Mirrors: what an export writes, and what an import takes; attacks are in tests/attacks/test_mirror.py."""

from __future__ import annotations

import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.archives import appearance, members, packed, site
from fakes.registries import NAME, PASSING, adapter_files, adapter_folder, copy_registry, objects
from registry import intake, mirror
from registry.client import Registry
from registry.content import CHUNK_BYTES
from registry.errors import DigestMismatch, NotFound, PolicyRefused, Revoked, Unsigned, UsageError
from registry.manifest import WEIGHTS_NAME
from registry.reference import Reference
from registry.storage.archive import ArchiveObjects, order
from registry.storage.local import LocalObjects

PROD = f"{NAME}@prod"


@pytest.fixture
def registry(home: Path) -> Registry:
    return copy_registry(home)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return tmp_path / "adapters.tar"


@pytest.fixture
def elsewhere(home: Path, tmp_path: Path, registry: Registry) -> Registry:
    return site(tmp_path / "site", home)


def second(registry: Registry, tmp_path: Path, *, approved: bool = True) -> None:
    registry.push(adapter_folder(tmp_path / "second", seed=1), NAME, evaluation=PASSING)
    if approved:
        registry.approve(f"{NAME}:2", "a person", "better")


# -- the archive as a file --

KEYS = st.sampled_from(["trust", "manifests", "statements", "blobs", "models"]).flatmap(
    lambda kind: st.lists(st.from_regex(r"\A[a-z0-9][a-z0-9._-]{0,60}\Z"), min_size=1, max_size=3).map(
        lambda parts: "/".join((kind, *parts))
    )
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(KEYS.filter(lambda key: len(key) < 200), st.binary(max_size=1500), min_size=1))
def test_what_is_packed_is_read_back_and_other_programs_agree(content: dict[str, bytes]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        path.write_bytes(packed(content))
        found = ArchiveObjects(path)
        assert [*found.keys("")] == sorted(content, key=order)
        assert {key: found.read(key, 0, 1 << 20) for key in found.keys("")} == content
        assert all(found.stat(key).size == len(data) for key, data in content.items())
        assert members(path) == content
        found.close()


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_no_byte_of_a_header_is_idle(data: st.DataObject) -> None:
    """Whatever is changed outside of a member's bytes, the archive is refused."""
    import tempfile

    content = {"trust/timestamp.json": b"{}", "manifests/sha256/ab": b"m" * 600}
    whole = bytearray(packed(content))
    inside = {*range(512, 514), *range(1536, 2136)}
    at = data.draw(st.sampled_from([at for at in range(len(whole)) if at not in inside]))
    whole[at] ^= data.draw(st.integers(1, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        path.write_bytes(whole)
        with pytest.raises((DigestMismatch, PolicyRefused)):
            ArchiveObjects(path)


def test_an_archive_cannot_be_written_through_its_store(registry: Registry, archive: Path) -> None:
    mirror.export(registry, archive)
    found = ArchiveObjects(archive)
    for write in (
        lambda: found.put("a/b", b""),
        lambda: found.replace("trust/timestamp.json", b"", None),
        lambda: found.delete("trust/timestamp.json"),
    ):
        with pytest.raises(UsageError):
            write()
    with pytest.raises(NotFound):
        found.stat("trust/9.root.json")


# -- export --


def test_the_same_registry_becomes_the_same_bytes(registry: Registry, archive: Path, tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    found = mirror.export(registry, archive, progress=lambda *at: heard.append(at))
    mirror.export(registry, tmp_path / "again.tar")
    assert archive.read_bytes() == (tmp_path / "again.tar").read_bytes()
    assert (found.references, found.left_out, found.size) == ((f"{NAME}:1",), (), archive.stat().st_size)
    assert heard[-1][0] == "export"
    assert heard[-1][1] == heard[-1][2]
    assert [path.name for path in tmp_path.glob(".*")] == [], "nothing is left beside it"


def test_gnu_tar_reads_it(registry: Registry, archive: Path, tmp_path: Path) -> None:
    mirror.export(registry, archive)
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-xf", archive, "-C", tmp_path / "out"], check=True, capture_output=True)
    for key, data in members(archive).items():
        assert (tmp_path / "out" / key).read_bytes() == data
        assert (objects(registry.place.home) / key).read_bytes() == data


def test_what_exists_is_not_overwritten(registry: Registry, archive: Path) -> None:
    archive.write_bytes(b"mine")
    with pytest.raises(UsageError):
        mirror.export(registry, archive)
    assert archive.read_bytes() == b"mine"


def test_a_disk_without_links_will_do(
    registry: Registry, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are carried around often have none."""

    def no_links(*arguments: object, **options: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", no_links)
    found = mirror.export(registry, archive)
    assert found.size == archive.stat().st_size
    assert [path.name for path in archive.parent.glob(".*")] == []


def test_only_what_is_approved_and_not_revoked_is_carried(
    registry: Registry, archive: Path, tmp_path: Path
) -> None:
    second(registry, tmp_path, approved=False)
    registry.push(adapter_folder(tmp_path / "third", seed=2), NAME, evaluation=PASSING)
    registry.revoke(f"{NAME}:3", "it leaks")
    found = mirror.export(registry, archive)
    assert found.references == (f"{NAME}:1",)
    assert {left.reference: type(left.refusal) for left in found.left_out} == {
        f"{NAME}:2": Unsigned,
        f"{NAME}:3": Revoked,
    }
    assert sum(key.startswith("manifests/") for key in members(archive)) == 1


def test_named_versions_are_carried_alone_or_refused(
    registry: Registry, archive: Path, tmp_path: Path
) -> None:
    second(registry, tmp_path)
    found = mirror.export(registry, archive, [Reference.parse(f"{NAME}:2")])
    assert found.references == (f"{NAME}:2",)
    registry.revoke(f"{NAME}:2", "it leaks")
    with pytest.raises(Revoked):
        mirror.export(registry, tmp_path / "no.tar", [Reference.parse(f"{NAME}:2")])
    with pytest.raises(NotFound):
        mirror.export(registry, tmp_path / "no.tar", [Reference.parse(f"{NAME}:7")])
    assert not (tmp_path / "no.tar").exists()


def test_a_version_that_only_its_alias_admits_is_carried(
    home: Path, registry: Registry, tmp_path: Path, archive: Path
) -> None:
    gates = '[gates.staging]\nrequire = ["training", "scan", "licence"]\napprovals = 0\n'
    (home / "registry" / "policy.toml").write_text(gates)
    registry = Registry.open(home)
    second(registry, tmp_path, approved=False)
    registry.promote(f"{NAME}:2", "staging")
    assert mirror.export(registry, archive).references == (f"{NAME}:1", f"{NAME}:2")
    strict = site(tmp_path / "strict", home)
    taken = intake.take(strict, archive)
    assert [(left.reference, type(left.refusal)) for left in taken.left_out] == [(f"{NAME}:2", Unsigned)]
    assert strict.pull(PROD).reference == f"{NAME}:1"


def test_a_chunk_is_in_memory_at_a_time(registry: Registry, archive: Path) -> None:
    asked: list[int] = []

    class Watched(LocalObjects):
        def read(self, key: str, start: int, stop: int) -> bytes:
            data = super().read(key, start, stop)
            asked.append(len(data))
            return data

    registry.store = Watched(objects(registry.place.home))
    mirror.export(registry, archive)
    assert max(asked) <= CHUNK_BYTES


def test_damaged_bytes_are_not_carried(registry: Registry, home: Path, archive: Path) -> None:
    (path,) = objects(home).glob("models/*/adapter_weights/*")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    with pytest.raises(DigestMismatch):
        mirror.export(registry, archive)
    assert not archive.exists()


# -- import --


def test_a_site_needs_nothing_but_the_root_and_the_archive(
    registry: Registry, elsewhere: Registry, archive: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The publisher is gone and MLflow is down."""
    exported = mirror.export(registry, archive)
    shutil.rmtree(home)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    here = Registry.open(elsewhere.place.home)
    heard: list[tuple[str, int, int]] = []
    taken = intake.take(here, archive, lambda *at: heard.append(at))
    size = sum(len(data) for data in adapter_files(0).values())
    assert (taken.references, taken.left_out, taken.sent) == (exported.references, (), size)
    assert {stage for stage, *_ in heard} == {"verify", "upload"}
    pulled = here.pull(PROD)
    assert (pulled.reference, pulled.fetched_bytes) == (f"{NAME}:1", size)
    assert pulled.path is not None
    assert (pulled.path / WEIGHTS_NAME).read_bytes() == adapter_files(0)[WEIGHTS_NAME]
    assert here.verify(PROD).digest == pulled.digest
    assert [row.reference for row in here.list()] == [f"{NAME}:1"]


def test_the_same_import_again_takes_nothing(registry: Registry, elsewhere: Registry, archive: Path) -> None:
    mirror.export(registry, archive)
    intake.take(elsewhere, archive)
    before = {path: path.stat().st_mtime_ns for path in objects(elsewhere.place.home).rglob("*/*")}
    assert intake.take(elsewhere, archive).sent == 0
    after = {path: path.stat().st_mtime_ns for path in objects(elsewhere.place.home).rglob("*/*")}
    assert {path for path in after if path.is_file() and after[path] != before.get(path)} == set()


def test_a_newer_archive_replaces_what_was_superseded(
    registry: Registry, elsewhere: Registry, archive: Path, tmp_path: Path
) -> None:
    mirror.export(registry, archive)
    intake.take(elsewhere, archive)
    second(registry, tmp_path)
    registry.promote(f"{NAME}:2", "prod")
    registry.revoke(f"{NAME}:1", "the new one is better")
    mirror.export(registry, tmp_path / "newer.tar")
    taken = intake.take(elsewhere, tmp_path / "newer.tar")
    assert taken.references == (f"{NAME}:2",)
    assert taken.sent == len(adapter_files(1)[WEIGHTS_NAME]), "the card was there already"
    assert elsewhere.pull(PROD).reference == f"{NAME}:2"
    with pytest.raises(Revoked):
        elsewhere.pull(f"{NAME}:1")
    names = [path.name for path in (objects(elsewhere.place.home) / "trust").iterdir()]
    assert len(names) == len({name.partition(".")[2] for name in names if name[0].isdigit()}) + 1


@pytest.mark.parametrize("after", range(0, 22, 3))
def test_an_interrupted_import_is_repeated(
    registry: Registry, elsewhere: Registry, archive: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Killed at any write: nothing is seen before all of it is there, and the next import goes on."""
    mirror.export(registry, archive)
    writes = iter(range(after))

    def dying(real: Any) -> Any:
        def write(*arguments: Any, **options: Any) -> Any:
            if next(writes, None) is None:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        return write

    with monkeypatch.context() as patch:
        patch.setattr(LocalObjects, "put", dying(LocalObjects.put))
        patch.setattr(LocalObjects, "replace", dying(LocalObjects.replace))
        try:
            intake.take(elsewhere, archive)
            killed = False
        except KeyboardInterrupt:
            killed = True
    here = Registry.open(elsewhere.place.home)
    if killed:
        with pytest.raises(Exception, match=r"trust metadata|withholds"):
            here.list()
    intake.take(here, archive)
    assert here.pull(PROD).reference == f"{NAME}:1"


def test_an_archive_can_be_signed_for_longer(
    registry: Registry, elsewhere: Registry, archive: Path, tmp_path: Path
) -> None:
    """For a site that cannot come every day; readers of the store keep the usual times."""
    mirror.export(registry, archive)
    intake.take(elsewhere, archive)
    month = timedelta(days=30)
    found = mirror.export(registry, tmp_path / "month.tar", lifetime=month)
    until = datetime.fromisoformat(found.expires)
    assert abs(until - (datetime.now(UTC) + month)) < timedelta(minutes=1)
    intake.take(elsewhere, tmp_path / "month.tar")
    assert elsewhere.authority.state().expires("timestamp") == until
    here = registry.authority.state()
    assert here.expires("timestamp") < datetime.now(UTC) + timedelta(days=2)
    assert here.version("timestamp") == elsewhere.authority.state().version("timestamp") + 1
    (row,) = registry.ledger.entries(limit=1, newest=True)
    assert (row.action, row.subject) == ("export", "month.tar")
    mirror.export(registry, tmp_path / "later.tar")
    intake.take(elsewhere, tmp_path / "later.tar")
    shutil.rmtree(registry.keys.folder)
    with pytest.raises(NotFound, match="online key"):
        mirror.export(Registry.open(registry.place.home), tmp_path / "no.tar", lifetime=month)


def test_rotated_roots_are_carried(
    registry: Registry, elsewhere: Registry, archive: Path, home: Path
) -> None:
    """A site that pinned the first root follows to the newest one."""
    from tuf.api.metadata import Metadata

    ring = registry.keys
    path = objects(home) / "trust" / "1.root.json"
    for number in (2, 3):
        root = Metadata.from_bytes(path.read_bytes()).signed
        root.version = number
        metadata = Metadata(root)
        metadata.sign(ring.signer("root"))
        path = path.with_name(f"{number}.root.json")
        path.write_bytes(metadata.to_bytes())
    assert registry.authority.state().version("root") == 3
    mirror.export(registry, archive)
    intake.take(elsewhere, archive)
    assert elsewhere.authority.state().version("root") == 3
    assert sorted(path.name for path in (objects(elsewhere.place.home) / "trust").glob("*.root.json")) == [
        "1.root.json",
        "2.root.json",
        "3.root.json",
    ]


def test_a_refused_archive_changes_nothing(
    registry: Registry, elsewhere: Registry, archive: Path, home: Path, tmp_path: Path
) -> None:
    """Not even what the site remembers of the trust metadata: it can go on with what it has."""
    mirror.export(registry, archive)
    intake.take(elsewhere, archive)
    before = appearance(elsewhere.place.home)
    second(registry, tmp_path)
    newer = tmp_path / "newer.tar"
    mirror.export(registry, newer)
    content = members(newer)
    key = next(key for key in content if key.endswith(WEIGHTS_NAME))
    content[key] = content[key][:-1] + bytes([content[key][-1] ^ 1])
    newer.write_bytes(packed(content))
    with pytest.raises(DigestMismatch):
        intake.take(elsewhere, newer)
    after = appearance(elsewhere.place.home)
    # Looking at the own store notes the time at which it was looked at, and nothing else.
    assert {name for name in after if after[name] != before.get(name)} <= {"trust/metadata/memory.json"}
    assert elsewhere.pull(PROD).reference == f"{NAME}:1"
