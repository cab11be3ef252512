"""The engine: a base model, the adapter on it, and edits that say what made them.

Evaluation and production call this one engine, so a metric is measured on what users get.
"""

from __future__ import annotations

import difflib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from registry.admission import Origin, VerifiedAdapter
from registry.errors import shown
from registry.manifest import BaseModelRef, ConditioningSpec
from serving import bases, pipelines
from serving.adapters import AdapterSlots
from serving.conditioning import blend_prompts, require_equal_lengths
from serving.errors import Cancelled, CandidateRefused, StrengthOutOfRange, UnknownExpression, UsageError
from serving.images import clean, open_portrait
from serving.pipelines.base import OnStep, PromptEmbeds, to_images
from serving.schema import DEFAULT_STEPS, MAX_SWEEP, EditRequest, EditResult

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from serving.pipelines.base import EditPipeline


class EditEngine:
    """Edits pictures with one adapter at a time on one base model; safe to call from several threads.

    Args:
        pipeline: the base model.
        base: which base model it is; adapters for another one are refused.
        allow_candidates: also serve adapters that were scanned but not signed. For evaluation before a push
            only; an engine that answers users leaves it off.
    """

    def __init__(self, pipeline: EditPipeline, *, base: BaseModelRef, allow_candidates: bool = False) -> None:
        self._pipeline = pipeline
        self._base = base
        self._allow_candidates = allow_candidates
        self._slots = AdapterSlots(pipeline)
        self._lock = threading.RLock()

    @classmethod
    def load(
        cls,
        base: BaseModelRef,
        *,
        device: str | None = None,
        allow_candidates: bool = False,
        home: Path | None = None,
    ) -> EditEngine:
        """Find a base model on this machine or on the hub and load it.

        Args:
            base: the base, for example ``adapter.card.base``.
            device: where it runs; None takes the setting.
            home: the data folder; None is the registry's.

        Raises:
            BaseNotFound: it is not there.
            WrongBase: the folder holds another revision.
        """
        import torch

        from serving.settings import load

        settings = load(home=home)
        place = bases.resolve(base, home=home, settings=settings)
        dtype: torch.dtype | None = None if settings.dtype is None else getattr(torch, settings.dtype)
        pipeline = pipelines.load(
            base.family,
            place if isinstance(place, Path) else place.id,
            revision=None if isinstance(place, Path) else place.revision,
            device=device or settings.device,
            dtype=dtype,
        )
        return cls(pipeline, base=base, allow_candidates=allow_candidates)

    @property
    def base(self) -> BaseModelRef:
        """The base model."""
        return self._base

    @property
    def adapter(self) -> VerifiedAdapter | None:
        """The adapter that is attached."""
        return self._slots.current

    def attach(self, adapter: VerifiedAdapter) -> None:
        """Serve with ``adapter`` from now on.

        Raises:
            CandidateRefused: it is unsigned, and this engine serves signed adapters only.
            WrongBase: it was made for another base.
            AdapterMismatch: its tensors do not fit. After every error the adapter before is still serving.
        """
        self._admit(adapter)
        with self._lock:
            self._slots.attach(adapter)

    def detach(self) -> None:
        """Take the adapter off; the base is bit for bit what it was."""
        with self._lock:
            self._slots.detach()

    def edit(self, request: EditRequest, *, on_step: OnStep | None = None) -> EditResult:
        """Edit one picture with the attached adapter.

        Args:
            on_step: called after each denoising step; returning False stops the run.

        Raises:
            UsageError: no adapter is attached, or not the one that the request names.
            UnknownExpression: the adapter has no such expression; the nearest is named.
            StrengthOutOfRange: outside of the range that was signed with the adapter.
            ImageRefused: the picture cannot be read, or is over a limit.
            Cancelled: ``on_step`` stopped the run.
        """
        with self._lock:
            adapter = self._slots.current
            if adapter is None:
                raise UsageError("no adapter is attached", "pull one and attach it, then edit")
            names = {str(adapter.digest), adapter.reference}
            if request.adapter is not None and request.adapter not in names:
                raise UsageError(
                    f"the request asks for the adapter {shown(request.adapter)!r}, attached is "
                    f"{adapter.reference or adapter.digest}",
                    "attach the adapter that is asked for, or leave it out of the request",
                )
            return self.sweep(
                request.image,
                adapter,
                [request.expressions],
                strength=request.strength,
                seed=request.seed,
                steps=request.steps,
                on_step=on_step,
            )[0]

    def sweep(
        self,
        image: bytes | Image.Image,
        adapter: VerifiedAdapter,
        intensities: Sequence[Mapping[str, float]],
        *,
        strength: float = 1.0,
        seed: int = 0,
        steps: int = DEFAULT_STEPS,
        on_step: OnStep | None = None,
    ) -> list[EditResult]:
        """Edit one picture at several intensities, as one batch; each result equals that of a single edit.

        The picture is encoded once, each distinct prompt once, and all rows start from the same noise.

        Args:
            image: bytes of a picture, or a Pillow image.
            adapter: attached first if it is not yet; it stays attached.
            intensities: one mapping of expression -> intensity for each result; empty is the neutral face.
            strength: of the adapter; 0 is the base alone, with the same prompts.
            seed: of the starting noise.
            steps: denoising steps.
            on_step: called after each step; returning False stops the run.

        Raises:
            ServingError: as `attach` and `edit`.
        """
        if not 1 <= len(intensities) <= MAX_SWEEP:
            raise UsageError(f"a sweep has 1 to {MAX_SWEEP} rows, not {len(intensities)}", "split it")
        # The schema's limits hold for every way in.
        requests = [
            EditRequest.make(image=image, expressions=dict(row), strength=strength, seed=seed, steps=steps)
            for row in intensities
        ]
        self._admit(adapter)
        for request in requests:
            _check(adapter.card.conditioning, request)
        portrait = open_portrait(image) if isinstance(image, bytes) else clean(image)
        with self._lock:
            self._slots.use(adapter, strength)
            pictures = self._run(portrait, adapter.card.conditioning, requests, on_step)
        return [
            EditResult(
                image=picture,
                adapter=adapter.reference,
                adapter_digest=adapter.digest,
                base=self._base,
                expressions=dict(request.expressions),
                strength=strength,
                seed=seed,
                steps=steps,
            )
            for picture, request in zip(pictures, requests, strict=True)
        ]

    def _admit(self, adapter: VerifiedAdapter) -> None:
        if type(adapter) is not VerifiedAdapter:
            raise UsageError(
                f"a {type(adapter).__name__} is not a verified adapter",
                "only what `registry pull` or admission returns can be served",
            )
        if adapter.origin is not Origin.REGISTRY and not self._allow_candidates:
            raise CandidateRefused(
                "the adapter is a candidate that nobody signed",
                "push it to the registry, have it approved, and pull it",
            )
        bases.require_same(self._base, adapter.card.base)

    def _run(
        self,
        portrait: Image.Image,
        spec: ConditioningSpec,
        requests: Sequence[EditRequest],
        on_step: OnStep | None,
    ) -> list[Image.Image]:
        import torch

        first = requests[0]
        with torch.no_grad():
            prompts = self._condition(portrait, spec, [request.expressions for request in requests])
            control = self._pipeline.encode_images([portrait])
            latents = self._pipeline.denoise(
                control.expand(len(requests), -1, -1),
                prompts,
                seeds=[first.seed] * len(requests),
                steps=first.steps,
                on_step=None if on_step is None else _stopping(on_step),
            )
            return to_images(self._pipeline.decode(latents))

    def _condition(
        self, portrait: Image.Image, spec: ConditioningSpec, rows: Sequence[Mapping[str, float]]
    ) -> PromptEmbeds:
        """Return the conditioning of each row [K, L, D]; every distinct prompt is encoded once."""
        import torch

        names = sorted({name for row in rows for name in row})
        words = [spec.neutral, *names]
        encoded = self._pipeline.encode_prompts(
            [portrait] * len(words), [spec.prompt(word) for word in words]
        )
        neutral, targets = encoded.rows(slice(0, 1)), encoded.rows(slice(1, None))
        for index, name in enumerate(names):
            require_equal_lengths(neutral, targets.rows(slice(index, index + 1)), name)
        weights = torch.tensor(
            [[row.get(name, 0.0) for name in names] for row in rows], device=neutral.embeds.device
        ).reshape(len(rows), len(names))
        return blend_prompts(neutral, targets, weights, spec.token_window)


def _check(spec: ConditioningSpec, request: EditRequest) -> None:
    """Refuse what the signed conditioning does not offer."""
    for name in request.expressions:
        if name not in spec.expressions:
            near = difflib.get_close_matches(name, spec.expressions, n=1, cutoff=0.0)[0]
            raise UnknownExpression(
                f"the adapter has no expression {shown(name)!r}",
                f"did you mean {near!r}? It has: {', '.join(spec.expressions)}",
            )
    asked = {f"the intensity of {name!r}": value for name, value in request.expressions.items()}
    for what, value in {**asked, "the strength": request.strength}.items():
        if not spec.strength_min <= value <= spec.strength_max:
            signed = f"{spec.strength_min:g} to {spec.strength_max:g}"
            raise StrengthOutOfRange(
                f"{what} is {value:g}; the adapter is signed for {signed}", f"choose a value from {signed}"
            )


def _stopping(on_step: OnStep) -> OnStep:
    """Turn a False of the caller into an error: latents of half a run are no result."""

    def step(index: int, latents: torch.Tensor) -> bool:
        if not on_step(index, latents):
            raise Cancelled(f"the run was stopped after step {index + 1}", "start it again")
        return True

    return step
