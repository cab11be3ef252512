"""Folders as the stages before a dataset leave them, and small datasets, written without those stages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from registry.manifest import canonical_json
from trainer.data import columns
from trainer.data.blobs import Blobs, encode_png
from trainer.data.dataset import Member, Triplet
from trainer.data.digests import pixel_digest
from trainer.data.measures import look
from trainer.data.tables import Rows
from trainer.data.writing import DatasetWriter, provenance
from trainer.portraits.expressions import EXPRESSIONS
from trainer.portraits.renderer import identity, one_hot, pose, render

#: Columns of images.parquet and scores.parquet of the stages.
IMAGES = pa.schema(
    [("number", pa.int32()), ("image", pa.string()), ("media_type", pa.string()), ("width", pa.int32()),
     ("height", pa.int32()), ("split", pa.string()), ("identity", pa.string()), ("domain", pa.string()),
     ("pose", pa.int64()), ("expression", pa.string()), ("intensity", pa.float32()),
     ("truth", pa.list_(pa.float32())), ("source", pa.string()), ("model", pa.string()),
     ("prompt", pa.string()), ("license", pa.string()), ("origin", pa.string()), ("request", pa.string()),
     ("refused", pa.string())]
)  # fmt: skip
SCORES = (
    [("number", pa.int32()), ("image", pa.string())],
    [("confidence", pa.float32()), ("disagreement", pa.float32()), ("samples", pa.int8()),
     ("status", pa.string()), ("reason", pa.string()), ("scorer", pa.string())],
)  # fmt: skip

Row = dict[str, Any]


def drawn(
    people: Mapping[str, str], expressions: Sequence[str], intensities: Sequence[float], size: int = 64
) -> list[Row]:
    """Return rows of drawn people as the renderer makes them; each has its ``pixels``, too.

    Args:
        people: identity such as "human-100" -> split.
        expressions, intensities: each person has all of them, and a neutral picture first.
        size: of the pictures.
    """
    faces = [(None, 0.0), *((name, level) for name in expressions for level in intensities)]
    rows: list[Row] = []
    for name, split in people.items():
        domain, number = name.rsplit("-", 1)
        for expression, level in faces:
            vector = one_hot(expression or "neutral", level)
            rows.append(
                {
                    "number": len(rows),
                    "pixels": render(identity(int(number), domain), vector, size, pose(int(number))),  # type: ignore[arg-type]
                    "split": split,
                    "identity": name,
                    "domain": domain,
                    "pose": int(number),
                    "expression": expression,
                    "intensity": level,
                    "truth": [float(value) for value in vector],
                    "source": "portrait-renderer/1",
                    "license": "Apache-2.0",
                    "origin": "drawn",
                }
            )
    return rows


def true_scores(rows: Iterable[Row], expressions: Sequence[str]) -> list[Row]:
    """Return what a scorer says that sees exactly what was drawn."""
    return [
        {
            "number": row["number"],
            **{f"score_{name}": row["truth"][EXPRESSIONS.index(name)] for name in expressions},
            "confidence": 1.0,
            "disagreement": 0.0,
            "samples": 1,
            "status": "scored",
            "scorer": "knowing/1",
        }
        for row in rows
    ]


def write_stages(
    folder: Path,
    rows: Sequence[Row],
    scores: Sequence[Row],
    expressions: Sequence[str],
    encode: Callable[[np.ndarray], bytes] = encode_png,
) -> tuple[Path, Path]:
    """Write ``images`` and ``scored`` into a folder; a row without pixels has no file."""
    images, scored = folder / "images", folder / "scored"
    blobs = Blobs(images / "blobs")
    told, seen = [], {}
    for row in rows:
        pixels = row.get("pixels")
        about = {name: row.get(name) for name in IMAGES.names}
        if pixels is not None:
            digest = blobs.add(encode(pixels), "image/png")
            about |= {"image": str(digest), "media_type": "image/png", "width": pixels.shape[1],
                      "height": pixels.shape[0]}  # fmt: skip
        seen[row["number"]] = about["image"]
        told.append(about)
    images.mkdir(parents=True, exist_ok=True)
    scored.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(told, schema=IMAGES), images / "images.parquet")
    before, after = SCORES
    schema = pa.schema([*before, *((f"score_{name}", pa.float32()) for name in expressions), *after])
    lines = [{"image": seen[row["number"]], **row} for row in scores]
    pq.write_table(pa.Table.from_pylist(lines, schema=schema), scored / "scores.parquet")
    return images, scored


def small_dataset(
    folder: Path, people: Sequence[tuple[str, str, Sequence[np.ndarray]]], license: str = "CC0-1.0"
) -> Path:
    """Write a dataset of one triplet a person: (split, identity, neutral picture and two edits)."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("fear", "surprised")
    with DatasetWriter(folder, names) as writer:
        for split, who, pictures in people:
            rows = []
            for pixels, expression in zip(pictures, (None, *names), strict=True):
                found = look(pixels)
                rows.append(
                    writer.picture(
                        {
                            "pixels": pixel_digest(pixels),
                            "height": pixels.shape[0],
                            "width": pixels.shape[1],
                            "split": split,
                            "identity": who,
                            "expression": expression,
                            "intensity": 0.0 if expression is None else 1.0,
                            "source": "drawn for a test",
                            "license": license,
                            "sharpness": found.sharpness,
                            "pdq": found.pdq,
                            "pdq_quality": found.quality,
                        },
                        (encode_png(pixels), "image/png"),
                    )
                )
            a, b = (Member(image=row, expression=name, intensity=1.0)
                    for row, name in zip(rows[1:], names, strict=True))  # fmt: skip
            writer.triplet(Triplet(split=split, identity=who, source=rows[0], a=a, b=b))
    writer.complete(provenance(source="drawn for a test", license=license, scorer="nobody"))
    return folder


def resigned(folder: Path, name: str, table: pa.Table, *, manifest: bool = True, **packing: Any) -> None:
    """Put another table into a dataset, with the digests that belong to it.

    Args:
        folder: of the dataset.
        name: of the table.
        table: with any columns; only of the right ones the rows have a digest.
        manifest: whether the manifest is written anew, too.
        packing: how pyarrow writes it.
    """
    path = folder / f"{name}.parquet"
    pq.write_table(table, path, **{"compression": "none", "store_schema": False} | packing)
    value = json.loads((folder / "manifest.json").read_bytes())
    if manifest:
        wanted = {"images": columns.images(value["expressions"]), "triplets": columns.TRIPLETS,
                  "rejects": columns.REJECTS}[name]  # fmt: skip
        facts = {"rows": table.num_rows, "digest": "sha256:" + "0" * 64}
        with suppress(Exception):
            rows = Rows(wanted)
            for batch in table.to_batches():
                rows.update(batch)
            facts = rows.facts().model_dump(mode="json")
        rewritten(folder, lambda told: told["tables"].update({name: facts}))
    summed(folder)


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest of a dataset."""
    value = json.loads((folder / "manifest.json").read_bytes())
    change(value)
    (folder / "manifest.json").write_bytes(canonical_json(value))
    summed(folder)


def summed(folder: Path) -> None:
    """Write SHA256SUMS for the files as they are."""
    names = ("manifest.json", "images.parquet", "triplets.parquet", "rejects.parquet")
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(lines))
