"""What a model answers: twelve bounded numbers and a confidence, or a reason why that is no answer.

Nothing is repaired and nothing is guessed: an answer with a missing number, a number in quotes or a word
around the object is none. The reason is in our words and names only our own keys, because it is told to the
model, kept in tables and shown on pages.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from trainer.portraits.expressions import EXPRESSIONS
from trainer.scoring.scorer import Row

MAX_CHARACTERS = 4096
"""Thirteen numbers take 400; what is longer is not read."""

_Unit = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    # Strict: neither "0.5" nor true is a number.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


_NUMBERS: Any = dict.fromkeys((*EXPRESSIONS, "confidence"), (_Unit, ...))
_Answer = create_model("Answer", __base__=_Strict, **_NUMBERS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One accepted answer: twelve intensities and how sure the model says it is, all 0 to 1."""

    scores: Row
    confidence: float


class BadAnswer(Exception):
    """An answer that is none; the text says why, without a word of the answer."""


def schema() -> dict[str, Any]:
    """Return the JSON Schema of an answer, in the subset that strict structured output takes."""
    number = {"type": "number", "minimum": 0, "maximum": 1}
    names = (*EXPRESSIONS, "confidence")
    return {
        "type": "object",
        "properties": {name: dict(number) for name in names},
        "required": list(names),
        "additionalProperties": False,
    }


def parse(text: str) -> Sample:
    """Return the answer in ``text``.

    Raises:
        BadAnswer: it is anything but one JSON object with exactly twelve scores and a confidence in 0 to 1.
    """
    if len(text) > MAX_CHARACTERS:
        raise BadAnswer(f"the answer is longer than {MAX_CHARACTERS} characters")
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except BadAnswer:
        raise
    except (ValueError, RecursionError):
        raise BadAnswer("the answer is not one JSON object and nothing else") from None
    if not isinstance(value, dict):
        raise BadAnswer("the answer is not a JSON object")
    try:
        numbers = _Answer.model_validate(value).model_dump()
    except ValidationError as error:
        raise BadAnswer("; ".join(_explained(error))) from None
    return Sample(scores=tuple(numbers[name] for name in EXPRESSIONS), confidence=numbers["confidence"])


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise BadAnswer("the answer has a key twice")
    return dict(pairs)


_REASONS = {
    "missing": "is missing",
    "float_type": "is not a number",
    "finite_number": "is not finite",
    "greater_than_equal": "is below 0",
    "less_than_equal": "is above 1",
}


def _explained(error: ValidationError) -> list[str]:
    """Return what is wrong in our words; keys that the model made up are counted, not quoted."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    wrong = [
        f"{item['loc'][0]} {_REASONS.get(item['type'], 'is wrong')}"
        for item in found
        if item["type"] != "extra_forbidden"
    ]
    extra = sum(item["type"] == "extra_forbidden" for item in found)
    return [*wrong, f"{extra} keys are not asked for"] if extra else wrong
