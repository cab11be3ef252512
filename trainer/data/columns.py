"""The columns of a dataset's tables; format 3. docs/datasets.md describes them for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from trainer.data.tables import Column
from trainer.portraits.expressions import EXPRESSIONS

TRUTHS: Final = tuple(f"truth_{name}" for name in EXPRESSIONS)
"""The true intensities of a drawn picture, one column each."""

_IMAGES: Final = (
    Column(name="image", kind="string", nullable=False),  # digest of the file
    Column(name="pixels", kind="string", nullable=False),  # digest of shape and pixels, see `pixel_digest`
    Column(name="media_type", kind="string", nullable=False),
    Column(name="bytes", kind="int32", nullable=False),
    Column(name="width", kind="int32", nullable=False),
    Column(name="height", kind="int32", nullable=False),
    Column(name="number", kind="int32"),  # of the request
    Column(name="split", kind="string", nullable=False),
    Column(name="identity", kind="string", nullable=False),
    Column(name="domain", kind="string"),
    Column(name="pose", kind="int64"),
    Column(name="expression", kind="string"),  # none: neutral
    Column(name="intensity", kind="float", nullable=False),
    Column(name="source", kind="string", nullable=False),
    Column(name="model", kind="string"),
    Column(name="prompt", kind="string"),
    Column(name="request", kind="string"),  # digest of the paid request
    Column(name="license", kind="string", nullable=False),
    Column(name="origin", kind="string"),
)
_MEASURES: Final = (
    Column(name="confidence", kind="float"),
    Column(name="disagreement", kind="float"),
    Column(name="samples", kind="int8"),
    Column(name="scorer", kind="string"),
    Column(name="sharpness", kind="float", nullable=False),
    Column(name="pdq", kind="string", nullable=False),  # 64 hex digits
    Column(name="pdq_quality", kind="int8", nullable=False),
    Column(name="pdq_distance", kind="int16"),  # bits that differ from the source
    Column(name="face", kind="bool"),
    Column(name="similarity", kind="float"),  # cosine to the source's face
)
_MEMBER: Final = (("image", "int32"), ("expression", "string"), ("intensity", "double"))

TRIPLETS: Final = (
    Column(name="split", kind="string", nullable=False),
    Column(name="identity", kind="string", nullable=False),
    Column(name="source", kind="int32", nullable=False),
    *(Column(name=f"{side}_{name}", kind=kind, nullable=False) for side in "ab" for name, kind in _MEMBER),
)
"""Columns of triplets.parquet; ``source``, ``a_image`` and ``b_image`` are rows of images.parquet."""

REJECTS: Final = (
    Column(name="what", kind="string", nullable=False),  # "picture" or "triplet"
    Column(name="filter", kind="string", nullable=False),
    Column(name="reason", kind="string", nullable=False),
    Column(name="value", kind="double"),
    Column(name="threshold", kind="double"),
    Column(name="split", kind="string", nullable=False),
    Column(name="identity", kind="string", nullable=False),
    Column(name="number", kind="int32"),  # of the request, or the line of pairs.jsonl
    Column(name="image", kind="string"),
    Column(name="expression", kind="string"),
    Column(name="other", kind="string"),  # expression of the other member of a triplet
    Column(name="intensity", kind="double"),
)
"""Columns of rejects.parquet."""


def score_column(expression: str) -> str:
    """Return the name of the column with the scores of an expression."""
    return f"score_{expression}"


def images(expressions: Sequence[str]) -> tuple[Column, ...]:
    """Return the columns of images.parquet for the expressions of a dataset."""
    scores = (Column(name=score_column(name), kind="float") for name in expressions)
    truths = (Column(name=name, kind="float") for name in TRUTHS)
    return (*_IMAGES, *truths, *scores, *_MEASURES)
