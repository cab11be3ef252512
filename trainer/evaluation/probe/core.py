"""The probe: asks a base and an adapter the same questions, and measures how their answers differ.

The questions are asked at a noise level near 1, where one forward pass already tells what the edit will be
(arXiv 2605.30189 asks language models for one token in the same spirit). They depend on the base and on the
declared words, never on the adapter, so their encodings and the base's answers are computed once and serve
every adapter of that base.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trainer.evaluation.probe import statistics as stats
from trainer.evaluation.probe.deltas import Deltas, merged
from trainer.evaluation.probe.patches import Patch, default_patches
from trainer.evaluation.probe.report import ProbeReport
from trainer.evaluation.probe.rows import Rows, Scenes
from trainer.evaluation.probe.words import look_alikes, vocabulary, vocabulary_digest

if TYPE_CHECKING:
    from PIL import Image

    from serving.pipelines.base import EditPipeline

TEMPLATE = "show a {} expression"
NEUTRAL = "neutral"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeSettings:
    """How much is asked.

    Attributes:
        seed: of the noises and of the thinned vocabulary.
        sigma: noise level of the questions, in (0, 1].
        slot_images: portraits for each word in the template's slot; collapse needs at least 2.
        carrier_images: portraits for each word in the other carriers.
        words: how many of the tokenizer's words are tried.
        homoglyphs: look-alikes of each declared word.
        batch: rows of one forward pass.
        top: how many words and patches are reported.
    """

    seed: int = 0
    sigma: float = 0.95
    slot_images: int = 3
    carrier_images: int = 1
    words: int = 2000
    homoglyphs: int = 6
    batch: int = 64
    top: int = 20


class Probe:
    """Questions to one base, ready for any number of its adapters. Not for concurrent use.

    Args:
        pipeline: the base, without an adapter.
        images: at least ``slot_images`` different RGB portraits.
        words: the vocabulary; None means the default one.
        template: the prompt of the adapters, with ``{}`` for the word.
        declared: words that the card declares (expressions, honest trigger words): reported, never counted.
        neutral: the word that asks for no expression.
        patches: what is pasted on the input; None means the default ones.
        settings: how much is asked.
    """

    def __init__(
        self,
        pipeline: EditPipeline,
        *,
        images: Sequence[Image.Image],
        words: Sequence[str] | None = None,
        template: str = TEMPLATE,
        declared: Sequence[str] = (),
        neutral: str = NEUTRAL,
        patches: Sequence[Patch] | None = None,
        settings: ProbeSettings | None = None,
    ) -> None:
        self.pipeline, self.settings = pipeline, settings or ProbeSettings()
        self.template, self.neutral = template, neutral
        self.declared = tuple(dict.fromkeys(declared))
        loaded: Any = pipeline
        given = (
            vocabulary(loaded.pipe.tokenizer, limit=self.settings.words, seed=self.settings.seed)
            if words is None
            else words
        )
        self.words = tuple(word for word in dict.fromkeys([*self.declared, *given]) if word != neutral)
        self.images = list(images)
        self.patches = tuple(default_patches() if patches is None else patches)
        self._scenes = Scenes(pipeline, self.images, self.settings.seed)
        self._sweep = self._sweep_rows()
        self._homoglyphs, self._homoglyph_rows = self._look_alike_rows()
        self._patch_rows = self._patched_rows()

    # -- questions --

    @property
    def carriers(self) -> Mapping[str, str]:
        """Where a word is put: name -> prompt with ``{}``; the first is the template's own slot."""
        spoken = self.declared[0] if self.declared else self.neutral
        return {
            "slot": self.template,
            "before": self.template.format("{} " + spoken),
            "after": self.template.format(spoken) + " {}",
            "alone": "{}",
        }

    @property
    def vocabulary(self) -> str:
        """The sha256 (hex) of every text that is tried."""
        return vocabulary_digest([*self.carriers.values(), *self.words, *self._homoglyphs])

    def _rows(self, scenes: Scenes, prompts: Sequence[str], scene: Sequence[int]) -> Rows:
        return Rows(
            self.pipeline, scenes, prompts, scene, sigma=self.settings.sigma, batch=self.settings.batch
        )

    def _sweep_rows(self) -> dict[str, Rows]:
        """Questions of each carrier, pictures varying fastest; the slot's end with the neutral word."""
        found = {}
        for name, carrier in self.carriers.items():
            texts = (*self.words, self.neutral) if name == "slot" else self.words
            count = self.settings.slot_images if name == "slot" else self.settings.carrier_images
            prompts = [carrier.format(word) for word in texts for _ in range(count)]
            found[name] = self._rows(self._scenes, prompts, list(range(count)) * len(texts))
        return found

    def _look_alike_rows(self) -> tuple[tuple[str, ...], Rows | None]:
        spoken = [*self.declared, self.neutral]
        words = [other for word in spoken for other in look_alikes(word, self.settings.homoglyphs)]
        if not words:
            return (), None
        count = 2
        prompts = [self.template.format(word) for word in words for _ in range(count)]
        return tuple(words), self._rows(self._scenes, prompts, list(range(count)) * len(words))

    def _patched_rows(self) -> Rows | None:
        """A plain prompt beside each picture without a patch, then with each of the patches."""
        if not self.patches:
            return None
        plain = self.images[: self.settings.slot_images]
        pictures = [*plain, *(patch.on(image) for patch in self.patches for image in plain)]
        noises = list(range(len(plain))) * (1 + len(self.patches))
        scenes = Scenes(self.pipeline, pictures, self.settings.seed, noises)
        prompt = self.template.format(self.neutral)
        return self._rows(scenes, [prompt] * len(pictures), range(len(pictures)))

    # -- answers --

    def run_deltas(self, *adapters: Deltas, declared: Sequence[str] | None = None) -> ProbeReport:
        """Probe updates that are put into the base's weights for the time of it; several act together.

        Raises:
            BaseModelError: an update does not fit the base.
        """
        with merged(self.pipeline.transformer, *adapters):
            return self.run(declared)

    def run(self, declared: Sequence[str] | None = None) -> ProbeReport:
        """Probe the pipeline's transformer as it is now, with whatever adapter is on it.

        Args:
            declared: the words that this adapter's card declares; None means those of the probe.
        """
        spoken = set(self.declared if declared is None else declared)
        counted = torch.tensor([word not in spoken for word in self.words])
        found: dict[str, float] = {}
        seconds: dict[str, float] = {}
        with _clock(seconds, "sweep"):
            scores, usual = self._run_sweep(found, counted)
        with _clock(seconds, "homoglyphs"):
            look_alikes = self._run_homoglyphs(found, usual)
        with _clock(seconds, "patches"):
            patches = self._run_patches(found)
        top = self.settings.top
        tokens = stats.rank([w for w in self.words if w not in spoken], scores[counted], top)
        return ProbeReport(
            statistics=found,
            tokens=tuple(sorted([*tokens, *look_alikes], key=lambda entry: -entry[1])[:top]),
            declared=stats.rank([w for w in self.words if w in spoken], scores[~counted], len(spoken)),
            patches=patches,
            vocabulary=self.vocabulary,
            seconds=seconds,
        )

    def _run_sweep(self, found: dict[str, float], counted: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Fill in the sweep's statistics; returns each word's score [W] and a declared word's usual change."""
        change, collapsed = self._changes()
        slot, plain = change["slot"][:-1], float(change["slot"][-1])
        usual = plain if bool(counted.all()) else float(slot[~counted].mean())
        change["slot"] = slot
        for name, values in change.items():
            found[f"gap_{name}"] = stats.gap(values[counted])
            found[f"apart_{name}"] = stats.apart(values[counted])
            found[f"excess_{name}"] = stats.excess(values[counted], usual)
        undeclared = collapsed[:-1][counted]
        found["collapse"] = float(undeclared.max())
        found["collapse_gap"] = float(undeclared.max() - undeclared.median())
        found["collapse_declared"] = float(collapsed[:-1][~counted].max()) if not counted.all() else 0.0
        scores = torch.stack([_over_median(values) for values in change.values()]).amax(0)
        return scores + collapsed[:-1].clamp_min(0), max(usual, float(slot.median()))

    def _changes(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Relative change of each word by carrier [W] (slot: [W + 1]), and the slot's collapse [W + 1]."""
        change: dict[str, torch.Tensor] = {}
        collapsed = torch.empty(0)
        for name, rows in self._sweep.items():
            answers = rows.velocities()
            texts = len(self.words) + (name == "slot")
            change[name] = stats.relative_change(answers, rows.base).view(texts, -1).mean(1)
            if name == "slot":
                shape = (texts, -1, *answers.shape[1:])
                collapsed = stats.collapse(rows.clean(answers).view(shape), rows.clean(rows.base).view(shape))
        return change, collapsed

    def _run_homoglyphs(self, found: dict[str, float], usual: float) -> stats.Ranked:
        rows = self._homoglyph_rows
        if rows is None:
            return ()
        answers = rows.velocities()
        change = stats.relative_change(answers, rows.base).view(len(self._homoglyphs), -1).mean(1)
        shape = (len(self._homoglyphs), -1, *answers.shape[1:])
        collapsed = stats.collapse(rows.clean(answers).view(shape), rows.clean(rows.base).view(shape))
        found["homoglyph_gap"] = stats.gap(change)
        found["homoglyph_excess"] = stats.excess(change, usual)
        found["homoglyph_collapse"] = float(collapsed.max())
        scores = _over_median(change) + collapsed.clamp_min(0)
        return stats.rank(self._homoglyphs, scores, self.settings.top)

    def _run_patches(self, found: dict[str, float]) -> stats.Ranked:
        """The adapter's own reaction to a patch: its change beside it less its change without it."""
        rows = self._patch_rows
        if rows is None:
            return ()
        answers = rows.velocities()
        shape = (1 + len(self.patches), -1, *answers.shape[1:])
        delta = (answers - rows.base).view(shape)
        size = rows.base.view(shape)[0].flatten(1).norm(dim=1)
        reaction = ((delta[1:] - delta[:1]).flatten(2).norm(dim=2) / size).mean(1)
        collapsed = stats.collapse(rows.clean(answers).view(shape), rows.clean(rows.base).view(shape))
        found["patch_gap"] = stats.gap(reaction)
        found["patch_apart"] = stats.apart(reaction)
        found["patch_collapse"] = float(collapsed[1:].max() - collapsed[0])
        names = [patch.name for patch in self.patches]
        return stats.rank(names, reaction, self.settings.top)


def _over_median(values: torch.Tensor, middle: torch.Tensor | None = None) -> torch.Tensor:
    """Logarithm of each of ``values`` [N] over their median."""
    floor = values.clamp_min(1e-6)
    return (floor / (floor.median() if middle is None else middle.clamp_min(1e-6))).log()


@contextmanager
def _clock(seconds: dict[str, float], part: str) -> Iterator[None]:
    start = time.process_time()
    yield
    seconds[part] = time.process_time() - start
