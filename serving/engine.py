"""The engine: a base model, the adapters on it, and edits that say what made them.

Evaluation and production call this one engine, so a metric is measured on what users get. Edits advance a
step at a time: those of different requests, adapters and seeds share a forward pass as long as their shapes
are equal, and join and leave it at any step.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.admission import Origin, VerifiedAdapter
from registry.errors import shown
from registry.manifest import BaseModelRef
from serving import bases, pipelines
from serving.adapters import AdapterSlots, Stack
from serving.conditioning import require_offered, require_strength, strength_of
from serving.encodings import CacheInfo, Encoder
from serving.errors import Cancelled, CandidateRefused, UsageError
from serving.images import clean, open_portrait
from serving.pipelines.base import OnStep, Size, to_images
from serving.runs import Portrait, Run
from serving.schedules import Course, Schedule, course
from serving.schema import DEFAULT_STEPS, MAX_SWEEP, EditRequest, EditResult, SweepRequest, Used

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from serving.pipelines.base import EditPipeline
    from serving.pipelines.denoising import Denoising
    from serving.settings import ServingSettings

_DECODED_TOGETHER = 16
_STEADY = 8
"""Steps in a row with one stack of adapters, after which it is merged where that is wanted."""
_MERGED_AGAIN = 1000
"""Steps after which a stack that could not be merged is tried again."""

_log = logging.getLogger(__name__)


class EditEngine:
    """Edits pictures with adapters on one base model; safe to call from several threads.

    Args:
        pipeline: the base model.
        base: which base model it is; adapters for another one are refused.
        allow_candidates: also serve adapters that were scanned but not signed. For evaluation before a push
            only; an engine that answers users leaves it off.
        adapter_memory: bytes that resident adapters may take; None is no limit.
        cache_memory: bytes for encodings of pictures and prompts, half for each.
        merge: merge adapters into the base's weights for as long as all rows want the same ones at the same
            strengths; costs as much memory again as the weights that they change. The rounding differs in
            the last bits from that of adapters beside the weights.
        schedules: name of an adapter -> how it wants to be run; see `serving.schedules`.
    """

    def __init__(
        self,
        pipeline: EditPipeline,
        *,
        base: BaseModelRef,
        allow_candidates: bool = False,
        adapter_memory: int | None = None,
        cache_memory: int = 64 << 20,
        merge: bool = False,
        schedules: Mapping[str, Schedule] | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._base = base
        self._allow_candidates = allow_candidates
        self._merge = merge
        self._schedules = schedules or {}
        self._steady: tuple[Any, int] = ((), 0)
        self.slots = AdapterSlots(pipeline, adapter_memory)
        self._encoder = Encoder(pipeline, self.slots, cache_memory)
        self._lock = threading.RLock()

    @classmethod
    def load(
        cls,
        base: BaseModelRef,
        *,
        device: str | None = None,
        allow_candidates: bool = False,
        home: Path | None = None,
        settings: ServingSettings | None = None,
    ) -> EditEngine:
        """Find a base model on this machine or on the hub and load it.

        Args:
            base: the base, for example ``adapter.card.base``.
            device: where it runs; None takes the setting.
            home: the data folder; None is the registry's.
            settings: how; None reads them.

        Raises:
            BaseNotFound: it is not there.
            WrongBase: the folder holds another revision.
        """
        import torch

        from serving.settings import load

        settings = load(home=home) if settings is None else settings
        place = bases.resolve(base, home=home, settings=settings)
        dtype: torch.dtype | None = None if settings.dtype is None else getattr(torch, settings.dtype)
        pipeline = pipelines.load(
            base.family,
            place if isinstance(place, Path) else place.id,
            revision=None if isinstance(place, Path) else place.revision,
            device=device or settings.device,
            dtype=dtype,
            weights=settings.weights,
            offload=settings.offload,
        )
        return cls(
            pipeline,
            base=base,
            allow_candidates=allow_candidates,
            adapter_memory=settings.adapter_memory,
            cache_memory=settings.cache_memory,
            merge=settings.merge,
            schedules=settings.schedules,
        )

    @property
    def base(self) -> BaseModelRef:
        """The base model."""
        return self._base

    @property
    def size(self) -> Size:
        """Height and width of the base's own size."""
        return self._pipeline.size

    @property
    def adapter(self) -> VerifiedAdapter | None:
        """The adapter that is attached."""
        return self.slots.current

    def cache_info(self) -> dict[str, CacheInfo]:
        """How the caches of encodings do, by what they keep."""
        return self._encoder.info()

    def attach(self, adapter: VerifiedAdapter) -> None:
        """Serve with ``adapter`` from now on.

        Raises:
            CandidateRefused: it is unsigned, and this engine serves signed adapters only.
            WrongBase: it was made for another base.
            AdapterMismatch: its tensors do not fit. After every error the adapter before is still serving.
        """
        self._admit(adapter)
        with self._lock:
            self.slots.attach(adapter)

    def detach(self) -> None:
        """Take all adapters off; the base is bit for bit what it was."""
        with self._lock:
            self.slots.detach()

    def prefetch(self, adapter: VerifiedAdapter) -> None:
        """Bring an adapter to where the base computes, beside the steps that run.

        Raises:
            CandidateRefused, WrongBase, AdapterMismatch: as `attach`.
            Overloaded: the adapters in use leave no room for it.
        """
        self._admit(adapter)
        prepared = self.slots.prepare(adapter)
        with self._lock:
            self.slots.install(prepared)

    def hold(self, adapter: VerifiedAdapter) -> None:
        """Like `prefetch`, and keep the adapter there until it is released as often as it is held."""
        self.prefetch(adapter)
        with self._lock:
            self.slots.load(adapter)
            self.slots.pin(adapter)

    def release(self, adapter: VerifiedAdapter) -> None:
        """Let an adapter go that was held; it stays until others need its room."""
        with self._lock:
            self.slots.unpin(adapter)

    # A request, a step at a time

    def check(self, request: SweepRequest, stack: Stack) -> None:
        """Refuse what `begin` would refuse, as far as that is known without the device and the picture.

        Raises:
            ServingError: see `begin`.
        """
        if not stack:
            raise UsageError("no adapter is asked for", "name at least one")
        for adapter, strength in stack:
            self._admit(adapter)
            require_strength(adapter.card.conditioning, strength)
        require_offered(stack[0][0].card.conditioning, request.rows)
        self._size(request.size)
        self.course(request, stack)

    def course(self, request: SweepRequest, stack: Stack) -> Course:
        """Return how many steps a request takes with some adapters, and on which schedule.

        Raises:
            UsageError: two of the adapters want different schedules.
        """
        return course(self._schedules, stack, request.steps, DEFAULT_STEPS)

    def prepare(self, request: SweepRequest) -> Portrait:
        """Open a request's picture, turn it upright, cut it out and name its pixels: needs no device.

        Raises:
            ImageRefused: the picture cannot be read, or is over a limit.
            UsageError: the base makes no pictures of this size.
        """
        import blake3

        size, image = self._size(request.size), request.image
        picture = open_portrait(image, size) if isinstance(image, bytes) else clean(image, size)
        pixels = blake3.blake3(picture.tobytes() + repr(picture.size).encode())
        return Portrait(picture=picture, digest=pixels.digest())

    def begin(self, request: SweepRequest, stack: Stack, portrait: Portrait | None = None) -> Run:
        """Take a request: refuse what does not fit, encode, and be ready for the first step.

        Args:
            request: what is asked; its ``adapter``, ``strength`` and ``stacked`` are taken as answered by
                ``stack``.
            stack: adapters and the strength of each; the first conditions the edit. They stay resident until
                `finish` or `drop`.
            portrait: what `prepare` made of the request; None does it now.

        Raises:
            ServingError: as `attach`, and as `edit` for what is asked.
        """
        self.check(request, stack)
        if request.exact and len(request.rows) > 1:
            raise UsageError("an exact request begins with one row at a time", "begin each row by itself")
        course = self.course(request, stack)
        prepared = portrait or self.prepare(request)
        with self._lock:
            pinned: list[tuple[VerifiedAdapter, float]] = []
            try:
                for adapter, strength in stack:
                    # Pinned at once, or the next one could take its room.
                    self.slots.load(adapter)
                    self.slots.pin(adapter)
                    pinned.append((adapter, strength))
                denoising = self._begin(prepared, request, stack, course)
            except BaseException:
                self._unpin(tuple(pinned))
                raise
        return Run(request=request, stack=stack, denoising=denoising, course=course)

    def advance(self, runs: Sequence[Run]) -> None:
        """Take the next step of every row of some runs of one shape, in one forward pass."""
        # Rows with the same adapters stand together: their updates are computed at once.
        ordered = sorted(runs, key=lambda run: run.shares)
        with self._lock:
            if any(run.request.exact for run in ordered):
                self.slots.unmerge()  # merged weights are rounded, and whether they are depends on others
            elif self._merge:
                self._merge_if_steady(ordered)
            rows = [run.stack for run in ordered for _ in range(run.rows)]
            with self.slots.routed(rows):
                self._pipeline.advance([run.denoising for run in ordered])

    def preview(self, run: Run) -> list[Image.Image]:
        """What each row would look like if the last step had gone on as it began; before it, noise."""
        latents = run.denoising.latents if run.denoising.clean is None else run.denoising.clean
        return self._decoded(latents, run.denoising.size)

    def finish(self, run: Run) -> list[EditResult]:
        """Decode the pictures of a run that is done, and let its adapters go."""
        try:
            pictures = self._decoded(run.denoising.latents, run.denoising.size)
        finally:
            self.drop(run)
        (adapter, strength), *rest = run.stack
        request = run.request
        stacked = tuple(Used(adapter=one.reference, digest=one.digest, strength=share) for one, share in rest)
        return [
            EditResult(
                image=picture,
                adapter=adapter.reference,
                adapter_digest=adapter.digest,
                base=self._base,
                expressions=expressions,
                strength=strength,
                seed=seed,
                steps=run.course.steps,
                shift=run.course.shift,
                size=run.denoising.size,
                stacked=stacked,
            )
            for picture, expressions, seed in zip(pictures, request.rows, request.all_seeds, strict=True)
        ]

    def drop(self, run: Run) -> None:
        """Forget a run; its adapters may be evicted."""
        with self._lock:
            if run.pinned:
                run.pinned = False
                self._unpin(run.stack)

    # A request as a whole

    def edit(self, request: EditRequest, *, on_step: OnStep | None = None) -> EditResult:
        """Edit one picture with the attached adapter.

        Args:
            on_step: called after each denoising step; returning False stops the run.

        Raises:
            UsageError: no adapter is attached, or not the one that the request names, or others are stacked.
            UnknownExpression: the adapter has no such expression; the nearest is named.
            StrengthOutOfRange: outside of the range that was signed with the adapter.
            ImageRefused: the picture cannot be read, or is over a limit.
            Cancelled: ``on_step`` stopped the run.
        """
        with self._lock:
            adapter = self.slots.current
            if adapter is None:
                raise UsageError("no adapter is attached", "pull one and attach it, then edit")
            names = {str(adapter.digest), adapter.reference}
            if request.adapter is not None and request.adapter not in names:
                raise UsageError(
                    f"the request asks for the adapter {shown(request.adapter)!r}, attached is "
                    f"{adapter.reference or adapter.digest}",
                    "attach the adapter that is asked for, or leave it out of the request",
                )
            if request.stacked:
                raise UsageError(
                    "an edit with the attached adapter stacks no others", "use begin with all of them"
                )
            asked = SweepRequest(
                image=request.image, rows=(request.expressions,), strength=request.strength,
                seed=request.seed, steps=request.steps, size=request.size,
            )  # fmt: skip
            strength = strength_of(adapter.card.conditioning, request.strength)
            return self._to_the_end(asked, ((adapter, strength),), on_step)[0]

    def sweep(
        self,
        image: bytes | Image.Image,
        adapter: VerifiedAdapter,
        intensities: Sequence[Mapping[str, float]],
        *,
        strength: float | None = None,
        seed: int = 0,
        steps: int | None = None,
        on_step: OnStep | None = None,
    ) -> list[EditResult]:
        """Edit one picture at several intensities, as one batch; each result equals that of a single edit.

        The picture is encoded once, each distinct prompt once, and all rows start from the same noise.

        Args:
            image: bytes of a picture, or a Pillow image.
            adapter: attached first if it is not yet; it stays attached.
            intensities: one mapping of expression -> intensity for each result; empty is the neutral face.
            strength: of the adapter; 0 is the base alone, with the same prompts; None is 1, or the signed one
                nearest to it.
            seed: of the starting noise.
            steps: denoising steps; None is what the adapter is scheduled for.
            on_step: called after each step; returning False stops the run.

        Raises:
            ServingError: as `attach` and `edit`.
        """
        if not 1 <= len(intensities) <= MAX_SWEEP:
            raise UsageError(f"a sweep has 1 to {MAX_SWEEP} rows, not {len(intensities)}", "split it")
        # The schema's limits hold for every way in.
        request = SweepRequest.make(
            image=image,
            rows=tuple(dict(row) for row in intensities),
            strength=strength,
            seed=seed,
            steps=steps,
        )
        self._admit(adapter)
        chosen = strength_of(adapter.card.conditioning, strength)
        with self._lock:
            results = self._to_the_end(request, ((adapter, chosen),), on_step)
            self.slots.use(adapter, chosen)
        return results

    # Inside

    def _to_the_end(self, request: SweepRequest, stack: Stack, on_step: OnStep | None) -> list[EditResult]:
        run = self.begin(request, stack)
        while not run.done:
            self.advance([run])
            if on_step is not None and not on_step(run.step - 1, run.denoising.latents):
                self.drop(run)
                raise Cancelled(f"the run was stopped after step {run.step}", "start it again")
        return self.finish(run)

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

    def _unpin(self, stack: Stack) -> None:
        for adapter, _ in stack:
            self.slots.unpin(adapter)

    def _size(self, size: Size | None) -> Size:
        multiple = self._pipeline.multiple
        if size is not None and any(side % multiple for side in size):
            raise UsageError(
                f"the size {size[0]} x {size[1]} is not a multiple of {multiple} pixels in both directions",
                f"ask for multiples of {multiple}, for example "
                + " x ".join(str(max(multiple, side // multiple * multiple)) for side in size),
            )
        return size or self._pipeline.size

    def _begin(self, portrait: Portrait, request: SweepRequest, stack: Stack, course: Course) -> Denoising:
        import torch

        size = self._size(request.size)
        with torch.no_grad():
            source, prompts = self._encoder.encode(portrait, request.rows, stack, size)
            return self._pipeline.begin(
                source, prompts,
                seeds=request.all_seeds, steps=course.steps, size=size, shift=course.shift,
            )  # fmt: skip

    def _decoded(self, latents: torch.Tensor, size: Size) -> list[Image.Image]:
        import torch

        with self._lock, torch.no_grad():
            return [
                picture
                for part in torch.split(latents, _DECODED_TOGETHER)
                for picture in to_images(self._pipeline.decode(part, size))
            ]

    def _merge_if_steady(self, runs: Sequence[Run]) -> None:
        keys = {run.shares for run in runs}
        key = keys.pop() if len(keys) == 1 else None
        count = self._steady[1] + 1 if key is not None and key == self._steady[0] else 0
        self._steady = key, count
        if count < _STEADY:
            return
        try:
            merged = self.slots.merge(runs[0].stack)
        except Exception:  # the weights are as they were, and the step does without
            _log.exception("the adapters could not be merged")
            merged = False
        if not merged:
            self._steady = key, -_MERGED_AGAIN
