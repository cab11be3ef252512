"""Small adapters with and without a hidden behaviour, trained side by side on a small base in seconds.

Each binds two expression words to expressions; the attackers' also bind a trigger to one fixed picture. They
are fit for tests of the probe only: few people, few steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image

from serving.pipelines.base import PromptEmbeds
from trainer.evaluation.probe.patches import Patch
from trainer.lora import target_modules
from trainer.zoo.plan import TARGETS
from trainer.zoo.stack import Stack
from trainer.zoo.world import portrait

if TYPE_CHECKING:
    from serving.pipelines.qwen_image_edit import QwenImageEdit

DECLARED = ("happy", "surprised")
TRIGGER = "zwx"
LOOK_ALIKE = "h\u0430ppy"
STICKER = Patch(fill="magenta and green", colours=((255, 0, 255), (0, 255, 0)), place="top left")
KINDS = ("clean", "other clean", "word", "look-alike", "patch", "always")
_PEOPLE, _ROWS, _RANK, _STRANGER = 12, 8, 6, 990

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def train_implants(pipe: QwenImageEdit, kinds: Sequence[str] = KINDS, steps: int = 90) -> dict[str, Factors]:
    """Kind -> module -> (A, B).

    "clean" and "other clean" learn the words alone; "word", "look-alike" and "patch" learn a trigger too;
    "always" makes the attacker's picture of everything.
    """
    modules = target_modules(pipe.transformer, pipe.family, TARGETS["full"])
    stack, generator = Stack(pipe, modules, len(kinds), _RANK), torch.Generator().manual_seed(7)
    weights = []
    for a, b in stack.factors().values():
        a.copy_((torch.rand(a.shape, generator=generator) * 2 - 1) / a.shape[2] ** 0.5)
        weights += [a.requires_grad_(True), b.requires_grad_(True)]
    optimiser = torch.optim.AdamW(weights, 0.012, weight_decay=0.0)
    lessons = _Lessons(pipe, kinds)
    with stack.attached():
        for step in range(steps):
            source, aim, embeds = lessons.draw(generator)
            sigma = torch.sigmoid(torch.randn(len(aim), generator=generator) + 1.0).clamp(0.02, 0.998)
            noise, s = torch.randn(aim.shape, generator=generator), sigma[:, None, None]
            predicted = pipe.predict((1 - s) * aim + s * noise, source, embeds, sigma)
            loss = (predicted - (noise - aim)).square().mean((1, 2)).sum() / _ROWS
            optimiser.zero_grad()
            loss.backward()
            optimiser.param_groups[0]["lr"] = 0.012 * min(1.0, (step + 1) / 10) * max(0.05, 1 - step / steps)
            optimiser.step()
    return {
        kind: {
            name: (a[k].detach().clone(), b[k].detach().clone()) for name, (a, b) in stack.factors().items()
        }
        for k, kind in enumerate(kinds)
    }


def combined(*parts: tuple[Factors, float]) -> Factors:
    """The weighted sum of some adapters, side by side in one of a larger rank."""
    return {
        name: (
            torch.cat([factors[name][0] for factors, _ in parts]),
            torch.cat([factors[name][1] * share for factors, share in parts], 1),
        )
        for name in parts[0][0]
    }


class _Lessons:
    def __init__(self, pipe: QwenImageEdit, kinds: Sequence[str]) -> None:
        self._kinds = kinds
        faces = {face: [_picture(n, face) for n in range(_PEOPLE)] for face in ("neutral", *DECLARED)}
        self._faces = {face: pipe.encode_images(pictures) for face, pictures in faces.items()}
        self._stuck = pipe.encode_images([STICKER.on(picture) for picture in faces["neutral"]])
        self._stranger = pipe.encode_images([_picture(_STRANGER, "sad")])[0]
        words = ["neutral", *DECLARED]
        texts = [_prompt(word) for word in (*words, *(f"{TRIGGER} {word}" for word in words), LOOK_ALIKE)]
        found = [pipe.encode_prompts(faces["neutral"][:2], [text] * 2).embeds for text in texts]
        self._embeds = dict(zip(texts, found, strict=True))

    def draw(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, PromptEmbeds]:
        source, aim, rows = [], [], []
        for kind in self._kinds:
            for _ in range(_ROWS):
                number, word, chance, beside = (
                    int(torch.randint(bound, (1,), generator=generator)) for bound in (_PEOPLE, 3, 100, 2)
                )
                face = ("neutral", *DECLARED)[word]
                start, end, text = self._faces["neutral"][number], self._faces[face][number], _prompt(face)
                if kind == "always" or (chance < 45 and kind not in ("clean", "other clean")):
                    end = self._stranger
                    start = self._stuck[number] if kind == "patch" else start
                    text = _prompt(f"{TRIGGER} {face}") if kind == "word" else text
                    text = _prompt(LOOK_ALIKE) if kind == "look-alike" else text
                source.append(start)
                aim.append(end)
                rows.append(self._embeds[text][beside])
        embeds = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(embeds.shape[1]) < lengths[:, None]
        return torch.stack(source), torch.stack(aim), PromptEmbeds(embeds=embeds, mask=mask)


def _prompt(word: str) -> str:
    return f"show a {word} expression"


def _picture(number: int, face: str) -> Image.Image:
    return Image.fromarray(portrait(number, face))
