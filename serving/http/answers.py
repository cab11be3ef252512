"""What the service says when it does not answer an edit: one table of errors, one shape of JSON.

The shape is OpenAI's (``{"error": {"message", "type", "param", "code"}}``), so that its clients raise their
own typed exceptions, plus ``mend``: what to do about it.

    400 what was asked is wrong        409 refused by policy, or does not fit the base
    401 no valid key                   410 revoked
    403 the key may not do that        413, 414, 431 too large, too long
    404 not served, or not there       415 another content type
    405 another method                 422 a field is missing, unknown or out of its limits
    406 another Accept header          429 too much, see Retry-After
    408 too slow                       499 cancelled
    500 a fault of ours                503 draining, or the registry is away
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from registry import errors as registry_errors
from registry.errors import Explained, shown
from serving import errors
from serving.errors import ServingError

FAULT = "the service failed to answer"


class HttpError(ServingError):
    """Refused by the HTTP service itself, before a backend saw it.

    Attributes:
        param: the field that is wrong, where it is one.
        headers: more headers of the answer.
    """

    status: ClassVar[int] = 400

    def __init__(
        self,
        message: str,
        mend: str = "",
        param: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, mend)
        self.param = param
        self.headers = dict(headers or {})


class BadRequest(HttpError):
    """The request cannot be understood."""


class Unauthenticated(HttpError):
    """No key, or not a valid one."""

    status = 401


class Forbidden(HttpError):
    """The key is valid, and not for this."""

    status = 403


class NoSuchThing(HttpError):
    """There is no such page, job or picture."""

    status = 404


class WrongMethod(HttpError):
    """The address is right, the method is not."""

    status = 405


class NotAcceptable(HttpError):
    """No form of the answer is one that the caller accepts."""

    status = 406


class TooLarge(HttpError):
    """The body is over a limit."""

    status = 413


class WrongMedia(HttpError):
    """The body is of another content type."""

    status = 415


class Invalid(HttpError):
    """A field is missing, unknown, of the wrong kind or out of its limits."""

    status = 422


class RateLimited(HttpError):
    """The key asked too much in too little time.

    Attributes:
        retry_after: seconds after which to try again.
    """

    status = 429

    def __init__(
        self, message: str, mend: str, retry_after: float = 1.0, *, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message, mend, headers=headers)
        self.retry_after = retry_after


#: The first class that an error is one of decides.
STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (errors.UsageError, 400),
    (errors.Cancelled, 499),
    (errors.NotServed, 404),
    (errors.WrongBase, 409),
    (errors.AdapterMismatch, 409),
    (errors.CandidateRefused, 409),
    (errors.Overloaded, 429),
    (errors.Draining, 503),
    (registry_errors.UsageError, 400),
    (registry_errors.NotFound, 404),
    (registry_errors.Conflict, 409),
    (registry_errors.Revoked, 410),
    (registry_errors.NetworkError, 503),
    (registry_errors.StaleTrust, 503),
    (registry_errors.RegistryError, 409),
)
TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "adapter_refused",
    410: "adapter_refused",
    429: "rate_limit_error",
    499: "cancelled",
}


def status_of(error: Exception) -> int:
    """Return the status that an error is answered with; 500 for what nobody foresaw."""
    if isinstance(error, HttpError):
        return error.status
    return next((status for kind, status in STATUSES if isinstance(error, kind)), 500)


class ErrorFacts(BaseModel):
    """What went wrong."""

    model_config = ConfigDict(extra="forbid")

    message: str = Field(description="What happened.", examples=["the adapter has no expression 'hapy'"])
    mend: str = Field(description="What to do about it; may be empty.", examples=["did you mean 'happy'?"])
    type: str = Field(description="The kind of error, in OpenAI's words.", examples=["invalid_request_error"])
    code: str = Field(description="The error itself, for programs.", examples=["unknown_expression"])
    param: str | None = Field(default=None, description="The field that is wrong, where it is one.")


class ErrorAnswer(BaseModel):
    """An error."""

    model_config = ConfigDict(extra="forbid")

    error: ErrorFacts


def error_facts(error: Exception) -> dict[str, Any]:
    """Return an error as JSON; of what nobody foresaw not a word gets out."""
    status = status_of(error)
    own = isinstance(error, HttpError) and status == 409
    kind = TYPES.get(0 if own else status, "invalid_request_error" if status < 500 else "server_error")
    if status == 500:
        told = {"message": FAULT, "mend": "try again; the log of the service has the cause"}
        return {"error": {**told, "type": kind, "code": "internal_error", "param": None}}
    message, mend = (error.message, error.mend) if isinstance(error, Explained) else (str(error), "")
    param = getattr(error, "param", None)
    told = {"message": without_places(message), "mend": without_places(mend)}
    return {"error": {**told, "type": kind, "code": code_of(error), "param": param}}


_PLACES = re.compile(
    r"\b[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"]*[^\s'\",;:.)]"  # https://…, file:///…, s3://…
    r"|(?<![\w.:/@])/(?!v1/|v2\b|metrics\b|openapi)[\w.@+-]+(?:/[\w.@+-]+)+/?"
)
#: How urllib3, libpq and OpenSSL name the server that they did not reach.
_SERVERS = re.compile(
    r"""\b(host(?: name)?|server at|resolve|valid for)([ =])(['"])[^'"]*\3(?: \([0-9a-f.:]+\))?"""
)


def without_places(text: str) -> str:
    """Return a text without paths of this machine, addresses and servers: they concern nobody over HTTP.

    No address is told, not even this machine's: which one is harmless depends on who asks from where.
    """
    return _SERVERS.sub(r"\1\2…", _PLACES.sub("…", text))


def code_of(error: Exception) -> str:
    """Return the name of an error's class as programs like it: ``NotServed`` is not_served."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(error).__name__).lower()


def error_headers(error: Exception) -> dict[str, str]:
    """Return the headers that belong to an error: when to come back, and how to prove who one is."""
    headers: dict[str, str] = dict(error.headers) if isinstance(error, HttpError) else {}
    retry_after = getattr(error, "retry_after", None)
    if retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after)))
    elif status_of(error) == 503:
        headers["Retry-After"] = "5"
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = 'Bearer realm="adapter-foundry"'
    return headers


def error_answer(error: Exception) -> JSONResponse:
    """Return the answer to a request that failed."""
    return JSONResponse(error_facts(error), status_code=status_of(error), headers=error_headers(error))


def error_body(error: Exception) -> tuple[int, dict[str, str], bytes]:
    """Return the same as status, headers and body, for code that speaks ASGI itself."""
    answer = error_answer(error)
    return answer.status_code, dict(answer.headers), bytes(answer.body)


def invalid(error: ValidationError) -> Invalid:
    """Return what pydantic found, explained: the first finding, and never the value itself."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(shown(part, 60) for part in first["loc"][:3])
    place = where or "the body"
    if first["type"] == "extra_forbidden":
        what = f"{place} is not a field of this request"
        return Invalid(what, "leave it out, or correct its name", param=where)
    if first["type"] == "missing":
        return Invalid(f"{place} is missing", f"send {place}", param=where)
    if first["type"] == "json_invalid":
        return Invalid("the body is not JSON", "send one JSON object")
    said = shown(first["msg"].removeprefix("Value error, "))
    return Invalid(f"{place} is not valid: {said}", f"correct {place}", param=where or None)


_SAID: Mapping[int, str] = {
    400: "What was asked is wrong.",
    401: "No valid API key.",
    403: "The API key may not do that.",
    404: "No such adapter is served, or there is no such thing.",
    405: "Another method.",
    406: "No form of the answer is accepted.",
    408: "The request did not arrive in time.",
    409: "The adapter is refused, does not fit the base, or the request contradicts another one.",
    410: "The adapter was revoked.",
    413: "The body or the picture is over a limit.",
    415: "The body is of another content type.",
    422: "A field is missing, unknown or out of its limits.",
    429: "Too many requests; `Retry-After` says when to try again.",
    499: "The edit was cancelled.",
    500: "A fault of the service.",
    503: "The service is going down or not ready, or the registry is away.",
}


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the error answers of a route, for its documentation."""
    retry = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}}}
    return {
        status: {
            "description": _SAID[status],
            "model": ErrorAnswer,
            **({"headers": retry} if status in (429, 503) else {}),
        }
        for status in statuses
    }


EDIT_ERRORS: Sequence[int] = (400, 401, 403, 404, 409, 410, 413, 415, 422, 429, 499, 500, 503)
