"""What judges say of edited pictures: one row for each picture, from which all metrics are computed.

Pixels end here. A reading is small and depends on nothing but the picture, its source and the judges, so that
it can be kept, compared with that of another adapter years later, and opened by anything that reads Parquet.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.errors import DataError
from trainer.evaluation.plan import Ask

VALUES: Mapping[str, str] = {
    "source_face": "1 where a face was found in the source, else 0",
    "identity": "cosine of the identity embeddings, source against edit; -1 to 1, NaN where there is no face",
    "psnr": "dB, edit against the true answer; NaN where there is none",
    "seam": "gradient energy across token borders over that inside tokens",
    "seam_truth": "the same of the true answer; NaN where there is none",
    "background_ssim": "SSIM of edit and source outside of the face; -1 to 1, 1 is unchanged",
    "background_lpips": "learned perceptual distance of edit and source outside of the face; 0 is unchanged; "
    "NaN where its network is not on this machine",
}
"""Name -> what a value of a picture is; see `trainer.evaluation.reading`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Readings:
    """N judged pictures.

    Attributes:
        subjects: [N] index of the subject in the plan.
        asks: N requests.
        judged: [N, K] judged intensity of each of the judge's K classes; a row of NaN where it saw nothing.
        values: name (see `VALUES`) -> [N].
    """

    subjects: NDArray[np.int64]
    asks: tuple[Ask, ...]
    judged: NDArray[np.float64]
    values: Mapping[str, NDArray[np.float64]]

    def __len__(self) -> int:
        return len(self.asks)

    def where(self, wanted: Iterable[int]) -> Readings:
        """The rows with these numbers."""
        rows = np.fromiter(wanted, np.int64)
        return Readings(
            subjects=self.subjects[rows],
            asks=tuple(self.asks[row] for row in rows),
            judged=self.judged[rows],
            values={name: values[rows] for name, values in self.values.items()},
        )

    def singles(self, intensity: float | None = None) -> Readings:
        """The rows that ask for one expression, at one intensity or at any above 0."""
        return self.where(
            row
            for row, ask in enumerate(self.asks)
            if len(ask) == 1 and (intensity is None or ask[0][1] == intensity)
        )

    def row_of(self) -> dict[tuple[int, Ask], int]:
        """Subject and request -> number of the row."""
        return {key: row for row, key in enumerate(zip(self.subjects.tolist(), self.asks, strict=True))}

    @classmethod
    def joined(cls, parts: Sequence[Readings]) -> Readings:
        """The rows of all parts, in their order."""
        return cls(
            subjects=np.concatenate([part.subjects for part in parts]),
            asks=tuple(ask for part in parts for ask in part.asks),
            judged=np.concatenate([part.judged for part in parts]),
            values={name: np.concatenate([part.values[name] for part in parts]) for name in VALUES},
        )

    def write(self, file: Path, judged: Sequence[str]) -> None:
        """Write a Parquet file, a row a picture: subject, ask (JSON), ``judged_<expression>`` and values."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {
            "subject": pa.array(self.subjects, pa.int32()),
            "ask": pa.array([json.dumps(dict(ask)) for ask in self.asks], pa.string()),
            **{
                f"judged_{name}": pa.array(self.judged[:, at], pa.float64()) for at, name in enumerate(judged)
            },
            **{name: pa.array(self.values[name], pa.float64()) for name in VALUES},
        }
        pq.write_table(pa.table(columns), file)

    @classmethod
    def read(cls, file: Path, judged: Sequence[str]) -> Readings:
        """Read what `write` wrote.

        Raises:
            DataError: the file is missing or damaged, or of another version.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(file)
            asks = [json.loads(text) for text in table["ask"].to_pylist()]
            return cls(
                subjects=table["subject"].to_numpy().astype(np.int64),
                asks=tuple(tuple(sorted((str(name), float(x)) for name, x in ask.items())) for ask in asks),
                judged=np.stack([table[f"judged_{name}"].to_numpy() for name in judged], axis=1),
                values={name: table[name].to_numpy() for name in VALUES},
            )
        except (OSError, KeyError, ValueError, AttributeError, pa.ArrowException) as error:
            raise DataError(
                f"the readings {file} cannot be read: {error}", "remove their folder and evaluate again"
            ) from None
