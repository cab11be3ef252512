"""``POST /v1/images/edits`` as OpenAI's clients send it, and answers as they read them.

``model`` is a reference to an adapter, and ``prompt`` names expressions:

    happy                                    at intensity 1, or the signed one nearest to it
    happy=0.8, surprised=0.3                 several at their intensities
    a prompt of the adapter's own template, around either of these

A prompt that says something else is refused: an adapter does the expressions that it was trained for, and
nothing is guessed. What OpenAI has no word for are fields of their own (``extra_body`` of its client):
``seed``, ``steps``, ``strength``, ``exact``.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile

from registry.errors import shown
from serving.http import events, pictures, reading
from serving.http.adapters import default_reference
from serving.http.answers import EDIT_ERRORS, BadRequest, Invalid, invalid, responses
from serving.http.bodies import EVENT, Number
from serving.http.events import Running
from serving.http.keys import Editor
from serving.http.prompts import parse_prompt
from serving.http.service import Service, service_of
from serving.logs import bind
from serving.schema import MAX_SIDE, MAX_STEPS, SweepRequest

if TYPE_CHECKING:
    from serving.backend import Progress
    from serving.schema import EditResult

router = APIRouter(tags=["openai"])

MAX_PROMPT = 1000
MAX_PICTURES = 16
"""That OpenAI's clients may send; more than one is refused with an explanation."""


def _whole(text: object) -> object:
    if isinstance(text, str) and not re.fullmatch(r"-?[0-9]{1,20}", text):
        raise ValueError("it is not a whole number")
    return text


def _true_or_false(text: object) -> object:
    if isinstance(text, str) and text not in ("true", "false"):
        raise ValueError("it is neither true nor false")
    return text


Whole = Annotated[int, BeforeValidator(_whole)]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS), BeforeValidator(_whole)]
Flag = Annotated[bool, BeforeValidator(_true_or_false)]


class OpenAIBody(BaseModel):
    """The fields of OpenAI's request that mean something here; as in its form, all are texts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str = Field(
        min_length=1, max_length=MAX_PROMPT, description="Expressions, with intensities.",
        examples=["happy=0.8, surprised=0.3"],
    )  # fmt: skip
    model: str | None = Field(
        default=None, min_length=1, max_length=300, description="Reference of an adapter.",
        examples=["pixelsmile@prod"],
    )  # fmt: skip
    n: Whole = Field(default=1, ge=1, le=10, description="Pictures; each starts from another seed.")
    size: str = Field(
        default="auto", pattern=r"^(auto|[1-9][0-9]{0,3}x[1-9][0-9]{0,3})$", description="WIDTHxHEIGHT."
    )
    response_format: Literal["b64_json"] = "b64_json"
    output_format: pictures.Kind = "png"
    output_compression: Whole = Field(default=95, ge=0, le=100, description="Quality of JPEG and WebP.")
    stream: Flag = False
    partial_images: Whole = Field(default=0, ge=0, le=3, description="Previews in a stream.")
    quality: Literal["auto", "standard"] = Field(default="auto", description="`steps` decides it here.")
    background: Literal["auto", "opaque"] = "auto"
    user: str = Field(default="", max_length=200, description="Not kept.")
    safety_identifier: str = Field(default="", max_length=200, description="Not kept.")
    seed: Whole = Field(default=0, ge=0, le=(1 << 53) - 1)
    steps: Steps | None = None
    strength: Number | None = Field(
        default=None, description="Of the adapter; without it 1, or the signed one nearest to it."
    )
    exact: Flag = Field(default=False, description="Make each picture alone.")

    def height_width(self) -> tuple[int, int] | None:
        """The size as height and width; None for ``auto``."""
        if self.size == "auto":
            return None
        width, height = map(int, self.size.split("x"))
        if not (8 <= width <= MAX_SIDE and 8 <= height <= MAX_SIDE):
            raise Invalid(f"each side has 8 to {MAX_SIDE} pixels", "choose another size, or auto", "size")
        return height, width


class ImageAnswer(BaseModel):
    """A picture, in OpenAI's words, with what made it."""

    b64_json: str
    revised_prompt: str = Field(description="What was understood.", examples=["happy=0.8"])
    seed: int
    adapter: str | None = Field(examples=["pixelsmile:3"])
    adapter_digest: str


class ImagesAnswer(BaseModel):
    """OpenAI's answer."""

    created: int
    data: list[ImageAnswer]
    background: str = "opaque"
    output_format: str
    size: str = Field(examples=["512x512"])


def _form() -> dict[str, Any]:
    file = {"type": "string", "format": "binary", "description": "The PNG, JPEG or WebP file."}
    fields: dict[str, Any] = {"image": file}
    for name, told in OpenAIBody.model_json_schema()["properties"].items():
        # A form has no null: what may be left out is left out
        kinds = [kind for kind in told.pop("anyOf", ()) if kind != {"type": "null"}]
        fields[name] = {**told, **(kinds[0] if kinds else {})}
        if fields[name].get("default", "") is None:
            del fields[name]["default"]
    form = {"type": "object", "properties": fields, "required": ["image", "prompt"]}
    return {
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": {"schema": {**form, "additionalProperties": False}}},
        }
    }


_DONE = {
    "description": "The pictures; with `stream` image_edit.partial_image and image_edit.completed events.",
    "content": {"text/event-stream": {"schema": EVENT}},
}


@router.post(
    "/v1/images/edits",
    summary="Edit a picture, for OpenAI's clients",
    response_model=ImagesAnswer,
    responses={200: _DONE, **responses(*(status for status in EDIT_ERRORS if status != 422))},
    openapi_extra=_form(),
)
async def edit(
    request: Request, caller: Editor, service: Annotated[Service, Depends(service_of)]
) -> Response:
    """Edit one picture with the adapter that `model` names, at the expressions that `prompt` names."""
    bind(key=caller.name)
    await events.require_room(service)
    try:
        body, picture = await _read(request)
        caller.spend(body.n)
        await asyncio.to_thread(pictures.require_readable, picture, service.settings.max_pixels)
        reference = body.model or default_reference(service)
        status = await events.while_connected(request, service.backend.adapter(reference))
        expressions = parse_prompt(body.prompt, status)
        size = body.height_width()
    except Invalid as error:  # OpenAI answers 400 to all of these, and its clients expect it
        raise BadRequest(error.message, error.mend, error.param) from None
    asked = SweepRequest.make(
        image=picture,
        rows=(expressions,) * body.n,
        adapter=reference,
        strength=body.strength,
        seed=body.seed,
        seeds=tuple(body.seed + index for index in range(body.n)),
        steps=body.steps,
        size=size,
        exact=body.exact,
    )
    previews = body.partial_images if body.stream else 0
    begin = Running.begin(service, asked, key=caller.name, previews=previews)
    running = await events.while_connected(request, begin)
    if body.stream:
        return _stream(service, running, body, picture)
    results = await running.results(request)
    encoded = await _encoded(service, body, results, picture)
    height, width = results[0].size
    answer = {
        "created": int(time.time()),
        "data": [_facts(data, result) for data, result in zip(encoded, results, strict=True)],
        "background": "opaque",
        "output_format": body.output_format,
        "size": f"{width}x{height}",
    }
    return JSONResponse(answer, headers=running.headers)


async def _read(request: Request) -> tuple[OpenAIBody, bytes]:
    """Return the fields of a form and its one picture.

    Raises:
        Invalid: a field is unknown or wrong, or there is not exactly one picture.
    """
    form = await reading.read_form(request, pictures=MAX_PICTURES + 1)
    try:
        fields, files = await _fields(form.multi_items())
    finally:
        await form.close()
    if len(files) != 1:
        what = "image is missing" if not files else f"{len(files)} pictures were sent; one is edited"
        raise Invalid(what, "send exactly one image; n asks for several results", "image")
    try:
        body = OpenAIBody.model_validate(fields)
    except ValidationError as error:
        raise invalid(error) from None
    if body.stream and body.n != 1:
        raise Invalid("a stream has one picture", "send n=1, or leave stream out", "n")
    return body, files[0]


async def _fields(items: Iterable[tuple[str, UploadFile | str]]) -> tuple[dict[str, str], list[bytes]]:
    """Return the texts and the pictures of a form."""
    fields: dict[str, str] = {}
    files: list[bytes] = []
    for name, value in items:
        if name == "mask":
            raise Invalid("masks are not supported: an adapter edits the whole face", "leave it out", "mask")
        if name in ("image", "image[]"):
            if isinstance(value, str):
                raise Invalid("the picture has to be a file", "send image as a file of the form", "image")
            files.append(await value.read())
        elif isinstance(value, str):
            fields[name] = value
        else:
            raise Invalid("only image takes a file", "send the picture as image", shown(name, 60))
    return fields, files


async def _encoded(
    service: Service, body: OpenAIBody, results: Sequence[EditResult], parent: bytes
) -> list[str]:
    return await asyncio.to_thread(
        pictures.encode_all,
        results,
        parent=parent,
        credentials=service.credentials,
        kind=body.output_format,
        quality=body.output_compression,
    )


def _facts(data: str, result: EditResult) -> dict[str, Any]:
    understood = ", ".join(f"{name}={value:g}" for name, value in result.expressions.items())
    return {
        "b64_json": data,
        "revised_prompt": understood or "neutral",
        "seed": result.seed,
        "adapter": result.adapter,
        "adapter_digest": str(result.adapter_digest),
    }


def _stream(service: Service, running: Running, body: OpenAIBody, parent: bytes) -> Response:
    """Answer with OpenAI's events."""
    sent = 0

    def event(kind: str, data: str, form: str, size: tuple[int, int], **more: Any) -> bytes:
        facts = {"b64_json": data, "created_at": int(time.time()), "size": f"{size[0]}x{size[1]}"}
        fixed = {"background": "opaque", "quality": "auto", "output_format": form}
        return events.event_of(kind, {"type": kind, **facts, **fixed, **more})

    async def tell(progress: Progress) -> bytes | None:
        nonlocal sent
        if progress.pictures is None:
            return None
        small = progress.pictures[0]
        data = await asyncio.to_thread(pictures.plain_text, small, body.output_format)
        sent += 1
        return event("image_edit.partial_image", data, body.output_format, small.size,
                     partial_image_index=sent - 1)  # fmt: skip

    async def finish(results: Sequence[EditResult]) -> bytes:
        (data,) = await _encoded(service, body, results, parent)
        known = {key: value for key, value in _facts(data, results[0]).items() if key != "b64_json"}
        return event("image_edit.completed", data, body.output_format, results[0].image.size,
                     usage=_USAGE, **known)  # fmt: skip

    return events.event_stream(running, opening=None, tell=tell, finish=finish, headers=running.headers)


#: OpenAI's clients expect it in the last event; nothing is counted in tokens here.
_USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
