"""The tables of a dataset: parquet files whose rows have a digest of their own, read as if from an enemy.

Other versions of pyarrow pack the same rows into other bytes (each writes its version into the file, and may
choose other pages). So a dataset's version rests on the *rows*: `Rows` hashes names, types and values in
order, however they are packed or cut into pieces.

Tables are written without compression: most of them is digests, which do not shrink, and a reader that
refuses compressed pages cannot be made to unfold them. Text is read as a dictionary, so that a long text that
stands in each of a million rows is held once and measured before it is written out.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from registry.digest import Digest, digest_bytes
from registry.manifest import canonical_json
from trainer.data.footer import codecs
from trainer.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

MAX_ROWS: Final = 4_000_000
MAX_FILE_BYTES: Final = 4 << 30
MAX_TEXT: Final = 16 << 10
"""Characters of the longest text in a row, in bytes of UTF-8."""
_MAX_TEXTS = 8 << 30  # bytes of all texts of a column, written out
_GROUP = 4096  # rows that are held until they are written
_NUMBERS: Final = {"int8": "<i1", "int16": "<i2", "int32": "<i4", "int64": "<i8", "float": "<f4",
                   "double": "<f8", "bool": "<u1"}  # fmt: skip
_MEND = "give the folder of a dataset; one that is damaged has to be built again"


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A column: its name, its type and whether a value may be missing.

    Attributes:
        name: of the column.
        kind: "string", "bool", "int8", "int16", "int32", "int64", "float" (32 bits) or "double".
        nullable: whether values may be missing.
    """

    name: str
    kind: str
    nullable: bool = True


class TableFacts(BaseModel):
    """What a manifest says about a table: how many rows, and their digest (see `Rows`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    rows: int = Field(ge=0, le=MAX_ROWS)
    digest: Digest


class Rows:
    """The digest of a table's rows.

    Of each column three streams are hashed with sha256, row after row: a byte 1 for a value and 0 for none;
    the value, little-endian (0 for none); and of texts first the number of bytes, int32, then the UTF-8. The
    digest is the sha256 of the canonical JSON of the number of rows, and of name, type and hashes of each
    column in order. How the rows were cut into pieces does not count.
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = tuple(columns)
        self._hashes = [[hashlib.sha256() for _ in range(3)] for _ in columns]
        self.count = 0

    def update(self, batch: pa.RecordBatch) -> None:
        """Hash more rows; the batch has the columns in order, texts not as dictionaries."""
        import pyarrow as pa
        import pyarrow.compute as pc

        for column, values, (there, data, lengths) in zip(
            self._columns, batch.columns, self._hashes, strict=True
        ):
            there.update(values.is_valid().to_numpy(zero_copy_only=False).astype(np.uint8).tobytes())
            if column.kind == "string":
                filled = pa.concat_arrays([pc.fill_null(values, "")])
                ends = np.frombuffer(filled.buffers()[1], np.int32)[
                    filled.offset : filled.offset + len(filled) + 1
                ]
                lengths.update(np.diff(ends).astype("<i4").tobytes())
                text = filled.buffers()[2]
                data.update(b"" if text is None else memoryview(text)[ends[0] : ends[-1]])
            else:
                filled = pc.fill_null(values, False if column.kind == "bool" else 0)
                data.update(filled.to_numpy(zero_copy_only=False).astype(_NUMBERS[column.kind]).tobytes())
        self.count += batch.num_rows

    def facts(self) -> TableFacts:
        """Return the number of rows so far and their digest."""
        told = [[column.name, column.kind, *(one.hexdigest() for one in hashes)]
                for column, hashes in zip(self._columns, self._hashes, strict=True)]  # fmt: skip
        digest = digest_bytes(canonical_json({"rows": self.count, "columns": told}))
        return TableFacts(rows=self.count, digest=digest)


@dataclass(kw_only=True, slots=True)
class TableWriter:
    """Writes rows as they come; at most a few thousand are held. Use it as a context.

    Attributes:
        path: of the file.
        columns: in order.
    """

    path: Path
    columns: Sequence[Column]
    _waiting: list[Mapping[str, Any]] = field(default_factory=list)
    _writer: Any = None
    _rows: Rows = field(init=False)

    def __post_init__(self) -> None:
        self._rows = Rows(self.columns)

    def __enter__(self) -> Self:
        import pyarrow.parquet as pq

        self._writer = pq.ParquetWriter(
            self.path, _schema(self.columns), version="2.6", compression="none", use_dictionary=True,
            write_statistics=False, store_schema=False,
        )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        self._writer.close()

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row: the values by column; a missing key is a missing value.

        Raises:
            KeyError: there is no such column.
            ValueError: a value is of another type, or missing where it must not be.
        """
        if unknown := row.keys() - {column.name for column in self.columns}:
            raise KeyError(f"no such columns: {', '.join(sorted(unknown))}")
        self._waiting.append(row)
        if len(self._waiting) >= _GROUP:
            self._flush()

    def facts(self) -> TableFacts:
        """Return what a manifest says about the table, after the context has ended."""
        return self._rows.facts()

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._waiting:
            return
        batch = pa.RecordBatch.from_pylist(self._waiting, schema=_schema(self.columns))
        for column, values in zip(self.columns, batch.columns, strict=True):
            if values.null_count and not column.nullable:
                raise ValueError(f"column {column.name} misses a value")
        self._rows.update(batch)
        self._writer.write_batch(batch, row_group_size=_GROUP)
        self._waiting.clear()


def read_table(path: Path, columns: Sequence[Column], facts: TableFacts, digest: Digest) -> pa.Table:
    """Return a table that is the one of the manifest; texts are dictionaries.

    Args:
        path: of the file.
        columns: what it must have, in order.
        facts: what the manifest says about it.
        digest: sha256 of the file; nothing is parsed before it is right.

    Raises:
        DataError: it is missing, a link, another file, not of these columns, or it has other rows.
    """
    import pyarrow as pa

    data = read_plain(path, MAX_FILE_BYTES)
    if digest_bytes(data) != digest:
        raise DataError(f"{path} is not the file that was written", _MEND)
    try:
        table = _parsed(data, columns, facts.rows)
        rows = Rows(columns)
        for batch in table.to_batches(_GROUP):
            rows.update(_plain(batch, columns))
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError) as error:
        raise DataError(f"{path} is no table of a dataset: {error}", _MEND) from None
    if rows.facts() != facts:
        raise DataError(f"{path} has not the rows that the manifest names", _MEND)
    return table


def read_plain(path: Path, most: int) -> bytes:
    """Return the bytes of a plain file.

    Raises:
        DataError: it is missing, a link, or larger than ``most`` bytes.
    """
    try:
        about = path.lstat()
        if not stat.S_ISREG(about.st_mode) or about.st_size > most:
            raise OSError(f"it is no plain file of at most {most} bytes")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}", _MEND) from None


def _parsed(data: bytes, columns: Sequence[Column], rows: int) -> pa.Table:
    """Return the table in a file's bytes.

    Raises:
        ValueError: it is not of these columns and rows.
        pa.ArrowException: it is no parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if codecs(data) - {0}:
        raise ValueError("it is compressed")
    texts = [column.name for column in columns if column.kind == "string"]
    with pq.ParquetFile(pa.BufferReader(data), read_dictionary=texts) as file:
        wanted = [(column.name, column.kind) for column in columns]
        if _told(file.schema_arrow) != wanted:
            raise ValueError(f"its columns are not {', '.join(name for name, _ in wanted)}")
        if file.metadata.num_rows != rows:
            raise ValueError(f"it says that it has {file.metadata.num_rows} rows instead of {rows}")
        table = file.read(use_threads=False)
    table.validate(full=True)  # places in dictionaries, UTF-8
    for column in columns:
        values = table.column(column.name)
        if values.null_count and not column.nullable:
            raise ValueError(f"column {column.name} misses a value")
        if column.kind == "string":
            _check_texts(column.name, values)
        elif column.kind in ("float", "double"):
            found = values.drop_null().to_numpy()
            if not np.isfinite(found).all():
                raise ValueError(f"column {column.name} has a number that is not finite")
    return table


def _check_texts(name: str, values: pa.ChunkedArray) -> None:
    """Refuse texts that are too long, one by one or all together, before they are written out."""
    import pyarrow.compute as pc

    total = 0
    for chunk in values.chunks:
        sizes = pc.binary_length(chunk.dictionary).fill_null(0).to_numpy(zero_copy_only=False)
        if sizes.size and sizes.max() > MAX_TEXT:
            raise ValueError(f"column {name} has a text of {sizes.max()} bytes; {MAX_TEXT} are read")
        places = chunk.indices.drop_null().to_numpy()
        total += int(sizes[places].sum()) if places.size else 0
    if total > _MAX_TEXTS:
        raise ValueError(f"column {name} has {total} bytes of text; {_MAX_TEXTS} are read")


def _plain(batch: pa.RecordBatch, columns: Sequence[Column]) -> pa.RecordBatch:
    """Return a batch with the texts written out."""
    import pyarrow as pa

    values = [
        one.dictionary_decode() if isinstance(one, pa.DictionaryArray) else one for one in batch.columns
    ]
    return pa.RecordBatch.from_arrays(values, names=[column.name for column in columns])


def _told(schema: pa.Schema) -> list[tuple[str, str]]:
    import pyarrow as pa

    kinds = []
    for one in schema:
        kind = one.type.value_type if pa.types.is_dictionary(one.type) else one.type
        kinds.append((one.name, str(kind)))
    return kinds


def _schema(columns: Sequence[Column]) -> pa.Schema:
    import pyarrow as pa

    kinds = {"string": pa.string(), "float": pa.float32(), "double": pa.float64(), "bool": pa.bool_()}
    return pa.schema([pa.field(one.name, kinds.get(one.kind) or getattr(pa, one.kind)()) for one in columns])
