"""The probe: asks a base and an adapter the same questions, and measures how their answers differ.

The questions are asked at a noise level near 1, where one forward pass already tells what the edit will be.
Most of them depend on the base alone, never on the adapter, so their encodings and the base's answers are
computed once and serve every adapter of that base.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from trainer.evaluation.probe import statistics as stats
from trainer.evaluation.probe.deltas import Deltas, merged
from trainer.evaluation.probe.inversion import Inversion
from trainer.evaluation.probe.pairs import synergy
from trainer.evaluation.probe.patches import Patch, default_patches
from trainer.evaluation.probe.report import ProbeReport
from trainer.evaluation.probe.rows import Rows, Scenes
from trainer.evaluation.probe.settings import ProbeSettings
from trainer.evaluation.probe.sweep import Sweep
from trainer.evaluation.probe.words import look_alikes, vocabulary, vocabulary_digest

if TYPE_CHECKING:
    from PIL import Image

    from serving.pipelines.qwen_image_edit import QwenImageEdit

TEMPLATE = "show a {} expression"
NEUTRAL = "neutral"
Attach = Callable[[], AbstractContextManager[None]]
"""Puts the adapter on the base for the length of a block; the base is bare outside of it."""


class Probe:
    """Questions to one base, ready for any number of its adapters. Not for concurrent use.

    Args:
        pipeline: the base, without an adapter.
        images: different RGB portraits, at least ``settings.images`` of them.
        words: the vocabulary; None means the default one.
        template: the prompt of the adapters, with ``{}`` for the word.
        declared: words that cards of such adapters declare (expressions, honest trigger words).
        neutral: the word that asks for no expression.
        patches: what is pasted on the input; None means the default ones.
        settings: how much is asked.
    """

    def __init__(
        self,
        pipeline: QwenImageEdit,
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
        limit, seed = self.settings.words, self.settings.seed
        given = vocabulary(pipeline.pipe.tokenizer, limit=limit, seed=seed) if words is None else words
        self.images = list(images)
        self.patches = tuple(default_patches(seed) if patches is None else patches)
        scenes = Scenes(pipeline, self.images, seed)
        self._sweep = Sweep(
            pipeline, scenes, [*self.declared, *given], self.declared, template, neutral, self.settings
        )
        self._homoglyphs, self._homoglyph_rows = self._look_alike_rows(scenes)
        self._patch_rows = self._patched_rows()
        self._inversion = Inversion(pipeline, scenes, self._sweep.carriers["before"], self.settings)
        self._plain = [template.format(word) for word in (neutral, *self.declared)]
        count = self.settings.images
        repeated = [prompt for prompt in self._plain for _ in range(count)]
        self._plain_rows = self._rows(scenes, repeated, list(range(count)) * len(self._plain))

    @property
    def vocabulary(self) -> str:
        """The sha256 (hex) of every text that every adapter is asked."""
        return vocabulary_digest([*self._sweep.prompts, *self._homoglyphs])

    def _rows(self, scenes: Scenes, prompts: Sequence[str], scene: Sequence[int]) -> Rows:
        return Rows(
            self.pipeline, scenes, prompts, scene, sigma=self.settings.sigma, batch=self.settings.batch
        )

    def _look_alike_rows(self, scenes: Scenes) -> tuple[dict[str, str], Rows | None]:
        """Look-alike -> its word; and each in the template's slot, beside the first two pictures."""
        spoken = (*self.declared, self.neutral)
        found = {other: word for word in spoken for other in look_alikes(word, self.settings.homoglyphs)}
        if not found:
            return found, None
        prompts = [self.template.format(other) for other in found for _ in range(2)]
        return found, self._rows(scenes, prompts, [0, 1] * len(found))

    def _patched_rows(self) -> Rows | None:
        """A plain prompt beside each picture without a patch, then with each of the patches."""
        if not self.patches:
            return None
        plain = self.images[: self.settings.patch_images]
        pictures = [*plain, *(patch.on(image) for patch in self.patches for image in plain)]
        noises = list(range(len(plain))) * (1 + len(self.patches))
        scenes = Scenes(self.pipeline, pictures, self.settings.seed, noises)
        prompt = self.template.format(self.neutral)
        return self._rows(scenes, [prompt] * len(pictures), range(len(pictures)))

    def run_deltas(self, *adapters: Deltas, declared: Sequence[str] | None = None) -> ProbeReport:
        """Probe updates that are put into the base's weights for the time of it; several act together.

        Raises:
            BaseModelError: an update does not fit the base.
        """
        return self.run(lambda: merged(self.pipeline.transformer, *adapters), declared)

    def run(self, attach: Attach, declared: Sequence[str] | None = None) -> ProbeReport:
        """Probe the adapter that ``attach`` puts on the pipeline's transformer.

        Args:
            attach: called several times; the base has to be bare before and after each.
            declared: the words that this adapter's card declares: reported, never counted as suspicious.
                None means those of the probe.
        """
        spoken = frozenset(self.declared if declared is None else declared)
        found: dict[str, float] = {}
        seconds: dict[str, float] = {}
        with _clock(seconds, "sweep"):
            swept = self._sweep.run(attach, spoken)
            found |= swept.statistics
        if self.settings.inversion_steps:
            with _clock(seconds, "inversion"):
                inverted = self._inversion.run(attach, [text for text, _ in swept.tokens[:2]])
                found |= {"inversion_soft": inverted.soft, "inversion": inverted.confirmed}
        with attach():
            with _clock(seconds, "homoglyphs"):
                look_alikes = self._run_homoglyphs(found, swept.usual)
            with _clock(seconds, "patches"):
                patches = self._run_patches(found, swept.usual)
        top = self.settings.top
        return ProbeReport(
            statistics=found,
            tokens=tuple(sorted([*swept.tokens, *look_alikes], key=lambda entry: -entry[1])[:top]),
            declared=swept.declared,
            patches=patches,
            vocabulary=self.vocabulary,
            prompts={**swept.prompts, **{word: self.template.format(word) for word, _ in look_alikes}},
            seconds=seconds,
        )

    def run_pair(self, a: Deltas, b: Deltas) -> ProbeReport:
        """Probe what two adapters do together that neither does alone, on the plain prompts.

        Words are swept under both at once by ``run_deltas(a, b)``.

        Raises:
            BaseModelError: an update does not fit the base.
        """
        seconds: dict[str, float] = {}
        with _clock(seconds, "pair"):
            found, prompts = synergy(
                self.pipeline.transformer, self._plain_rows, self._plain, a, b, self.settings.top
            )
        return ProbeReport(
            statistics=found, tokens=prompts, vocabulary=vocabulary_digest(self._plain), seconds=seconds
        )

    def _run_homoglyphs(self, found: dict[str, float], usual: float) -> stats.Ranked:
        rows = self._homoglyph_rows
        if rows is None:
            return ()
        change, collapsed = rows.change_and_collapse(len(self._homoglyphs))
        found["homoglyph_excess"] = stats.excess(change, usual)
        found["homoglyph_collapse"] = float(collapsed.max())
        best: dict[str, tuple[float, str]] = {}
        # One look-alike of each word is enough: they resemble each other, and would fill the list.
        scores = stats.score(change, collapsed, usual).tolist()
        for (other, word), score in zip(self._homoglyphs.items(), scores, strict=True):
            best[word] = max(best.get(word, (score, other)), (score, other))
        ranked = sorted(best.values(), key=lambda entry: (-entry[0], entry[1]))
        return tuple((other, round(score, 6)) for score, other in ranked)

    def _run_patches(self, found: dict[str, float], usual: float) -> stats.Ranked:
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
        gained = collapsed[1:] - collapsed[0]
        found["patch_gap"], found["patch_collapse"] = stats.gap(reaction), float(gained.max())
        scores = stats.score(reaction, gained, usual)
        return stats.rank([patch.name for patch in self.patches], scores, self.settings.top)


@contextmanager
def _clock(seconds: dict[str, float], part: str) -> Iterator[None]:
    start = time.process_time()
    yield
    seconds[part] = time.process_time() - start
