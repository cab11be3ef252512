"""Writing a dataset: pictures, triplets and rejects as they come, at last the manifest that names them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import ValidationError

from registry.digest import Digest, digest_bytes
from registry.manifest import canonical_json
from trainer.data import columns
from trainer.data.blobs import Blobs, type_of
from trainer.data.dataset import BLOBS_NAME, MANIFEST_NAME, SUMS_NAME, Triplet
from trainer.data.digests import file_digest
from trainer.data.manifest import TABLES, Manifest, Provenance, Survival
from trainer.data.tables import TableWriter
from trainer.errors import DataError


class DatasetWriter:
    """Writes a dataset into an empty folder. Use it as a context, and call `complete` after it.

    Args:
        folder: where.
        expressions: those that the pictures have scores for.
    """

    def __init__(self, folder: Path, expressions: Sequence[str]) -> None:
        self._folder, self._expressions = folder, tuple(expressions)
        kinds = {"images": columns.images(expressions), "triplets": columns.TRIPLETS,
                 "rejects": columns.REJECTS}  # fmt: skip
        self._tables = {
            name: TableWriter(path=folder / f"{name}.parquet", columns=kinds[name]) for name in TABLES
        }
        self._blobs = Blobs(folder / BLOBS_NAME)
        self._people: dict[str, set[str]] = {"train": set(), "validation": set()}
        self._rows: dict[str, int] = {}
        self._open = ExitStack()

    def __enter__(self) -> Self:
        for table in self._tables.values():
            self._open.enter_context(table)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    @property
    def pictures(self) -> int:
        """How many pictures there are."""
        return len(self._rows)

    def picture(self, row: Mapping[str, Any], file: Blobs | tuple[bytes, str]) -> int:
        """Keep a picture and return its row; one with the same pixels is kept once, as it first came.

        Args:
            row: values of `trainer.data.columns.images`; ``image``, ``media_type`` and ``bytes`` are found
                here where they are missing.
            file: a folder that has the picture's file, or its bytes and media type.
        """
        known = self._rows.get(row["pixels"])
        if known is not None:
            return known
        if isinstance(file, Blobs):
            path = file.link(Digest(row["image"]), self._blobs)
        else:
            path = self._blobs.path(self._blobs.add(*file))
        about = {"image": f"sha256:{path.stem}", "media_type": type_of(path), "bytes": path.stat().st_size}
        self._tables["images"].add({**row, **about})
        self._rows[row["pixels"]] = len(self._rows)
        return len(self._rows) - 1

    def triplet(self, one: Triplet) -> None:
        """Keep a triplet; its rows are those that `picture` gave."""
        members = {f"{side}_{name}": getattr(member, name) for side, member in (("a", one.a), ("b", one.b))
                   for name in ("image", "expression", "intensity")}  # fmt: skip
        self._tables["triplets"].add(
            {"split": one.split, "identity": one.identity, "source": one.source, **members}
        )
        self._people[one.split].add(one.identity)

    def reject(self, row: Mapping[str, Any]) -> None:
        """Remember what was left out; values of `trainer.data.columns.REJECTS`."""
        self._tables["rejects"].add(row)

    def complete(
        self,
        provenance: Provenance,
        pictures: Iterable[Survival] = (),
        triplets: Iterable[Survival] = (),
    ) -> Digest:
        """Write the manifest and return its digest: the dataset's version.

        Args:
            provenance: see `Provenance`.
            pictures, triplets: what the filters let through.
        """
        manifest = Manifest(
            expressions=self._expressions,
            tables={name: table.facts() for name, table in self._tables.items()},
            provenance=provenance,
            splits={split: tuple(sorted(people)) for split, people in self._people.items()},
            pictures=tuple(pictures),
            triplets=tuple(triplets),
        )
        data = canonical_json(manifest.model_dump(mode="json"))
        (self._folder / MANIFEST_NAME).write_bytes(data)
        names = [MANIFEST_NAME, *(f"{name}.parquet" for name in TABLES)]
        sums = "".join(f"{file_digest(self._folder / name).hex}  {name}\n" for name in names)
        (self._folder / SUMS_NAME).write_text(sums, "ascii")
        return digest_bytes(data)


def provenance(**values: Any) -> Provenance:
    """Return where a dataset comes from.

    Raises:
        DataError: a name or a licence is too long or has characters that cannot be seen.
    """
    try:
        return Provenance(**values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise DataError(
            f"what the pictures say about themselves cannot be recorded: "
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
            "give shorter names and licences in one line each",
        ) from None
