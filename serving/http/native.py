"""``POST /v1/edits``: vectors of expressions, rows and sweeps; JSON or a form in, JSON, a PNG or events out.

The order in which a request is looked at: the key and its limits, room in the queue, and only then the body;
then its fields, the pictures a minute of the key, and only then the picture, whose sides are read from its
header. Pixels are decoded by the backend, when the request has a place in the queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Header, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from registry.errors import shown
from serving.http import events, pictures, reading
from serving.http.answers import (
    EDIT_ERRORS,
    HttpError,
    Invalid,
    NotAcceptable,
    WrongMedia,
    invalid,
    responses,
)
from serving.http.bodies import BODY, DONE, JOB, EditAnswer, EditBody
from serving.http.events import Running
from serving.http.job import facts as job_facts
from serving.http.keys import Editor
from serving.http.service import Service, service_of
from serving.http.webhooks import Webhook
from serving.logs import bind, request_id

if TYPE_CHECKING:
    from serving.backend import Progress
    from serving.schema import EditResult, SweepRequest

router = APIRouter(tags=["edits"])

FORMS = ("application/json", "text/event-stream", "image/png")
Idempotency = Annotated[
    str | None,
    Header(min_length=1, max_length=200, pattern=r"^[!-~]+$", description="The same key makes one job only."),
]
Prefer = Annotated[str | None, Header(max_length=200, description="`respond-async` answers with a job.")]


@router.post(
    "/v1/edits",
    summary="Edit a picture",
    response_model=EditAnswer,
    responses={200: DONE, 202: JOB, **responses(*EDIT_ERRORS, 406)},
    openapi_extra=BODY,
)
async def edit(
    request: Request,
    caller: Editor,
    service: Annotated[Service, Depends(service_of)],
    prefer: Prefer = None,
    idempotency_key: Idempotency = None,
) -> Response:
    """Edit one picture at one or several vectors, with the adapter that a reference means now."""
    bind(key=caller.name)
    form = accepted(request.headers.get("accept"), FORMS)
    await events.require_room(service)
    body, picture = await _read(request)
    count = len(body.vectors())
    if form == "image/png" and count != 1:
        raise NotAcceptable("one PNG cannot hold several pictures", "ask for one, or for application/json")
    caller.spend(count)
    data = reading.read_base64(body.image) if picture is None else picture
    await asyncio.to_thread(pictures.require_readable, data, service.settings.max_pixels)
    asked = body.request(data)
    if body.later or body.webhook is not None or _wants_job(prefer):
        return await _accept(service, body, asked, caller, idempotency_key)
    begin = Running.begin(service, asked, key=caller.name, previews=body.previews)
    running = await events.while_connected(request, begin)
    if form == "text/event-stream":
        return _stream(service, running, data)
    results = await running.results(request)
    if form == "image/png":
        png = await asyncio.to_thread(
            pictures.encode, results[0], parent=data, credentials=service.credentials
        )
        return Response(png, media_type="image/png", headers=running.headers)
    facts = await answer_facts(_request_id(), service, results, data)
    return JSONResponse(facts, headers=running.headers)


def accepted(header: str | None, offered: Sequence[str]) -> str:
    """Return which of the offered content types an Accept header likes best; the first of equals.

    Raises:
        NotAcceptable: none of them.
    """
    best, liked = "", 0.0
    ranges = [_range(part) for part in (header or "*/*")[:2000].split(",")]
    for kind in offered:
        matching = [
            (len(pattern.replace("*", "")), quality)
            for pattern, quality in ranges
            if pattern in (kind, kind.partition("/")[0] + "/*", "*/*")
        ]
        quality = max(matching, default=(0, 0.0))[1]
        if quality > liked:
            best, liked = kind, quality
    if not best:
        raise NotAcceptable("no form of the answer is accepted", "accept one of: " + ", ".join(offered))
    return best


def _range(part: str) -> tuple[str, float]:
    pattern, *parameters = (word.strip() for word in part.lower().split(";"))
    quality = next((word[2:] for word in parameters if word.startswith("q=")), "1")
    try:
        return pattern, float(quality)
    except ValueError:
        return pattern, 0.0


async def _read(request: Request) -> tuple[EditBody, bytes | None]:
    """Return the fields of a body, and the picture where it came as a file."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return _body(await reading.read_json(request)), None
    if kind != "multipart/form-data":
        what = "the body is neither JSON nor a form"
        raise WrongMedia(what, "send application/json or multipart/form-data")
    form = await reading.read_form(request, pictures=1)
    try:
        values, picture = await _fields(form.multi_items())
    finally:
        await form.close()
    return _body(values), picture


async def _fields(items: Iterable[tuple[str, UploadFile | str]]) -> tuple[dict[str, Any], bytes | None]:
    """Return the fields of a form as JSON would have them, and the picture where it came as a file."""
    values: dict[str, Any] = {}
    picture: bytes | None = None
    for name, value in items:
        shortened = shown(name, 60)
        if name in values:
            raise Invalid(f"{shortened} is given twice", "give each field once", shortened)
        if isinstance(value, str):
            values[name] = value if name in ("adapter", "image") else _json(shortened, value)
        elif name == "image":
            picture, values["image"] = await value.read(), "a file"
        else:
            raise Invalid("only the field image takes a file", "send the picture as image", shortened)
    return values, picture


def _json(name: str, text: str) -> Any:
    """Return the value that a field of a form holds as JSON."""
    try:
        wrapped = reading.parse_json(b'{"value":%s}' % text.encode())
    except (HttpError, UnicodeEncodeError):
        wrapped = {}
    if set(wrapped) != {"value"}:
        what = f"the field {name} is not JSON"
        raise Invalid(what, 'write for example expressions={"happy": 0.8} or seed=7', name)
    return wrapped["value"]


def _body(values: Mapping[str, Any]) -> EditBody:
    try:
        return EditBody.model_validate(values)
    except ValidationError as error:
        raise invalid(error) from None


def _wants_job(prefer: str | None) -> bool:
    words = (word.split(";")[0].strip().lower() for word in (prefer or "").split(","))
    return "respond-async" in words


async def _accept(
    service: Service, body: EditBody, asked: SweepRequest, caller: Editor, idempotency_key: str | None
) -> Response:
    """Take a job; it is kept before this answers."""
    hook = None if body.webhook is None else Webhook(url=body.webhook.url, secret=body.webhook.secret)
    job = await service.jobs.accept(
        asked, caller=caller, previews=body.previews, idempotency_key=idempotency_key, webhook=hook
    )
    headers = {"Location": f"/v1/jobs/{job.id}", "Preference-Applied": "respond-async"}
    return JSONResponse(job_facts(job), status_code=202, headers=headers)


def _stream(service: Service, running: Running, parent: bytes) -> Response:
    identifier = _request_id()
    opening = {"id": identifier, **running.facts}

    async def tell(progress: Progress) -> bytes | None:
        return events.event_of("step", await events.step_facts(progress))

    async def finish(results: Sequence[EditResult]) -> bytes:
        facts = await answer_facts(identifier, service, results, parent)
        return events.event_of("result", facts)

    return events.event_stream(
        running,
        opening=events.event_of("queued", opening),
        tell=tell,
        finish=finish,
        headers=running.headers,
    )


def _request_id() -> str:
    return request_id() or ""


async def answer_facts(
    identifier: str, service: Service, results: Sequence[EditResult], parent: bytes
) -> dict[str, Any]:
    """Return the results of an edit as JSON; the pictures are encoded in a thread."""
    encoded = await asyncio.to_thread(
        pictures.encode_all, results, parent=parent, credentials=service.credentials
    )
    name, _, version = (results[0].adapter or "").partition(":")
    return {
        "id": identifier,
        "results": [
            {"image": image, **result.facts()} for image, result in zip(encoded, results, strict=True)
        ],
        "adapter": results[0].adapter,
        "adapter_name": name,
        "adapter_version": int(version) if version else None,
        "adapter_digest": str(results[0].adapter_digest),
    }
