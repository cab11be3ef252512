"""A recipe: everything that decides a training, in one strict YAML file with one digest.

What is not in the recipe does not change the adapter. An unknown key is an error that names the nearest right
one, so a typing error cannot silently train something else.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from registry.digest import Digest, digest_bytes
from registry.manifest import BaseModelRef, ConditioningSpec, Ingredient, Line, Text, canonical_json
from registry.reference import NAME_PATTERN
from trainer.errors import RecipeError

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]
Domain = Literal["human", "anime"]
LossName = Literal["flow_matching", "contrastive", "identity"]
EncoderName = Literal["portraits", "antelopev2", "buffalo_l"]

DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataSection(_Section):
    """Which images are made, and which of them become training data.

    Attributes:
        source: name of the generator.
        identities: training people per domain.
        validation: people per domain that are only used to measure the loss.
        first_identity: seed of the first person; the others follow.
        intensities: intensities of each expression, each in (0, 1.5].
        size: side in pixels.
        min_score: an image is kept when the judge sees its expression with at least this share of its
            intensity.
        license: licence of the identity images.
    """

    source: Literal["renderer"] = "renderer"
    identities: dict[Domain, Positive]
    validation: dict[Domain, Positive]
    first_identity: Seed
    intensities: Annotated[tuple[Annotated[float, Field(gt=0, le=1.5)], ...], Field(min_length=1)]
    size: Annotated[int, Field(ge=64, le=512)] = 64
    min_score: Fraction = 0.2
    license: Line = "Apache-2.0"

    @field_validator("intensities")
    @classmethod
    def _rising(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError("intensities must rise, each once")
        return value


class LoraSection(_Section):
    """Shape of the update; ``dtype`` is that of the exported file, training is always in fp32."""

    rank: Annotated[int, Field(ge=1, le=1024)]
    alpha: Annotated[float, Field(gt=0, le=8192)]
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    dtype: Literal["F16", "BF16", "F32"] = "F16"


class OptimiserSection(_Section):
    """AdamW and its schedule.

    Attributes:
        learning_rate: at the top of the schedule.
        final_share: share of ``learning_rate`` that is left at the last step.
        batch_pairs: pairs in a step over all processes; a pair is two images of one person.
        keep_share: share of samples that ask for intensity 0 and have the source as target.
        sigma_shift: centre of the logit-normal distribution of noise levels; above 0 means more noise.
        sigma_uniform: share of noise levels that are drawn uniformly instead.
        checkpoint_every: steps between checkpoints.
    """

    learning_rate: Annotated[float, Field(gt=0, le=1)]
    schedule: Literal["cosine"] = "cosine"
    warmup_steps: Count = 30
    final_share: Fraction = 0.05
    steps: Positive
    batch_pairs: Positive
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    keep_share: Fraction = 0.06
    sigma_shift: float = 0.6
    sigma_uniform: Fraction = 0.2
    checkpoint_every: Positive = 100

    @model_validator(mode="after")
    def _warm_up_ends(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError("warmup_steps must be below steps")
        return self


class EmaSection(_Section):
    """Exponential moving average; while warming up the decay is (1 + n) / (warmup + n) at update n."""

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    warmup: Annotated[float, Field(ge=1)] = 10.0


class LossSection(_Section):
    """One loss.

    Attributes:
        weight: 0 turns the loss off, at no cost.
        temperature: of the contrastive softmax.
        max_sigma: only samples with at most this noise take part in losses on decoded images.
        pairs: at most that many pairs of a step take part in them.
        encoder: whose eyes the identity loss has: "portraits" is the shipped encoder; the others are model
            packs of InsightFace, for non-commercial research unless a signed MODEL.LICENSE grants more.
    """

    weight: Annotated[float, Field(ge=0)]
    temperature: Annotated[float, Field(gt=0)] = 0.07
    max_sigma: Fraction = 0.5
    pairs: Positive = 2
    encoder: EncoderName = "portraits"


class EvaluationSection(_Section):
    """How the result is judged, on people that neither training nor validation has seen."""

    identities: dict[Domain, Positive]
    first_identity: Seed
    intensities: tuple[Annotated[float, Field(ge=0, le=1.5)], ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    steps: Positive = 8
    seed: Seed = 0
    thresholds: dict[str, float] = {}


class ReleaseSection(_Section):
    """Under which name and licence the adapter goes to the registry.

    ``ingredients`` adds to those that the training records by itself: base, dataset, and every network that
    a loss looked through. Nothing here can take one of them away.
    """

    adapter: Annotated[str, Field(pattern=NAME_PATTERN)]
    license: Line
    alias: Annotated[str, Field(pattern=NAME_PATTERN)] = "prod"
    ingredients: tuple[Ingredient, ...] = ()
    description: Text = ""


class Recipe(_Section):
    """Everything that decides a training; see the sections."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    seed: Seed = 0
    base: BaseModelRef
    data: DataSection
    lora: LoraSection
    optimiser: OptimiserSection
    ema: EmaSection = EmaSection()
    losses: dict[LossName, LossSection]
    conditioning: ConditioningSpec
    evaluation: EvaluationSection
    release: ReleaseSection

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not any(loss.weight > 0 for loss in self.losses.values()):
            raise ValueError("every loss has weight 0; give at least one a weight")
        for name, loss in self.losses.items():
            if name != "identity" and loss.encoder != LossSection.model_fields["encoder"].default:
                raise ValueError(f"the loss {name} has no encoder to choose; only identity has")
        held_out = range(
            self.evaluation.first_identity,
            self.evaluation.first_identity + sum(self.evaluation.identities.values()),
        )
        used = sum(self.data.identities.values()) + sum(self.data.validation.values())
        seen = range(self.data.first_identity, self.data.first_identity + used)
        if seen.start < held_out.stop and held_out.start < seen.stop:
            raise ValueError(
                f"the people of the evaluation ({held_out.start} to {held_out.stop - 1}) overlap with "
                f"those of the data ({seen.start} to {seen.stop - 1})"
            )
        return self

    @cached_property
    def digest(self) -> Digest:
        """sha256 of the recipe's canonical JSON; comments and layout of the YAML do not count."""
        return digest_bytes(canonical_json(self.model_dump(mode="json")))

    def section(self, *names: str) -> dict[str, Any]:
        """Return some sections as JSON values; stages make their keys of the sections that they use."""
        return self.model_dump(mode="json", include=set(names))


def load(source: str | Path) -> Recipe:
    """Return the recipe in a YAML file, or the shipped recipe of that name.

    Raises:
        RecipeError: there is no such recipe, or it is not valid.
    """
    path = Path(source)
    if not path.is_file():
        shipped = resources.files("trainer") / "recipes"
        known = sorted(
            item.name.removesuffix(".yaml") for item in shipped.iterdir() if item.name.endswith(".yaml")
        )
        if str(source) not in known:
            raise RecipeError(
                f"there is no recipe {str(source)!r}",
                "give the path of a YAML file or one of the shipped recipes: " + ", ".join(known),
            )
        return parse((shipped / f"{source}.yaml").read_text("utf-8"), str(source))
    return parse(path.read_text("utf-8"), str(path))


def parse(text: str, where: str = "the recipe") -> Recipe:
    """Return the recipe in YAML ``text``; ``where`` names it in errors.

    Raises:
        RecipeError: ``text`` is no YAML mapping, has an unknown or missing key, or a wrong value.
    """
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not valid YAML: {error}", "correct the line that is named") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{where} is not a mapping of sections", "start from trainer/recipes/*.yaml")
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        raise RecipeError(f"{where} is not valid:\n" + "\n".join(_explained(error)), _MEND) from None


_MEND = "correct these keys; trainer/recipes/pixelsmile-portraits.yaml is an example that works"


def _explained(error: ValidationError) -> list[str]:
    """Return one line for each mistake, with the nearest right key for an unknown one."""
    lines = []
    for item in error.errors(include_url=False, include_context=False):
        location = tuple(str(part) for part in item["loc"])
        text = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(location[-1], _keys_at(location[:-1]), n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            text = f"there is no such key{hint}"
        lines.append(f"  {'.'.join(part for part in location if part != '[key]') or 'the recipe'}: {text}")
    return lines


def _keys_at(location: tuple[str, ...]) -> list[str]:
    """Return the keys that are right at a place in a recipe."""
    model: Any = Recipe
    for part in location:
        fields: Mapping[str, Any] = getattr(model, "model_fields", {})
        annotation = fields[part].annotation if part in fields else model
        arguments = [a for a in getattr(annotation, "__args__", ()) if hasattr(a, "model_fields")]
        model = arguments[0] if arguments else annotation
    return sorted(getattr(model, "model_fields", {}))
