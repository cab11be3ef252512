"""The training loop.

`_steps` reads from top to bottom: what the step trains on, forward and backward of both members of every pair
(in one pass, or in micro-batches), one sum of the small LoRA gradient over all processes, a verdict on the
loss, one step of the optimiser, the average, and now and then a checkpoint. The model is not wrapped: only
the LoRA weights have gradients, and those are added up here, so one process and eight do the same. The device
is waited for once a step, when losses, the gradient's length and the wish to stop come over together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from registry.digest import Digest
from registry.manifest import Ingredient, Provenance
from serving.memory import keep_freed_memory
from serving.pipelines.base import EditPipeline, Size
from trainer import lora, optimisers, placement, text_lora
from trainer.checkpoint import TrainingState
from trainer.data.batches import StepPlan, TrainingSet
from trainer.data.cache import TensorCache, View
from trainer.data.triplets import Dataset
from trainer.ema import Ema
from trainer.errors import Interrupted
from trainer.identity import FeatureNet, Truth, contrastive_features, identity_features
from trainer.journal import LossCurve, StopSignal
from trainer.losses import StepOutputs, active, combined, select
from trainer.optimisers import learning_rate
from trainer.parallel import Gradients, Processes
from trainer.perceptual import PerceptualNet, perceptual_features
from trainer.policy import BadLossPolicy, PairRecord, described, worst
from trainer.progress import Progress
from trainer.recipe import Recipe
from trainer.sections import LossSection
from trainer.tracking import Tracker
from trainer.validation import Validation

LOSS_NAME = "loss.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What came out of a training.

    Attributes:
        weights, ema: fp32 weights and their average.
        facts: how it went.
        size: height and width in pixels that the base is made for.
        ingredients: the networks that the losses looked through, with their licences.
        made: by which sources and on which machines, those of earlier parts included.
    """

    weights: Mapping[str, torch.Tensor]
    ema: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any]
    size: Size
    ingredients: tuple[Ingredient, ...]
    made: Provenance


@dataclass(frozen=True, kw_only=True, slots=True)
class _Session:
    """What the loop works with."""

    recipe: Recipe
    processes: Processes
    pipeline: EditPipeline
    dataset: Dataset
    data: TrainingSet
    features: Mapping[str, FeatureNet | PerceptualNet]
    state: TrainingState
    policy: BadLossPolicy
    validation: Validation
    curve: LossCurve
    progress: Progress


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
    processes: Processes,
    made: Provenance,
) -> Trained:
    """Train a LoRA on ``pipeline`` until the recipe's last step, from the newest checkpoint in ``out``.

    Args:
        recipe: everything that decides the training.
        dataset: the triplets.
        cache: has the latents and embeddings of the dataset.
        base_path: folder of the base; names the encoder that filled the cache.
        out: folder for the checkpoints and the loss curve.
        key: digest of recipe, dataset and base; a checkpoint of another key is refused.
        progress: is told every few steps.
        pipeline: the loaded base; its transformer carries the LoRA until the end of this function.
        tracker: takes the metrics.
        processes: who takes part.
        made: by which sources and on which machine the steps to come are made.

    Raises:
        Interrupted: SIGTERM came; a checkpoint was written.
        NotFinite: a loss or the gradient is not finite, or the loss jumped, and the recipe says to stop.
        CheckpointError: the checkpoints in ``out`` belong to another training or other sources, or one
            cannot be written.
    """
    keep_freed_memory()
    with placement.training(pipeline, recipe, processes.device) as placed:
        try:
            session = _session(
                recipe, dataset, cache, base_path, out, key, progress, pipeline, tracker, processes, made
            )
            state, features = session.state, session.features
            facts = _steps(session)
            facts |= {"base_bytes": placed.held_bytes, "waiting_bytes": placed.waiting_bytes}
            facts |= session.validation.losses(state.parameters, state.ema.values)
            return Trained(
                weights=_copy(state.parameters),
                ema=_copy(state.ema.values),
                facts=facts,
                size=pipeline.size,
                # From the networks themselves, not from the recipe: what was looked through is what is named.
                ingredients=tuple(one for net in features.values() for one in net.ingredients),
                made=state.made,
            )
        finally:
            lora.remove(pipeline.transformer)
            text_lora.remove(pipeline, recipe)


def _session(
    recipe: Recipe,
    dataset: Dataset,
    cache: TensorCache,
    base_path: Path,
    out: Path,
    key: Digest,
    progress: Progress,
    pipeline: EditPipeline,
    tracker: Tracker,
    processes: Processes,
    made: Provenance,
) -> _Session:
    """Put the LoRA into the base and everything that the loop works with around it; see `run`."""
    settings, device = recipe.optimiser, processes.device
    read = (dataset, cache, View.of(pipeline, base_path, recipe), recipe)
    encode = text_lora.encoder(pipeline, recipe)
    validation = Validation(
        pipeline=pipeline,
        data=TrainingSet(*read, split="validation", device=device, encode=encode),
        recipe=recipe,
        folder=out / "validation",
        tracker=tracker,
        writes=processes.main,
    )
    parameters = lora.inject(pipeline.transformer, recipe, device) | text_lora.inject(pipeline, recipe)
    state = TrainingState(
        parameters=parameters,
        optimiser=optimisers.build(parameters, settings),
        ema=Ema(parameters, recipe.ema),
        folder=out / "checkpoints",
        key=key,
        made=made,
        processes=processes,
        keep=recipe.running.keep_checkpoints,
    )
    curve = LossCurve(out / LOSS_NAME, tracker, samples=2 * settings.batch_pairs, enabled=processes.main)
    return _Session(
        recipe=recipe,
        processes=processes,
        pipeline=pipeline,
        dataset=dataset,
        data=TrainingSet(*read, device=device, encode=encode),
        features=_features(recipe.losses, dataset, device),
        state=state,
        policy=BadLossPolicy(settings),
        validation=validation,
        curve=curve,
        progress=progress,
    )


def _steps(session: _Session) -> dict[str, Any]:
    """Train from the newest checkpoint to the last step; return the figures of this run."""
    recipe, state, curve, policy = session.recipe, session.state, session.curve, session.policy
    settings, running = recipe.optimiser, recipe.running
    total = settings.total_steps(len(session.data.triplets))
    found = state.restore()
    start = curve.continue_from(found)
    if found is not None:
        policy.load(found.numbers["policy"])
        session.progress("train", start, total, "resumed")
    gradients = Gradients(state.parameters, session.processes)
    mine = range(session.processes.rank, settings.batch_pairs, session.processes.count)
    decodes = 0
    with StopSignal() as stop, _kept(session):
        for step in range(start, total):
            plan = session.data.plan(recipe.seed, step, settings.batch_pairs)
            gradients.clear()
            sums, looked = _backward(session, plan, mine)
            values, stopping = gradients.add_up(sums, stop.received)
            rate = learning_rate(settings, step, total)
            wrong, skipped = policy.judge(values), None
            if wrong is None:
                _update(session, gradients, values["gradient"], rate)
            else:
                pair = _worst_pair(session, step, gradients)
                if policy.stops():
                    raise policy.error(step + 1, wrong, pair)
                skipped = f"{wrong}; the worst pair: {pair}"
            done, decodes = step + 1, decodes + looked
            state.steps = done
            curve.add(done, values, rate, skipped)

            last = stopping or done == total
            saves = last or done % running.checkpoint_every == 0
            if saves or done % running.log_every == 0:
                session.progress("train", done, total, curve.flush())
            if saves:
                state.save(curve.seconds(), {"policy": policy.numbers()}, wait=last)
            if running.validate_every and (done % running.validate_every == 0 or done == total):
                session.validation.look(done, state.parameters, state.ema.values)
            if stopping and done < total:
                raise Interrupted(
                    f"the training was asked to stop and did so after step {done} of {total}",
                    f"run the same command again; it goes on from the checkpoint in {state.folder}",
                )
    return {**curve.facts(), "steps": total, "resumed_from": start, "decodes": decodes}


def _update(session: _Session, gradients: Gradients, norm: float, rate: float) -> None:
    """Clip the gradients to the recipe's length, take one step of the optimiser and of the average."""
    state, limit = session.state, session.recipe.optimiser.grad_clip
    state.steps = None  # until the step is whole
    if norm > limit:
        gradients.scale(limit / norm)
    for group in state.optimiser.param_groups:
        group["lr"] = rate
    state.optimiser.step()
    state.ema.update(state.parameters)


@contextmanager
def _kept(session: _Session) -> Iterator[None]:
    """Save the last whole step when the training ends in an error, whatever it was."""
    state, curve = session.state, session.curve
    try:
        yield
    except BaseException:
        with suppress(Exception):  # the error that ended the training is the one to tell
            curve.flush()
            state.save(curve.seconds(), {"policy": session.policy.numbers()})
        raise
    finally:
        state.close()


def _backward(session: _Session, plan: StepPlan, slots: Sequence[int]) -> tuple[dict[str, torch.Tensor], int]:
    """Do some slots of a step; return their share of its losses and the number of decoded pictures.

    Gradients add up over micro-batches, for every loss is divided by what the whole step looks at.
    """
    recipe, pipeline = session.recipe, session.pipeline
    selection = select(plan, recipe.losses, session.features)
    at_once = recipe.running.micro_pairs or len(slots)
    sums: dict[str, torch.Tensor] = {}
    decodes = 0
    for begin in range(0, len(slots), at_once):
        batch = session.data.batch(plan, slots[begin : begin + at_once])
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
        total.backward()
        if outputs.unseen is not None:
            parts["unseen"] = total.new_tensor(float(outputs.unseen)).detach()
        for name, value in {"loss": total.detach(), **parts}.items():
            sums[name] = sums[name] + value if name in sums else value
        decodes += outputs.decodes
    return sums, decodes


def _worst_pair(session: _Session, step: int, gradients: Gradients) -> str:
    """Run each pair of a bad step alone, forward and backward, and return the worst in words.

    All processes run equally many passes, as a base that is spread over them asks for.
    """
    processes, pairs = session.processes, session.recipe.optimiser.batch_pairs
    mine = range(processes.rank, pairs, processes.count)
    records: dict[int, dict[str, float]] = {}
    for number in range(-(-pairs // processes.count)):
        slot = mine[min(number, len(mine) - 1)]
        plan = session.data.plan(session.recipe.seed, step, pairs)  # anew: a slot's noise is drawn once
        gradients.clear()
        sums, _ = _backward(session, plan, [slot])
        values = {name: float(value) for name, value in sums.items()}
        records[slot] = {**values, "gradient": float(gradients.norm())}
    found = [(slot, values) for part in processes.gather(list(records.items())) for slot, values in part]
    about = {draw.slot: described(draw, session.dataset.image_digests) for draw in plan.draws}
    return worst([PairRecord(slot=slot, about=about[slot], values=values) for slot, values in found])


def _features(
    losses: Mapping[Any, LossSection], dataset: Dataset, device: torch.device
) -> dict[str, FeatureNet | PerceptualNet]:
    """Return the networks that the active losses look through; none is loaded for a loss without weight."""
    makers = {
        "contrastive": contrastive_features, "identity": identity_features, "perceptual": perceptual_features,
    }  # fmt: skip
    truth = Truth(fitted=dataset.fitted, digests=dataset.image_digests)
    return {name: makers[name](truth, device, one) for name, one in active(losses).items() if name in makers}


def _copy(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().float().cpu().clone() for name, value in values.items()}
