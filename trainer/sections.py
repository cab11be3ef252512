"""The sections of a recipe, each a strict model: what may be written there, and what it means.

`trainer.recipe` puts them together. All but `RunningSection` decide what comes out and count in the digest.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from registry.manifest import Ingredient, Line, Text
from registry.reference import NAME_PATTERN

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]
Side = Annotated[int, Field(ge=64, le=4096)]
Domain = Literal["human", "anime"]
LossName = Literal["flow_matching", "denoising", "contrastive", "identity", "perceptual"]

DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


class Section(BaseModel):
    """A part of a recipe; unknown keys and numbers that are not finite are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataSection(Section):
    """Which images there are, and which of them become training data.

    Attributes:
        source: "renderer" draws people; "folder" takes the pictures that ``path`` lists.
        path: folder of pictures with ``pairs.jsonl``; for "folder" only.
        identities: training people per domain; for "renderer" only, as the next three.
        validation: people per domain that are only used to measure the loss.
        first_identity: seed of the first person; the others follow.
        intensities: intensities of each expression, each in (0, 1.5].
        size: side of drawn pictures in pixels.
        sizes: training resolutions, each the side of a square with the area of its pictures; empty is the
            base's own.
        max_aspect: pictures keep their aspect up to that ratio of the longer to the shorter side and are
            trained in buckets of like aspect; 1 makes them all square.
        keep_share: share of samples that ask for intensity 0 and have the source as target.
        min_score: an image is kept when the judge sees its expression with at least this share of its
            intensity.
        license: licence of the identity images.
    """

    source: Literal["renderer", "folder"] = "renderer"
    path: Line | None = None
    identities: dict[Domain, Positive] = {}
    validation: dict[Domain, Positive] = {}
    first_identity: Seed = 0
    intensities: tuple[Annotated[float, Field(gt=0, le=1.5)], ...] = ()
    size: Annotated[int, Field(ge=64, le=512)] = 64
    sizes: tuple[Side, ...] = ()
    max_aspect: Annotated[float, Field(ge=1, le=4)] = 1.0
    keep_share: Fraction = 0.06
    min_score: Fraction = 0.2
    license: Line = "Apache-2.0"

    @field_validator("intensities")
    @classmethod
    def _rising(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError("intensities must rise, each once")
        return value

    @model_validator(mode="after")
    def _of_its_source(self) -> Self:
        drawn = {
            name for name in ("identities", "validation", "first_identity", "intensities")
            if name in self.model_fields_set
        }  # fmt: skip
        if self.source == "folder" and self.path is None:
            raise ValueError("source folder needs the path of the folder")
        # By value: a recipe that was written out and is read again names every key.
        foreign = sorted(name for name in drawn if getattr(self, name))
        if self.source == "folder" and foreign:
            raise ValueError(f"{', '.join(foreign)} are for source renderer; the folder decides them")
        if self.source == "renderer" and self.path is not None:
            raise ValueError("path is for source folder")
        if self.source == "renderer" and len(drawn) < 4:
            raise ValueError("source renderer needs identities, validation, first_identity and intensities")
        return self


class LoraSection(Section):
    """Shape of the update.

    Attributes:
        rank, alpha: the update is scale * B A, with scale alpha / rank, or alpha / sqrt(rank) if ``scaling``
            is "rank-stabilised" (Kalajdzievski, arXiv 2312.03732).
        dora: train magnitude and direction apart (Liu et al., arXiv 2402.09353).
        targets: kinds of modules, or a preset of the base's family: "full", "attention", "image-stream".
        text_encoder: kinds of modules of the text encoders; empty trains none.
        dtype: of the exported file; training is always in fp32.
    """

    rank: Annotated[int, Field(ge=1, le=1024)]
    alpha: Annotated[float, Field(gt=0, le=8192)]
    scaling: Literal["standard", "rank-stabilised"] = "standard"
    dora: bool = False
    targets: str | Annotated[tuple[str, ...], Field(min_length=1)]
    text_encoder: tuple[str, ...] = ()
    dtype: Literal["F16", "BF16", "F32"] = "F16"

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        return self.alpha / (self.rank**0.5 if self.scaling == "rank-stabilised" else self.rank)


class PrecisionSection(Section):
    """In which numbers the frozen base is kept and computed with; LoRA, EMA and optimiser are always fp32.

    Attributes:
        base: "auto" is bf16 on a GPU and fp32 on a CPU; "fp8" keeps the transformer's linear weights as
            float8_e4m3fn, "nf4" as 4-bit NormalFloat (Dettmers et al., arXiv 2305.14314).
        compute: of the forward pass; "auto" as above.
    """

    base: Literal["auto", "fp32", "bf16", "fp8", "nf4"] = "auto"
    compute: Literal["auto", "fp32", "bf16"] = "auto"


class OptimiserSection(Section):
    """The optimiser and its schedule, which counts optimiser steps whatever the number of processes.

    Attributes:
        name: "adamw", "adamw-8bit" (states in 8 bits) or "prodigy" (finds its learning rate; 1 is right).
        learning_rate: at the top of the schedule.
        schedule: from the top to ``final_share`` of it.
        final_share: share of ``learning_rate`` that is left at the last step.
        steps: optimiser steps; or
        epochs: as often as that many pairs as there are triplets are drawn.
        batch_pairs: pairs in an optimiser step over all processes; a pair is two images of one person.
        bad_loss: what happens to a step whose loss or gradient is not finite, or whose loss is more than
            ``spike`` times the median of the last hundred: "stop", or "skip" up to ten in a row.
        spike: 0 looks for none.
    """

    name: Literal["adamw", "adamw-8bit", "prodigy"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0, le=1)]
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Count = 30
    final_share: Fraction = 0.05
    steps: Positive | None = None
    epochs: Positive | None = None
    batch_pairs: Positive
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    bad_loss: Literal["stop", "skip"] = "stop"
    spike: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError("warmup_steps must be below steps")
        if 0 < self.spike <= 1:
            raise ValueError("spike must be above 1 (a multiple of the median loss), or 0")
        return self

    def total_steps(self, triplets: int) -> int:
        """Return the number of optimiser steps for a dataset of that many training triplets."""
        if self.steps is not None:
            return self.steps
        return max(self.warmup_steps + 1, -(-(self.epochs or 1) * triplets // self.batch_pairs))


class NoiseSection(Section):
    """How the noise level s in (0, 1) of a sample is drawn; 0 is the picture, 1 is noise.

    Attributes:
        scheme: "uniform"; "logit-normal" (Esser et al., arXiv 2403.03206, eq. 19) with ``mean`` and ``std``;
            "mode" (eq. 20) and "cosmap" (eq. 21) of the same paper, the first with ``scale``.
        mean, std: of the logit.
        scale: of "mode"; above 0 prefers the middle.
        shift: s -> shift s / (1 + (shift - 1) s) afterwards, as for higher resolutions (eq. 23).
        uniform_share: that share of samples is drawn uniformly whatever the scheme.
        snr_gamma: clips the weight of a sample at gamma / SNR (min-SNR, Hang et al., arXiv 2303.09556); for
            bases that predict epsilon or v only; 0 weighs all alike.
    """

    scheme: Literal["uniform", "logit-normal", "mode", "cosmap"] = "uniform"
    mean: float = 0.0
    std: Annotated[float, Field(gt=0)] = 1.0
    scale: Annotated[float, Field(ge=-1, le=1.75)] = 1.29
    shift: Annotated[float, Field(gt=0)] = 1.0
    uniform_share: Fraction = 0.0
    snr_gamma: Annotated[float, Field(ge=0)] = 0.0


class EmaSection(Section):
    """Exponential moving average; while warming up the decay is (1 + n) / (warmup + n) at update n."""

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    warmup: Annotated[float, Field(ge=1)] = 10.0


class LossSection(Section):
    """One loss.

    Attributes:
        weight: 0 turns the loss off, at no cost.
        temperature: of the contrastive softmax.
        min_sigma, max_sigma: only samples whose noise level lies between take part in losses on decoded
            images, each judged by its own.
        pairs: at most that many pairs of a step, over all processes, take part in them, least noise first.
        encoder: through whose eyes the loss looks; the default is the one that ships with the portraits.
    """

    weight: Annotated[float, Field(ge=0)]
    temperature: Annotated[float, Field(gt=0)] = 0.07
    min_sigma: Fraction = 0.0
    max_sigma: Fraction = 0.5
    pairs: Positive = 2
    encoder: Literal["portraits", "antelopev2", "buffalo_l", "clip-vit-l-14", "lpips-alex", "lpips-vgg"] = (
        "portraits"
    )


class EvaluationSection(Section):
    """How the result is judged, on people that neither training nor validation has seen."""

    identities: dict[Domain, Positive] = {}
    first_identity: Seed = 0
    intensities: tuple[Annotated[float, Field(ge=0, le=1.5)], ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    steps: Positive = 8
    seed: Seed = 0
    thresholds: dict[str, float] = {}


class ReleaseSection(Section):
    """Under which name and licence the adapter goes to the registry.

    ``ingredients`` adds to those that the training records by itself: base, dataset, and every network that
    a loss looked through. Nothing here can take one of them away.
    """

    adapter: Annotated[str, Field(pattern=NAME_PATTERN)]
    license: Line
    alias: Annotated[str, Field(pattern=NAME_PATTERN)] = "prod"
    ingredients: tuple[Ingredient, ...] = ()
    description: Text = ""


class RunningSection(Section):
    """How and where it runs. It changes rounding only, is not part of the digest, and may be changed between
    a stop and the resumption.

    Attributes:
        gpu, count: the machine that `trainer plan` reckons with unless it is told another.
        micro_pairs: pairs of one forward pass in one process; a step is made of as many passes as it takes.
            None passes all of them at once.
        checkpointing: compute each block's activations again in the backward pass.
        compile: compile the repeated block once (regional compilation).
        offload_blocks: that many transformer blocks wait in the machine's memory for their turn.
        shard: distribute the frozen base over the processes (FSDP2).
        checkpoint_every, validate_every: in optimiser steps; 0 validates only at the end.
        log_every: steps between two lines of progress.
        keep_checkpoints: the newest so many stay.
        tensorboard: write event files beside the loss curve.
    """

    gpu: Literal["H200", "H100", "A100", "L40S", "RTX4090", "CPU"] = "CPU"
    count: Positive = 1
    micro_pairs: Positive | None = None
    checkpointing: bool = False
    compile: bool = False
    offload_blocks: Count = 0
    shard: bool = False
    checkpoint_every: Positive = 100
    validate_every: Count = 0
    log_every: Positive = 10
    keep_checkpoints: Annotated[int, Field(ge=1, le=1000)] = 2
    tensorboard: bool = False

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.offload_blocks and self.shard:
            raise ValueError("offload_blocks and shard exclude each other: give memory back in one way")
        if self.offload_blocks and not self.checkpointing:
            raise ValueError("offload_blocks needs checkpointing: a block is fetched again for its backward")
        if self.offload_blocks and self.compile:
            raise ValueError("offload_blocks and compile exclude each other")
        if self.shard and self.compile:
            raise ValueError("shard and compile exclude each other")
        return self
