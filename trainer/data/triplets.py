"""Triplets from drawn pictures: a neutral picture and two of expressions that are easily confused.

Which are kept is a function of the recipe, the pictures and the scores; see `trainer.data.dataset` for what
is written.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from registry.digest import Digest, digest_bytes
from trainer.data.dataset import FORMAT, Dataset, Member, Pictures, Triplet, counts, write_dataset
from trainer.data.shards import iterate_images, read_lines
from trainer.errors import DataError
from trainer.progress import Progress, silent
from trainer.recipe import Recipe
from trainer.stage import StageResult, finished, new_folder, stage_key, write_result

__all__ = ["Dataset", "Member", "Triplet", "build_triplets", "pairs_of"]

_FULL = 0.95  # from this intensity on, the judge must see the expression before all others


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
        format=FORMAT,
        images=[line["digest"] for line in index],
        scores=digest_bytes(scores.tobytes()),
        min_score=recipe.data.filters.min_score,
        pairs=pairs_of(recipe),
    )
    if done := finished(out, key):
        return done
    kept, rejected = _choose(recipe, index, scores)
    if not any(triplet.split == "train" for triplet in kept):
        raise DataError(
            f"no triplet is left of {len(rejected)}; why the first was left out: {_first_reason(rejected)}",
            "lower data.filters.min_score, or look at the pictures and the judge",
        )
    with new_folder(out) as folder:
        digest = _write(folder, index, images, kept, rejected, _scorer_name(scored))
        result = StageResult(
            stage="triplets",
            folder=out,
            key=key,
            digest=digest,
            facts={**counts(kept), "rejected": len(rejected)},
        )
        write_result(folder, result)
    progress("triplets", len(kept) + len(rejected), len(kept) + len(rejected), f"{len(kept)} kept")
    return result


def pairs_of(recipe: Recipe) -> list[tuple[str, str]]:
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
        for first, second in pairs_of(recipe):
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
        if score < recipe.data.filters.min_score * level:
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
    images: Path,
    kept: list[Triplet],
    rejected: list[dict[str, Any]],
    scorer: str,
) -> Digest:
    """Write the dataset with only the pictures that are used; return its digest."""
    used = {row for triplet in kept for row in triplet.rows}
    pictures = Pictures(folder)
    place = {row: pictures.add(pixels) for row, pixels in enumerate(iterate_images(images)) if row in used}
    moved = [
        replace(
            one,
            source=place[one.source],
            a=replace(one.a, image=place[one.a.image]),
            b=replace(one.b, image=place[one.b.image]),
        )
        for one in kept
    ]
    about = {"source": index[0]["source"], "license": index[0]["license"], "scorer": scorer}
    return write_dataset(folder, pictures, moved, rejected, about)
