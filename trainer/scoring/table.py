"""The table of scores: rows of a part, rows of the stage, and what is told about them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.digest import Digest, digest_bytes
from registry.manifest import canonical_json
from trainer.errors import DataError
from trainer.scoring.decisions import Decision
from trainer.scoring.scorer import Scored, Scorer

if TYPE_CHECKING:
    import pyarrow as pa

_MEND = "make the pictures again"


def pictures_of(images: Path) -> list[tuple[int, str]]:
    """Return number and digest of every picture, in order; refused requests have none."""
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(images / "images.parquet", columns=["number", "image"])
    except (OSError, ValueError) as error:
        raise DataError(f"the list of pictures in {images} cannot be read: {error}", _MEND) from None
    rows = zip(table["number"].to_pylist(), table["image"].to_pylist(), strict=True)
    found = [(number, image) for number, image in rows if image is not None]
    if not found:
        raise DataError(f"there are no pictures in {images}", _MEND)
    return found


def table_of(images: Sequence[str], found: Sequence[Scored], judge: Scorer, names: Sequence[str]) -> pa.Table:
    """Return the rows of some pictures, without their numbers.

    Args:
        images: digests.
        found: what is seen in each.
        judge: who looked.
        names: expressions that become columns.

    Raises:
        DataError: the scorer gave another number of answers, or numbers that are not finite.
    """
    import pyarrow as pa

    width = len(judge.expressions)
    for one in found:
        whole = len(one.scores) == (0 if one.status == "quarantined" else width)
        if not whole or not all(map(math.isfinite, one.scores)):
            raise DataError(
                f"{judge.name} gave {len(one.scores)} scores for a picture that is {one.status}, or numbers "
                "that are not finite",
                "use a scorer that gives one number for each of its expressions",
            )
    if len(found) != len(images):
        raise DataError(f"{judge.name} gave {len(found)} answers for {len(images)} pictures", "correct it")
    columns: dict[str, Any] = {"image": pa.array(images, pa.string())}
    for name in names:
        place = judge.expressions.index(name)
        values = [one.scores[place] if one.scores else None for one in found]
        columns[f"score_{name}"] = pa.array(values, pa.float32())
    columns["confidence"] = pa.array([one.confidence for one in found], pa.float32())
    columns["disagreement"] = pa.array([one.disagreement for one in found], pa.float32())
    columns["samples"] = pa.array([len(one.samples) for one in found], pa.int8())
    columns["status"] = pa.array([one.status for one in found], pa.string())
    columns["reason"] = pa.array([one.reason for one in found], pa.string())
    columns["scorer"] = pa.array([judge.name] * len(found), pa.string())
    return pa.table(columns)


def joined(
    parts: Sequence[Path], pictures: Sequence[tuple[int, str]], decided: Mapping[str, Decision]
) -> pa.Table:
    """Return a row for each picture's number, as people decided them.

    Args:
        parts: files with the rows of the parts.
        pictures: number and digest of each picture.
        decided: decisions by digest.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.concat_tables([pq.read_table(path) for path in parts])
    if decided:
        table = _with_decisions(table, decided)
    row_of = {image: row for row, image in enumerate(table["image"].to_pylist())}
    table = table.take([row_of[image] for _, image in pictures])
    numbers = pa.array([number for number, _ in pictures], pa.int32())
    return table.add_column(0, "number", numbers)


def _with_decisions(table: pa.Table, decided: Mapping[str, Decision]) -> pa.Table:
    """Return the rows as people decided them."""
    import pyarrow as pa

    rows = table.to_pylist()
    for row in rows:
        decision = decided.get(row["image"])
        if decision is None:
            continue
        accepted, words = decision.scores or {}, f": {decision.reason}" if decision.reason else ""
        scores = [name for name in row if name.startswith("score_")]
        row.update({name: accepted.get(name.removeprefix("score_")) for name in scores})
        row["status"] = "scored" if accepted else "quarantined"
        row["confidence"] = 1.0 if accepted else 0.0
        row["reason"] = f"{'accepted' if accepted else 'rejected'} by {decision.by}{words}"
    return pa.Table.from_pylist(rows, table.schema)


def digest(table: pa.Table) -> Digest:
    """Return the digest of the scores' values; another pyarrow may pack the same ones into other bytes."""
    columns = {name: digest_bytes(repr(table[name].to_pylist()).encode()) for name in table.column_names}
    return digest_bytes(canonical_json(columns))


def agreement(images: Path, scores: pa.Table, expressions: Sequence[str]) -> float:
    """Return the share of pictures at the highest intensity whose strongest score is the asked expression."""
    import numpy as np
    import pyarrow.parquet as pq

    listed = pq.read_table(images / "images.parquet", columns=["number", "expression", "intensity"])
    asked = {line["number"]: line for line in listed.to_pylist() if line["expression"] in expressions}
    top = max((line["intensity"] for line in asked.values()), default=0)
    rows = np.stack([scores[f"score_{name}"].to_numpy() for name in expressions], axis=1)
    judged = [
        (row, asked[number]["expression"])
        for row, number in enumerate(scores["number"].to_pylist())
        if number in asked and asked[number]["intensity"] == top and np.isfinite(rows[row]).all()
    ]
    hits = [expressions[int(rows[row].argmax())] == name for row, name in judged]
    return round(sum(hits) / len(hits), 4) if hits else 0.0
