"""Google's Gemini API through google-genai: the client, and what its failures mean."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trainer.apis import retry
from trainer.apis.keys import VARIABLES, address, key_of
from trainer.apis.request import Failed, Usage, count_of
from trainer.apis.transport import HEADERS, arguments, begin, transport_failure, unreadable
from trainer.errors import ApiError

ADDRESS = "https://generativelanguage.googleapis.com"
_VERSION = "v1beta"  # the SDK's own default changes; models in preview are at this one alone
EXTRA = "pip install 'adapter-foundry[apis]'"


def client(endpoint: str | None, timeout: float) -> Any:
    """Return a `google.genai.Client` that repeats nothing by itself.

    Args:
        endpoint: address of another server of this protocol; None is Google's.
        timeout: seconds for one request.

    Raises:
        ApiError: there is no key, it may not go there, or google-genai is not installed.
    """
    key, base = key_of("gemini"), address(endpoint or ADDRESS, ADDRESS)
    try:
        from google import genai
        from google.genai.types import HttpOptions
    except ImportError as error:
        raise ApiError(f"the Gemini API needs google-genai ({error})", EXTRA) from None
    options = HttpOptions(
        base_url=base,
        api_version=_VERSION,
        timeout=max(1, int(timeout * 1000)),
        headers=dict(HEADERS),
        client_args=arguments(),
        retry_options=None,
    )
    # Said outright, because the SDK looks into the environment for either.
    return genai.Client(api_key=key, vertexai=False, http_options=options)


def usage_of(told: Any, images: int = 0) -> Usage | None:
    """Return what an answer took, or None if the server does not count as the protocol says.

    Thoughts are billed as output; tokens of pictures are left out, for pictures have a price of their own.

    Args:
        told: the SDK's object for ``usageMetadata``.
        images: that were made.
    """
    if told is None:
        return None
    # A zero is not sent; only the prompt is never empty.
    answered, thought = (told.candidates_token_count or 0, told.thoughts_token_count or 0)
    details = told.candidates_tokens_details or []
    drawn = [one.token_count or 0 for one in details if word(one.modality) == "IMAGE"]
    counts = [count_of(one) for one in (told.prompt_token_count, answered, thought, *drawn)]
    if None in counts:
        return None
    written = answered - sum(drawn) if details or not images else 0
    return Usage(input_tokens=told.prompt_token_count, output_tokens=max(0, written) + thought, images=images)


def word(value: Any) -> str:
    """Return the name of one of the SDK's enumerations, also of a value that is new to it."""
    return str(getattr(value, "value", value) or "")


@contextmanager
def failures() -> Iterator[None]:
    """Turn what the SDK raises inside of the block into `Failed`."""
    from google.genai import errors

    begin()
    try:
        yield
    except errors.APIError as error:
        raise _of_status(error) from None
    except errors.UnknownApiResponseError as error:
        raise unreadable(f"no JSON: {error}") from None
    except Exception as error:
        raise transport_failure(error) from None


def _of_status(error: Any) -> Failed:
    code = int(error.code or 0)
    headers = dict(getattr(error.response, "headers", None) or {})
    text = str(error.message or error.status or "")
    after = retry.retry_after(headers, time.time())
    if after is None:
        after = _retry_info(error.details)
    if code in retry.REPEATED or code >= 500:
        return Failed(status=str(code), message=text, after=after)
    mends = {
        400: "correct synthesis or scoring in the recipe: the model's id, the resolution, the address",
        401: f"look whether {VARIABLES['gemini']} is right",
        403: f"look whether {VARIABLES['gemini']} may use this model",
        404: "look up the model's id: vendors retire models; ids are written in the recipe",
    }
    return Failed(status=str(code), message=text, mend=mends.get(code, ""), repeat=False)


def _retry_info(details: Any) -> float | None:
    """Return the seconds of google.rpc.RetryInfo, with which Gemini says what others say in Retry-After."""
    try:
        for item in details["error"]["details"]:
            if str(item.get("@type", "")).endswith("google.rpc.RetryInfo"):
                return max(0.0, float(str(item["retryDelay"]).removesuffix("s")))
    except (KeyError, TypeError, ValueError, AttributeError):
        pass
    return None
