"""The token sweep: which words does the adapter react to more than to those that its card declares?

First every word once, inside and at the end of a plain prompt (the screen), then the most suspicious strings
a letter longer, then the most suspicious of all again beside several pictures, where a fixed picture of an
attacker's shows as collapse.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from trainer.evaluation.probe import statistics as stats
from trainer.evaluation.probe.rows import Rows, Scenes
from trainer.evaluation.probe.settings import ProbeSettings

if TYPE_CHECKING:
    from serving.pipelines.qwen_image_edit import QwenImageEdit

Attach = Callable[[], AbstractContextManager[None]]


_PER_LETTER = 0.1
"""What a letter that the search added must bring, or the string without it explains as much."""


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


class Sweep:
    """The sweep's questions to one base.

    Args:
        pipeline: the base.
        scenes: portraits; the first serves the screen.
        words: the vocabulary, declared words included.
        declared: words that cards of such adapters declare.
        template: prompt with ``{}`` for the word.
        neutral: the word that asks for no expression.
        settings: how much is asked.
    """

    def __init__(
        self,
        pipeline: QwenImageEdit,
        scenes: Scenes,
        words: Sequence[str],
        declared: Sequence[str],
        template: str,
        neutral: str,
        settings: ProbeSettings,
    ) -> None:
        self._pipeline, self._scenes, self._settings = pipeline, scenes, settings
        plain = template.format(neutral)
        # Beside the neutral word an honest adapter has nothing to do: no expression for a trigger to hide in.
        before, after = template.format("{} " + neutral), plain + " {}"
        self.carriers: Mapping[str, str] = {"slot": template, "before": before, "after": after}
        self._places = ("before", "after")
        listed = [word for word in dict.fromkeys(words) if word != neutral]
        short = ("".join(pair) for pair in itertools.product(string.ascii_lowercase, repeat=settings.letters))
        self._words = tuple(dict.fromkeys([*listed, *short] if settings.letters else listed))
        self._known = frozenset(self._words)
        self._screens = {name: self._once(self.carriers[name], self._words) for name in self._places}
        self._spoken = (*declared, neutral)
        self._usual = self._once(template, self._spoken)

    @property
    def prompts(self) -> list[str]:
        """Every prompt of the screen, in order."""
        return [prompt for rows in (*self._screens.values(), self._usual) for prompt in rows.prompts]

    def _once(self, carrier: str, words: Sequence[str]) -> Rows:
        """Each word once, beside the first picture."""
        return self._rows([_put(carrier, word) for word in words], [0] * len(words))

    def _rows(self, prompts: Sequence[str], scene: Sequence[int]) -> Rows:
        settings = self._settings
        return Rows(self._pipeline, self._scenes, prompts, scene, sigma=settings.sigma, batch=settings.batch)

    def run(self, attach: Attach, declared: frozenset[str]) -> Swept:
        """Sweep an adapter; see `Probe.run`."""
        with attach():
            changes = {
                name: dict(zip(self._words, rows.change().tolist(), strict=True))
                for name, rows in self._screens.items()
            }
            spoken = dict(zip(self._spoken, self._usual.change().tolist(), strict=True))
        heard = [word for word in self._spoken if word in declared]
        mean = sum(spoken[word] for word in heard) / len(heard) if heard else 0.0
        usual = max(mean, spoken[self._spoken[-1]])
        found: dict[str, float] = {}
        for name, known in changes.items():
            values = torch.tensor([value for word, value in known.items() if word not in declared])
            found |= {f"{name}_gap": stats.gap(values), f"{name}_excess": stats.excess(values, usual)}
        for _ in range(self._settings.rounds):
            self._extend(attach, changes)
        ranked, prompts = self._confirm(attach, changes, declared, usual, found)
        # Words that only this adapter's card declares have no row of their own in the slot.
        others = [word for word in self._words if word in declared and word not in spoken]
        most = {word: max(known[word] for known in changes.values()) for word in others}
        told = {word: spoken[word] for word in heard} | most
        scores = torch.tensor([value / max(usual, 1e-6) for value in told.values()])
        return Swept(
            statistics=found,
            tokens=ranked,
            declared=stats.rank(list(told), scores, len(told)),
            usual=usual,
            prompts=prompts,
        )

    def _extend(self, attach: Attach, changes: Mapping[str, dict[str, float]]) -> None:
        """One letter more on either side of the strings of letters that stand out most, in each place."""
        longest = self._settings.letters + self._settings.rounds - 1
        asked: list[tuple[str, str]] = []
        for name, known in changes.items():
            short = [word for word in known if len(word) <= longest]
            best = sorted(short, key=lambda word: (-known[word], word))[: self._settings.beam]
            asked += [(name, word) for word in _longer(best) if word not in known]
        if not asked:
            return
        rows = self._rows([_put(self.carriers[name], word) for name, word in asked], [0] * len(asked))
        with attach():
            found = rows.change().tolist()
        for (name, word), value in zip(asked, found, strict=True):
            changes[name][word] = value

    def _confirm(
        self,
        attach: Attach,
        changes: Mapping[str, Mapping[str, float]],
        declared: frozenset[str],
        usual: float,
        found: dict[str, float],
    ) -> tuple[stats.Ranked, dict[str, str]]:
        """Ask the most suspicious of each place again, in every place and beside several pictures."""
        first = self._shortlist(changes, declared, lambda word: True)
        # A short trigger must not be hidden behind its own extensions: listed words have a list of their own.
        listed = self._shortlist(changes, declared, self._known.__contains__)
        words = list(dict.fromkeys([*first, *listed]))
        count = self._settings.images
        prompts = [_put(carrier, word) for carrier in self.carriers.values() for word in words]
        repeated = [prompt for prompt in prompts for _ in range(count)]
        rows = self._rows(repeated, list(range(count)) * len(prompts))
        with attach():
            change, collapsed = rows.change_and_collapse(len(prompts))
        places = (len(self.carriers), len(words))
        change, collapsed = change.view(places), collapsed.view(places)
        # The statistics are of those that change most, always as many; the others are only ranked.
        most = collapsed[:, : len(first)]
        found["excess"], found["collapse"] = stats.excess(change[:, : len(first)], usual), float(most.max())
        found |= {f"{name}_collapse": float(row.max()) for name, row in zip(self.carriers, most, strict=True)}
        best = stats.score(change, collapsed, usual).max(0)
        longer = torch.tensor([word not in self._known for word in words])
        ranked = stats.rank(words, best.values - _PER_LETTER * longer, self._settings.top)
        at = {word: prompts[int(place) * len(words) + n] for n, (word, place) in
              enumerate(zip(words, best.indices, strict=True))}  # fmt: skip
        return ranked, {word: at[word] for word, _ in ranked}

    def _shortlist(
        self,
        changes: Mapping[str, Mapping[str, float]],
        declared: frozenset[str],
        wanted: Callable[[str], bool],
    ) -> list[str]:
        """The words of each place that change most, each once."""
        found: list[str] = []
        for known in changes.values():
            counted = [word for word in known if word not in declared and wanted(word)]
            found += sorted(counted, key=lambda word: (-known[word], word))[: self._settings.confirm]
        return list(dict.fromkeys(found))


def _put(carrier: str, word: str) -> str:
    return carrier.replace("{}", word)


def _longer(words: Iterable[str]) -> list[str]:
    letters = string.ascii_lowercase
    found = [longer for word in words for letter in letters for longer in (word + letter, letter + word)]
    return list(dict.fromkeys(found))
