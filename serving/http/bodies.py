"""What an edit is asked with and answered with over HTTP: fields, their limits, their documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from serving.http.jobs import JobAnswer
from serving.schema import (
    MAX_EXPRESSIONS,
    MAX_SIDE,
    MAX_STACKED,
    MAX_STEPS,
    MAX_SWEEP,
    StackedAdapter,
    SweepRequest,
)


def _integral(value: object) -> object:
    """Take 8.0 as 8: JSON has one kind of number, and some clients write all of them with a dot."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_integral)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=64)]
Vector = Annotated[dict[Name, Number], Field(max_length=MAX_EXPRESSIONS)]
Side = Annotated[int, Field(ge=8, le=MAX_SIDE), BeforeValidator(_integral)]
Size = Annotated[list[Side], Field(min_length=2, max_length=2)]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS), BeforeValidator(_integral)]
#: For the documentation; what is wrong with a reference is explained by who parses it.
REFERENCE = r"^[a-z0-9][a-z0-9._-]{0,127}(@[a-z][a-z0-9_-]{0,63}|:[1-9][0-9]{0,8}|@sha256:[0-9a-f]{64})$"
AdapterName = Annotated[str, Field(min_length=1, max_length=300, json_schema_extra={"pattern": REFERENCE})]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Sweep(_Strict):
    """One expression at growing intensities."""

    expression: Name = Field(description="The expression that grows.", examples=["happy"])
    low: Number = Field(default=0.0, alias="from", description="First intensity.")
    high: Number = Field(default=1.5, alias="to", description="Last intensity.")
    count: Whole = Field(default=7, ge=2, le=MAX_SWEEP, description="Pictures, both ends included.")

    def rows(self) -> list[dict[str, float]]:
        """The vector of each picture."""
        step = (self.high - self.low) / (self.count - 1)
        return [{self.expression: self.low + step * index} for index in range(self.count)]


class Stacked(_Strict):
    """An adapter that lies under the one that conditions the edit."""

    adapter: AdapterName = Field(description="Reference.", examples=["lightning:1"])
    strength: Number | None = Field(
        default=None, description="In its signed range; without it 1, or the signed one nearest to it."
    )


class WebhookAsked(_Strict):
    """Where the end of a job is announced."""

    url: str = Field(min_length=8, max_length=2000, description="An https address.")
    secret: str | None = Field(
        default=None,
        min_length=1,
        max_length=100,
        description="Name of the key whose secret signs; your own.",
    )


class EditBody(_Strict):
    """An edit of one picture: exactly one of `expressions`, `rows` and `sweep` says what to make of it."""

    image: str = Field(
        min_length=1,
        description="A PNG, JPEG or WebP file as base64, or as a data: URL.",
        json_schema_extra={"format": "byte"},
    )
    expressions: Vector | None = Field(
        default=None, description="Expression -> intensity; empty is the neutral face.",
        examples=[{"happy": 0.8, "surprised": 0.3}],
    )  # fmt: skip
    rows: list[Vector] | None = Field(
        default=None, min_length=1, max_length=MAX_SWEEP, description="Several vectors, one picture each."
    )
    sweep: Sweep | None = None
    adapter: AdapterName | None = Field(
        default=None, description="Reference; without it the service's first.", examples=["pixelsmile@prod"]
    )
    strength: Number | None = Field(
        default=None,
        description="Of the adapter, in its signed range; 0 is the base alone. Without it 1, or the signed "
        "one nearest to it.",
    )
    stacked: list[Stacked] | None = Field(
        default=None,
        max_length=MAX_STACKED,
        description="What lies under the adapter; without it what the service puts there.",
    )
    seed: Whole = Field(default=0, ge=0, lt=1 << 63, description="Of the starting noise.")
    steps: Steps | None = Field(
        default=None,
        description="Denoising steps; without it those that suit the base and the adapters.",
    )
    size: Size | None = Field(
        default=None, description="Height and width of the pictures; without it the base's own."
    )
    exact: bool = Field(
        default=False, description="Make each picture alone: the same request gives the same bytes for ever."
    )
    previews: Whole = Field(default=0, ge=0, le=MAX_STEPS, description="Steps whose events have pictures.")
    later: bool = Field(default=False, alias="async", description="Answer with a job instead of waiting.")
    webhook: WebhookAsked | None = Field(default=None, description="Told when the job ends; makes it a job.")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if sum(given is not None for given in (self.expressions, self.rows, self.sweep)) != 1:
            raise ValueError("give exactly one of expressions, rows and sweep")
        return self

    def vectors(self) -> Sequence[Mapping[str, float]]:
        """The expressions of each picture."""
        if self.sweep is not None:
            return self.sweep.rows()
        return self.rows if self.rows is not None else [self.expressions or {}]

    def request(self, picture: bytes) -> SweepRequest:
        """Return what the backend is asked."""
        return SweepRequest.make(
            image=picture,
            rows=tuple(self.vectors()),
            adapter=self.adapter,
            strength=self.strength,
            stacked=None
            if self.stacked is None
            else tuple(StackedAdapter(adapter=one.adapter, strength=one.strength) for one in self.stacked),
            seed=self.seed,
            steps=self.steps,
            exact=self.exact,
            size=None if self.size is None else (self.size[0], self.size[1]),
        )


class UsedAnswer(BaseModel):
    """An adapter that lay under the one that conditioned the edit."""

    adapter: str | None = Field(examples=["lightning:1"])
    digest: str
    strength: float


class PictureAnswer(BaseModel):
    """A picture and everything that made it: the same again gives the same pixels."""

    image: str = Field(description="The PNG file as base64; its text chunk says the rest, too.")
    adapter: str | None = Field(examples=["pixelsmile:3"])
    adapter_digest: str
    base: str
    base_revision: str
    expressions: dict[str, float]
    strength: float
    stacked: list[UsedAnswer]
    seed: int
    steps: int
    size: list[int]


class EditAnswer(BaseModel):
    """The pictures of an edit, all made by one version of one adapter."""

    id: str = Field(description="Of the request, as in X-Request-Id.")
    results: list[PictureAnswer]
    adapter: str = Field(examples=["pixelsmile:3"])
    adapter_name: str = Field(examples=["pixelsmile"])
    adapter_version: int | None = Field(examples=[3])
    adapter_digest: str = Field(description="Of the signed manifest.")


EXAMPLE = {
    "image": "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAEElEQVR42mNsYIAAJgaKGAAmCACQtTEKkQAAAABJRU5"
    "ErkJggg==",
    "expressions": {"happy": 0.8, "surprised": 0.3},
    "adapter": "pixelsmile@prod",
    "seed": 7,
}
JOB = {
    "description": "A job: `Location` is its address.",
    "headers": {"Location": {"schema": {"type": "string"}, "description": "Of the job."}},
    "model": JobAnswer,
}
#: Of each event; its data is one JSON object as text.
EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["event", "data"],
}
DONE = {
    "description": "The pictures; with `Accept: text/event-stream` events (queued, step, result, error), "
    "with `Accept: image/png` the one PNG itself.",
    "content": {
        "text/event-stream": {"schema": EVENT},
        "image/png": {"schema": {"type": "string", "format": "binary"}},
    },
    "headers": {
        name: {"schema": {"type": "string"}, "description": text}
        for name, text in (
            ("Adapter-Name", "Of the adapter that answered."),
            ("Adapter-Version", "Of the adapter that answered."),
            ("Adapter-Digest", "Of its signed manifest."),
        )
    },
}


def _form_schema() -> dict[str, Any]:
    """The fields of a form: the picture as a file, texts as they are, everything else as JSON."""
    fields: dict[str, Any] = {"image": {"type": "string", "format": "binary", "description": "The file."}}
    for name, field in EditBody.model_fields.items():
        told = {"type": "string", "description": field.description or "As in the JSON body."}
        fields.setdefault(field.alias or name, told)
    return {"type": "object", "properties": fields, "required": ["image"], "additionalProperties": False}


BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/EditBody"}, "example": EXAMPLE,
            },
            "multipart/form-data": {
                "schema": _form_schema(),
                "encoding": {"image": {"contentType": "image/png, image/jpeg, image/webp"}},
            },
        },
    }
}  # fmt: skip
