"""Tables of datasets, pictures by digest, and what is measured: what goes in comes out, whoever packs it."""

from __future__ import annotations

import json
import multiprocessing
import os
import struct
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from registry.digest import Digest, digest_bytes
from trainer.data import tables
from trainer.data.blobs import Blobs, encode_png, media_type
from trainer.data.measures import BITS, distance, look, near, packed, perceptual_hash, sharpness
from trainer.data.tables import Column, Rows, TableWriter, read_table
from trainer.errors import DataError

KINDS: dict[str, st.SearchStrategy[Any]] = {
    "string": st.text(st.characters(exclude_categories=("Cs",)), max_size=12),
    "bool": st.booleans(),
    "int8": st.integers(-128, 127),
    "int16": st.integers(-(1 << 15), (1 << 15) - 1),
    "int32": st.integers(-(1 << 31), (1 << 31) - 1),
    "int64": st.integers(-(1 << 63), (1 << 63) - 1),
    "float": st.floats(width=32, allow_nan=False, allow_infinity=False),
    "double": st.floats(allow_nan=False, allow_infinity=False),
}
COLUMNS = tuple(Column(name=f"a_{kind}", kind=kind) for kind in KINDS)
ROWS = st.lists(
    st.fixed_dictionaries({f"a_{kind}": st.none() | values for kind, values in KINDS.items()}), max_size=30
)


def written(path: Path, rows: Sequence[dict[str, Any]]) -> tables.TableFacts:
    with TableWriter(path=path, columns=COLUMNS) as writer:
        for row in rows:
            writer.add(row)
    return writer.facts()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS)
def test_rows_come_back(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "a.parquet"
    facts = written(path, rows)
    assert read_table(path, COLUMNS, facts, digest_bytes(path.read_bytes())).to_pylist() == rows
    assert facts.rows == len(rows)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, cut=st.integers(1, 7))
def test_the_digest_of_rows_is_the_same_however_they_are_cut(
    tmp_path: Path, rows: list[dict[str, Any]], cut: int
) -> None:
    facts = written(tmp_path / "a.parquet", rows)
    table = pq.read_table(tmp_path / "a.parquet")
    found = Rows(COLUMNS)
    for begin in range(0, len(rows), cut):
        for batch in table.slice(begin, cut).to_batches():
            found.update(batch)
    assert found.facts() == facts


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS.filter(len), other=ROWS.filter(len))
def test_other_rows_have_another_digest(tmp_path: Path, rows: list[Any], other: list[Any]) -> None:
    def shown(values: list[dict[str, Any]]) -> list[list[Any]]:
        return [[repr(value) for value in row.values()] for row in values]  # 0.0 and -0.0 are two

    same = written(tmp_path / "a.parquet", rows) == written(tmp_path / "b.parquet", other)
    assert same == (shown(rows) == shown(other))


def test_texts_that_run_together_alike_have_different_digests(tmp_path: Path) -> None:
    column = "a_string"
    facts = [
        written(tmp_path / "a.parquet", [{column: one} for one in texts])
        for texts in (("ab", "c"), ("a", "bc"), ("abc", ""), ("abc", None))
    ]
    assert len({one.digest for one in facts}) == 4


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS)
def test_the_digest_is_the_one_that_is_documented(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    """Written anew from the words of `Rows`, without Arrow: anybody can compute a dataset's version."""
    layout = {"bool": "<B", "int8": "<b", "int16": "<h", "int32": "<i", "int64": "<q", "float": "<f",
              "double": "<d"}  # fmt: skip
    told = []
    for column in COLUMNS:
        values = [row[column.name] for row in rows]
        there = b"".join(b"\0" if value is None else b"\1" for value in values)
        if column.kind == "string":
            texts = [(value or "").encode() for value in values]
            data, lengths = b"".join(texts), b"".join(struct.pack("<i", len(text)) for text in texts)
        else:
            data, lengths = b"".join(struct.pack(layout[column.kind], value or 0) for value in values), b""
            if column.kind in ("float", "double"):
                zero = struct.pack(layout[column.kind], 0.0)
                data = b"".join(zero if value is None else struct.pack(layout[column.kind], value)
                                for value in values)  # fmt: skip
        told.append(
            [column.name, column.kind, *(sha256(part).hexdigest() for part in (there, data, lengths))]
        )
    text = json.dumps({"rows": len(rows), "columns": told}, sort_keys=True, separators=(",", ":"))
    facts = written(tmp_path / "a.parquet", rows)
    assert facts.digest == f"sha256:{sha256(text.encode()).hexdigest()}"


def test_many_rows_are_written_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"a_int32": number} for number in range(25)]
    whole = written(tmp_path / "a.parquet", rows)
    monkeypatch.setattr(tables, "_GROUP", 10)
    assert written(tmp_path / "b.parquet", rows) == whole
    assert pq.ParquetFile(tmp_path / "b.parquet").metadata.num_row_groups == 3


@pytest.mark.parametrize(
    ("row", "error"),
    [({"b": 1}, KeyError), ({"a_int8": 300}, ValueError), ({"a_int32": "x"}, (ValueError, TypeError))],
)
def test_rows_that_do_not_fit_are_refused(tmp_path: Path, row: dict[str, Any], error: Any) -> None:
    with pytest.raises(error):
        written(tmp_path / "a.parquet", [row])


def test_a_value_that_must_be_there_is_asked_for(tmp_path: Path) -> None:
    columns = (Column(name="a", kind="int32", nullable=False),)
    with (
        pytest.raises(ValueError, match="column a misses a value"),
        TableWriter(path=tmp_path / "a.parquet", columns=columns) as writer,
    ):
        writer.add({"a": None})


# Pictures by digest


def pixels(seed: int, side: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8)


def test_a_picture_is_kept_once_and_comes_back(tmp_path: Path) -> None:
    blobs, data = Blobs(tmp_path / "blobs"), encode_png(pixels(1))
    digest = blobs.add(data, "image/png")
    assert blobs.add(data, "image/png") == digest == digest_bytes(data)
    assert list(blobs) == [digest]
    assert digest in blobs
    assert blobs.read(digest) == data
    assert blobs.media_type(digest) == "image/png"
    assert np.array_equal(blobs.pixels(digest), pixels(1))
    assert blobs.path(digest) == tmp_path / "blobs" / digest.hex[:2] / f"{digest.hex}.png"


def test_a_picture_that_was_cut_short_is_written_again(tmp_path: Path) -> None:
    blobs, data = Blobs(tmp_path), encode_png(pixels(1))
    digest = blobs.add(data, "image/png")
    blobs.path(digest).write_bytes(data[:-1])
    with pytest.raises(DataError, match="is not the one that its name says"):
        blobs.read(digest)
    blobs.add(data, "image/png")
    assert blobs.read(digest) == data


def test_links_share_the_bytes(tmp_path: Path) -> None:
    one, other = Blobs(tmp_path / "a"), Blobs(tmp_path / "b")
    digest = one.add(encode_png(pixels(1)), "image/png")
    one.link(digest, other)
    one.link(digest, other)
    assert os.path.samefile(one.path(digest), other.path(digest))
    with pytest.raises(DataError, match="there is no picture"):
        one.link(Digest(f"sha256:{1:064}"), other)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_kinds_of_pictures_are_told_apart(tmp_path: Path, kind: str) -> None:
    Image.fromarray(pixels(1)).save(tmp_path / "one", kind)
    data = (tmp_path / "one").read_bytes()
    assert media_type(data) == f"image/{kind.lower()}"
    assert media_type(data[1:]) is None
    digest = Blobs(tmp_path / "blobs").add(data, f"image/{kind.lower()}")
    assert Blobs(tmp_path / "blobs").pixels(digest).shape == (20, 20, 3)


def test_other_types_are_not_kept(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="image/gif"):
        Blobs(tmp_path).add(b"GIF89a", "image/gif")


def _add_all(folder: Path, start: Any) -> None:
    start.wait()
    for number in range(40):
        Blobs(folder).add(encode_png(pixels(number)), "image/png")


def test_several_writers_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(3)
    writers = [context.Process(target=_add_all, args=(tmp_path, start)) for _ in range(3)]
    for one in writers:
        one.start()
    for one in writers:
        one.join()
        assert one.exitcode == 0
    wanted = [encode_png(pixels(number)) for number in range(40)]
    assert set(Blobs(tmp_path)) == {digest_bytes(data) for data in wanted}
    assert all(Blobs(tmp_path).read(one) for one in Blobs(tmp_path))
    assert not list(tmp_path.rglob("*.tmp"))


# What is measured


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 40), st.integers(3, 40), st.integers(0, 1000))
def test_sharpness_is_the_variance_of_the_laplacian(height: int, width: int, seed: int) -> None:
    picture = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    luma = np.floor(picture @ np.array([0.299, 0.587, 0.114]) + 0.5 + 1e-9)
    kernel = {(0, 1): 1, (1, 0): 1, (1, 2): 1, (2, 1): 1, (1, 1): -4}
    found = sum(factor * luma[y : height - 2 + y, x : width - 2 + x] for (y, x), factor in kernel.items())
    assert sharpness(picture) == pytest.approx(float(np.var(found)), rel=1e-9, abs=1e-9)


def test_sharpness_of_extremes() -> None:
    assert sharpness(np.full((8, 8, 3), 77, np.uint8)) == 0.0
    board = np.indices((64, 64)).sum(0)[..., None].repeat(3, 2) % 2 * np.uint8(255)
    assert sharpness(board.astype(np.uint8)) == 1020**2  # alternating between -1020 and 1020


def test_perceptual_hashes_see_what_people_see() -> None:
    """A scaled and packed copy is near, another picture is half of all bits away."""
    source = np.asarray(Image.fromarray(pixels(3, 8)).resize((256, 256), Image.Resampling.BICUBIC))
    copy = np.asarray(Image.fromarray(source).resize((180, 180)))
    other = np.asarray(Image.fromarray(pixels(4, 8)).resize((256, 256), Image.Resampling.BICUBIC))
    first, quality = perceptual_hash(source)
    assert quality == 100
    assert distance(first, perceptual_hash(copy)[0]) <= 31  # what Meta calls a match
    assert 80 < distance(first, perceptual_hash(other)[0]) < 176
    assert look(np.full((64, 64, 3), 9, np.uint8)).quality == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 128), st.sampled_from((2, 60, 300)))
def test_near_hashes_are_all_found(seed: int, most: int, count: int) -> None:
    source = np.random.default_rng(seed)
    hashes = [source.integers(0, 256, BITS // 8, np.uint8).tobytes().hex() for _ in range(count)]
    for place in range(1, count, 3):  # some are near others
        flipped = int(hashes[place - 1], 16)
        for bit in source.integers(0, BITS, 20):
            flipped ^= 1 << int(bit)
        hashes[place] = f"{flipped:064x}"
    expected = {
        (first, second, distance(hashes[first], hashes[second]))
        for first in range(count)
        for second in range(first + 1, count)
        if distance(hashes[first], hashes[second]) <= most
    }
    assert set(near(packed(hashes), most)) == expected


def test_tables_do_not_depend_on_pyarrows_own_types(tmp_path: Path) -> None:
    """Without Arrow's schema in the file, any reader of parquet sees plain types."""
    written(tmp_path / "a.parquet", [{"a_string": "x"}])
    about = pq.read_metadata(tmp_path / "a.parquet")
    assert about.metadata is None
    assert pa.types.is_string(pq.read_schema(tmp_path / "a.parquet").field("a_string").type)
