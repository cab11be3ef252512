"""What the filters' measures are on drawn people: which thresholds tell good pictures from spoilt ones.

    PYTHONPATH=tests python tests/bench/filter_calibration.py [--people 300] [--size 64]

Prints one JSON line. Drawn people are the only ones of whom the truth is known: each is drawn neutral and
with every expression at three intensities, a part of them is spoilt in known ways, and the measures of both
are told as percentiles, with the share that the thresholds in docs/datasets.md leave out. ``ratio`` is the
share of spoilt pictures that they leave out by the share of good ones that they keep.
"""

from __future__ import annotations

import argparse
import io
import json
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from trainer.data.likeness import faces
from trainer.data.measures import distance, near, packed, perceptual_hash, sharpness
from trainer.portraits.expressions import EXPRESSIONS
from trainer.portraits.renderer import identity, one_hot, pose, render

LEVELS = (0.33, 0.67, 1.0)
_FIRST, _EDITED = 40_000, 40  # people whose edits are drawn, too
SHARPNESS, DUPLICATE, UNCHANGED, IDENTITY = 400.0, 20, 0, 0.75


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--people", type=int, default=300)
    parser.add_argument("--size", type=int, default=64)
    asked = parser.parse_args()
    people = [(_FIRST + number, "anime" if number % 10 > 6 else "human") for number in range(asked.people)]
    neutral = [drawn(*one, "neutral", 0.0, asked.size) for one in people]
    edits = {
        level: [[drawn(*one, name, level, asked.size) for name in EXPRESSIONS] for one in people[:_EDITED]]
        for level in LEVELS
    }
    every = neutral + [picture for found in edits.values() for some in found for picture in some]
    told = {
        "bench": "filter_calibration", "people": asked.people, "pictures": len(every), "size": asked.size,
        "sharpness": of_sharpness(every, neutral), "duplicate": of_duplicates(neutral),
        "unchanged": of_edits(neutral, edits), "identity": of_faces(neutral, edits),
    }  # fmt: skip
    told["ratio"] = {
        "sharpness": told["sharpness"]["blur 1"]["left_out"] / (1 - told["sharpness"]["good"]["left_out"]),
        "duplicate": told["duplicate"]["jpeg 75"]["left_out"] / (1 - told["duplicate"]["others"]["left_out"]),
        "identity": told["identity"]["others"]["left_out"] / (1 - told["identity"]["1.0"]["left_out"]),
    }
    print(json.dumps(told))


def drawn(seed: int, domain: str, name: str, level: float, size: int) -> np.ndarray:
    """Return a picture, uint8 [size, size, 3]."""
    vector = one_hot(name, level) if level else one_hot("neutral")
    return render(identity(seed, domain), vector, size, pose(seed))  # type: ignore[arg-type]


def spread(values: Any, left_out: Any) -> dict[str, float]:
    """Return percentiles, and the share that is left out."""
    found = {f"p{rank}": round(float(np.percentile(values, rank)), 3) for rank in (0, 1, 50, 99, 100)}
    return found | {"left_out": round(float(np.mean(left_out)), 5)}


def of_sharpness(every: list[np.ndarray], neutral: list[np.ndarray]) -> dict[str, Any]:
    """Return sharpness of good and of blurred pictures; the radius is in pixels."""
    groups = {"good": every}
    for radius in (0.5, 1, 2):
        blur = ImageFilter.GaussianBlur(radius)
        groups[f"blur {radius}"] = [np.asarray(Image.fromarray(one).filter(blur)) for one in neutral]
    found = {name: np.array([sharpness(one) for one in some]) for name, some in groups.items()}
    return {name: spread(values, values < SHARPNESS) for name, values in found.items()}


def of_duplicates(neutral: list[np.ndarray]) -> dict[str, Any]:
    """Return how far other people are, and how far copies of the same picture."""
    hashes = [perceptual_hash(one)[0] for one in neutral]
    others = np.array([bits for _, _, bits in near(packed(hashes), 256)])
    copies = {f"jpeg {quality}": [jpeg(one, quality) for one in neutral] for quality in (90, 75, 50)}
    copies |= {f"scaled {share}": [scaled(one, share) for one in neutral] for share in (2.0, 0.75)}
    copies["cropped 3 %"] = [cropped(one) for one in neutral]
    found = {"others": spread(others, others <= DUPLICATE)}
    for name, some in copies.items():
        bits = np.array(
            [distance(mine, perceptual_hash(copy)[0]) for mine, copy in zip(hashes, some, strict=True)]
        )
        found[name] = spread(bits, bits <= DUPLICATE)
    return found


def of_edits(neutral: list[np.ndarray], edits: dict[float, list[list[np.ndarray]]]) -> dict[str, Any]:
    """Return how far edits are from their sources."""
    found = {}
    for level, some in edits.items():
        bits = np.array([
            distance(perceptual_hash(source)[0], perceptual_hash(edit)[0])
            for source, mine in zip(neutral, some, strict=False) for edit in mine
        ])  # fmt: skip
        found[str(level)] = spread(bits, bits <= UNCHANGED)
    return found


def of_faces(neutral: list[np.ndarray], edits: dict[float, list[list[np.ndarray]]]) -> dict[str, Any]:
    """Return the cosines of edits, and of other people, to a person."""
    eyes = faces("portraits")
    vectors = np.stack([eyes.vector(one) for one in neutral[:_EDITED]])  # type: ignore[misc]
    whole = vectors @ vectors.T
    others = whole[np.triu_indices(len(whole), 1)]
    found = {"others": spread(others, others < IDENTITY)}
    for level, some in edits.items():
        cosines = np.array(
            [vector @ eyes.vector(edit) for vector, mine in zip(vectors, some, strict=True) for edit in mine]
        )
        found[str(level)] = spread(cosines, cosines < IDENTITY)
    return found


def jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def scaled(picture: np.ndarray, share: float) -> np.ndarray:
    side = round(picture.shape[0] * share)
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS))


def cropped(picture: np.ndarray) -> np.ndarray:
    side = picture.shape[0]
    edge = max(1, round(side * 0.03))
    return np.asarray(Image.fromarray(picture).crop((edge, edge, side - edge, side - edge)))


if __name__ == "__main__":
    main()
