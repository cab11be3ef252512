"""Serving on the full-size base: steps beside diffusers' own, adapters, sweeps, small weights, waiting.

Times are medians of single steps, the first one left out, with the device waited for. ``published`` is
`QwenImageEditPlusPipeline.__call__` on the same pictures, prompts, noise and sizes, its steps timed by its
own callback. Runs that make the base small read it from safetensors files, as a base of the hub is read.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from random_base import Size, random_base

from fakes.adapters import clean_adapter
from registry.admission import Policy, VerifiedAdapter, admit_candidate
from registry.families import BaseFacts
from registry.manifest import WEIGHTS_NAME, BaseModelRef
from serving.adapters import Stack
from serving.engine import EditEngine
from serving.pipelines.loading import small_denoiser
from serving.placement import Offloaded
from serving.runs import Run
from serving.schema import SweepRequest

SERVED = (
    "published", "step", "adapter", "pair", "mixed", "swap", "cold", "single-edits", "sweep",
    "fp8", "nf4", "models", "blocks",
)  # fmt: skip
ROWS = 8
ROUNDS = 5


class Service:
    """An engine on the random base, and two adapters of random tensors."""

    def __init__(self, size: Size, steps: int, folder: Path) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.steps, self.folder = max(3, steps), folder
        self.pipeline = random_base(size, self.device, self.dtype, folder)
        transformer: Any = self.pipeline.transformer
        config = {name: transformer.config[name] for name in (
            "num_layers", "num_attention_heads", "attention_head_dim", "joint_attention_dim",
        )}  # fmt: skip
        base = BaseFacts(
            id="tests/full-size", family="qwen-image-edit", license="Apache-2.0", revision="1", config=config
        )
        self.base = BaseModelRef(id=base.id, revision=base.revision, family=base.family, license=base.license)
        policy = Policy(bases={base.id: base}, purpose="internal-research", allow_review=True)
        self.adapters: list[VerifiedAdapter] = []
        for seed in (1, 2):
            files = clean_adapter(base, rank=size.rank, seed=seed)
            self.adapters.append(admit_candidate(files, policy))
        self.portrait = Image.linear_gradient("L").resize((size.pixels, size.pixels)).convert("RGB")
        self.engine = self._engine(self.pipeline)

    def runs(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """Name -> a run; the last two leave the base in the machine's memory."""
        first, second = ((one, 1.0) for one in self.adapters)
        none: Stack = ((self.adapters[0], 0.0),)  # at strength 0 nothing of it is computed
        return {
            "published": self.published,
            "step": lambda: self.stepped([none]),
            "adapter": lambda: self.stepped([(first,)]),
            "pair": lambda: self.stepped([none, none]),
            "mixed": lambda: self.stepped([(first,), (second,)]),
            "swap": self.swap,
            "cold": self.cold,
            "single-edits": lambda: self.swept(1),
            "sweep": lambda: self.swept(ROWS),
            "fp8": lambda: self.small("fp8"),
            "nf4": lambda: self.small("nf4"),
            "models": lambda: self.waiting(stream=False),
            "blocks": lambda: self.waiting(stream=True),
        }

    def published(self) -> dict[str, Any]:
        """Steps of diffusers' own pipeline, which sees the source at the size of the result as we do."""
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

        marks: list[float] = []

        def note(pipe: Any, step: int, at: Any, values: dict[str, Any]) -> dict[str, Any]:
            self._wait()
            marks.append(time.perf_counter())
            return values

        pipe, (height, width) = self.pipeline.pipe, self.pipeline.size
        pipe.set_progress_bar_config(disable=True)
        given = self.pipeline.encode_prompts([self.portrait], ["show a happy expression"])
        noise = self.pipeline.noise([1], given.embeds, self.pipeline.size)
        before, module.VAE_IMAGE_SIZE = module.VAE_IMAGE_SIZE, height * width
        self._reset()
        try:
            pipe(
                image=[self.portrait], height=height, width=width, num_inference_steps=self.steps,
                true_cfg_scale=1.0, prompt_embeds=given.embeds, prompt_embeds_mask=given.mask,
                latents=noise, output_type="latent", callback_on_step_end=note,
            )  # fmt: skip
        finally:
            module.VAE_IMAGE_SIZE = before
        return self._facts([after - begun for begun, after in itertools.pairwise(marks)])

    def stepped(self, stacks: list[Stack], engine: EditEngine | None = None) -> dict[str, Any]:
        """Steps of one row for each stack, all rows in one forward pass."""
        engine = engine or self.engine
        self._reset()
        runs = [engine.begin(self._asked(), stack) for stack in stacks]
        found = self._facts(self._advanced(engine, runs))
        for run in runs:
            engine.drop(run)
        return {**found, "rows": len(stacks)}

    def swap(self) -> dict[str, Any]:
        """What a step with another resident adapter costs beside one with the same again."""
        stacks: list[Stack] = [((one, 1.0),) for one in self.adapters]
        runs = [self.engine.begin(self._asked(steps=2 * ROUNDS + 2), stack) for stack in stacks]
        for run in runs:
            self._timed(lambda run=run: self.engine.advance([run]))  # type: ignore[misc]
        same, other = [], []
        for _ in range(ROUNDS):
            for run in runs:
                other.append(self._timed(lambda run=run: self.engine.advance([run])))  # type: ignore[misc]
                same.append(self._timed(lambda run=run: self.engine.advance([run])))  # type: ignore[misc]
        for run in runs:
            self.engine.drop(run)
        cost = statistics.median(other) - statistics.median(same)
        return {"swap_ms": round(1000 * cost, 2), "step_s": round(statistics.median(same), 4)}

    def cold(self) -> dict[str, Any]:
        """Bringing a verified adapter to the device that is not there, beside reading its file."""
        adapter = self.adapters[0]
        file = self.folder / WEIGHTS_NAME
        file.write_bytes(adapter.weights)
        reads, attaches = [], []
        for _ in range(ROUNDS):
            assert self.engine.slots.evict(adapter)
            reads.append(self._timed(file.read_bytes))
            attaches.append(self._timed(lambda: self.engine.prefetch(adapter)))
        read, attach = statistics.median(reads), statistics.median(attaches)
        return {
            "bytes": len(adapter.weights),
            "read_s": round(read, 4),
            "attach_s": round(attach, 4),
            "cold_ratio": round((read + attach) / read, 2),
        }

    def swept(self, rows: int) -> dict[str, Any]:
        """Eight intensities of one picture, in so many rows at a time, from the picture to the pictures."""
        levels = [index / ROWS for index in range(ROWS)]

        def edits() -> None:
            engine = self._engine(self.pipeline)  # with empty caches
            try:
                for begin in range(0, ROWS, rows):
                    asked = [{"happy": level} for level in levels[begin : begin + rows]]
                    engine.sweep(self.portrait, self.adapters[0], asked, seed=1, steps=self.steps)
            finally:
                engine.detach()

        self.engine.detach()
        self._timed(edits)
        self._reset()
        return {**self._facts([self._timed(edits)] * 2, "eight_s"), "rows": rows}

    def small(self, weights: Any) -> dict[str, Any]:
        """The denoiser read from files in another format: seconds, memory, steps with and without adapter."""
        self.engine.detach()
        folder = self.folder / "transformer"
        if not folder.is_dir():
            self.pipeline.transformer.save_pretrained(folder, max_shard_size="5GB")  # type: ignore[operator]
        self._reset()
        before = self._held()
        class_name = type(self.pipeline.transformer).__name__
        begun = time.perf_counter()
        model = small_denoiser(
            folder, class_name, weights, self.dtype, device=self.device, compute=self.device
        )
        self._wait()
        facts = {"load_s": round(time.perf_counter() - begun, 1)}
        if self.device == "cuda":
            facts["held_gib"] = round((self._held() - before) / 2**30, 2)
            facts["peak_of_loading_gib"] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)
        pipeline = copy.copy(self.pipeline)
        pipeline.transformer = model.requires_grad_(False).eval()
        engine = self._engine(pipeline)
        none: Stack = ((self.adapters[0], 0.0),)
        with_adapter = self.stepped([((self.adapters[0], 1.0),)], engine)
        found = {**facts, "adapter_step_s": with_adapter["step_s"], **self.stepped([none], engine)}
        engine.detach()
        return found

    def waiting(self, *, stream: bool) -> dict[str, Any]:
        """Steps of a base that waits in the machine's memory, and its turns with the text encoder."""
        self.engine.detach()
        self.pipeline.pipe.to("cpu")
        self._reset()
        away: Any = Offloaded(self.pipeline, torch.device(self.device), stream=stream)
        engine = self._engine(away)
        found = self.stepped([((self.adapters[0], 1.0),)], engine)
        turns = []
        for _ in range(3):
            away._settle(texts=True)
            turns.append(self._timed(lambda: away._settle(texts=False)))
        engine.detach()
        return {
            **found,
            "turn_s": round(statistics.median(turns), 3),
            "streamed_gib": round(away.waiting_bytes / 2**30, 2),
        }

    def _engine(self, pipeline: Any) -> EditEngine:
        return EditEngine(pipeline, base=self.base, allow_candidates=True)

    def _asked(self, steps: int | None = None) -> SweepRequest:
        return SweepRequest.make(
            image=self.portrait, rows=({"happy": 1.0},), seed=1, steps=steps or self.steps
        )

    def _advanced(self, engine: EditEngine, runs: list[Run]) -> list[float]:
        return [self._timed(lambda: engine.advance(runs)) for _ in range(runs[0].steps)]

    def _timed(self, call: Callable[[], Any]) -> float:
        self._wait()
        begun = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - begun

    def _facts(self, seconds: list[float], name: str = "step_s") -> dict[str, Any]:
        facts: dict[str, Any] = {name: round(statistics.median(seconds[1:]), 4)}
        if self.device == "cuda":
            facts["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        return facts

    def _held(self) -> int:
        return torch.cuda.memory_allocated() if self.device == "cuda" else 0

    def _reset(self) -> None:
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def ratios(runs: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return what the runs say of each other; only of those that were done.

    ``step`` is the published step over ours without an adapter; overheads are shares of a step without.
    """
    wanted = {
        "step": ("published", "step", "step_s", 0.0),
        "adapter_overhead": ("adapter", "step", "step_s", 1.0),
        "mixed_overhead": ("mixed", "pair", "step_s", 1.0),
        "sweep": ("single-edits", "sweep", "eight_s", 0.0),
        "fp8_step": ("fp8", "step", "step_s", 0.0),
        "nf4_step": ("nf4", "step", "step_s", 0.0),
        "models_step": ("models", "adapter", "step_s", 0.0),
        "blocks_step": ("blocks", "adapter", "step_s", 0.0),
    }
    return {
        name: round(runs[one][key] / runs[other][key] - less, 3)
        for name, (one, other, key, less) in wanted.items()
        if key in runs.get(one, {}) and key in runs.get(other, {})
    }
