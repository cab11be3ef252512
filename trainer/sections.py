"""The sections of a recipe, each a strict model: what may be written there, and what it means.

`trainer.recipe` puts them together. All but `RunningSection` decide what comes out and count in the digest.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from registry.manifest import Ingredient, Line, Text
from registry.reference import NAME_PATTERN
from trainer import templates

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


class FilterSection(Section):
    """What a picture must be like to become training data; each filter counts what it lets through.

    Attributes:
        min_score: the scorer sees the asked expression with at least this share of its intensity.
        min_margin: at full intensity the asked expression is that much above every other one; 0 asks that
            it is the strongest.
        min_confidence: how sure the scorer is, 0 to 1; see `trainer.scoring`.
        min_identity: cosine between the faces of source and edit, by ``face_encoder``; None looks at none.
        face_encoder: who finds faces and tells people apart; None takes the portraits' for drawn people.
        min_sharpness: least variance of the Laplacian of the picture's luma (0 to 255) at its own size; 0
            looks for none.
        max_unchanged: an edit whose perceptual hash (PDQ, 256 bits) differs in at most that many bits from
            its source's is no edit; None looks for none.
        max_duplicate: people whose neutral pictures differ in at most that many bits are one person, and
            the later one is left out; None looks for none.
    """

    min_score: Fraction = 0.2
    min_margin: Fraction = 0.0
    min_confidence: Fraction = 0.0
    min_identity: Annotated[float, Field(ge=-1, le=1)] | None = None
    face_encoder: Literal["portraits", "antelopev2", "buffalo_l"] | None = None
    min_sharpness: Annotated[float, Field(ge=0)] = 0.0
    max_unchanged: Annotated[int, Field(ge=0, le=128)] | None = None
    max_duplicate: Annotated[int, Field(ge=0, le=128)] | None = None


class DataSection(Section):
    """Which images there are, and which of them become training data.

    Attributes:
        source: "renderer" draws people; "edited" has an image-edit API put expressions on the people in
            ``path``; "folder" takes the finished pairs that ``path`` lists.
        path: for "folder" a folder of pictures with ``pairs.jsonl``; for "edited" a folder of neutral
            portraits, or a dataset whose neutral pictures are taken.
        identities: training people per domain; for "renderer" only, as the next two.
        validation: people per domain that are only used to measure the loss.
        first_identity: seed of the first person; the others follow.
        validation_share: share of the people in ``path`` that are only used to measure the loss; for
            "edited" only. Who they are depends on their names alone.
        intensities: intensities of each expression, each in (0, 1.5]; not for "folder".
        pairing: which two expressions a triplet holds: the "confusing" partners, or "random" ones, which is
            what the confusing pairs are measured against; not for "folder".
        size: side of drawn pictures in pixels.
        sizes: training resolutions, each the side of a square with the area of its pictures; empty is the
            base's own.
        max_aspect: pictures keep their aspect up to that ratio of the longer to the shorter side and are
            trained in buckets of like aspect; 1 makes them all square.
        keep_share: share of samples that ask for intensity 0 and have the source as target.
        filters: what a picture must be like to be kept.
        license: licence of the identity images.
    """

    source: Literal["renderer", "edited", "folder"] = "renderer"
    path: Line | None = None
    identities: dict[Domain, Positive] = {}
    validation: dict[Domain, Positive] = {}
    first_identity: Seed = 0
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    intensities: tuple[Annotated[float, Field(gt=0, le=1.5)], ...] = ()
    pairing: Literal["confusing", "random"] = "confusing"
    size: Annotated[int, Field(ge=64, le=512)] = 64
    sizes: tuple[Side, ...] = ()
    max_aspect: Annotated[float, Field(ge=1, le=4)] = 1.0
    keep_share: Fraction = 0.06
    filters: FilterSection = FilterSection()
    license: Line = "Apache-2.0"

    @field_validator("intensities")
    @classmethod
    def _rising(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError("intensities must rise, each once")
        return value

    @model_validator(mode="after")
    def _of_its_source(self) -> Self:
        needs = _NEEDS[self.source]
        # By value: a recipe that was written out and is read again names every key.
        foreign = [name for name in _OF_SOURCES if name not in needs and getattr(self, name)]
        missing = [name for name in needs if name not in self.model_fields_set]
        if foreign:
            raise ValueError(f"{', '.join(foreign)}: not for source {self.source}, which has them elsewhere")
        if missing:
            raise ValueError(f"source {self.source} needs {', '.join(missing)}")
        if self.source == "folder" and self.pairing == "random":
            raise ValueError("pairing: the pairs of source folder are those that its list names")
        return self


_NEEDS = {
    "renderer": ("identities", "validation", "first_identity", "intensities"),
    "edited": ("path", "intensities"),
    "folder": ("path",),
}
_OF_SOURCES = sorted({name for names in _NEEDS.values() for name in names})


class SynthesisSection(Section):
    """Which image-edit API makes the pictures of ``data.source: edited``, and what it is asked for.

    The prompt has two parts: who must stay who they are, and what the face must show. Both are templates;
    what may stand in braces is checked. A different prompt or model makes other requests, which are paid.
    docs/how-to/image-apis.md shows the way for each vendor.

    Attributes:
        provider: "gemini" speaks Google's Gemini API, "openai" any OpenAI-compatible /v1/images/edits.
        model: id of the model; vendors change them.
        endpoint: address of another server of that protocol; None is the vendor's.
        identity_prompt: what is kept.
        expression_prompt: what is asked; ``{expression}`` is described by ``descriptions`` or its name,
            ``{intensity}`` is a word for the intensity and its share of full strength.
        descriptions: expression -> words for it; the shipped ones where it is missing.
        resolution: what the API is asked for, such as "1K", "2K" or "4K" (gemini) or "1024x1024" (openai);
            "auto" leaves it to the API.
        options: further fields of the request by the names that the server gives them, such as
            ``input_fidelity: high``; for "openai" only.
        license: under which terms the made pictures may be used (an SPDX expression or LicenseRef); it is
            recorded as an ingredient.
    """

    provider: Literal["gemini", "openai"]
    model: Line
    endpoint: Line | None = None
    identity_prompt: Text = (
        "Edit this portrait. Keep the person's identity, age, hair, clothes, pose, framing, light and "
        "background exactly as they are."
    )
    expression_prompt: Text = "Change only the facial expression to: {intensity} {expression}."
    descriptions: dict[Line, Line] = {}
    resolution: Annotated[
        str, Field(pattern=r"^(auto|[1-9][0-9]{0,3}K?|[1-9][0-9]{1,4}x[1-9][0-9]{1,4})$")
    ] = "auto"
    options: dict[Line, Line] = {}
    license: Line

    @model_validator(mode="after")
    def _can_be_asked(self) -> Self:
        for name, known in (("identity_prompt", ()), ("expression_prompt", ("expression", "intensity"))):
            try:
                templates.check(getattr(self, name), known, known[:1])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        if self.resolution != "auto" and ("x" in self.resolution) != (self.provider == "openai"):
            example = "1024x1024" if self.provider == "openai" else "1K"
            raise ValueError(f"resolution: {self.provider} takes one such as {example}, or auto")
        if self.options and self.provider != "openai":
            raise ValueError(f"options: {self.provider} takes none")
        return self


class ScoringSection(Section):
    """Who looks at the pictures, and how sure one must be.

    Attributes:
        scorer: "judge" is the shipped expression judge of the portraits; "openai" any OpenAI-compatible
            /v1/chat/completions with structured output, "gemini" Google's Gemini API.
        model: id of the model; for "openai" and "gemini".
        endpoint: address of another server of that protocol; None is the vendor's.
        samples: how often each picture is asked about, each a request; the score is the median. The judge
            always says the same and is asked once.
        temperature: of the answers; None leaves it to the model, which some models demand. Several samples
            need one above 0, or None: at 0 they are one answer paid several times, which never disagrees.
        max_disagreement: pictures whose samples differ by more in an expression go to the review queue and
            stay out of the dataset until a person decides.
        license: under which terms the model's answers may be used (an SPDX expression or LicenseRef); it is
            recorded as an ingredient. For "openai" and "gemini".
    """

    scorer: Literal["judge", "openai", "gemini"] = "judge"
    model: Line | None = None
    endpoint: Line | None = None
    samples: Annotated[int, Field(ge=1, le=16)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 0.0
    max_disagreement: Fraction = 0.25
    license: Line | None = None

    @model_validator(mode="after")
    def _of_its_scorer(self) -> Self:
        if {self.model is None, self.license is None} != {self.scorer == "judge"}:
            raise ValueError("scorer openai and gemini need a model and a license, the judge takes neither")
        if self.scorer != "judge" and self.samples > 1 and self.temperature == 0:
            raise ValueError(
                "several samples at temperature 0 are the same answer paid several times, and say nothing of "
                "how sure it is: set a temperature above 0, or null for the model's own, or ask for 1 sample"
            )
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


class PriceSection(Section):
    """What a model takes, in US dollars: for each image that it makes, and for a million tokens."""

    image: Annotated[float, Field(ge=0)] = 0.0
    input: Annotated[float, Field(ge=0)] = 0.0
    output: Annotated[float, Field(ge=0)] = 0.0


class ApiSection(Section):
    """What paid APIs may be asked; it changes nothing in the answers.

    Attributes:
        requests: at most that many requests in a run, over all providers; None is no limit.
        money: at most that much in a run, in US dollars; needs a price for every model that is used.
        per_minute: at most that many requests a minute and process, beside what the flow's limits say.
        parallel: requests under way at the same time in a process.
        timeout: seconds for one request.
        prices: model id -> what it takes, where the shipped table lacks it or is out of date.
    """

    requests: Count | None = None
    money: Annotated[float, Field(ge=0)] | None = None
    per_minute: Annotated[float, Field(gt=0)] = 60.0
    parallel: Annotated[int, Field(ge=1, le=64)] = 4
    timeout: Annotated[float, Field(gt=0, le=3600)] = 180.0
    prices: dict[Line, PriceSection] = {}


class SuiteSection(Section):
    """What a suite asks of every adapter, and who judges; see `trainer.evaluation.suites`.

    Attributes:
        name: what reports call it.
        source: "renderer" draws people, whose true expressions are known; "tasks" reads pictures and tasks
            from the folder ``path``, laid out as FFE-Bench.
        identities: people per domain, from the number ``first_identity`` on; for "renderer".
        intensities: of the sweep, rising from 0 with 1 among them.
        sweep_people: so many of the first people are asked for every intensity, the others for 0 and 1; None
            is all of them.
        blend_people: so many of the first people are asked for blends of two basic expressions as well.
        steps: of sampling.
        seed: of the starting noise and of the bootstrap.
        judge: who sees expressions; never who scored the training data.
        faces: who tells people apart.
        api: what a judge over a network may cost; it changes nothing in its answers.
    """

    name: Line
    source: Literal["renderer", "tasks"] = "renderer"
    path: Line | None = None
    identities: dict[Domain, Positive] = {}
    first_identity: Seed = 0
    intensities: tuple[Annotated[float, Field(ge=0, le=1.5)], ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    sweep_people: Positive | None = None
    blend_people: Count = 0
    steps: Positive = 20
    seed: Seed = 0
    judge: ScoringSection = ScoringSection()
    faces: Literal["portraits", "antelopev2", "buffalo_l"] = "portraits"
    api: ApiSection = ApiSection()

    @model_validator(mode="after")
    def _of_its_source(self) -> Self:
        if self.source == "tasks" and self.identities:
            raise ValueError("identities: are drawn by the renderer; the source tasks has a path")
        if self.source == "renderer" and self.path is not None:
            raise ValueError("path: is for the source tasks; the renderer draws identities")
        return self

    @property
    def people(self) -> range:
        """Numbers of the people that are drawn; nobody else may be drawn for training."""
        return range(self.first_identity, self.first_identity + sum(self.identities.values()))


class EvaluationSection(Section):
    """How the result is judged: by a suite, of which a recipe may change what it names here.

    Attributes:
        suite: a shipped suite, or the path of a suite's YAML file.
        thresholds: metric -> the value that still passes.
        path, identities, first_identity, intensities, sweep_people, blend_people, steps, seed, judge, faces:
            as in `SuiteSection`; None is the suite's own.
    """

    suite: Line = "portraits-v1"
    path: Line | None = None
    identities: dict[Domain, Positive] | None = None
    first_identity: Seed | None = None
    intensities: tuple[Annotated[float, Field(ge=0, le=1.5)], ...] | None = None
    sweep_people: Positive | None = None
    blend_people: Count | None = None
    steps: Positive | None = None
    seed: Seed | None = None
    judge: ScoringSection | None = None
    faces: Literal["portraits", "antelopev2", "buffalo_l"] | None = None
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
        api: limits for paid APIs.
        batch: pictures in one piece of the stages that are shared between processes and machines.
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
    api: ApiSection = ApiSection()
    batch: Annotated[int, Field(ge=1, le=4096)] = 128

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
