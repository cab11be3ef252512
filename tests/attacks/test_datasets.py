"""Datasets from an enemy: the digests inside are right, the content is not. Each is refused and explained."""

from __future__ import annotations

import os
import resource
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes.datasets import resigned, rewritten, small_dataset, summed
from registry.digest import digest_bytes
from trainer.data import Dataset
from trainer.data.blobs import Blobs, encode_png
from trainer.data.tables import MAX_TEXT
from trainer.errors import DataError

Change = Callable[[pa.Table], pa.Table]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of three people."""
    source = np.random.default_rng(1)
    people = [
        (split, who, [source.integers(0, 255, (40, 48, 3), np.uint8) for _ in range(3)])
        for split, who in (("train", "anna"), ("train", "ben"), ("validation", "cleo"))
    ]
    return small_dataset(tmp_path_factory.mktemp("honest") / "dataset", people)


@pytest.fixture
def folder(honest: Path, tmp_path: Path) -> Path:
    return shutil.copytree(honest, tmp_path / "dataset")


def put(column: str, value: Any, row: int = 0) -> Change:
    """Return a change of one value."""

    def change(table: pa.Table) -> pa.Table:
        values = table.column(column).to_pylist()
        values[row] = value
        kind = table.schema.field(column).type
        return table.set_column(table.column_names.index(column), column, pa.array(values, kind))

    return change


def cast(column: str, kind: pa.DataType) -> Change:
    """Return a change of a column's type."""
    return lambda table: table.set_column(
        table.column_names.index(column), column, table.column(column).cast(kind)
    )


def person_in_both(table: pa.Table) -> pa.Table:
    return put("identity", "anna", 2)(table)


def again(table: pa.Table) -> pa.Table:
    return pa.concat_tables([table, table.slice(0, 1)])


ROWS: list[tuple[str, str, Change, str]] = [
    ("a row of pictures that is none", "triplets", put("source", 9), "there are 9"),
    ("a negative row", "triplets", put("a_image", -1), "there are 9"),
    ("an intensity beyond", "triplets", put("b_intensity", 1e9), "not from 0 to 1.5"),
    ("no number", "triplets", put("b_intensity", float("nan")), "not finite"),
    ("a split that is none", "triplets", put("split", "test"), "of no split"),
    ("a person in both splits", "triplets", person_in_both, "splits are not those|both splits"),
    ("a picture in both splits", "triplets", put("source", 0, 2), "in both splits"),
    ("a missing value", "triplets", put("identity", None), "identity misses a value"),
    ("a row as a wide number", "triplets", cast("source", pa.int64()), "its columns are not"),
    ("a text as bytes", "images", cast("license", pa.binary()), "its columns are not"),
    ("a column less", "images", lambda table: table.drop_columns(["origin"]), "origin"),
    ("a number less", "images", lambda table: table.drop_columns(["pose"]), "its columns are not"),
    ("a column more", "images", lambda table: table.append_column("x", table["width"]),
     "its columns are not"),
    ("columns in another order", "images", lambda table: table.select(table.column_names[::-1]),
     "its columns are not"),
    ("a path instead of a digest", "images", put("image", "../../../../etc/passwd"), "not a digest"),
    ("a path with a digest", "images", put("image", f"sha256:../../{'a' * 58}"), "not a digest"),
    ("a path as the type", "images", put("media_type", "image/../../png"), "is not right"),
    ("pixels that are no digest", "images", put("pixels", "x"), "not a digest"),
    ("the same picture twice", "images", again, "there twice"),
    ("a picture without pixels", "images", put("height", 0), "over the limits"),
    ("sides that overflow", "images",
     lambda table: put("width", 2**31 - 1)(put("height", 2**31 - 1)(table)), "over the limits"),
    ("a file that is longer than told", "images", put("bytes", 1), "has another size"),
    ("a picture whose file is not there", "images", put("image", "sha256:" + "0" * 64), "is missing"),
    ("a text without end", "images", put("prompt", "x" * (MAX_TEXT + 1)), "has a text of"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("table", "change", "reason"), [one[1:] for one in ROWS], ids=[one[0] for one in ROWS]
)
def test_wrong_rows_are_refused(folder: Path, table: str, change: Change, reason: str) -> None:
    resigned(folder, table, change(pq.read_table(folder / f"{table}.parquet")))
    with pytest.raises(DataError, match=reason):
        Dataset.open(folder)


def test_the_honest_one_opens_after_the_same_treatment(folder: Path) -> None:
    """Otherwise the attacks above prove nothing."""
    for name in ("images", "triplets", "rejects"):
        resigned(folder, name, pq.read_table(folder / f"{name}.parquet"))
    rewritten(folder, lambda told: None)
    assert len(Dataset.open(folder).pictures(range(9))) == 9


MANIFESTS: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("an unknown key", lambda told: told.update(run="rm -rf /"), "Extra inputs"),
    ("another format", lambda told: told.update(format=4), "another version"),
    ("a table less", lambda told: told["tables"].pop("rejects"), "a table or a split is missing"),
    ("a table by a path", lambda told: told["tables"].update({"../x": told["tables"]["images"]}), "tables"),
    (
        "more rows than there are",
        lambda told: told["tables"]["images"].update(rows=10),
        "it says that it has 9",
    ),
    ("rows without end", lambda told: told["tables"]["images"].update(rows=10**12), "less than or equal"),
    ("rows as a text", lambda told: told["tables"]["images"].update(rows="9"), "valid integer"),
    ("other rows", lambda told: told["tables"]["images"].update(digest="sha256:" + "0" * 64), "not the rows"),
    ("people who are not there", lambda told: told["splits"]["train"].append("x"), "splits are not those"),
    ("a licence that cannot be seen", lambda told: told["provenance"].update(license="MIT\u202e"), "license"),
    ("an expression as a path", lambda told: told.update(expressions=["../x"]), "its columns are not"),
]


@pytest.mark.parametrize(
    ("change", "reason"), [one[1:] for one in MANIFESTS], ids=[one[0] for one in MANIFESTS]
)
def test_wrong_manifests_are_refused(folder: Path, change: Any, reason: str) -> None:
    rewritten(folder, change)
    with pytest.raises(DataError, match=reason):
        Dataset.open(folder)


def test_a_deep_manifest_is_refused(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"[" * 100_000 + b"]" * 100_000)
    summed(folder)
    with pytest.raises(DataError, match="nested"):
        Dataset.open(folder)


# Bombs


def held() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def test_compressed_pages_are_not_unfolded(folder: Path) -> None:
    table = pq.read_table(folder / "images.parquet")
    text = pa.array(["x" * (1 << 28), *[None] * 8])
    bomb = table.set_column(table.column_names.index("prompt"), "prompt", text)
    resigned(folder, "images", bomb, compression="zstd", use_dictionary=False)
    assert (folder / "images.parquet").stat().st_size < 1 << 20
    del text, bomb
    before = held()
    with pytest.raises(DataError, match="it is compressed"):
        Dataset.open(folder)
    assert held() - before < 1 << 26


def test_one_text_in_a_million_rows_is_not_written_out(folder: Path) -> None:
    """A dictionary holds it once; written out it would be 16 GiB."""
    rows = 1 << 20
    whole = pq.read_table(folder / "rejects.parquet")
    columns = {
        name: pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(["x" * MAX_TEXT]))
        if whole.schema.field(name).type == pa.string()
        else pa.nulls(rows, whole.schema.field(name).type)
        for name in whole.column_names
    }
    resigned(folder, "rejects", pa.table(columns))
    assert (folder / "rejects.parquet").stat().st_size < 1 << 20
    before = held()
    with pytest.raises(DataError, match="bytes of text"):
        Dataset.open(folder).table("rejects")
    assert held() - before < 1 << 28


def png_of(width: int, height: int) -> bytes:
    """Return a PNG that says that it has so many pixels, in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def swapped(folder: Path, data: bytes) -> Dataset:
    """Put other bytes in the place of the first picture, with all digests right, and open the dataset."""
    blobs = Blobs(folder / "blobs")
    first = Dataset.open(folder).files[0]
    blobs.path(first).unlink()
    digest = blobs.add(data, "image/png")
    change = put("image", str(digest))(pq.read_table(folder / "images.parquet"))
    resigned(folder, "images", put("bytes", len(data))(change))
    return Dataset.open(folder)


def test_a_picture_that_is_a_bomb_is_not_decoded(folder: Path) -> None:
    data, before = swapped(folder, png_of(60_000, 60_000)), held()
    with pytest.raises(DataError, match=r"cannot be used: the picture has .* pixels"):
        data.pictures([0])
    assert held() - before < 1 << 26
    with pytest.raises(DataError, match="cannot be used"):
        data.fitted([0], (64, 64))


def test_a_picture_that_is_another_one_is_refused(folder: Path) -> None:
    data = swapped(folder, encode_png(np.zeros((40, 48, 3), np.uint8)))
    with pytest.raises(DataError, match="has other pixels than the dataset says"):
        data.pictures([0])


# Files that are none


def first_blob(folder: Path) -> Path:
    return min((folder / "blobs").rglob("*.png"))


def link_blob(folder: Path) -> None:
    path = first_blob(folder)
    path.rename(folder.parent / "outside.png")
    path.symlink_to(folder.parent / "outside.png")


def link_folder(folder: Path) -> None:
    inside = first_blob(folder).parent
    inside.rename(folder.parent / "outside")
    inside.symlink_to(folder.parent / "outside")


def link_blobs(folder: Path) -> None:
    (folder / "blobs").rename(folder.parent / "outside")
    (folder / "blobs").symlink_to(folder.parent / "outside")


def pipe_blob(folder: Path) -> None:
    path = first_blob(folder)
    path.unlink()
    os.mkfifo(path)


def extra_blob(folder: Path) -> None:
    Blobs(folder / "blobs").add(b"a stranger", "image/png")


def stray_file(folder: Path) -> None:
    (first_blob(folder).parent / "run.sh").write_text("rm -rf /")


def wrong_place(folder: Path) -> None:
    path = first_blob(folder)
    other = path.parent.parent / ("00" if path.parent.name != "00" else "11")
    other.mkdir(exist_ok=True)
    path.rename(other / path.name)


def wrong_name(folder: Path) -> None:
    path = first_blob(folder)
    digest = digest_bytes(b"another").hex
    (path.parent.parent / digest[:2]).mkdir(exist_ok=True)
    path.rename(path.parent.parent / digest[:2] / f"{digest}.png")


def link_manifest(folder: Path) -> None:
    (folder / "manifest.json").rename(folder.parent / "manifest.json")
    (folder / "manifest.json").symlink_to(folder.parent / "manifest.json")


def link_table(folder: Path) -> None:
    (folder / "images.parquet").rename(folder.parent / "images.parquet")
    (folder / "images.parquet").symlink_to(folder.parent / "images.parquet")


def no_blobs(folder: Path) -> None:
    shutil.rmtree(folder / "blobs")


def sums_of_nothing(folder: Path) -> None:
    (folder / "SHA256SUMS").write_text("")


FILES = (link_blob, link_folder, link_blobs, pipe_blob, extra_blob, stray_file, wrong_place, wrong_name,
         link_manifest, link_table, no_blobs, sums_of_nothing)  # fmt: skip


@pytest.mark.parametrize("attack", FILES)
def test_files_that_are_not_the_datasets_are_refused(folder: Path, attack: Callable[[Path], None]) -> None:
    Dataset.open(folder)
    attack(folder)
    with pytest.raises(DataError):
        Dataset.open(folder)


def test_a_picture_that_becomes_a_link_or_a_pipe_is_not_followed(folder: Path) -> None:
    data = Dataset.open(folder)
    path = data.blobs.path(data.files[0])
    for attack in (lambda: path.symlink_to("/dev/zero"), lambda: os.mkfifo(path)):
        path.unlink()
        attack()
        with pytest.raises(DataError, match="there is no picture"):
            data.pictures([0])


def test_a_footer_that_ends_pyarrow_is_refused(folder: Path) -> None:
    """Histograms of a wrong size, in the statistics of a column: pyarrow 25 aborts when asked for them."""
    path = folder / "images.parquet"
    whole = path.read_bytes()
    length = int.from_bytes(whole[-8:-4], "little")
    refused = 0
    for place in range(len(whole) - 8 - length, len(whole) - 8, 5):
        spoilt = bytearray(whole)
        spoilt[place] ^= 0x10
        path.write_bytes(spoilt)
        summed(folder)
        try:
            Dataset.open(folder)
        except DataError:
            refused += 1
    assert refused > 100


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_bytes_of_a_table_are_explained(folder: Path, data: st.DataObject) -> None:
    """Bytes of a real table changed at will, with the digests of files right: never another error."""
    name = data.draw(st.sampled_from(("images", "triplets")))
    path = folder / f"{name}.parquet"
    whole = path.read_bytes()
    sums = (folder / "SHA256SUMS").read_bytes()
    spoilt = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        spoilt[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        path.write_bytes(spoilt)
        summed(folder)
        try:
            Dataset.open(folder)
        except DataError as error:
            assert error.mend  # noqa: PT017
    finally:
        path.write_bytes(whole)
        (folder / "SHA256SUMS").write_bytes(sums)


def test_long_columns_of_nothing_have_an_end() -> None:
    """Nulls are run-length encoded: a manifest may not ask for more rows than are ever read."""
    from pydantic import ValidationError

    from trainer.data.tables import MAX_ROWS, TableFacts

    with pytest.raises(ValidationError):
        TableFacts(rows=MAX_ROWS + 1, digest=digest_bytes(b""))
