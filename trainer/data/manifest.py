"""The manifest of a dataset: what it says, and how one from anybody is read."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from registry.errors import InvalidDocument
from registry.manifest import Ingredient, Line, strict_json
from trainer.data.tables import TableFacts
from trainer.errors import DataError

TABLES: Final = ("images", "triplets", "rejects")
FORMAT: Final = 3  # pictures as they were made or delivered
MAX_BYTES: Final = 16 << 20
_MEND = "give the folder of a dataset; one that is damaged has to be built again"

Split = Literal["train", "validation"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Survival(_Part):
    """What a filter let through.

    Attributes:
        filter: its name.
        threshold: what the recipe asks for; None where nothing can be asked.
        kept, left_out: pictures (or triplets) of those that the filters before it had kept.
    """

    filter: Line
    threshold: float | None = None
    kept: int = Field(ge=0)
    left_out: int = Field(ge=0)


class Provenance(_Part):
    """Where a dataset comes from.

    Attributes:
        source: who made the pictures.
        license: of all kept pictures together, an SPDX expression.
        scorer: who gave them their intensities.
        ingredients: what the adapter's card must name beside the dataset itself.
    """

    source: Line
    license: Line
    scorer: Line
    ingredients: tuple[Ingredient, ...] = ()


class Manifest(_Part):
    """``manifest.json``; its sha256 is the dataset's version.

    Attributes:
        format: 3.
        expressions: those that the pictures have scores for.
        tables: name -> number and digest of the rows.
        provenance: see `Provenance`.
        splits: the people of each.
        pictures, triplets: the filters in their order.
    """

    format: Literal[3] = 3
    expressions: tuple[Line, ...]
    tables: dict[Literal["images", "triplets", "rejects"], TableFacts]
    provenance: Provenance
    splits: dict[Split, tuple[Line, ...]]
    pictures: tuple[Survival, ...] = ()
    triplets: tuple[Survival, ...] = ()


def parsed(path: Path, raw: bytes) -> Manifest:
    """Return what the bytes of a manifest say; ``path`` names it in errors.

    Raises:
        DataError: they are no manifest of this format.
    """
    try:
        value = strict_json(raw, "the dataset's manifest", MAX_BYTES)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise DataError(f"the dataset in {path.parent} was made by another version", _MEND)
        manifest = Manifest.model_validate_json(raw)
        if set(manifest.tables) != set(TABLES) or set(manifest.splits) != {"train", "validation"}:
            raise ValueError("a table or a split is missing")
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(f"{path} is not right: {place}: {first['msg']}", _MEND) from None
    except (ValueError, InvalidDocument) as error:
        raise DataError(f"{path} cannot be read: {error}", _MEND) from None
    return manifest
