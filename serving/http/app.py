"""The HTTP application: routes over a backend, and what holds for every answer.

From the outside in, a request passes: traces, the log (which gives it an id), metrics, the headers and the
last net of this file, the limits of bodies and headers, and then its route.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from registry.errors import Explained
from registry.settings import home as data_folder
from serving import logs
from serving.http import adapters, health, jobs, native, openai_edits, static
from serving.http.answers import (
    BadRequest,
    HttpError,
    Invalid,
    NoSuchThing,
    WrongMethod,
    code_of,
    error_answer,
    error_body,
    status_of,
)
from serving.http.document import ABOUT, allowed, document
from serving.http.job_runner import JobRunner
from serving.http.jobs import JobStore
from serving.http.keyring import Keys
from serving.http.keys import Gate
from serving.http.limits import Limits
from serving.http.service import Service
from serving.logs import HttpLogs
from serving.metrics import HttpMetrics, Metrics
from serving.tracing import HttpTraces, Tracing

if TYPE_CHECKING:
    from serving.backend import Backend
    from serving.provenance import ContentCredentials
    from serving.schema import EditResult, SweepRequest
    from serving.settings import ServingSettings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


def create_app(
    backend: Backend,
    settings: ServingSettings,
    *,
    keys: Gate,
    jobs: JobStore,
    metrics: Metrics,
    credentials: ContentCredentials | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """Return the application over a backend.

    Args:
        backend: answers edits; `start` starts it, and the server's lifespan does where nobody did.
        settings: of serving.
        keys: lets callers in.
        jobs: keeps edits that are answered later.
        metrics: counts.
        credentials: signs a C2PA manifest into each picture; None signs nothing.
        tracing: where spans go; None sends none.
    """
    app = FastAPI(
        title="adapter-foundry serving",
        version=version("adapter-foundry"),
        description=ABOUT,
        docs_url=None,  # FastAPI's pages fetch their scripts from elsewhere
        redoc_url=None,
        lifespan=running,
        redirect_slashes=False,
    )
    app.state.service = Service(
        backend=backend, settings=settings, keys=keys, jobs=jobs, metrics=metrics, credentials=credentials
    )
    if credentials is not None:
        metrics.content_credentials_expiry_timestamp_seconds.set(credentials.expires.timestamp())
    _add_routes(app)
    app.add_exception_handler(Explained, _explained)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_exception)
    # The last one that is added is the outermost.
    app.add_middleware(Limits, settings=settings)
    app.add_middleware(Edges)
    app.add_middleware(HttpMetrics, metrics=metrics)
    app.add_middleware(HttpLogs)
    app.state.tracing = tracing or Tracing(None)
    app.add_middleware(HttpTraces, tracing=app.state.tracing)
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    return app


def _add_routes(app: FastAPI) -> None:
    for part in (native, openai_edits, jobs, adapters, health):
        app.include_router(part.router)
    app.include_router(static.router())


@asynccontextmanager
async def running(app: FastAPI) -> AsyncIterator[None]:
    """Start what is not started yet, and end it."""
    await start(app)
    try:
        yield
    finally:
        await drain(app)


async def start(app: FastAPI) -> None:
    """Start the backend and what works through the jobs; twice is once.

    Raises:
        registry.errors.Explained: the backend does not start, and why.
    """
    if getattr(app.state, "runner", None) is not None:
        return
    service: Service = app.state.service
    await service.backend.start()
    app.state.runner = JobRunner(
        service.backend, service.jobs, encode=_encoder(service), metrics=service.metrics
    )
    app.state.runner.start()


async def drain(app: FastAPI) -> None:
    """Take nothing new and finish what was taken; twice is once."""
    service: Service = app.state.service
    runner = getattr(app.state, "runner", None)
    if runner is not None:
        app.state.runner = None
        grace = service.settings.grace_seconds
        await asyncio.gather(runner.close(grace), service.backend.close(grace))
        await asyncio.to_thread(app.state.tracing.close)


def _encoder(service: Service) -> Callable[[SweepRequest, EditResult], bytes]:
    from serving.http import pictures

    def encode(request: SweepRequest, result: EditResult) -> bytes:
        parent = request.image if isinstance(request.image, bytes) else b""
        return pictures.encode(result, parent=parent, credentials=service.credentials)

    return encode


def service_app(
    backend: Backend,
    settings: ServingSettings,
    *,
    metrics: Metrics | None = None,
    home: Path | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """Return the application with the keys, jobs and credentials that the settings name.

    Args:
        backend: answers edits.
        settings: of serving.
        metrics: those that the backend counts with; None makes new ones.
        home: the data folder; None is the registry's.
        tracing: where spans go; None is what the settings say.

    Raises:
        registry.errors.Explained: keys, jobs or credentials are not as the settings say.
    """
    folder = home or data_folder()
    known = Keys.open(folder)
    return create_app(
        backend,
        settings,
        keys=Gate(known, host=settings.host, public=settings.public),
        jobs=JobStore.open(settings, folder, known),
        metrics=metrics or Metrics(),
        credentials=_credentials(settings),
        tracing=tracing or Tracing(settings.otlp_endpoint),
    )


def _credentials(settings: ServingSettings) -> ContentCredentials | None:
    if settings.content_credentials is None:
        return None
    from serving.provenance import ContentCredentials

    return ContentCredentials.open(settings.content_credentials)


class Edges:
    """ASGI middleware: the headers that keep browsers careful, and an answer when code of ours failed.

    Args:
        app: what it wraps.
    """

    HEADERS = (
        (b"x-content-type-options", b"nosniff"),
        (b"x-frame-options", b"DENY"),
        (b"referrer-policy", b"no-referrer"),
        (b"cross-origin-resource-policy", b"same-origin"),
        (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
        (b"cache-control", b"no-store"),
    )

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = _with_defaults(message.get("headers", ()))
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception as error:
            if begun:
                raise
            logs.event("request failed", level=logging.ERROR, error=error)
            status, headers, body = error_body(error)
            pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
            await sending({"type": "http.response.start", "status": status, "headers": pairs})
            await sending({"type": "http.response.body", "body": body})


def _with_defaults(headers: Any) -> list[tuple[bytes, bytes]]:
    """Add the headers that an answer has not set itself, as the page sets its own."""
    own = list(headers)
    names = {name.lower() for name, _ in own}
    return [*own, *(pair for pair in Edges.HEADERS if pair[0] not in names)]


async def _explained(request: Request, error: Exception) -> JSONResponse:
    if status_of(error) == 500:
        logs.event("request failed", level=logging.ERROR, error=error)
    logs.bind(error=code_of(error))
    return error_answer(error)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """Explain what FastAPI found wrong with a path or a header."""
    assert isinstance(error, RequestValidationError)
    found = [{**one, "loc": one["loc"][1:]} for one in error.errors()]
    first = found[0]
    place = ".".join(str(part) for part in first["loc"]) or "the request"
    return error_answer(Invalid(f"{place} is not valid: {first['msg']}", f"correct {place}", place))


async def _http_exception(request: Request, error: Exception) -> JSONResponse:
    """Answer what the framework refuses: an address without a route, a method without one."""
    assert isinstance(error, HTTPException)
    told: HttpError
    if error.status_code == 405:
        methods = allowed(request) or (error.headers or {}).get("Allow", "")
        told = WrongMethod(
            "this address does not take that method", f"use {methods}", headers={"Allow": methods}
        )
    elif error.status_code == 404:
        told = NoSuchThing("there is nothing at this address", "GET /openapi.json lists all addresses")
    else:
        told = BadRequest("the request cannot be understood", "see GET /openapi.json")
    return error_answer(told)
