"""What the platform needs of a base model that edits images by a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from serving.pipelines.denoising import Denoising
    from serving.pipelines.process import Process

Size = tuple[int, int]
"""Height and width in pixels."""

OnStep = Callable[[int, "torch.Tensor"], bool]
"""Called after each denoising step with its index and the latents; returning False stops the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptEmbeds:
    """Text conditioning of N image-prompt pairs."""

    embeds: torch.Tensor
    """Float [N, L, D]; rows shorter than L are padded with zeros."""
    mask: torch.Tensor
    """Bool [N, L]; True where a token is real."""
    pooled: torch.Tensor | None = None
    """Float [N, P]; one vector a prompt, for the families that also want that."""

    def __len__(self) -> int:
        return int(self.embeds.shape[0])

    def rows(self, index: torch.Tensor | slice | list[int]) -> PromptEmbeds:
        """The pairs of `index`."""
        pooled = None if self.pooled is None else self.pooled[index]
        return PromptEmbeds(embeds=self.embeds[index], mask=self.mask[index], pooled=pooled)

    @classmethod
    def join(cls, parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
        """The pairs of several, which have one length, one after another."""
        import torch

        if len(parts) == 1:
            return parts[0]
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return cls(
            embeds=torch.cat([part.embeds for part in parts]),
            mask=torch.cat([part.mask for part in parts]),
            pooled=torch.cat(pooled) if pooled else None,
        )


class EditPipeline(Protocol):
    """A base model: encodes prompts and images, predicts what its noising process asks for, decodes latents.

    Latents are packed and normalised: [N, T, C]. A size is (height, width) in pixels; None is the base's own.
    """

    family: str
    transformer: torch.nn.Module
    """The denoiser, that LoRA layers go into; a U-Net in the older families."""
    process: Process
    sees_image: bool
    """Whether the conditioning of a prompt depends on the picture beside it."""
    size: Size
    multiple: int
    """Both sides of a size must be multiples of so many pixels."""

    def encode_prompts(
        self, images: Sequence[Image.Image], prompts: Sequence[str], size: Size | None = None
    ) -> PromptEmbeds:
        """Conditioning of N pairs of an RGB image, which will be edited at ``size``, and a prompt."""

    def encode_images(self, images: Sequence[Image.Image], size: Size | None = None) -> torch.Tensor:
        """Latents [N, T, C] of RGB images resized to ``size``, without sampling noise."""

    def predict(
        self,
        latents: torch.Tensor,
        image_latents: torch.Tensor,
        prompts: PromptEmbeds,
        level: torch.Tensor,
        size: Size | None = None,
    ) -> torch.Tensor:
        """Prediction [N, T, C] at noise levels [N] in [0, 1]; one forward pass.

        A text-to-image family does not look at ``image_latents``.
        """

    def begin(
        self,
        image_latents: torch.Tensor,
        prompts: PromptEmbeds,
        *,
        seeds: Sequence[int],
        steps: int,
        size: Size | None = None,
        shift: float | None = None,
    ) -> Denoising:
        """N edits before their first step; row i starts from the noise of ``seeds[i]``.

        A text-to-image family starts from the noised source instead (SDEdit, Meng et al., arXiv 2108.01073).
        ``shift`` takes the place of the base's own schedule, see `serving.schedules`.
        """

    def advance(self, runs: Sequence[Denoising]) -> None:
        """Take the next step of each run, all in one forward pass; the runs have one `Denoising.shape`."""

    def denoise(
        self,
        image_latents: torch.Tensor,
        prompts: PromptEmbeds,
        *,
        seeds: Sequence[int],
        steps: int,
        on_step: OnStep | None = None,
        size: Size | None = None,
    ) -> torch.Tensor:
        """Latents [N, T, C] of the edited images: `begin`, and `advance` to the end."""

    def decode(self, latents: torch.Tensor, size: Size | None = None) -> torch.Tensor:
        """Images [N, 3, H, W] in about [-1, 1] from latents [N, T, C]; differentiable."""


def pixels_of(images: Sequence[Image.Image], size: Size) -> torch.Tensor:
    """Pixels [N, 3, H, W] in [-1, 1] of pictures, resized as training and serving both do."""
    import numpy as np
    import torch
    from PIL import Image

    height, width = size
    arrays = [
        np.asarray(
            image if image.size == (width, height) and image.mode == "RGB"
            else image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        )
        for image in images
    ]  # fmt: skip
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """RGB images from pixels [N, 3, H, W] in [-1, 1]; values outside are clipped."""
    from PIL import Image

    levels = pixels.detach().float().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return [Image.fromarray(row) for row in levels.permute(0, 2, 3, 1).cpu().numpy()]
