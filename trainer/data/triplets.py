"""Triplets: one person's neutral picture and two pictures of expressions that are easily confused.

The dataset is a folder: shards of the pictures that are used, ``triplets.jsonl``, ``rejects.jsonl`` (what was
left out, and why) and ``manifest.json`` with the sha256 of every file. The digest of the manifest is the
digest of the dataset; everything in it is a function of the recipe, the pictures and the scores.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from registry.digest import Digest, digest_bytes
from registry.manifest import canonical_json
from trainer.data.shards import ShardWriter, read_images, read_lines
from trainer.errors import DataError
from trainer.progress import Progress, silent
from trainer.recipe import Recipe
from trainer.stage import StageResult, finished, new_folder, stage_key, write_result

MANIFEST_NAME = "manifest.json"
TRIPLETS_NAME = "triplets.jsonl"
REJECTS_NAME = "rejects.jsonl"
_FULL = 0.95  # from this intensity on, the judge must see the expression before all others


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One edited picture of a triplet; ``image`` is its row in the dataset's pictures."""

    image: int
    expression: str
    intensity: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Triplet:
    """A neutral picture (row ``source``) and two edits of it that are easily confused."""

    split: str
    identity: str
    source: int
    a: Member
    b: Member


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """A verified dataset in memory.

    Attributes:
        folder: where it lies.
        digest: sha256 of its manifest.
        triplets: in the order of the file.
        image_digests: digest of every picture, in the order of the shards.
        provenance: source and licence of the pictures, name of the scorer.
    """

    folder: Path
    digest: Digest
    triplets: tuple[Triplet, ...]
    image_digests: tuple[Digest, ...]
    provenance: dict[str, str]

    def images(self) -> np.ndarray:
        """Return all pictures, uint8 [N, H, W, 3]."""
        return read_images(self.folder)

    @classmethod
    def open(cls, folder: Path) -> Dataset:
        """Read a dataset and check every file against the manifest.

        Raises:
            DataError: a file is missing or is not the one of the manifest.
        """
        mend = "remove the folder and build the dataset again"
        try:
            raw = (folder / MANIFEST_NAME).read_bytes()
            manifest = json.loads(raw)
            for name, digest in manifest["files"].items():
                if digest_bytes((folder / name).read_bytes()) != digest:
                    raise DataError(f"{folder / name} is not the file that the manifest names", mend)
            return cls(
                folder=folder,
                digest=digest_bytes(raw),
                triplets=tuple(_triplet(line) for line in read_lines(folder / TRIPLETS_NAME)),
                image_digests=tuple(Digest(value) for value in manifest["images"]),
                provenance=manifest["provenance"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"the dataset in {folder} cannot be read: {error}", mend) from None


def build_triplets(
    recipe: Recipe, images: Path, scored: Path, out: Path, progress: Progress = silent
) -> StageResult:
    """Choose the triplets of ``recipe`` from scored pictures.

    Args:
        recipe: gives the expressions, the splits and the least score.
        images: output of `trainer.synthesis.synthesise`.
        scored: output of `trainer.scoring.score` for these pictures.
        out: folder of the dataset.
        progress: is told about the kept and rejected triplets.

    Raises:
        DataError: files are missing, do not belong together, or nothing is left to train on.
    """
    index = read_lines(images / "index.jsonl")
    try:
        scores = np.load(scored / "scores.npy", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(
            f"the scores in {scored} cannot be read: {error}", "score the pictures again"
        ) from None
    if len(scores) != len(index):
        raise DataError(
            f"{len(scores)} scores do not belong to {len(index)} pictures", "score these pictures again"
        )
    key = stage_key(
        "triplets",
        images=[line["digest"] for line in index],
        scores=digest_bytes(scores.tobytes()),
        min_score=recipe.data.min_score,
        pairs=_pairs(recipe),
    )
    if done := finished(out, key):
        return done
    kept, rejected = _choose(recipe, index, scores)
    if not any(triplet.split == "train" for triplet in kept):
        raise DataError(
            f"no triplet is left of {len(rejected)}; why the first was left out: {_first_reason(rejected)}",
            "lower data.min_score, or look at the pictures and the judge",
        )
    with new_folder(out) as folder:
        digest = _write(folder, index, read_images(images), kept, rejected, _scorer_name(scored))
        result = StageResult(
            stage="triplets",
            folder=out,
            key=key,
            digest=digest,
            facts={
                "triplets": sum(triplet.split == "train" for triplet in kept),
                "validation": sum(triplet.split == "validation" for triplet in kept),
                "rejected": len(rejected),
            },
        )
        write_result(folder, result)
    progress("triplets", len(kept) + len(rejected), len(kept) + len(rejected), f"{len(kept)} kept")
    return result


def _pairs(recipe: Recipe) -> list[tuple[str, str]]:
    """Return the confusing pairs among the recipe's expressions; one without a partner gets its neighbour."""
    from trainer.portraits.expressions import CONFUSING_PAIRS

    names = recipe.conditioning.expressions
    pairs = [(a, b) for a, b in CONFUSING_PAIRS if a in names and b in names]
    covered = {name for pair in pairs for name in pair}
    lonely = [name for name in names if name not in covered]
    if len(names) > 1:
        pairs += [(name, names[(names.index(name) + 1) % len(names)]) for name in lonely]
    return pairs


def _choose(
    recipe: Recipe, index: list[dict[str, Any]], scores: np.ndarray
) -> tuple[list[Triplet], list[dict[str, Any]]]:
    """Return the kept triplets (rows are those of ``index``) and the rejects with their reasons."""
    row_of = {(line["domain"], line["identity"], line["expression"], line["intensity"]): row
              for row, line in enumerate(index)}  # fmt: skip
    unseen = _unseen_rows(recipe, index, scores)
    kept: list[Triplet] = []
    rejected: list[dict[str, Any]] = []
    seen: set[tuple[str, ...]] = set()
    split_of: dict[str, str] = {}
    for source, line in enumerate(index):
        if line["expression"] is not None:
            continue
        person = (line["domain"], line["identity"])
        identity, split = f"{person[0]}-{person[1]}", line["split"]
        for first, second in _pairs(recipe):
            for level in recipe.data.intensities:
                a, b = row_of[(*person, first, level)], row_of[(*person, second, level)]
                digests = tuple(index[row]["digest"] for row in (source, a, b))
                reason = unseen.get(a) or unseen.get(b) or _repeated(digests, seen, split, split_of)
                if reason:
                    rejected.append({"identity": identity, "split": split, "expressions": [first, second],
                                     "intensity": level, "reason": reason})  # fmt: skip
                    continue
                seen.add(digests)
                split_of.update(dict.fromkeys(digests, split))
                members = [Member(image=row, expression=name, intensity=level)
                           for row, name in ((a, first), (b, second))]  # fmt: skip
                kept.append(
                    Triplet(split=split, identity=identity, source=source, a=members[0], b=members[1])
                )
    return kept, rejected


def _unseen_rows(recipe: Recipe, index: list[dict[str, Any]], scores: np.ndarray) -> dict[int, str]:
    """Return row -> reason for every picture in which the judge does not see the asked expression."""
    names, reasons = recipe.conditioning.expressions, {}
    for row, line in enumerate(index):
        name, level = line["expression"], line["intensity"]
        if name is None:
            continue
        score, strongest = float(scores[row, names.index(name)]), names[int(scores[row].argmax())]
        if score < recipe.data.min_score * level:
            reasons[row] = f"{name} at {level:g} is seen at {score:.2f} only"
        elif level >= _FULL and strongest != name:
            reasons[row] = f"{name} at {level:g} is taken for {strongest}"
    return reasons


def _repeated(
    digests: tuple[str, ...], seen: set[tuple[str, ...]], split: str, split_of: dict[str, str]
) -> str:
    """Return why these three pictures cannot be a new triplet of ``split``, or nothing."""
    if len(set(digests)) < 3:
        return "two of its pictures are the same"
    if digests in seen:
        return "the same triplet is there already"
    if any(split_of.get(digest, split) != split for digest in digests):
        return "one of its pictures is in the other split"
    return ""


def _first_reason(rejected: list[dict[str, Any]]) -> str:
    return str(rejected[0]["reason"]) if rejected else "there were no pictures"


def _scorer_name(scored: Path) -> str:
    try:
        return str(json.loads((scored / "stage.json").read_text("utf-8"))["facts"]["scorer"])
    except (OSError, ValueError, KeyError):
        return "unknown"


def _write(
    folder: Path,
    index: list[dict[str, Any]],
    pixels: np.ndarray,
    kept: list[Triplet],
    rejected: list[dict[str, Any]],
    scorer: str,
) -> Digest:
    """Write the dataset with only the pictures that are used; return the manifest's digest."""
    used = sorted({row for triplet in kept for row in (triplet.source, triplet.a.image, triplet.b.image)})
    place = {row: number for number, row in enumerate(used)}
    writer = ShardWriter(folder)
    for row in used:
        writer.add(pixels[row])
    files = writer.close()
    lines = {TRIPLETS_NAME: [_triplet_line(triplet, place) for triplet in kept], REJECTS_NAME: rejected}
    for name, values in lines.items():
        data = b"".join(canonical_json(value) + b"\n" for value in values)
        (folder / name).write_bytes(data)
        files[name] = digest_bytes(data)
    manifest = canonical_json(
        {
            "files": files,
            "images": [index[row]["digest"] for row in used],
            "provenance": {"source": index[0]["source"], "license": index[0]["license"], "scorer": scorer},
            "splits": {
                split: sorted({triplet.identity for triplet in kept if triplet.split == split})
                for split in ("train", "validation")
            },
        }
    )
    (folder / MANIFEST_NAME).write_bytes(manifest)
    return digest_bytes(manifest)


def _triplet_line(triplet: Triplet, place: dict[int, int]) -> dict[str, Any]:
    members = {
        name: {"image": place[member.image], "expression": member.expression, "intensity": member.intensity}
        for name, member in (("a", triplet.a), ("b", triplet.b))
    }
    return {"split": triplet.split, "identity": triplet.identity, "source": place[triplet.source], **members}


def _triplet(line: dict[str, Any]) -> Triplet:
    members = {name: Member(**line[name]) for name in ("a", "b")}
    return Triplet(split=line["split"], identity=line["identity"], source=line["source"], **members)
