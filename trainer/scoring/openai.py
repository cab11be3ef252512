"""Asking vision-language models behind any OpenAI-compatible /v1/chat/completions, with structured output."""

from __future__ import annotations

import base64
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.apis import Reply, Usage
from trainer.apis.openai import Moderated, client, failures, usage_of
from trainer.apis.transport import unreadable
from trainer.scoring.vlm import MAX_TOKENS, Question, reply

if TYPE_CHECKING:
    from trainer.sections import ScoringSection


class OpenAiVendor:
    """`Vendor` of the OpenAI protocol.

    ``create`` with a JSON Schema, not ``parse``: that raises on an answer that breaks the schema before
    anybody can read what it cost.

    Args:
        settings: model and address.
        timeout: seconds for one request.
    """

    provider: ClassVar[str] = "openai"

    def __init__(self, settings: ScoringSection, timeout: float) -> None:
        self._settings, self._timeout = settings, timeout

    @cached_property
    def _client(self) -> Any:
        return client(self._settings.endpoint, self._timeout)

    def ask(self, question: Question) -> Reply:
        """See `Vendor`."""
        try:
            with failures():
                return _reply(self._client.chat.completions.create(**self._asked(question)))
        except Moderated as moderated:
            return reply(None, cut=False, usage=Usage(), refused=str(moderated))

    def _asked(self, question: Question) -> dict[str, Any]:
        picture = "data:image/png;base64," + base64.b64encode(question.png).decode("ascii")
        user = [
            {"type": "text", "text": question.text},
            {"type": "image_url", "image_url": {"url": picture, "detail": "high"}},
        ]
        form = {"name": "scores", "strict": True, "schema": question.schema}
        asked: dict[str, Any] = {
            "model": self._settings.model,
            "messages": [{"role": "system", "content": question.system}, {"role": "user", "content": user}],
            "response_format": {"type": "json_schema", "json_schema": form},
            "max_completion_tokens": MAX_TOKENS,
            "seed": question.seed,
        }
        if question.temperature is not None:
            asked["temperature"] = question.temperature
        return asked


def _reply(completion: Any) -> Reply:
    """Return a completion as a reply.

    Raises:
        Failed: it has another form than the protocol says.
    """
    usage = usage_of(getattr(completion, "usage", None), "prompt_tokens", "completion_tokens")
    # The SDK checks nothing: what a server leaves out or spells otherwise comes as it is.
    choices = getattr(completion, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = getattr(choice, "message", None)
    if message is None:
        raise unreadable("the answer has no message", usage=usage)
    refusal, reason = getattr(message, "refusal", None), getattr(choice, "finish_reason", None)
    if isinstance(refusal, str) and refusal:
        return reply(None, cut=False, usage=usage, refused=refusal)
    if reason == "content_filter":
        return reply(None, cut=False, usage=usage, refused="content_filter")
    text = getattr(message, "content", None)
    return reply(text if isinstance(text, str) else None, cut=reason == "length", usage=usage)
