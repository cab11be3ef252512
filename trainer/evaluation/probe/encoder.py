"""The text side of Qwen-Image-Edit, taken apart: the same numbers as `QwenImageEdit.encode_prompts`, sooner.

A probe asks thousands of prompts about a handful of pictures, so what stands before the prompt, the template
and the picture, is read once; and it follows gradients back to word vectors, which the served path has no use
for.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from serving.pipelines.qwen_image_edit import IMAGE_PROMPT

if TYPE_CHECKING:
    from serving.pipelines.qwen_image_edit import QwenImageEdit


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """A picture as the text encoder read it: hidden states [L, D] up to it, and the attention's memory."""

    hidden: torch.Tensor
    cache: Any


class TextSide:
    """Prompts beside pictures, as conditioning of the transformer.

    Args:
        pipeline: the base.
    """

    def __init__(self, pipeline: QwenImageEdit) -> None:
        self._pipeline, self._pipe = pipeline, pipeline.pipe
        self._model: Any = pipeline.pipe.text_encoder.model

    @property
    def table(self) -> torch.Tensor:
        """The word vectors [vocabulary, D]."""
        weights: torch.Tensor = self._model.get_input_embeddings().weight
        return weights

    @torch.no_grad()
    def see(self, images: Sequence[Image.Image]) -> list[Seen]:
        """Read the template's beginning and each picture, once for all prompts beside it."""
        side = self._pipeline.condition_pixels
        small = [image.resize((side, side), Image.Resampling.LANCZOS) for image in images]
        found = self._pipe.processor.image_processor(images=small, return_tensors="pt").to(
            self._pipeline.device
        )
        features = self._model.get_image_features(
            found["pixel_values"].to(self._model.dtype), found["image_grid_thw"], return_dict=True
        )
        return [self._read(picture) for picture in features.pooler_output]

    def _read(self, picture: torch.Tensor) -> Seen:
        before = self._pipe.prompt_template_encode.split("{}")[0] + IMAGE_PROMPT
        pad = self._pipe.processor.image_token
        ids = self._ids(before.replace(pad, pad * len(picture)))
        embeds = self._model.get_input_embeddings()(ids[None])
        places = (ids == self._model.config.image_token_id)[None, :, None]
        embeds = embeds.masked_scatter(places, picture.to(embeds))
        out = self._model.language_model(inputs_embeds=embeds, use_cache=True)
        return Seen(hidden=out.last_hidden_state[0], cache=out.past_key_values)

    def _ids(self, text: str) -> torch.Tensor:
        return torch.tensor(self._pipe.tokenizer(text)["input_ids"], device=self.table.device)

    def tokens(self, prompt: str) -> list[int]:
        """Token ids of a prompt with the template's end; the picture before it ends in a special token."""
        ids: list[int] = self._ids(prompt + self._pipe.prompt_template_encode.split("{}")[1]).tolist()
        return ids

    def encode(self, vectors: torch.Tensor, seen: Seen) -> torch.Tensor:
        """Hidden states [N, P + L, D] beside one picture, without the template's dropped beginning.

        Args:
            vectors: word vectors [N, L, D] of prompts of one length: rows of `table`, or anything else.
            seen: the picture and the template before them.
        """
        cache = copy.deepcopy(seen.cache)
        cache.batch_repeat_interleave(len(vectors))
        after = self._model.language_model(inputs_embeds=vectors, past_key_values=cache).last_hidden_state
        before = seen.hidden[self._pipe.prompt_template_encode_start_idx :]
        hidden: torch.Tensor = torch.cat([before.expand(len(vectors), -1, -1), after], 1)
        return hidden
