"""Any OpenAI-compatible server through the openai SDK: the client, and what its failures mean."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trainer.apis import retry
from trainer.apis.gemini import EXTRA
from trainer.apis.keys import VARIABLES, address, key_of
from trainer.apis.request import Failed, Usage, count_of
from trainer.apis.transport import HEADERS, arguments, begin, transport_failure, unreadable
from trainer.errors import ApiError

ADDRESS = "https://api.openai.com/v1"
_MODERATED = frozenset({"moderation_blocked", "content_policy_violation", "content_filter"})


def client(endpoint: str | None, timeout: float) -> Any:
    """Return an `openai.OpenAI` that repeats nothing by itself.

    Args:
        endpoint: address of another server of this protocol, with its /v1; None is OpenAI's.
        timeout: seconds for one request.

    Raises:
        ApiError: there is no key, it may not go there, or openai is not installed.
    """
    key, base = key_of("openai"), address(endpoint or ADDRESS, ADDRESS)
    try:
        import openai
    except ImportError as error:
        raise ApiError(f"the OpenAI protocol needs openai ({error})", EXTRA) from None
    http = openai.DefaultHttpxClient(**arguments())
    return openai.OpenAI(
        api_key=key,
        base_url=base,
        timeout=timeout,
        max_retries=0,
        default_headers=dict(HEADERS),
        http_client=http,
    )


def usage_of(told: Any, prompt: str, answer: str, images: int = 0) -> Usage | None:
    """Return what an answer took, or None if the server does not count as the protocol says.

    Args:
        told: the SDK's object for ``usage``; it holds whatever was sent.
        prompt, answer: names of the tokens.
        images: that were made.
    """
    read, written = (count_of(getattr(told, name, None)) for name in (prompt, answer))
    if read is None or written is None:
        return None
    return Usage(input_tokens=read, output_tokens=written, images=images)


class Moderated(Exception):
    """The vendor does not answer that question; the text says why."""


@contextmanager
def failures() -> Iterator[None]:
    """Turn what the SDK raises inside of the block into `Failed`, and a refusal into `Moderated`."""
    import openai

    begin()
    try:
        yield
    except openai.APIStatusError as error:
        if str(error.code) in _MODERATED:
            raise Moderated(f"{error.code}: {error.message}") from None
        raise _of_status(error) from None
    except openai.APIResponseValidationError as error:
        raise unreadable(f"the answer has another form ({error.message})") from None
    except openai.APIConnectionError as error:
        # The SDK hides what httpx said as the cause.
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else TimeoutError()
        raise transport_failure(cause) from None
    except Moderated:
        raise
    except Exception as error:
        raise transport_failure(error) from None


def _of_status(error: Any) -> Failed:
    code, text = int(error.status_code), str(error.message)
    after = retry.retry_after(dict(error.response.headers), time.time())
    if str(error.code) == "insufficient_quota":
        mend = "put money into the account, or give the key of another one"
        return Failed(status=str(code), message=text, mend=mend, repeat=False)
    if code in retry.REPEATED or code >= 500:
        return Failed(status=str(code), message=text, after=after)
    mends = {
        400: "correct synthesis or scoring in the recipe: the model's id, the resolution, the address",
        401: f"look whether {VARIABLES['openai']} is right",
        403: f"look whether {VARIABLES['openai']} may use this model",
        404: "look up the model's id and the address: vendors retire models; both are written in the recipe",
    }
    return Failed(status=str(code), message=text, mend=mends.get(code, ""), repeat=False)
