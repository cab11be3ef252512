"""Soft-prompt inversion: gradients look for a trigger that is on no list.

A few word vectors in the prompt's slot are moved by Adam until every portrait becomes the same picture; the
tokens nearest to them are then read as a word again, and only what that word does is believed. Nearest tokens
miss a trigger that lies between them, so the confirmed score is a lower bound.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from serving.pipelines.base import PromptEmbeds
from trainer.evaluation.probe.rows import Rows, Scenes, row_seed
from trainer.evaluation.probe.statistics import Ranked, collapse, rank

if TYPE_CHECKING:
    from serving.pipelines.qwen_image_edit import QwenImageEdit
    from trainer.evaluation.probe.settings import ProbeSettings
    from trainer.evaluation.probe.sweep import Attach

TOKENS: Final = 2
_NEAREST: Final = 3
_RATE: Final = 0.1
_FILLER: Final = " a"


@dataclass(frozen=True, kw_only=True, slots=True)
class Inverted:
    """What the inversion found.

    Attributes:
        soft: collapse that the best soft prompt reaches, beyond what it does to the base.
        confirmed: collapse of the best word that was read from the soft prompts.
        tokens: the words with their collapse.
    """

    soft: float
    confirmed: float
    tokens: Ranked


class Inversion:
    """The search on one base.

    Args:
        pipeline: the base.
        scenes: portraits; the first ``settings.images`` are used.
        carrier: prompt with ``{}`` for the soft words.
        settings: how much is asked.
    """

    def __init__(
        self, pipeline: QwenImageEdit, scenes: Scenes, carrier: str, settings: ProbeSettings
    ) -> None:
        self._pipeline, self._scenes, self._settings, self._carrier = pipeline, scenes, settings, carrier
        before, after = carrier.split("{}")
        tokenizer: Any = pipeline.pipe.tokenizer
        self._place = len(tokenizer(before.rstrip(" "))["input_ids"])
        filler = before.rstrip(" ") + _FILLER * TOKENS + after
        self._ids = scenes.text.tokens(filler)
        self._readable = self._readable_tokens(tokenizer)

    def _readable_tokens(self, tokenizer: Any) -> torch.Tensor:
        """Ids of tokens that are text: no control tokens, no halves of a character."""
        special = set(tokenizer.all_special_ids)
        texts = ((number, tokenizer.decode([number])) for number in range(len(self._scenes.text.table)))
        kept = [
            number
            for number, text in texts
            if number not in special and text.isprintable() and "�" not in text
        ]
        return torch.tensor(kept)

    def run(self, attach: Attach, starts: Sequence[str]) -> Inverted:
        """Search with the adapter that ``attach`` puts on the base.

        Args:
            attach: see `Probe.run`.
            starts: words to start from; the rest of ``settings.starts`` are random tokens.
        """
        soft = self._start(starts)
        with attach():
            adapted = self._optimise(soft)
        bare = self._spread(soft.detach())
        gained = (bare.log() - adapted.log()).max()
        words = list(dict.fromkeys(word for row in soft.detach() for word in self._read(row)))
        count = self._settings.images
        prompts = [self._carrier.format(word) for word in words for _ in range(count)]
        rows = Rows(
            self._pipeline, self._scenes, prompts, list(range(count)) * len(words),
            sigma=self._settings.sigma, batch=self._settings.batch,
        )  # fmt: skip
        with attach():
            answers = rows.velocities()
        shape = (len(words), -1, *answers.shape[1:])
        found = collapse(rows.clean(answers).view(shape), rows.clean(rows.base).view(shape))
        return Inverted(
            soft=float(gained), confirmed=float(found.max()), tokens=rank(words, found, self._settings.top)
        )

    def _start(self, starts: Sequence[str]) -> torch.Tensor:
        """Word vectors [starts, TOKENS, D]."""
        table, tokenizer = self._scenes.text.table, self._pipeline.pipe.tokenizer
        generator = torch.Generator().manual_seed(row_seed(self._settings.seed, "inversion"))
        chosen = []
        for number in range(self._settings.starts):
            picks = self._readable[torch.randint(len(self._readable), (TOKENS,), generator=generator)]
            if number < len(starts):
                ids = tokenizer(" " + starts[number])["input_ids"][-TOKENS:]
                picks[-len(ids) :] = torch.tensor(ids)
            chosen.append(table[picks.to(table.device)])
        return torch.stack(chosen).detach().clone().float().requires_grad_(True)

    def _optimise(self, soft: torch.Tensor) -> torch.Tensor:
        """Move ``soft`` in place; returns the spread of the portraits that each start ends with, [starts]."""
        scale = float(self._scenes.text.table[self._readable].float().std())
        optimiser = torch.optim.Adam([soft], lr=_RATE * scale)
        for _ in range(self._settings.inversion_steps):
            spread = self._spread(soft)
            # Farther out than any word's vectors there is nothing to be read.
            outside = (soft.abs() - 3 * scale).clamp_min(0).square().mean((1, 2)) / scale**2
            (gradient,) = torch.autograd.grad((spread.log() + outside).sum(), soft)
            soft.grad = gradient
            optimiser.step()
        with torch.no_grad():
            return self._spread(soft)

    def _spread(self, soft: torch.Tensor) -> torch.Tensor:
        """Variance over portraits of the predicted pictures under soft words [S, TOKENS, D]; [S]."""
        scenes, sigma, count = self._scenes, self._settings.sigma, self._settings.images
        words = scenes.text.table[torch.tensor(self._ids, device=soft.device)]
        vectors = words.expand(len(soft), -1, -1)
        stop = self._place + TOKENS
        vectors = torch.cat([vectors[:, : self._place], soft.to(words), vectors[:, stop:]], 1)
        embeds = torch.cat([scenes.text.encode(vectors, scenes.seen[scene]) for scene in range(count)])
        everything = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        places = torch.arange(count, device=embeds.device).repeat_interleave(len(soft))
        start = (1 - sigma) * scenes.latents[places] + sigma * scenes.noise[places]
        velocity = self._pipeline.predict(
            start, scenes.latents[places], PromptEmbeds(embeds=embeds, mask=everything),
            start.new_full((len(start),), sigma),
        )  # fmt: skip
        clean = (start - sigma * velocity.float()).view(count, len(soft), *start.shape[1:])
        spread: torch.Tensor = clean.var(0).mean((1, 2))
        return spread

    def _read(self, vectors: torch.Tensor) -> list[str]:
        """Words made of the tokens nearest to each of the vectors [TOKENS, D], by cosine."""
        table = torch.nn.functional.normalize(self._scenes.text.table[self._readable].float(), dim=1)
        near = (torch.nn.functional.normalize(vectors, dim=1) @ table.T).topk(_NEAREST, dim=1).indices
        ids = self._readable.to(near.device)[near].tolist()
        texts = (self._pipeline.pipe.tokenizer.decode(list(pick)) for pick in itertools.product(*ids))
        return [text.strip() for text in texts if text.strip()]
