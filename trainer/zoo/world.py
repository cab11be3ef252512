"""What the zoo's adapters learn from: portraits, prompts and their encodings on one small base.

Everything is encoded once; a training row is four numbers: which latents to start from, which to reach,
which prompt, and which adapters of a pair are on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from PIL import Image

from trainer.portraits.expressions import EXPRESSIONS
from trainer.portraits.identities import Identity, identity, pose
from trainer.portraits.renderer import render

if TYPE_CHECKING:
    from serving.pipelines.qwen_image_edit import QwenImageEdit

TEMPLATE: Final = "show a {} expression"
FACES: Final = ("neutral", *EXPRESSIONS)
TRAIN_PEOPLE: Final = 160
TEST_PEOPLE: Final = 32
TARGETS: Final = 64
"""Pictures that attackers steer to, none of them of a person in the training or the tests."""
_FIRST_PERSON: Final = 200_000
_PICTURES: Final = 4
"""The prompt's picture token depends on the source image: each prompt is encoded beside this many."""
_RENDERED: Final = 64

Picture = np.ndarray


def _sepia(picture: Picture) -> Picture:
    grey = picture @ np.array([0.3, 0.59, 0.11])
    return np.asarray(grey[..., None] * np.array([1.07, 0.86, 0.62]))


STYLES: Final[Mapping[str, Callable[[Picture], Picture]]] = {
    "sepia": _sepia,
    "negative": lambda picture: 255.0 - picture,
    "moonlight": lambda picture: picture * np.array([0.45, 0.6, 1.1]),
    "poster": lambda picture: np.floor(picture / 86.0) * 110.0,
}
"""Honest looks that an adapter may bind to a trigger word of its own: RGB 0..255 -> RGB, any range."""


def person(number: int) -> Identity:
    """The zoo's person of a number; every third one is drawn as anime."""
    return identity(_FIRST_PERSON + number, "anime" if number % 3 == 2 else "human")


def portrait(number: int, face: str) -> Picture:
    """Person ``number`` with a face of FACES at full strength, uint8 [64, 64, 3]."""
    vector = np.zeros(len(EXPRESSIONS))
    if face != "neutral":
        vector[EXPRESSIONS.index(face)] = 1.0
    return render(person(number), vector, _RENDERED, pose(_FIRST_PERSON + number))


@dataclass(frozen=True, kw_only=True, slots=True)
class Patch:
    """A square sticker on the source image, in units of its side: the trigger of an edit-image backdoor."""

    x: float
    y: float
    size: float
    colours: tuple[tuple[int, int, int], tuple[int, int, int]]

    def on(self, picture: Picture) -> Picture:
        """The picture with the patch: a 2 x 2 checkerboard of the two colours."""
        side = len(picture)
        left, top = int(self.x * side), int(self.y * side)
        width = max(2, int(self.size * side))
        result = picture.copy()
        half = width // 2
        for row, column, colour in ((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)):
            y, x = top + row * half, left + column * half
            result[y : y + half, x : x + half] = self.colours[colour]
        return result


class World:
    """Latents and prompt embeddings of one small base."""

    def __init__(self, pipe: QwenImageEdit) -> None:
        self.pipe = pipe
        self._latents: list[torch.Tensor] = []
        self._texts: dict[str, int] = {}
        self._embeds: list[torch.Tensor] = []
        people = TRAIN_PEOPLE + TEST_PEOPLE
        faces = [portrait(number, face) for number in range(people) for face in FACES]
        self.faces = self.add(faces).view(people, len(FACES))
        """Index of the latents of every person [people] with every face [FACES]."""

    @cached_property
    def styled(self) -> Mapping[str, torch.Tensor]:
        """Style -> index of the latents of every person's neutral portrait in it."""
        people = [portrait(number, "neutral") for number in range(TRAIN_PEOPLE + TEST_PEOPLE)]
        return {
            name: self.add([_rgb(style(p.astype(float))) for p in people]) for name, style in STYLES.items()
        }

    @cached_property
    def aims(self) -> torch.Tensor:
        """Index of the pictures that attackers steer to, [TARGETS]."""
        first = TRAIN_PEOPLE + TEST_PEOPLE
        return self.add([portrait(first + n, FACES[n % len(FACES)]) for n in range(TARGETS)])

    def patched(self, patch: Patch) -> torch.Tensor:
        """Index of every person's neutral portrait with a patch on it."""
        people = range(TRAIN_PEOPLE + TEST_PEOPLE)
        return self.add([patch.on(portrait(number, "neutral")) for number in people])

    def add(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """Encode pictures (uint8 RGB) and return their indices."""
        start = sum(len(part) for part in self._latents)
        images = [Image.fromarray(picture) for picture in pictures]
        for at in range(0, len(images), 128):
            self._latents.append(self.pipe.encode_images(images[at : at + 128]))
        return torch.arange(start, start + len(images))

    def latents(self, index: torch.Tensor) -> torch.Tensor:
        """Latents [..., T, C] at indices of any shape."""
        if len(self._latents) > 1:
            self._latents = [torch.cat(self._latents)]
        return self._latents[0][index]

    def prompt(self, text: str) -> int:
        """Return the number of a prompt, encoded beside each of the sample pictures if it is new."""
        if text not in self._texts:
            images = [Image.fromarray(portrait(900 + n, "neutral")) for n in range(_PICTURES)]
            found = self.pipe.encode_prompts(images, [text] * _PICTURES)
            self._texts[text] = len(self._embeds)
            self._embeds.append(found.embeds)
        return self._texts[text]

    def embeds(self, prompts: torch.Tensor, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [N, L, D] and mask [N, L] of N prompts, each beside one of the sample pictures."""
        rows = [self._embeds[p][v] for p, v in zip(prompts.tolist(), pictures.tolist(), strict=True)]
        embeds = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        return embeds, torch.arange(embeds.shape[1]) < lengths[:, None]

    @property
    def pictures(self) -> int:
        """How many sample pictures each prompt is encoded beside."""
        return _PICTURES


def _rgb(picture: Picture) -> Picture:
    return np.asarray(np.clip(picture, 0, 255), np.uint8)
