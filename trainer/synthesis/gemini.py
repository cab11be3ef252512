"""Edits by Gemini's image models (Nano Banana, Nano Banana Pro and whatever follows them)."""

from __future__ import annotations

from typing import Any, ClassVar

from trainer.apis import Reply, Usage
from trainer.apis.gemini import client, failures, usage_of, word
from trainer.apis.transport import unreadable
from trainer.sections import SynthesisSection
from trainer.synthesis.prompts import Prompt


class GeminiEditor:
    """`Vendor` that speaks ``:generateContent``.

    Args:
        section: has the model.
        timeout: seconds for one edit.
    """

    provider: ClassVar[str] = "gemini"

    def __init__(self, section: SynthesisSection, timeout: float) -> None:
        self._section = section
        self._client = client(section.endpoint, timeout)

    def edit(self, portrait: bytes, prompt: Prompt) -> Reply:
        """See `Vendor`."""
        from google.genai import types

        asked = [
            types.Part.from_bytes(data=portrait, mime_type="image/png"),
            types.Part.from_text(text=prompt.identity),
            types.Part.from_text(text=prompt.expression),
        ]
        size = self._section.resolution
        config = types.GenerateContentConfig(
            response_modalities=["IMAGE"],
            image_config=None if size == "auto" else types.ImageConfig(image_size=size),
        )
        with failures():
            answer = self._client.models.generate_content(
                model=self._section.model, contents=[types.Content(role="user", parts=asked)], config=config
            )
            return reply_of(answer)


def reply_of(answer: Any) -> Reply:
    """Return what a `google.genai.types.GenerateContentResponse` holds: a picture, or why there is none.

    Raises:
        Failed: it holds neither.
    """
    blocked = answer.prompt_feedback.block_reason if answer.prompt_feedback else None
    candidate = answer.candidates[0] if answer.candidates else None
    parts = (candidate.content.parts or []) if candidate is not None and candidate.content else []
    # Models that think draw drafts on the way; the picture that is meant comes last.
    pictures = [part.inline_data for part in parts if part.inline_data and not part.thought]
    counted = usage_of(answer.usage_metadata, len(pictures))
    usage = counted or Usage(images=len(pictures))
    if pictures:
        return Reply(
            body=pictures[-1].data or b"",
            media_type=str(pictures[-1].mime_type or ""),
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            images=usage.images,
            counted=counted is not None,
        )
    if blocked is None and candidate is None:
        raise unreadable("neither a picture nor a reason why there is none", counted)
    said = " ".join(part.text for part in parts if part.text)
    reason = word(blocked or (candidate.finish_reason if candidate is not None else None)) or "no picture"
    return Reply(
        refused=f"{reason}: {said}" if said else reason,
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        counted=counted is not None,
    )
