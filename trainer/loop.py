"""The training loop.

`run` reads from top to bottom: a batch, one forward of both members of every pair, the losses, one backward, one
all-reduce of the small LoRA gradient, one step of AdamW, the average, and now and then a checkpoint. The model is
not wrapped: only the LoRA weights have gradients, and those are averaged here, so one process and eight do the same.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from accelerate import Accelerator

from registry.digest import Digest
from serving.pipelines.base import EditPipeline
from trainer import checkpoint, lora
from trainer.data.batches import TrainingSet
from trainer.data.cache import TensorCache, encoder_digest
from trainer.data.triplets import Dataset
from trainer.ema import Ema
from trainer.errors import Interrupted, NotFinite
from trainer.identity import FeatureNet, expression_features, identity_features
from trainer.losses import StepOutputs, active, combined, flow_matching, select_pairs
from trainer.progress import Progress, eta
from trainer.recipe import LossSection, OptimiserSection, Recipe
from trainer.tracking import Tracker

LOSS_NAME = "loss.jsonl"
_LOG_EVERY = 10
_VALIDATION_PAIRS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What came out of a training: fp32 weights, their average, and how it went."""

    weights: Mapping[str, torch.Tensor]
    ema: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any]


class StopSignal:
    """Notices SIGTERM instead of dying of it; outside the main thread it can only watch, not listen."""

    def __init__(self) -> None:
        self.received = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True


def learning_rate(settings: OptimiserSection, step: int) -> float:
    """Return the learning rate of a step, counted from 0: a linear warm-up, then half a cosine."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    share = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * share))
    return settings.learning_rate * (settings.final_share + (1 - settings.final_share) * cosine)


def run(
    recipe: Recipe,
    dataset: Dataset,
    cache: TensorCache,
    base_path: Path,
    out: Path,
    key: Digest,
    progress: Progress,
    *,
    pipeline: EditPipeline,
    tracker: Tracker,
) -> Trained:
    """Train a LoRA on ``pipeline`` until the recipe's last step, from the newest checkpoint in ``out``.

    Args:
        recipe: everything that decides the training.
        dataset: the triplets.
        cache: has the latents and embeddings of the dataset.
        base_path: folder of the base; names the encoder that filled the cache.
        out: folder for the checkpoints and the loss curve.
        key: digest of recipe, dataset and base; a checkpoint of another key is refused.
        progress: is told every ten steps.
        pipeline: the loaded base; its transformer carries the LoRA until the end of this function.
        tracker: takes the metrics.

    Raises:
        Interrupted: SIGTERM came; a checkpoint was written.
        NotFinite: the loss is infinite or not a number.
        CheckpointError: the checkpoints in ``out`` belong to another training.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    settings, device = recipe.optimiser, accelerator.device
    slots = range(accelerator.process_index, settings.batch_pairs, accelerator.num_processes)
    read = (cache, encoder_digest(base_path), recipe.conditioning, settings)
    data = TrainingSet(dataset, *read, device=device)
    held_out = TrainingSet(dataset, *read, split="validation", device=device)
    features = _features(recipe.losses, dataset, device)

    parameters = lora.inject(pipeline.transformer, recipe.base.family, recipe.lora, recipe.seed)
    pipeline.transformer.to(device)
    optimiser = torch.optim.AdamW(
        parameters.values(),
        settings.learning_rate,
        settings.betas,
        weight_decay=settings.weight_decay,
        foreach=True,
    )
    ema = Ema(parameters, recipe.ema)
    state = _State(parameters=parameters, optimiser=optimiser, ema=ema, folder=out / "checkpoints", key=key)
    log = _Log(out / LOSS_NAME, tracker, enabled=accelerator.is_main_process)
    start = log.continue_from(state.restore())
    begun, decodes = time.monotonic(), 0

    try:
        with StopSignal() as stop:
            for step in range(start, settings.steps):
                batch = data.draw(recipe.seed, step, slots)
                velocity = pipeline.velocity(batch.noisy, batch.source, batch.prompts, batch.sigma)
                outputs = StepOutputs(
                    batch=batch,
                    velocity=velocity,
                    pipeline=pipeline,
                    features=features,
                    selected=select_pairs(batch, recipe.losses),
                )
                total, parts = combined(outputs, recipe.losses)
                accelerator.backward(total)
                stopping = _average_gradients(accelerator, parameters, stop.received)
                norm = torch.nn.utils.clip_grad_norm_(parameters.values(), settings.grad_clip)
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate(settings, step)
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                ema.update(parameters)

                done, decodes = step + 1, decodes + outputs.decodes
                log.add(
                    done, {"loss": total.detach(), **parts, "gradient": norm}, learning_rate(settings, step)
                )
                if done % _LOG_EVERY == 0 or done == settings.steps or stopping:
                    seconds = time.monotonic() - begun
                    note = f"loss {log.flush():.4f}  {_speed(settings, done - start, seconds)}"
                    progress(
                        "train",
                        done,
                        settings.steps,
                        f"{note}  {eta(seconds, done - start, settings.steps - start)}",
                    )
                if accelerator.is_main_process and (
                    stopping or done % settings.checkpoint_every == 0 or done == settings.steps
                ):
                    state.save(done, seconds=log.seconds(begun))
                if stopping and done < settings.steps:
                    raise Interrupted(
                        f"the training was asked to stop and did so after step {done} of {settings.steps}",
                        f"run the same command again; it goes on from the checkpoint in {state.folder}",
                    )
        facts = log.facts(settings, start, time.monotonic() - begun, decodes)
        facts["validation_loss"] = _validate(pipeline, held_out, recipe)
        return Trained(weights=_copy(parameters), ema=_copy(ema.values), facts=facts)
    finally:
        lora.remove(pipeline.transformer)


def _features(
    losses: Mapping[Any, LossSection], dataset: Dataset, device: torch.device
) -> dict[str, FeatureNet]:
    """Return the networks that the active losses look through; none is loaded for a loss without weight."""
    makers = {"contrastive": expression_features, "identity": identity_features}
    wanted = [name for name in active(losses) if name in makers]
    truth = dataset.images() if wanted else None
    return {name: makers[name](truth, device) for name in wanted}


def _average_gradients(
    accelerator: Accelerator, parameters: Mapping[str, torch.nn.Parameter], stop: bool
) -> bool:
    """Average the gradients of all processes in one transfer; return whether any of them was asked to stop."""
    if accelerator.num_processes == 1:
        return stop
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters.values()])
    flat = torch.cat([flat, flat.new_tensor([float(stop)])])
    flat = accelerator.reduce(flat, "mean")
    begin = 0
    for parameter in parameters.values():
        parameter.grad = flat[begin : begin + parameter.numel()].view_as(parameter)
        begin += parameter.numel()
    return bool(flat[-1] > 0)


@torch.no_grad()
def _validate(pipeline: EditPipeline, data: TrainingSet, recipe: Recipe) -> float:
    """Return the flow-matching loss on people that were not trained on; the same samples every time."""
    batch = data.draw(recipe.seed, -1, range(_VALIDATION_PAIRS))
    velocity = pipeline.velocity(batch.noisy, batch.source, batch.prompts, batch.sigma)
    outputs = StepOutputs(batch=batch, velocity=velocity, pipeline=pipeline)
    return round(float(flow_matching(outputs, LossSection(weight=1.0))), 6)


def _copy(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().float().cpu().clone() for name, value in values.items()}


def _speed(settings: OptimiserSection, steps: int, seconds: float) -> str:
    return f"{2 * settings.batch_pairs * steps / max(seconds, 1e-9):.0f} samples/s"


@dataclass(kw_only=True)
class _State:
    """Everything that a checkpoint keeps, and the way there and back."""

    parameters: Mapping[str, torch.nn.Parameter]
    optimiser: torch.optim.AdamW
    ema: Ema
    folder: Path
    key: Digest

    def save(self, step: int, seconds: float) -> None:
        """Write a checkpoint after ``step`` steps."""
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self.parameters.items():
            moments = self.optimiser.state[parameter]
            tensors[f"weights/{name}"] = parameter.detach()
            tensors[f"ema/{name}"] = self.ema.values[name]
            tensors[f"exp_avg/{name}"] = moments["exp_avg"]
            tensors[f"exp_avg_sq/{name}"] = moments["exp_avg_sq"]
            tensors[f"adam_step/{name}"] = moments["step"]
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save(
            self.folder,
            checkpoint.Checkpoint(
                step=step, key=self.key, ema_updates=self.ema.updates, seconds=seconds, tensors=tensors
            ),
        )

    def restore(self) -> checkpoint.Checkpoint | None:
        """Load the newest checkpoint, if there is one."""
        found = checkpoint.latest(self.folder, self.key)
        if found is None:
            return None
        lora.put(self.parameters, found.group("weights"))
        self.ema.load(found.group("ema"), found.ema_updates)
        first, second, steps = found.group("exp_avg"), found.group("exp_avg_sq"), found.group("adam_step")
        for name, parameter in self.parameters.items():
            self.optimiser.state[parameter] = {
                "step": steps[name],
                "exp_avg": first[name].to(parameter.device),
                "exp_avg_sq": second[name].to(parameter.device),
            }
        return found


class _Log:
    """The loss curve: one JSON line a step, and the same numbers to the tracker."""

    def __init__(self, path: Path, tracker: Tracker, *, enabled: bool) -> None:
        self._path, self._tracker, self._enabled = path, tracker, enabled
        self._waiting: list[tuple[int, dict[str, torch.Tensor], float]] = []
        self._before = 0.0
        self._last = math.nan

    def continue_from(self, found: checkpoint.Checkpoint | None) -> int:
        """Cut the curve back to the checkpoint (or to nothing) and return its step."""
        step = found.step if found else 0
        self._before = found.seconds if found else 0.0
        if self._enabled:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lines = self._path.read_text("utf-8").splitlines() if self._path.exists() else []
            self._path.write_text("".join(f"{line}\n" for line in lines[:step]), "utf-8")
        return step

    def seconds(self, begun: float) -> float:
        """Return the seconds of all runs of this training together."""
        return self._before + time.monotonic() - begun

    def add(self, step: int, values: dict[str, torch.Tensor], rate: float) -> None:
        """Take the values of a step without waiting for the device."""
        self._waiting.append((step, values, rate))

    def flush(self) -> float:
        """Write what waits and return the mean loss of it.

        Raises:
            NotFinite: one of the losses is infinite or not a number.
        """
        lines, losses = [], []
        for step, values, rate in self._waiting:
            numbers = {name: float(value) for name, value in values.items()}
            if not math.isfinite(numbers["loss"]):
                raise NotFinite(
                    f"the loss is {numbers['loss']} at step {step}",
                    "lower optimiser.learning_rate, or train longer with warmup_steps",
                )
            lines.append(json.dumps({"step": step, "learning_rate": rate, **numbers}))
            losses.append(numbers["loss"])
            self._tracker.metrics(step, {"learning_rate": rate, **numbers})
        self._waiting = []
        if self._enabled and lines:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write("\n".join(lines) + "\n")
        self._last = sum(losses) / len(losses) if losses else self._last
        return self._last

    def facts(self, settings: OptimiserSection, start: int, seconds: float, decodes: int) -> dict[str, Any]:
        """Return the figures of a training for its result."""
        steps = settings.steps - start
        lines = self._path.read_text("utf-8").splitlines() if self._enabled else []
        losses = [json.loads(line)["loss"] for line in lines]
        return {
            "steps": settings.steps,
            "resumed_from": start,
            "seconds": round(self._before + seconds, 1),
            "samples_per_second": round(2 * settings.batch_pairs * steps / max(seconds, 1e-9), 1),
            "loss_first": round(sum(losses[:20]) / max(1, len(losses[:20])), 4),
            "loss_last": round(sum(losses[-20:]) / max(1, len(losses[-20:])), 4),
            "decodes": decodes,
        }
