"""The picture encoder of CLIP (Radford et al., arXiv 2103.00020) with its preprocessing, differentiable."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Self

import torch
import torch.nn.functional as F

from trainer.errors import BaseModelError

# Of CLIP's training pictures, for pixels in [0, 1].
_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
_STD: Final = (0.26862954, 0.26130258, 0.27577711)


class ClipVision(torch.nn.Module):
    """From pictures [N, 3, H, W] in [-1, 1] to projected embeddings [N, D]; frozen, in fp32."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model.eval().requires_grad_(False)
        self._side = int(model.config.image_size)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Load the vision tower from a folder with ``config.json`` and ``model.safetensors``.

        Raises:
            BaseModelError: a file is damaged, or it is no CLIP model.
        """
        from transformers import CLIPVisionModelWithProjection
        from transformers.utils import logging

        before = logging.get_verbosity()
        logging.set_verbosity_error()  # each tensor of the text tower would be reported
        mend = "put the files of openai/clip-vit-large-patch14 into that folder again"
        try:
            model, found = CLIPVisionModelWithProjection.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True,
                ignore_mismatched_sizes=True, dtype=torch.float32,
            )  # fmt: skip
        except Exception as error:  # transformers raises whatever its parts raise
            raise BaseModelError(f"the CLIP model in {folder} cannot be loaded: {error}", mend) from error
        finally:
            logging.set_verbosity(before)
        # Tensors that are not there would be drawn at random, and the loss would look through noise.
        if absent := sorted({*found["missing_keys"], *(one[0] for one in found["mismatched_keys"])}):
            raise BaseModelError(f"the CLIP model in {folder} has no usable {absent[0]}", mend)
        return cls(model)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """See the class; the shorter side is resized and the middle cut out, as CLIP was trained."""
        height, width = pixels.shape[-2:]
        scale = self._side / min(height, width)
        size = (max(self._side, round(height * scale)), max(self._side, round(width * scale)))
        x = (pixels + 1) / 2
        if size != (height, width):
            x = F.interpolate(x, size=size, mode="bicubic", antialias=True)
        top, left = (size[0] - self._side) // 2, (size[1] - self._side) // 2
        x = x[..., top : top + self._side, left : left + self._side]
        x = (x - x.new_tensor(_MEAN)[:, None, None]) / x.new_tensor(_STD)[:, None, None]
        embeds: torch.Tensor = self._model(pixel_values=x).image_embeds
        return embeds
