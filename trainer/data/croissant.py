"""A dataset's description for dataset hubs and loaders: MLCommons Croissant 1.0 with its RAI vocabulary.

``croissant.json`` lies in the dataset's folder and describes what lies there: the tables of pictures,
triplets and rejects (``cr:FileObject``, with their digests), the pictures (``cr:FileSet``), and records of
all of them.
Specification: https://docs.mlcommons.org/croissant/docs/croissant-spec-1.0.html
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from trainer.data import columns
from trainer.data.blobs import ENDINGS
from trainer.data.dataset import Dataset
from trainer.data.digests import file_digest
from trainer.data.manifest import TABLES
from trainer.data.tables import Column
from trainer.errors import DataError
from trainer.stage import write_atomically

CROISSANT_NAME: Final = "croissant.json"
_CONTEXT: Final = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    **{name: f"cr:{name}" for name in (
        "citeAs", "column", "equivalentProperty", "extract", "field", "fileProperty", "fileObject", "fileSet",
        "format", "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet",
        "references", "regex", "repeated", "replace", "samplingRate", "separator", "source", "subField",
        "transform",
    )},
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "sc": "https://schema.org/",
}  # fmt: skip
_TYPES: Final = {"string": "sc:Text", "bool": "sc:Boolean", "float": "sc:Float", "double": "sc:Float"}
_PARQUET: Final = "application/x-parquet"
_ABOUT: Final = {
    "images": "One row for each picture that was kept: what it shows, where it comes from, its scores and "
    "measures.",
    "triplets": "A neutral picture and two edits of it that are easily confused; rows of the pictures.",
    "rejects": "What the filters left out, and why; these pictures are not part of the dataset.",
}
_COLUMNS: Final = {
    "image": "sha256 of the picture's file, which is its name in blobs/",
    "pixels": "sha256 of the picture's shape and pixels",
    "expression": "expression that was asked for; missing: neutral",
    "intensity": "intensity that was asked for, 0 to 1.5",
    "license": "licence of this picture, an SPDX expression",
    "source": "who made the picture; of triplets: row of the neutral picture",
    "sharpness": "variance of the Laplacian of the luma",
    "similarity": "cosine between the faces of the picture and its source",
    "pdq": "perceptual hash (PDQ), 64 hexadecimal digits",
    "confidence": "how sure the scorer is, 0 to 1",
    "disagreement": "how far the scorer's samples are apart, 0 to 1",
}


def write(data: Dataset, out: Path | None = None) -> Path:
    """Write the description of a dataset and return its file.

    Args:
        data: an opened dataset.
        out: the file; it names its neighbours, so it must lie in the dataset's folder. None is
            ``croissant.json``.

    Raises:
        DataError: it would lie elsewhere, or take the place of the dataset's own files.
    """
    out = out or data.folder / CROISSANT_NAME
    own = {"manifest.json", "stage.json", "SHA256SUMS", *(f"{name}.parquet" for name in TABLES)}
    if out.resolve().parent != data.folder.resolve() or out.name in own:
        raise DataError(
            f"{out} is no place for the description of {data.folder}",
            f"write it to {data.folder / CROISSANT_NAME}: it names the files beside it",
        )
    write_atomically(out, json.dumps(describe(data), indent=1, ensure_ascii=True).encode("ascii") + b"\n")
    return out


def describe(data: Dataset) -> dict[str, Any]:
    """Return the description of a dataset as JSON-LD."""
    images = data.table("images")
    types = sorted(set(images.column("media_type").to_pylist()))
    about = data.provenance
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": f"facial-expressions-{data.digest.hex[:12]}",
        "description": (
            f"{len(data.files)} portraits and {len(data.triplets)} triplets of a neutral portrait and two "
            f"edits with facial expressions of continuous intensity ({', '.join(data.manifest.expressions)})."
        ),
        "version": f"1.0.0+{data.digest.hex}",
        "license": about["license"],
        "url": f"urn:sha256:{data.digest.hex}",
        "creator": {"@type": "sc:Organization", "name": about["source"]},
        "citeAs": f"dataset sha256:{data.digest.hex}",
        "isLiveDataset": False,
        **_responsible(data),
        "distribution": [*(_table_file(data, name) for name in TABLES), _pictures(types)],
        "recordSet": [*(_records(data, name) for name in TABLES), _picture_records()],
    }


def _responsible(data: Dataset) -> dict[str, Any]:
    """What the RAI vocabulary asks for, as far as the dataset itself knows it."""
    about, people = data.provenance, data.manifest.splits
    made = "; ".join(f"{one['kind']}: {one['name']} ({one['license']})" for one in about["ingredients"])
    filters = ", ".join(
        f"{one.filter}{'' if one.threshold is None else f' (asked for: {one.threshold:g})'}: "
        f"{one.left_out} left out"
        for one in (*data.manifest.pictures, *data.manifest.triplets)
    )
    models = sorted({text for text in data.table("images").column("model").to_pylist() if text})
    return {
        "rai:dataCollection": (
            f"Pictures by {about['source']}. What went in: {made or 'nothing else is recorded'}."
        ),
        "rai:dataCollectionType": ["Synthetic"] if _synthetic(data) else ["Others"],
        "rai:dataPreprocessingProtocol": [filters] if filters else [],
        "rai:dataAnnotationProtocol": (
            f"Intensities of {len(data.manifest.expressions)} expressions, 0 to 1 each, by {about['scorer']}."
        ),
        "rai:machineAnnotationTools": [about["scorer"]],
        "rai:personalSensitiveInformation": [
            f"Portraits of {sum(map(len, people.values()))} people. "
            + (
                "They are drawn by a program; none of them exists."
                if _drawn(data)
                else "Whether they exist, and what they agreed to, is what the sources of the pictures tell: "
                "see license and origin of each picture."
            )
            + (f" Edited by {', '.join(models)}." if models else "")
        ],
        "rai:dataUseCases": ["Training of adapters that edit facial expressions, and their validation."],
        "rai:dataLimitations": [
            "Intensities are what the scorer sees, not what a person feels. People of the validation are not "
            "among those to train on."
        ],
    }  # fmt: skip


def _synthetic(data: Dataset) -> bool:
    """Whether a program or a model made every picture that is no neutral one."""
    return _drawn(data) or any(data.table("images").column("model").to_pylist())


def _drawn(data: Dataset) -> bool:
    """Whether the renderer drew every picture: then each has the truth that it was drawn from."""
    return data.table("images").column(columns.TRUTHS[0]).null_count == 0 and bool(data.files)


def _table_file(data: Dataset, name: str) -> dict[str, Any]:
    path = data.folder / f"{name}.parquet"
    return {
        "@type": "cr:FileObject",
        "@id": f"{name}.parquet",
        "name": f"{name}.parquet",
        "description": _ABOUT[name],
        "contentUrl": f"{name}.parquet",
        "contentSize": f"{path.stat().st_size} B",
        "encodingFormat": _PARQUET,
        "sha256": file_digest(path).hex,
    }


def _pictures(types: Sequence[str]) -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": "pictures",
        "name": "pictures",
        "description": "The pictures by the sha256 of their files, as they were made or delivered.",
        "encodingFormat": types[0] if len(types) == 1 else list(types),
        "includes": [f"blobs/*/*.{ENDINGS[one]}" for one in types],
    }


def _records(data: Dataset, name: str) -> dict[str, Any]:
    kinds: Mapping[str, Sequence[Column]] = {
        "images": columns.images(data.manifest.expressions),
        "triplets": columns.TRIPLETS,
        "rejects": columns.REJECTS,
    }
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "description": _ABOUT[name],
        "field": list(_fields(name, kinds[name])),
    }


def _fields(table: str, found: Iterable[Column]) -> Iterable[dict[str, Any]]:
    for column in found:
        yield {
            "@type": "cr:Field",
            "@id": f"{table}/{column.name}",
            "name": column.name,
            "description": _COLUMNS.get(column.name, column.name.replace("_", " ")),
            "dataType": _TYPES.get(column.kind, "sc:Integer"),
            "source": {"fileObject": {"@id": f"{table}.parquet"}, "extract": {"column": column.name}},
        }


def _picture_records() -> dict[str, Any]:
    """The pictures themselves, each with the digest that the tables call it by."""
    source = {"fileSet": {"@id": "pictures"}}
    return {
        "@type": "cr:RecordSet",
        "@id": "pictures-by-digest",
        "name": "pictures-by-digest",
        "description": "Each picture with its sha256: images.image is 'sha256:' and this.",
        "key": {"@id": "pictures-by-digest/sha256"},
        "field": [
            {
                "@type": "cr:Field",
                "@id": "pictures-by-digest/sha256",
                "name": "sha256",
                "description": "sha256 of the file",
                "dataType": "sc:Text",
                "source": {
                    **source,
                    "extract": {"fileProperty": "filename"},
                    "transform": {"regex": r"([0-9a-f]{64})\..*"},
                },
            },
            {
                "@type": "cr:Field",
                "@id": "pictures-by-digest/picture",
                "name": "picture",
                "description": "the picture",
                "dataType": "sc:ImageObject",
                "source": {**source, "extract": {"fileProperty": "content"}},
            },
        ],
    }
