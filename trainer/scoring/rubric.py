"""The rubric: what a vision-language model is told before it looks, from ``rubric.yaml``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from registry.digest import Digest, digest_bytes
from registry.manifest import canonical_json
from trainer.portraits.expressions import EXPRESSIONS

Words = Annotated[str, Field(min_length=3)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Row(_Strict):
    """One expression: its action units, who says so, the five anchors, and what looks alike."""

    units: Words
    source: str
    absent: Words = Field(alias="0")
    trace: Words = Field(alias="0.25")
    marked: Words = Field(alias="0.5")
    strong: Words = Field(alias="0.75")
    full: Words = Field(alias="1")
    unlike: Words = Field(alias="not")

    @property
    def anchors(self) -> dict[float, str]:
        """What the face does at 0, 0.25, 0.5, 0.75 and 1."""
        return {0.0: self.absent, 0.25: self.trace, 0.5: self.marked, 0.75: self.strong, 1.0: self.full}


class RubricFile(_Strict):
    """``rubric.yaml``."""

    version: int
    sources: dict[str, Words]
    system: Words
    anchors: dict[str, Words]
    expressions: dict[str, Row]

    @model_validator(mode="after")
    def _complete(self) -> RubricFile:
        if tuple(self.expressions) != EXPRESSIONS:
            raise ValueError("the rubric describes other expressions, or in another order")
        unnamed = {row.source for row in self.expressions.values()} - set(self.sources)
        if unnamed:
            raise ValueError(f"sources without a title: {sorted(unnamed)}")
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class Rubric:
    """What is told.

    Attributes:
        system: the system text: rules, and for each expression units, anchors and what looks alike.
        question: goes with each picture.
        digest: of both; part of every request's address.
    """

    system: str
    question: str
    digest: Digest


@cache
def read() -> RubricFile:
    """Return the shipped rubric as data."""
    import yaml

    text = (resources.files("trainer.scoring") / "rubric.yaml").read_text("utf-8")
    return RubricFile.model_validate(yaml.safe_load(text))


@cache
def rubric() -> Rubric:
    """Return the shipped rubric as it is told; it names no person, no file and no asked expression."""
    data = read()
    levels = "Anchors: " + ", ".join(f"{value} {word}" for value, word in data.anchors.items()) + "."
    lines = [data.system, "", levels]
    for name, row in data.expressions.items():
        lines += ["", f"{name}: {row.units}"]
        lines += [f"  {value:g}: {text}" for value, text in row.anchors.items()]
        lines.append(f"  not: {row.unlike}")
    system = "\n".join(lines)
    question = "Score this face: " + ", ".join(EXPRESSIONS) + ", and your confidence."
    digest = digest_bytes(canonical_json({"system": system, "question": question}))
    return Rubric(system=system, question=question, digest=digest)
