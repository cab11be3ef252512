"""The training loop.

`_steps` reads from top to bottom: what the step trains on, forward and backward of both members of every pair
(in one pass, or in micro-batches), one sum of the small LoRA gradient over all processes, one step of the
optimiser, the average, and now and then a checkpoint. The model is not wrapped: only the LoRA weights have
gradients, and those are added up here, so one process and eight do the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from registry.digest import Digest
from registry.manifest import Ingredient
from serving.memory import keep_freed_memory
from serving.pipelines.base import EditPipeline
from trainer import lora, optimisers
from trainer.checkpoint import TrainingState
from trainer.data.batches import StepPlan, TrainingSet
from trainer.data.cache import TensorCache, View
from trainer.data.triplets import Dataset
from trainer.ema import Ema
from trainer.errors import Interrupted
from trainer.identity import FeatureNet, Truth, contrastive_features, identity_features
from trainer.journal import LossCurve, StopSignal
from trainer.losses import StepOutputs, active, combined, select
from trainer.perceptual import PerceptualNet, perceptual_features
from trainer.progress import Progress
from trainer.recipe import Recipe
from trainer.sections import LossSection, OptimiserSection
from trainer.tracking import Tracker
from trainer.validation import Validation

LOSS_NAME = "loss.jsonl"
_LOG_EVERY = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What came out of a training.

    Attributes:
        weights, ema: fp32 weights and their average.
        facts: how it went.
        ingredients: the networks that the losses looked through, with their licences.
    """

    weights: Mapping[str, torch.Tensor]
    ema: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any]
    ingredients: tuple[Ingredient, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Session:
    """What the loop works with."""

    recipe: Recipe
    accelerator: Accelerator
    pipeline: EditPipeline
    data: TrainingSet
    features: Mapping[str, FeatureNet | PerceptualNet]
    state: TrainingState
    validation: Validation
    curve: LossCurve
    progress: Progress


def learning_rate(settings: OptimiserSection, step: int, total: int) -> float:
    """Return the learning rate of a step of ``total``, counted from 0: a warm-up, then the schedule."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    share = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * share)), "linear": 1 - share, "constant": 1.0}
    final = settings.final_share
    return settings.learning_rate * (final + (1 - final) * left[settings.schedule])


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
    keep_freed_memory()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    settings, device = recipe.optimiser, accelerator.device
    read = (dataset, cache, View.of(pipeline, base_path, recipe), recipe)
    data = TrainingSet(*read, device=device)
    validation = Validation(
        pipeline=pipeline,
        data=TrainingSet(*read, split="validation", device=device),
        recipe=recipe,
        folder=out / "validation",
        tracker=tracker,
        writes=accelerator.is_main_process,
    )
    features = _features(recipe.losses, dataset, device)
    try:
        parameters = lora.inject(pipeline.transformer, recipe)
        pipeline.transformer.to(device)
        state = TrainingState(
            parameters=parameters,
            optimiser=optimisers.build(parameters, settings),
            ema=Ema(parameters, recipe.ema),
            folder=out / "checkpoints",
            key=key,
        )
        facts = _steps(
            _Session(
                recipe=recipe,
                accelerator=accelerator,
                pipeline=pipeline,
                data=data,
                features=features,
                state=state,
                validation=validation,
                curve=LossCurve(
                    out / LOSS_NAME,
                    tracker,
                    samples=2 * settings.batch_pairs,
                    enabled=accelerator.is_main_process,
                ),
                progress=progress,
            )
        )
        facts |= validation.losses(parameters, state.ema.values)
        # From the networks themselves, not from the recipe: what was looked through is what is named.
        seen = tuple(one for net in features.values() for one in net.ingredients)
        return Trained(weights=_copy(parameters), ema=_copy(state.ema.values), facts=facts, ingredients=seen)
    finally:
        lora.remove(pipeline.transformer)


def _steps(session: _Session) -> dict[str, Any]:
    """Train from the newest checkpoint to the last step; return the figures of this run."""
    recipe, state, curve = session.recipe, session.state, session.curve
    accelerator, settings, running = session.accelerator, recipe.optimiser, recipe.running
    total = settings.total_steps(len(session.data.triplets))
    start = curve.continue_from(state.restore())
    decodes = 0
    with StopSignal() as stop:
        for step in range(start, total):
            plan = session.data.plan(recipe.seed, step, settings.batch_pairs)
            sums, looked = _backward(session, plan)
            sums, stopping = _add_up(accelerator, state.parameters, sums, stop.received)
            norm = torch.nn.utils.clip_grad_norm_(state.parameters.values(), settings.grad_clip)
            rate = learning_rate(settings, step, total)
            for group in state.optimiser.param_groups:
                group["lr"] = rate
            state.optimiser.step()
            state.optimiser.zero_grad(set_to_none=True)
            state.ema.update(state.parameters)

            done, decodes = step + 1, decodes + looked
            last = stopping or done == total
            curve.add(done, {**sums, "gradient": norm}, rate)
            if last or done % _LOG_EVERY == 0 or done % running.checkpoint_every == 0:
                loss = curve.flush()  # also refuses a loss that is no number, before it is saved
                note = f"loss {loss:.4f}  {curve.speed():.0f} samples/s"
                session.progress("train", done, total, note)
            if accelerator.is_main_process and (last or done % running.checkpoint_every == 0):
                state.save(done, curve.seconds())
            if running.validate_every and (done % running.validate_every == 0 or done == total):
                session.validation.look(done, state.parameters, state.ema.values)
            if stopping and done < total:
                raise Interrupted(
                    f"the training was asked to stop and did so after step {done} of {total}",
                    f"run the same command again; it goes on from the checkpoint in {state.folder}",
                )
    return {**curve.facts(), "steps": total, "resumed_from": start, "decodes": decodes}


def _backward(session: _Session, plan: StepPlan) -> tuple[dict[str, torch.Tensor], int]:
    """Do this process's part of a step; return its share of the losses and the pictures it decoded.

    Gradients add up over micro-batches, for every loss is divided by what the whole step looks at.
    """
    recipe, pipeline, accelerator = session.recipe, session.pipeline, session.accelerator
    selection = select(plan, recipe.losses, session.features)
    mine = range(accelerator.process_index, len(plan.draws), accelerator.num_processes)
    at_once = recipe.running.micro_pairs or len(mine)
    sums: dict[str, torch.Tensor] = {}
    decodes = 0
    for begin in range(0, len(mine), at_once):
        batch = session.data.batch(plan, mine[begin : begin + at_once])
        noisy = pipeline.process.noisy(batch.target, batch.noise, batch.sigma)
        outputs = StepOutputs(
            batch=batch,
            noisy=noisy,
            predicted=pipeline.predict(noisy, batch.source, batch.prompts, batch.sigma, batch.size),
            pipeline=pipeline,
            selection=selection,
            features=session.features,
            checkpointing=recipe.running.checkpointing,
            snr_gamma=recipe.noise.snr_gamma,
        )
        total, parts = combined(outputs, recipe.losses)
        accelerator.backward(total)
        if outputs.unseen is not None:
            parts["unseen"] = total.new_tensor(float(outputs.unseen)).detach()
        for name, value in {"loss": total.detach(), **parts}.items():
            sums[name] = sums[name] + value if name in sums else value
        decodes += outputs.decodes
    return sums, decodes


def _features(
    losses: Mapping[Any, LossSection], dataset: Dataset, device: torch.device
) -> dict[str, FeatureNet | PerceptualNet]:
    """Return the networks that the active losses look through; none is loaded for a loss without weight."""
    makers = {
        "contrastive": contrastive_features, "identity": identity_features, "perceptual": perceptual_features,
    }  # fmt: skip
    truth = Truth(fitted=dataset.fitted, digests=dataset.image_digests)
    return {name: makers[name](truth, device, one) for name, one in active(losses).items() if name in makers}


def _add_up(
    accelerator: Accelerator,
    parameters: Mapping[str, torch.nn.Parameter],
    sums: Mapping[str, torch.Tensor],
    stop: bool,
) -> tuple[dict[str, torch.Tensor], bool]:
    """Add up gradients and losses over all processes in one transfer; say whether any of them is to stop."""
    if accelerator.num_processes == 1:
        return dict(sums), stop
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters.values()])
    flat = torch.cat([flat, torch.stack(list(sums.values())).to(flat), flat.new_tensor([float(stop)])])
    flat = accelerator.reduce(flat, "sum")
    begin = 0
    for parameter in parameters.values():
        parameter.grad = flat[begin : begin + parameter.numel()].view_as(parameter)
        begin += parameter.numel()
    return dict(zip(sums, flat[begin:-1], strict=True)), bool(flat[-1] > 0)


def _copy(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().float().cpu().clone() for name, value in values.items()}
