"""Questions to a base model: a prompt beside a portrait, from a fixed noise; asked again of every adapter.

Everything that does not depend on the adapter (text, picture, noise, the base's answer) is computed once and
kept, so an adapter costs one forward pass a question.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from serving.pipelines.base import PromptEmbeds

if TYPE_CHECKING:
    from PIL import Image

    from serving.pipelines.base import EditPipeline

_ENCODE = 64


def row_seed(*parts: object) -> int:
    """A seed of 63 bits from its parts, the same on every machine."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class Scenes:
    """Pictures that questions are asked about, encoded once, each with a noise of its own.

    Args:
        pipeline: the base.
        images: RGB pictures.
        seed: with the picture's place it decides the noise.
        noises: whose noise each picture takes, default its own; patched copies of a picture share one.
    """

    def __init__(
        self,
        pipeline: EditPipeline,
        images: Sequence[Image.Image],
        seed: int,
        noises: Sequence[int] | None = None,
    ) -> None:
        self.images = list(images)
        parts = [pipeline.encode_images(self.images[i : i + _ENCODE]) for i in range(0, len(images), _ENCODE)]
        self.latents = torch.cat(parts).float()
        places = range(len(self.images)) if noises is None else noises
        rows = [
            torch.randn(
                self.latents.shape[1:],
                generator=torch.Generator().manual_seed(row_seed(seed, "noise", place)),
            )
            for place in places
        ]
        self.noise = torch.stack(rows).to(self.latents)


class Rows:
    """N questions with the base's answers.

    Attributes:
        prompts: the text of each.
        scene: which picture each is about, [N].
        base: the base's velocities, float32 [N, T, C]; the last batch's order is that of ``prompts``.
    """

    def __init__(
        self,
        pipeline: EditPipeline,
        scenes: Scenes,
        prompts: Sequence[str],
        scene: Sequence[int],
        *,
        sigma: float,
        batch: int,
    ) -> None:
        self._pipeline, self._scenes, self._batch = pipeline, scenes, batch
        self.prompts, self.scene, self.sigma = tuple(prompts), torch.tensor(scene), sigma
        self._groups = self._encode()
        self.base = self.velocities()

    def __len__(self) -> int:
        return len(self.prompts)

    def _encode(self) -> list[tuple[torch.Tensor, PromptEmbeds]]:
        """Batches of rows of one length, so that no row pays for another's padding."""
        by_length: dict[int, list[tuple[int, torch.Tensor]]] = {}
        for start in range(0, len(self.prompts), _ENCODE):
            chunk = range(start, min(start + _ENCODE, len(self.prompts)))
            images = [self._scenes.images[int(self.scene[row])] for row in chunk]
            found = self._pipeline.encode_prompts(images, [self.prompts[row] for row in chunk])
            for row, embeds, mask in zip(chunk, found.embeds, found.mask, strict=True):
                real = embeds[mask].clone()
                by_length.setdefault(len(real), []).append((row, real))
        groups = []
        for length in sorted(by_length):
            members = by_length[length]
            for start in range(0, len(members), self._batch):
                part = members[start : start + self._batch]
                embeds = torch.stack([real for _, real in part])
                everything = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
                index = torch.tensor([row for row, _ in part])
                groups.append((index, PromptEmbeds(embeds=embeds, mask=everything)))
        return groups

    def start(self, index: torch.Tensor) -> torch.Tensor:
        """Where the questions ``index`` start: x_s = (1 - s) picture + s noise, [n, T, C]."""
        at = self.scene[index]
        return (1 - self.sigma) * self._scenes.latents[at] + self.sigma * self._scenes.noise[at]

    @torch.no_grad()
    def velocities(self) -> torch.Tensor:
        """The answers of the transformer as it is now, float32 [N, T, C]."""
        answers: torch.Tensor | None = None
        for index, prompts in self._groups:
            start = self.start(index)
            level = start.new_full((len(index),), self.sigma)
            found = self._pipeline.velocity(start, self._scenes.latents[self.scene[index]], prompts, level)
            if answers is None:
                answers = torch.empty((len(self), *found.shape[1:]))
            answers[index] = found.float().cpu()
        assert answers is not None
        return answers

    def clean(self, velocities: torch.Tensor) -> torch.Tensor:
        """One-step predictions of the edited picture, x_0 = x_s - s v, [N, T, C]."""
        everything = torch.arange(len(self))
        return self.start(everything).cpu() - self.sigma * velocities
