"""Bodies of requests, read under limits: JSON, forms and base64. Only then does a schema look at them.

A body that is small enough may still unfold into much more: two bytes of JSON make a list of 56, and a form
can have a million parts. So parts are counted before they are parsed.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import math
from collections.abc import Sequence
from typing import Any, Final

from fastapi import Request
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from registry.errors import shown
from serving.errors import Cancelled
from serving.http.answers import Invalid, TooLarge, WrongMedia
from serving.http.limits import BadRequest
from serving.images import MAX_IMAGE_BYTES

MAX_VALUES: Final = 10_000
"""Values in a JSON document."""
MAX_DEPTH: Final = 16
MAX_FIELDS: Final = 64
MAX_FIELD_BYTES: Final = 64 << 10
"""Of a field of a form that is no file."""


async def read_json(request: Request) -> dict[str, Any]:
    """Return the JSON object in a request's body.

    Raises:
        WrongMedia: the body is said to be something else.
        BadRequest: it is no JSON object, names a key twice, or holds what JSON has no word for (NaN).
        TooLarge: too many or too deeply nested values; or the limits of `Limits`.
    """
    media, _, parameters = request.headers.get("content-type", "").partition(";")
    charset = parameters.strip().lower().removeprefix("charset=").strip('"')
    if media.strip().lower() != "application/json" or charset not in ("", "utf-8"):
        raise WrongMedia("the body is not JSON in UTF-8", "send it as application/json")
    try:
        body = await request.body()
    except ClientDisconnect:
        raise Cancelled("the client is gone", "") from None
    return await asyncio.to_thread(parse_json, body)


def parse_json(body: bytes) -> dict[str, Any]:
    """See `read_json`."""
    # Each value but the first stands behind one of these; base64 has none of them.
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > MAX_VALUES:
        raise TooLarge(f"the JSON has more than {MAX_VALUES} values", "send less")
    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_once,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        reason = (
            shown(error) if isinstance(error, json.JSONDecodeError | _Refused) else "it is not text in UTF-8"
        )
        raise BadRequest(f"the body is not JSON: {reason}", "send one JSON object") from None
    if not isinstance(value, dict):
        raise BadRequest("the body is not a JSON object", "send one JSON object")
    _check_values(value)
    return value


async def read_form(request: Request, pictures: int = 1) -> FormData:
    """Return the form in a request's body; close it when its files were read.

    Args:
        request: with a multipart body.
        pictures: files that it may have.

    Raises:
        WrongMedia: the body is said to be something else.
        BadRequest: it is no form, has too many parts or too long ones.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise WrongMedia("the body is not a form", "send it as multipart/form-data")
    try:
        return await request.form(max_files=pictures, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)
    except HTTPException as error:
        raise BadRequest(
            f"the form cannot be read: {shown(error.detail)}", "send fewer or smaller parts"
        ) from None
    except ClientDisconnect:
        raise Cancelled("the client is gone", "") from None
    except (ValueError, LookupError, AssertionError):
        raise BadRequest("the form cannot be read", "send it as multipart/form-data") from None


def read_base64(text: str, param: str = "image") -> bytes:
    """Return the bytes of base64 text, or of a data URL with base64.

    Raises:
        TooLarge: more than a picture may have; nothing is decoded then.
        Invalid: it is not base64.
    """
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or len(head) > 100 or not head.endswith(";base64"):
            raise Invalid(
                f"{param} is not a data URL with base64", "send data:image/png;base64,…", param=param
            )
    if len(text) > MAX_IMAGE_BYTES // 3 * 4 + 4:
        raise TooLarge(f"the picture has more than {MAX_IMAGE_BYTES} bytes", "send a smaller file")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Invalid(f"{param} is not base64", "send the file as standard base64", param=param) from None


class _Refused(ValueError):
    """What JSON allows, or Python adds to it, and we do not take."""


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Refused("it names a key twice")
    return found


def _no_constant(word: str) -> float:
    raise _Refused(f"{word} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _Refused("a number is out of range")
    return number


def _check_values(value: Any) -> None:
    """Refuse values that lie too deep, and text that is no text (half of a surrogate pair)."""
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below += [*one.keys(), *one.values()]
            elif isinstance(one, list):
                below += one
            elif (
                isinstance(one, str)
                and not one.isascii()
                and any("\ud800" <= sign <= "\udfff" for sign in one)
            ):
                raise BadRequest("the body holds half a character", "send text in UTF-8")
        if not below:
            return
        level = below
    raise _too_deep()


def _too_deep() -> TooLarge:
    return TooLarge(f"the JSON is nested deeper than {MAX_DEPTH}", "send it flatter")
