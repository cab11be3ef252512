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
from trainer.evaluation.probe.encoder import TextSide
from trainer.evaluation.probe.statistics import collapse, relative_change

if TYPE_CHECKING:
    from PIL import Image

    from serving.pipelines.qwen_image_edit import QwenImageEdit

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
        pipeline: QwenImageEdit,
        images: Sequence[Image.Image],
        seed: int,
        noises: Sequence[int] | None = None,
    ) -> None:
        self.images, self.text = list(images), TextSide(pipeline)
        chunks = [self.images[i : i + _ENCODE] for i in range(0, len(images), _ENCODE)]
        self.latents = torch.cat([pipeline.encode_images(chunk) for chunk in chunks]).float()
        self.seen = [seen for chunk in chunks for seen in self.text.see(chunk)]
        places = range(len(self.images)) if noises is None else noises
        shape = self.latents.shape[1:]
        generators = (torch.Generator().manual_seed(row_seed(seed, "noise", place)) for place in places)
        self.noise = torch.stack([torch.randn(shape, generator=one) for one in generators]).to(self.latents)


class Rows:
    """N questions with the base's answers.

    Attributes:
        prompts: the text of each.
        scene: which picture each is about, [N].
        base: the base's velocities, float32 [N, T, C]; the last batch's order is that of ``prompts``.
    """

    def __init__(
        self,
        pipeline: QwenImageEdit,
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

    @torch.no_grad()
    def _encode(self) -> list[tuple[torch.Tensor, PromptEmbeds]]:
        """Batches of rows of one length, so that no row pays for another's padding."""
        text, known = self._scenes.text, dict[str, list[int]]()
        alike: dict[tuple[int, int], list[int]] = {}
        for row, (prompt, scene) in enumerate(zip(self.prompts, self.scene.tolist(), strict=True)):
            words = known.get(prompt) or known.setdefault(prompt, text.tokens(prompt))
            alike.setdefault((len(words), scene), []).append(row)
        found: dict[int, list[tuple[int, torch.Tensor]]] = {}
        for (length, scene), members in sorted(alike.items()):
            for start in range(0, len(members), self._batch):
                part = members[start : start + self._batch]
                ids = torch.tensor([known[self.prompts[row]] for row in part], device=text.table.device)
                embeds = text.encode(text.table[ids], self._scenes.seen[scene])
                found.setdefault(length, []).extend(zip(part, embeds, strict=True))
        groups = []
        for encoded in found.values():
            for start in range(0, len(encoded), self._batch):
                batch = encoded[start : start + self._batch]
                embeds = torch.stack([hidden for _, hidden in batch])
                everything = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
                index = torch.tensor([row for row, _ in batch])
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
            found = self._pipeline.predict(start, self._scenes.latents[self.scene[index]], prompts, level)
            if answers is None:
                answers = torch.empty((len(self), *found.shape[1:]))
            answers[index] = found.float().cpu()
        assert answers is not None
        return answers

    def clean(self, velocities: torch.Tensor) -> torch.Tensor:
        """One-step predictions of the edited picture, x_0 = x_s - s v, [N, T, C]."""
        everything = torch.arange(len(self))
        return self.start(everything).cpu() - self.sigma * velocities

    def change(self) -> torch.Tensor:
        """Relative change of the answers by the adapter that is on the transformer now, [N]."""
        return relative_change(self.velocities(), self.base)

    def change_and_collapse(self, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean relative change and collapse, [groups] each, of rows that lie group by group."""
        answers = self.velocities()
        shape = (groups, -1, *answers.shape[1:])
        collapsed = collapse(self.clean(answers).view(shape), self.clean(self.base).view(shape))
        return relative_change(answers, self.base).view(groups, -1).mean(1), collapsed
