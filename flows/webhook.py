"""MLflow says that somebody moved an alias there, and a reconcile looks at it: ``python -m flows.webhook``.

MLflow signs what it sends with a secret that both know (HMAC-SHA256 over delivery id, time and body, as
`mlflow.webhooks.delivery` writes it). A message is only a reason to look: the reconcile compares MLflow with
what is signed and believes neither the message nor MLflow. So a forged one would cost no more than a run; the
checks keep strangers from starting runs at all.

The checks, in their order: size of the body, headers, time, signature, delivery id, form. Only then anything
of the body is read.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import click
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flows.errors import FlowError, MessageRefused
from registry import command
from registry.errors import Explained, shown

if TYPE_CHECKING:
    from fastapi import FastAPI

TAG: Final = "mlflow-webhook"
"""Of the runs that are started here."""
SECRET_VARIABLE: Final = "ADAPTER_FOUNDRY_WEBHOOK_SECRET"  # noqa: S105 (the name of a variable)
EVENTS: Final = ("model_version_alias.created", "model_version_alias.deleted")
"""What MLflow should be told to send."""
MAX_BODY: Final = 64 * 1024
MAX_AGE: Final = 300
"""Seconds that a message may be old, or early by another clock."""
_MIN_SECRET: Final = 16
_REMEMBERED: Final = 10_000
_VERSION: Final = "v1"


class _Alias(BaseModel):
    """What MLflow tells about an alias; a deleted one has no version."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: Annotated[str, Field(min_length=1, max_length=500)]
    alias: Annotated[str, Field(min_length=1, max_length=500)]


class News(BaseModel):
    """The body of a message; other fields belong to newer servers."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    entity: Literal["model_version_alias"]
    action: Literal["created", "deleted"]
    data: _Alias


@dataclass(kw_only=True)
class Gate:
    """Lets through what MLflow has signed, once.

    Attributes:
        secret: known to MLflow and to this service.
        now: the time in seconds since 1970.
    """

    secret: bytes = field(repr=False)
    now: Callable[[], float] = time.time
    _seen: OrderedDict[str, float] = field(default_factory=OrderedDict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def check(self, headers: Mapping[str, str], body: bytes) -> News:
        """Return what a message says.

        Args:
            headers: with lower-case names.
            body: at most `MAX_BODY` bytes, as they came.

        Raises:
            MessageRefused: it is not believed.
        """
        if len(body) > MAX_BODY:
            raise MessageRefused(413, f"a message has more than {MAX_BODY} bytes", "MLflow sends far less")
        delivery = headers.get("x-mlflow-delivery-id", "")
        stamp, signature = headers.get("x-mlflow-timestamp", ""), headers.get("x-mlflow-signature", "")
        if not (delivery and stamp and signature) or max(map(len, (delivery, stamp, signature))) > 200:
            raise MessageRefused(
                401, "a message is not signed", "give MLflow's webhook the secret of this service"
            )
        if not (stamp.isascii() and stamp.isdecimal()) or abs(self.now() - int(stamp)) > MAX_AGE:
            raise MessageRefused(401, "a message is too old", "compare the clocks of both machines")
        if not hmac.compare_digest(self._signature(delivery, stamp, body), signature.encode()):
            raise MessageRefused(
                401, "a signature does not hold", "give MLflow's webhook the secret of this service"
            )
        self._once(delivery)
        try:
            return News.model_validate_json(body)
        except ValidationError as error:
            what = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, what["loc"]))
            raise MessageRefused(
                422, f"a message is no news of an alias: {where}: {shown(what['msg'])}",
                f"let MLflow's webhook send {' and '.join(EVENTS)} only",
            ) from None  # fmt: skip

    def forget(self, delivery: str) -> None:
        """Let a delivery come again, because nothing came of it."""
        with self._lock:
            self._seen.pop(delivery, None)

    def _signature(self, delivery: str, stamp: str, body: bytes) -> bytes:
        signed = f"{delivery}.{stamp}.".encode("utf-8", "surrogateescape") + body
        digest = hmac.new(self.secret, signed, hashlib.sha256).digest()
        return f"{_VERSION},{base64.b64encode(digest).decode()}".encode()

    def _once(self, delivery: str) -> None:
        """Remember a delivery as long as its time would let it through."""
        with self._lock:
            now = self.now()
            while self._seen and (next(iter(self._seen.values())) < now - 2 * MAX_AGE):
                self._seen.popitem(last=False)
            if delivery in self._seen:
                raise MessageRefused(409, "a message came twice", "nothing to do: the first one was heard")
            if len(self._seen) >= _REMEMBERED:
                raise MessageRefused(429, "too many messages at once", "MLflow tries again later")
            self._seen[delivery] = now


def create_app(gate: Gate, start: Callable[[News], str]) -> FastAPI:
    """Return the service.

    Args:
        gate: decides what is believed.
        start: starts a reconcile, and returns the id of its run.
    """
    from fastapi import FastAPI, Request
    from fastapi.concurrency import run_in_threadpool
    from fastapi.responses import JSONResponse

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    def health() -> bool:
        return True

    async def hear(request: Request) -> JSONResponse:
        headers = {name.lower(): value for name, value in request.headers.items()}
        body = b""
        # Never more than the limit is read, whatever Content-Length says or does not say.
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_BODY:
                break
        try:
            news = gate.check(headers, body)
        except MessageRefused as error:
            return _told(error.status, error)
        try:
            run = await run_in_threadpool(start, news)
        except Explained as error:
            gate.forget(headers["x-mlflow-delivery-id"])
            return _told(503, error)
        return JSONResponse({"run": run}, 202)

    def _told(status: int, error: Explained) -> JSONResponse:
        content = {"kind": type(error).__name__, "message": error.message, "mend": error.mend}
        return JSONResponse({"error": content}, status)

    # FastAPI resolves annotations by name, and those of a nested function have none that it can find.
    app.add_route("/mlflow", hear, methods=["POST"])
    return app


def start_reconcile(url: str, deployment: str, *, repair: bool) -> Callable[[News], str]:
    """Return what starts a run of a deployment on a Prefect server for a message.

    One that was started and has not begun will look after the message came: it does for both. One that is
    under way may have looked before.

    Args:
        url: of the server's API.
        deployment: ``flow/deployment``.
        repair: let it repair MLflow, too.
    """
    from flows.server import ask

    def start(news: News) -> str:
        try:
            found = ask(f"{url}/deployments/name/{deployment}")
            if waiting := _waiting(url, found["id"], repair=repair):
                return waiting
            subject = shown(f"{news.data.name}@{news.data.alias}", 100)
            wanted: dict[str, Any] = {
                "parameters": {"repair": repair},
                "name": f"mlflow-{news.action}-{subject}"[:150],
                "tags": [TAG],
                "state": {"type": "SCHEDULED"},
            }
            made = ask(f"{url}/deployments/{found['id']}/create_flow_run", wanted)
        except (OSError, ValueError, KeyError) as error:
            raise FlowError(
                f"the deployment {deployment} cannot be started on {url}: {shown(error)}",
                "start Prefect's server and deploy with `python -m flows.local`, or name another one",
            ) from error
        return str(made["id"])

    return start


def _waiting(url: str, deployment: str, *, repair: bool) -> str | None:
    """Return the id of a run that was started here and has not begun; a schedule's is due much later."""
    from flows.server import PAGE, ask

    wanted = {
        "flow_runs": {
            "deployment_id": {"any_": [deployment]},
            "state": {"type": {"any_": ["SCHEDULED"]}},
            "tags": {"all_": [TAG]},
        },
        "limit": PAGE,
    }
    runs = ask(f"{url}/flow_runs/filter", wanted)
    return next((str(run["id"]) for run in runs if run["parameters"].get("repair") is repair), None)


def secret() -> bytes:
    """Return the secret, which is nowhere but in the environment.

    Raises:
        FlowError: there is none, or it is too short to be one.
    """
    found = os.environ.get(SECRET_VARIABLE, "")
    if len(found) < _MIN_SECRET:
        why = "is not set" if not found else f"has {len(found)} characters; at least {_MIN_SECRET} are needed"
        raise FlowError(
            f"{SECRET_VARIABLE} {why}",
            "make one with `openssl rand -hex 32`, and give the same to MLflow's webhook",
        )
    return found.encode()


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8610, show_default=True)
@click.option(
    "--deployment", default="reconcile/reconcile", show_default=True, help="FLOW/DEPLOYMENT to start."
)
@click.option("--repair", is_flag=True, help="Let it make MLflow say what is signed.")
@click.option("--json", "as_json", is_flag=True, help="Tell the addresses as one JSON object, then serve.")
def main(host: str, port: int, deployment: str, repair: bool, as_json: bool) -> None:
    """Listen for MLflow's webhooks about aliases, and let a reconcile look after each.

    The secret is in ADAPTER_FOUNDRY_WEBHOOK_SECRET, Prefect's server in PREFECT_API_URL.
    """
    import uvicorn

    from flows.settings import FlowSettings

    url = FlowSettings.read().prefect_api_url
    if url is None:
        raise FlowError(
            "PREFECT_API_URL is not set", "name the Prefect server on which reconcile is deployed"
        )
    app = create_app(Gate(secret=secret()), start_reconcile(url, deployment, repair=repair))
    told = {"address": f"http://{host}:{port}/mlflow", "events": [*EVENTS], "prefect": url, "repair": repair}
    if as_json:
        click.echo(json.dumps(told, sort_keys=True))
    else:
        click.echo(f"Listening for {' and '.join(EVENTS)} at {told['address']}", err=True)
    uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    command.run(main, "python -m flows.webhook")
