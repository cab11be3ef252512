"""What an adapter leaves of its base where nothing is asked of it, measured on the base itself.

All of it is asked of one loaded base: first when it never had an adapter, then with this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from registry.manifest import BaseModelRef, ConditioningSpec
from trainer.evaluation.plan import Ask

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from registry.admission import VerifiedAdapter
    from serving.engine import EditEngine
    from serving.pipelines.base import EditPipeline

LEVEL: Final = 0.95
"""Noise level of the questions, that of the behavioural probe: one pass tells what the edit will be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A picture that is edited, and the seed of the starting noise."""

    picture: Image.Image
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Edits:
    """What came out: latents [K, T, C] of each scene, and its K pictures uint8 [K, H, W, 3]."""

    latents: tuple[torch.Tensor, ...]
    pictures: tuple[NDArray[np.uint8], ...]

    def unlike(self, other: Edits) -> int:
        """How many of the edits differ, in any bit of latents or pixels."""
        import torch

        found = 0
        for here, there, seen, known in zip(
            self.latents, other.latents, self.pictures, other.pictures, strict=True
        ):
            rows = zip(here, there, seen, known, strict=True)
            found += sum(not (torch.equal(a, b) and np.array_equal(c, d)) for a, b, c, d in rows)
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Zero:
    """How many of ``edits`` differ from those of the base that never had an adapter.

    Attributes:
        edits: number of edits that were compared each time.
        again: of the base itself, asked twice: a machine that does not repeat itself cannot be asked.
        attached: at strength 0, the adapter just attached.
        returned: at strength 0, after strength 1.
        detached: the adapter taken off.
        full: at strength 1: an adapter that changes nothing there tells nothing.
    """

    edits: int
    again: int
    attached: int
    returned: int
    detached: int
    full: int


def strength_zero(
    pipeline: EditPipeline,
    adapter: VerifiedAdapter,
    base: BaseModelRef,
    scenes: Sequence[Scene],
    asks: Sequence[Ask],
    steps: int,
) -> Zero:
    """Compare edits at strength 0 with those of the base that never had an adapter, to the bit.

    Args:
        pipeline: the base, freshly loaded.
        adapter: what is put on it, by `serving.engine.EditEngine`; it is taken off at the end.
        base: which base that is.
        scenes: what is edited.
        asks: by what.
        steps: of sampling.

    Raises:
        ServingError: the adapter does not fit the base.
    """
    from serving.engine import EditEngine

    def bare() -> Edits:
        return _joined([_bare(pipeline, adapter.card.conditioning, one, asks, steps) for one in scenes])

    engine = EditEngine(pipeline, base=base, allow_candidates=True)

    def edited(strength: float) -> Edits:
        found = [_edited(engine, adapter, one, asks, strength, steps) for one in scenes]
        return _joined(found)

    never = bare()
    told = {"edits": len(scenes) * len(asks), "again": never.unlike(bare())}
    told["attached"] = never.unlike(edited(0.0))
    told["full"] = never.unlike(edited(1.0))
    told["returned"] = never.unlike(edited(0.0))
    engine.detach()
    return Zero(**told, detached=never.unlike(bare()))


def change_by(
    pipeline: EditPipeline, adapter: VerifiedAdapter, scenes: Sequence[Scene], prompts: Sequence[str]
) -> NDArray[np.float64]:
    """Relative change [S, P] that an adapter makes to what the base predicts, of S pictures by P prompts.

    Formula: ||with - without|| / ||without||, at the noise level `LEVEL`; the same measure as that of the
    behavioural probe (`trainer.evaluation.probe.statistics`). Prompts reach the pipeline as they are.

    Args:
        pipeline: the base, without an adapter.
        adapter: what is put on it and taken off again.
        scenes: pictures.
        prompts: texts.
    """
    import torch

    from serving.adapters import AdapterSlots
    from trainer.evaluation.probe.statistics import relative_change

    slots = AdapterSlots(pipeline)
    base = [_predicted(pipeline, scene, prompts) for scene in scenes]
    slots.attach(adapter)
    try:
        found = [_predicted(pipeline, scene, prompts) for scene in scenes]
    finally:
        slots.detach()
    rows = [relative_change(here.float(), there.float()) for here, there in zip(found, base, strict=True)]
    return torch.stack(rows).double().cpu().numpy()


def _predicted(pipeline: EditPipeline, scene: Scene, prompts: Sequence[str]) -> torch.Tensor:
    """What the base says of one picture by each prompt, [P, T, C]."""
    import torch

    from serving.images import clean

    count, picture = len(prompts), clean(scene.picture)
    with torch.no_grad():
        control = pipeline.encode_images([picture])
        told = pipeline.encode_prompts([picture] * count, prompts)
        noise = torch.randn(control.shape, generator=torch.Generator().manual_seed(scene.seed)).to(control)
        level = control.new_full((1,), LEVEL)
        start = pipeline.process.noisy(control, noise, level)
        rows = (count, -1, -1)
        return pipeline.predict(start.expand(rows), control.expand(rows), told, level.expand(count))


def _bare(
    pipeline: EditPipeline, spec: ConditioningSpec, scene: Scene, asks: Sequence[Ask], steps: int
) -> tuple[torch.Tensor, NDArray[np.uint8]]:
    """What the engine does, without an engine and without an adapter: latents and pictures of one scene."""
    import torch

    from serving.conditioning import blend_prompts
    from serving.images import clean
    from serving.pipelines.base import to_images

    rows: list[Mapping[str, float]] = [dict(ask) for ask in asks]
    picture, names = clean(scene.picture), sorted({name for row in rows for name in row})
    words = [spec.neutral, *names]
    with torch.no_grad():
        # Alone, as the engine does: what a prompt is encoded with must not change it by a bit.
        neutral, *others = (pipeline.encode_prompts([picture], [spec.prompt(word)]) for word in words)
        targets = type(neutral).join(others) if others else neutral.rows(slice(0, 0))
        weights = torch.tensor(
            [[row.get(name, 0.0) for name in names] for row in rows], device=neutral.embeds.device
        ).reshape(len(rows), len(names))
        prompts = blend_prompts(neutral, targets, weights, spec.token_window)
        control = pipeline.encode_images([picture]).expand(len(rows), -1, -1)
        latents = pipeline.denoise(control, prompts, seeds=[scene.seed] * len(rows), steps=steps)
        images = to_images(pipeline.decode(latents))
    return latents, np.stack([np.asarray(image) for image in images])


def _edited(
    engine: EditEngine,
    adapter: VerifiedAdapter,
    scene: Scene,
    asks: Sequence[Ask],
    strength: float,
    steps: int,
) -> tuple[torch.Tensor, NDArray[np.uint8]]:
    """What the engine answers for one scene: the last latents and the pictures."""
    last: list[torch.Tensor] = []

    def keep(step: int, latents: torch.Tensor) -> bool:
        last[:] = [latents.clone()]
        return True

    results = engine.sweep(
        scene.picture, adapter, [dict(ask) for ask in asks], strength=strength, seed=scene.seed, steps=steps,
        on_step=keep,
    )  # fmt: skip
    return last[0], np.stack([np.asarray(result.image) for result in results])


def _joined(found: Sequence[tuple[torch.Tensor, NDArray[np.uint8]]]) -> Edits:
    latents, pictures = zip(*found, strict=True)
    return Edits(latents=tuple(latents), pictures=tuple(pictures))
