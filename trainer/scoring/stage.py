"""The second stage: what the labelling judge sees in every picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from registry.digest import digest_bytes
from trainer.data.shards import read_images, read_lines
from trainer.errors import DataError
from trainer.parts import Mapper, here
from trainer.progress import Progress, silent
from trainer.recipe import Recipe
from trainer.scoring.local import LocalScorer, Scorer
from trainer.stage import StageResult, finished, new_folder, stage_key, write_result

SCORES_NAME = "scores.npy"
_BATCH = 128


def score(
    recipe: Recipe,
    images: Path,
    out: Path,
    progress: Progress = silent,
    *,
    scorer: Scorer | None = None,
    mapper: Mapper = here,
) -> StageResult:
    """Score every picture of the folder ``images`` into ``out/scores.npy``, float32 [N, K].

    Args:
        recipe: names the expressions that the columns stand for.
        images: output of `trainer.synthesis.synthesise`.
        out: folder of the result.
        progress: is told after every batch.
        scorer: who looks; the shipped labelling judge when None.
        mapper: does the parts.

    Raises:
        DataError: the pictures are missing, or the scorer cannot see the recipe's expressions.
    """
    judge = scorer or LocalScorer()
    index = read_lines(images / "index.jsonl")
    expressions = recipe.conditioning.expressions
    key = stage_key(
        "score", images=[line["digest"] for line in index], scorer=judge.name, expressions=expressions
    )
    if done := finished(out, key):
        return done
    unknown = [name for name in expressions if name not in judge.expressions]
    if unknown:
        raise DataError(
            f"{judge.name} cannot see {', '.join(unknown)}",
            "choose among its expressions: " + ", ".join(judge.expressions),
        )
    pixels = read_images(images)
    rows = []
    for start in range(0, len(pixels), _BATCH):
        rows.append(np.asarray(judge(pixels[start : start + _BATCH]), np.float32))
        progress("score", min(start + _BATCH, len(pixels)), len(pixels), judge.name)
    scores = np.concatenate(rows)
    if scores.shape != (len(index), len(judge.expressions)) or not np.isfinite(scores).all():
        raise DataError(
            f"{judge.name} gave scores of shape {scores.shape} for {len(index)} pictures, or "
            "numbers that are not finite",
            "use a judge that gives one number for each of its expressions",
        )
    scores = np.ascontiguousarray(scores[:, [judge.expressions.index(name) for name in expressions]])
    with new_folder(out) as folder:
        np.save(folder / SCORES_NAME, scores, allow_pickle=False)
        result = StageResult(
            stage="score",
            folder=out,
            key=key,
            digest=digest_bytes((folder / SCORES_NAME).read_bytes()),
            facts={
                "images": len(index),
                "scorer": judge.name,
                "agreement": _agreement(index, scores, expressions),
            },
        )
        write_result(folder, result)
    return result


def _agreement(index: list[dict], scores: np.ndarray, expressions: tuple[str, ...]) -> float:
    """Return the share of pictures at the highest intensity whose strongest score is the asked expression."""
    top = max(line["intensity"] for line in index)
    asked = [(row, line["expression"]) for row, line in enumerate(index) if line["intensity"] == top > 0]
    hits = [expressions[int(scores[row].argmax())] == name for row, name in asked]
    return round(sum(hits) / len(hits), 4) if hits else 0.0
