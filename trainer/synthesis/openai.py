"""Edits by any server with OpenAI's /v1/images/edits."""

from __future__ import annotations

import base64
import binascii
from typing import Any, ClassVar

from trainer.apis import Failed, Reply, Usage
from trainer.apis.openai import Moderated, client, failures, usage_of
from trainer.apis.transport import unreadable
from trainer.sections import SynthesisSection
from trainer.synthesis.prompts import Prompt

# These models answer with the picture itself and refuse to be told so; others have to be asked.
_INLINE = ("gpt-image", "chatgpt-image")
_FORMATS = frozenset({"png", "jpeg", "webp"})


class OpenAiEditor:
    """`Vendor` that speaks ``/v1/images/edits``.

    Args:
        section: has the model.
        timeout: seconds for one edit.
    """

    provider: ClassVar[str] = "openai"

    def __init__(self, section: SynthesisSection, timeout: float) -> None:
        self._section = section
        self._client = client(section.endpoint, timeout)

    def edit(self, portrait: bytes, prompt: Prompt) -> Reply:
        """See `Vendor`."""
        section = self._section
        more: dict[str, Any] = {} if section.model.startswith(_INLINE) else {"response_format": "b64_json"}
        if section.resolution != "auto":
            more["size"] = section.resolution
        try:
            with failures():
                answer = self._client.images.edit(
                    model=section.model,
                    image=("portrait.png", portrait, "image/png"),
                    prompt=prompt.text,
                    n=1,
                    extra_body=dict(section.options) or None,
                    **more,
                )
                return reply_of(answer)
        except Moderated as refusal:
            return Reply(refused=str(refusal))


def reply_of(answer: Any) -> Reply:
    """Return what an `openai.types.ImagesResponse` holds: a picture.

    Raises:
        Failed: it holds none, or only its address.
    """
    import openai

    if not isinstance(answer, openai.types.ImagesResponse):
        raise unreadable("the answer is no JSON object")
    # The SDK checks nothing: what a server leaves out or spells otherwise comes as it is.
    images = answer.data if isinstance(answer.data, list) else []
    # Pictures are among the tokens; they are counted beside them for servers with a price for each.
    usage = usage_of(answer.usage, "input_tokens", "output_tokens", images=len(images))
    first = images[0] if images and isinstance(images[0], openai.types.Image) else None
    if first is None or not isinstance(first.b64_json, str):
        if first is None or not isinstance(first.url, str):
            done = usage is not None or isinstance(answer.data, list)
            raise unreadable("there is no picture in the answer", usage, delivered=done)
        raise Failed(
            status="address",
            message="the server answers with the address of the picture, which is not followed",
            mend="let the server answer with b64_json",
            repeat=False,
            billed="yes" if usage else "unsure",
            usage=usage or Usage(images=len(images)),
        )
    try:
        body = base64.b64decode(first.b64_json, validate=True)
    except (binascii.Error, ValueError):
        raise unreadable("the picture is not base64", usage, delivered=True) from None
    form = answer.output_format if isinstance(answer.output_format, str) else None
    taken = usage or Usage(images=len(images))
    return Reply(
        body=body,
        media_type=f"image/{form if form in _FORMATS else 'png'}",
        input_tokens=taken.input_tokens,
        output_tokens=taken.output_tokens,
        images=taken.images,
        counted=usage is not None,
    )
