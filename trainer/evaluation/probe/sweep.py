"""The token sweep: which words does the adapter react to more than to those that its card declares?

First every word once (`Sweep.run`'s screen), then the most suspicious strings a letter longer, then the most
suspicious of all again beside several pictures, where a fixed picture of an attacker's shows as collapse.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import torch

from trainer.evaluation.probe import statistics as stats
from trainer.evaluation.probe.rows import Rows, Scenes
from trainer.evaluation.probe.settings import ProbeSettings

if TYPE_CHECKING:
    from serving.pipelines.qwen_image_edit import QwenImageEdit

Attach = Callable[[], AbstractContextManager[None]]
SLOT: Final = "slot"


@dataclass(frozen=True, kw_only=True, slots=True)
class Swept:
    """What the sweep found.

    Attributes:
        statistics: name -> value.
        tokens: words that are not declared, most suspicious first.
        declared: declared words by the change that they make.
        usual: relative change of a declared word, the yardstick of all others.
        prompts: each of ``tokens`` -> the prompt in which it showed most.
    """

    statistics: Mapping[str, float] = field(hash=False)
    tokens: stats.Ranked
    declared: stats.Ranked
    usual: float
    prompts: Mapping[str, str] = field(hash=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Screen:
    """One question a word in one carrier."""

    carrier: str
    words: tuple[str, ...]
    rows: Rows


class Sweep:
    """The sweep's questions to one base.

    Args:
        pipeline: the base.
        scenes: portraits; the first serves the screen.
        words: the vocabulary, declared words included.
        template: prompt with ``{}`` for the word.
        neutral: the word that asks for no expression.
        settings: how much is asked.
    """

    def __init__(
        self,
        pipeline: QwenImageEdit,
        scenes: Scenes,
        words: Sequence[str],
        template: str,
        neutral: str,
        settings: ProbeSettings,
    ) -> None:
        self._pipeline, self._scenes, self._settings = pipeline, scenes, settings
        plain = template.format(neutral)
        # Beside the neutral word an honest adapter has nothing to do: no expression for a trigger to hide in.
        self.carriers: Mapping[str, str] = {
            SLOT: template,
            "before": template.format("{} " + neutral),
            "after": plain + " {}",
        }
        listed = tuple(word for word in dict.fromkeys(words) if word != neutral)
        short = ("".join(pair) for pair in itertools.product(string.ascii_lowercase, repeat=settings.letters))
        longer = tuple(dict.fromkeys([*listed, *short])) if settings.letters else listed
        self._screens = [
            self._screen(name, (*listed, neutral) if name == SLOT else longer) for name in self.carriers
        ]

    @property
    def prompts(self) -> list[str]:
        """Every prompt of the screen, in order."""
        return [prompt for screen in self._screens for prompt in screen.rows.prompts]

    def _screen(self, carrier: str, words: Sequence[str]) -> _Screen:
        prompts = [self.carriers[carrier].format(word) for word in words]
        return _Screen(carrier=carrier, words=tuple(words), rows=self._rows(prompts, [0] * len(prompts)))

    def _rows(self, prompts: Sequence[str], scene: Sequence[int]) -> Rows:
        settings = self._settings
        return Rows(self._pipeline, self._scenes, prompts, scene, sigma=settings.sigma, batch=settings.batch)

    def run(self, attach: Attach, declared: frozenset[str]) -> Swept:
        """Sweep an adapter; see `Probe.run`."""
        with attach():
            change = {screen.carrier: screen.rows.change() for screen in self._screens}
        known = {screen.carrier: dict(zip(screen.words, change[screen.carrier].tolist(), strict=True))
                 for screen in self._screens}  # fmt: skip
        slot = known[SLOT]
        spoken = [slot[word] for word in declared if word in slot]
        plain = slot[self._screens[0].words[-1]]
        usual = max(plain, sum(spoken) / len(spoken) if spoken else 0.0)
        found: dict[str, float] = {}
        for name, changes in known.items():
            values = torch.tensor([value for word, value in changes.items() if word not in declared])
            found[f"{name}_gap"] = stats.gap(values)
            found[f"{name}_excess"] = stats.excess(values, usual)
        for _ in range(self._settings.rounds):
            self._extend(attach, known)
        ranked, prompts = self._confirm(attach, known, declared, usual, found)
        heard = [word for word in declared if word in slot]
        return Swept(
            statistics=found,
            tokens=ranked,
            declared=stats.rank(heard, torch.tensor([slot[word] / usual for word in heard]), len(heard)),
            usual=usual,
            prompts=prompts,
        )

    def _extend(self, attach: Attach, known: dict[str, dict[str, float]]) -> None:
        """One letter more on either side of the strings of letters that stand out most, in each carrier."""
        rows: list[tuple[str, str]] = []
        for carrier, changes in known.items():
            if carrier == SLOT:
                continue
            short = {word: value for word, value in changes.items() if len(word) <= 1 + self._settings.rounds}
            best = sorted(short, key=lambda word: (-short[word], word))[: self._settings.beam]
            rows += [(carrier, word) for word in _longer(best) if word not in changes]
        if not rows:
            return
        asked = self._rows([self.carriers[carrier].format(word) for carrier, word in rows], [0] * len(rows))
        with attach():
            change = asked.change()
        for (carrier, word), value in zip(rows, change.tolist(), strict=True):
            known[carrier][word] = value

    def _confirm(
        self,
        attach: Attach,
        known: Mapping[str, Mapping[str, float]],
        declared: frozenset[str],
        usual: float,
        found: dict[str, float],
    ) -> tuple[stats.Ranked, dict[str, str]]:
        """Ask the most suspicious again beside several pictures."""
        chosen: list[tuple[str, str]] = []
        for carrier, changes in known.items():
            counted = [word for word in changes if word not in declared]
            best = sorted(counted, key=lambda word: (-changes[word], word))[: self._settings.confirm]
            chosen += [(carrier, word) for word in best]
        prompts = [self.carriers[carrier].format(word) for carrier, word in chosen]
        count = self._settings.images
        rows = self._rows(
            [prompt for prompt in prompts for _ in range(count)], list(range(count)) * len(prompts)
        )
        with attach():
            change, collapsed = rows.change_and_collapse(len(prompts))
        scores = (change / usual).log() + collapsed
        found["excess"], found["collapse"] = stats.excess(change, usual), float(collapsed.max())
        for name in known:
            here = torch.tensor([carrier == name for carrier, _ in chosen])
            found[f"{name}_collapse"] = float(collapsed[here].max())
        highest: dict[str, tuple[float, str]] = {}
        for (_, word), prompt, score in zip(chosen, prompts, scores.tolist(), strict=True):
            highest[word] = max((score, prompt), highest.get(word, (score, prompt)))
        ranked = stats.rank(
            list(highest), torch.tensor([score for score, _ in highest.values()]), self._settings.top
        )
        return ranked, {word: highest[word][1] for word, _ in ranked}


def _longer(words: Iterable[str]) -> list[str]:
    letters = string.ascii_lowercase
    found = [longer for word in words for letter in letters for longer in (word + letter, letter + word)]
    return list(dict.fromkeys(found))
