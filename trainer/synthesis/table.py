"""The table of a recipe's pictures, ``images.parquet``: one row for each request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import pyarrow as pa

IMAGES_NAME = "images.parquet"


def schema() -> pa.Schema:
    """Return the columns.

    ``image`` (digest of the file), ``media_type``, ``width`` and ``height`` are null when the request was
    refused, and ``refused`` says why. ``expression`` is null for the neutral picture, ``truth`` (12 numbers
    in the order of `trainer.portraits.expressions.EXPRESSIONS`) where nobody knows it.
    """
    import pyarrow as pa

    text = pa.string()
    return pa.schema(
        [
            pa.field("number", pa.int32(), nullable=False),
            pa.field("image", text),
            pa.field("media_type", text),
            pa.field("width", pa.int32()),
            pa.field("height", pa.int32()),
            pa.field("split", text, nullable=False),
            pa.field("identity", text, nullable=False),
            pa.field("domain", text),
            pa.field("pose", pa.int64()),
            pa.field("expression", text),
            pa.field("intensity", pa.float32(), nullable=False),
            pa.field("truth", pa.list_(pa.float32())),
            pa.field("source", text, nullable=False),
            pa.field("model", text),
            pa.field("prompt", text),
            pa.field("license", text, nullable=False),
            pa.field("origin", text, nullable=False),
            pa.field("request", text),
            pa.field("refused", text),
        ]
    )


class Table:
    """Writes the table piece by piece; a context manager."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self._schema = schema()
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows, each a value for every column."""
        import pyarrow as pa

        self._writer.write_table(pa.Table.from_pylist(list(rows), schema=self._schema))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self._writer.close()
