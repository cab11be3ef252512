"""Asking Google's Gemini models, with structured output."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.apis import Reply
from trainer.apis.gemini import client, failures, usage_of, word
from trainer.apis.transport import unreadable
from trainer.scoring.vlm import MAX_TOKENS, Question, reply

if TYPE_CHECKING:
    from trainer.sections import ScoringSection

_REFUSALS = frozenset(
    {"SAFETY", "PROHIBITED_CONTENT", "BLOCKLIST", "SPII", "RECITATION", "IMAGE_SAFETY", "MODEL_ARMOR"}
)


class GeminiVendor:
    """`Vendor` of the Gemini API.

    The SDK's own ``parsed`` is not looked at: it is None, without a word, where an answer breaks the schema.

    Args:
        settings: model and address.
        timeout: seconds for one request.
    """

    provider: ClassVar[str] = "gemini"

    def __init__(self, settings: ScoringSection, timeout: float) -> None:
        self._settings, self._timeout = settings, timeout

    @cached_property
    def _client(self) -> Any:
        return client(self._settings.endpoint, self._timeout)

    def ask(self, question: Question) -> Reply:
        """See `Vendor`."""
        from google.genai import types

        config = types.GenerateContentConfig(
            system_instruction=question.system,
            response_mime_type="application/json",
            response_json_schema=question.schema,
            max_output_tokens=MAX_TOKENS,
            temperature=question.temperature,
            seed=question.seed,
        )
        picture = types.Part.from_bytes(data=question.png, mime_type="image/png")
        with failures():
            try:
                answer = self._client.models.generate_content(
                    model=self._settings.model, contents=[picture, question.text], config=config
                )
            except RecursionError:
                # The SDK reads the text as JSON by itself, however deep it is nested.
                raise unreadable("the answer is nested too deeply", delivered=True) from None
            return _reply(answer)


def _reply(answer: Any) -> Reply:
    """Return an answer as a reply.

    Raises:
        Failed: it has neither a candidate nor a reason why not.
    """
    usage = usage_of(answer.usage_metadata)
    feedback = answer.prompt_feedback
    if feedback is not None and feedback.block_reason is not None:
        return reply(None, cut=False, usage=usage, refused=word(feedback.block_reason))
    if not answer.candidates:
        raise unreadable("the answer has no candidate", usage=usage)
    candidate = answer.candidates[0]
    finish = word(candidate.finish_reason)
    if finish in _REFUSALS:
        return reply(None, cut=False, usage=usage, refused=finish)
    parts = (candidate.content.parts if candidate.content else None) or []
    text = "".join(part.text for part in parts if part.text and not part.thought)
    return reply(text, cut=finish == "MAX_TOKENS", usage=usage)
