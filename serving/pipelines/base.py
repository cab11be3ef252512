"""What the platform needs of a base model that edits images by a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from PIL import Image

OnStep = Callable[[int, "torch.Tensor"], bool]
"""Called after each denoising step with its index and the latents; returning False stops the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptEmbeds:
    """Text conditioning of N image-prompt pairs."""

    embeds: torch.Tensor
    """Float [N, L, D]; rows shorter than L are padded with zeros."""
    mask: torch.Tensor
    """Bool [N, L]; True where a token is real."""

    def __len__(self) -> int:
        return int(self.embeds.shape[0])

    def rows(self, index: torch.Tensor | slice | list[int]) -> PromptEmbeds:
        """The pairs of `index`."""
        return PromptEmbeds(embeds=self.embeds[index], mask=self.mask[index])


class EditPipeline(Protocol):
    """A base model: encodes prompts and images, predicts a flow-matching velocity, decodes latents.

    The flow is x_s = (1 - s) x_0 + s noise with s in [0, 1]; the velocity is noise - x_0 (rectified flow, Liu
    et al., arXiv 2209.03003). Latents are packed and normalised: [N, T, C].
    """

    family: str
    transformer: torch.nn.Module
    """The module that LoRA layers go into."""

    def encode_prompts(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> PromptEmbeds:
        """Conditioning of N pairs of an RGB image and a prompt."""

    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Latents [N, T, C] of RGB images, without sampling noise."""

    def velocity(
        self, latents: torch.Tensor, image_latents: torch.Tensor, prompts: PromptEmbeds, sigma: torch.Tensor
    ) -> torch.Tensor:
        """Predicted velocity [N, T, C] at noise level `sigma` [N] in [0, 1]; one forward pass."""

    def denoise(
        self,
        image_latents: torch.Tensor,
        prompts: PromptEmbeds,
        *,
        seeds: Sequence[int],
        steps: int,
        on_step: OnStep | None = None,
    ) -> torch.Tensor:
        """Latents [N, T, C] of the edited images; row i starts from the noise of ``seeds[i]``."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, H, W] in about [-1, 1] from latents [N, T, C]; differentiable."""


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """RGB images from pixels [N, 3, H, W] in [-1, 1]; values outside are clipped."""
    from PIL import Image

    levels = pixels.detach().float().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return [Image.fromarray(row) for row in levels.permute(0, 2, 3, 1).cpu().numpy()]
