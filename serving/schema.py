"""What an edit is asked with and answered with, and the limits of both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

from PIL import Image
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from registry.digest import Digest
from registry.errors import shown
from registry.manifest import BaseModelRef
from serving.errors import UsageError

MAX_EXPRESSIONS = 12
MAX_STEPS = 100
MAX_SWEEP = 64
MAX_STACKED = 4
MAX_SIDE = 2048
DEFAULT_STEPS = 8

ExpressionName = Annotated[str, StringConstraints(min_length=1, max_length=64)]
AdapterText = Annotated[str, StringConstraints(min_length=1, max_length=300)]
Strength = Annotated[float, Field(allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
Side = Annotated[int, Field(ge=8, le=MAX_SIDE)]
Expressions = Annotated[Mapping[ExpressionName, float], Field(max_length=MAX_EXPRESSIONS)]


class _Asked(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)

    @classmethod
    def make(cls, **values: Any) -> Self:
        """Return a request; what is wrong with the values is explained.

        Raises:
            UsageError: a value is of the wrong kind or over a limit.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(shown(part, 60) for part in first["loc"][:2])
            raise UsageError(
                f"the request is not valid: {where}: {shown(first['msg'])}", f"correct {where}"
            ) from None


class StackedAdapter(_Asked):
    """An adapter that lies under the one that conditions the edit, such as one distilled to few steps.

    Attributes:
        adapter: reference or digest.
        strength: in its signed range, 0 is nothing of it; None is 1, or the signed one nearest to it.
    """

    adapter: AdapterText
    strength: Strength | None = None


class _Edited(_Asked):
    image: bytes | Image.Image
    adapter: AdapterText | None = None
    strength: Strength | None = None
    stacked: Annotated[tuple[StackedAdapter, ...], Field(max_length=MAX_STACKED)] | None = None
    seed: Seed = 0
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    size: tuple[Side, Side] | None = None
    exact: bool = False


class EditRequest(_Edited):
    """One edit of one picture.

    Attributes:
        image: the bytes of a PNG, JPEG or WebP file, or a Pillow image.
        expressions: expression -> intensity, in the adapter's signed range; empty asks for the neutral face.
        adapter: reference or digest of the adapter that has to answer; None takes the attached one.
        strength: of the adapter, in its signed range, 0 is the base alone; None is 1, or the signed one
            nearest to it.
        stacked: the adapters beside it, each at its own strength, ``()`` for none; None is what the service
            puts there.
        seed: of the starting noise; the same request gives the same picture.
        steps: denoising steps; None is what the adapters are scheduled for, or `DEFAULT_STEPS`.
        size: height and width of the result in pixels, multiples of the base's; None is the base's own. The
            middle of the picture is cut out with this aspect.
        exact: make each picture alone, so that the same request gives the same bytes whatever else runs; in
            company sums are rounded otherwise, which now and then moves a value by one level of 255.
    """

    expressions: Expressions

    @field_validator("expressions")
    @classmethod
    def _finite(cls, expressions: Mapping[str, float]) -> Mapping[str, float]:
        return _finite(expressions)


class SweepRequest(_Edited):
    """One picture at several intensities: it is encoded once, and all rows start from the same noise.

    Attributes:
        rows: the expressions of each result; see `EditRequest`, as for everything else.
        seeds: one for each row, in the place of ``seed``.
    """

    rows: Annotated[tuple[Expressions, ...], Field(min_length=1, max_length=MAX_SWEEP)]
    seeds: tuple[Seed, ...] | None = None

    @model_validator(mode="after")
    def _one_seed_a_row(self) -> Self:
        if self.seeds is not None and len(self.seeds) != len(self.rows):
            raise ValueError(f"there are {len(self.seeds)} seeds for {len(self.rows)} rows")
        return self

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seed of each row."""
        return self.seeds or (self.seed,) * len(self.rows)

    @field_validator("rows")
    @classmethod
    def _all_finite(cls, rows: tuple[Mapping[str, float], ...]) -> tuple[Mapping[str, float], ...]:
        return tuple(_finite(row) for row in rows)


def _finite(expressions: Mapping[str, float]) -> Mapping[str, float]:
    for name, intensity in expressions.items():
        if not math.isfinite(intensity):
            raise ValueError(f"the intensity of {name!r} is not a finite number")
    return expressions


@dataclass(frozen=True, kw_only=True, slots=True)
class Used:
    """An adapter that took part in an edit.

    Attributes:
        adapter: ``name:version``; None for an unsigned candidate.
        digest: of the manifest, or of the weights of a candidate.
        strength: that it had.
    """

    adapter: str | None
    digest: Digest
    strength: float

    def facts(self) -> dict[str, Any]:
        """The same, ready for JSON."""
        return {"adapter": self.adapter, "digest": str(self.digest), "strength": self.strength}


@dataclass(frozen=True, kw_only=True, slots=True)
class EditResult:
    """An edited picture and everything that made it.

    Attributes:
        image: RGB, at the size that was asked for.
        adapter: ``name:version`` of the adapter that conditioned the edit; None for an unsigned candidate.
        adapter_digest: of the manifest, or of the weights of a candidate.
        stacked: the adapters beside it.
        base: the base model.
        size: height and width.
        shift: of the noise levels, where an adapter was distilled to one; see `serving.schedules`.
    """

    image: Image.Image
    adapter: str | None
    adapter_digest: Digest
    base: BaseModelRef
    expressions: Mapping[str, float]
    strength: float
    seed: int
    steps: int
    size: tuple[int, int]
    stacked: tuple[Used, ...] = ()
    shift: float | None = None

    def facts(self) -> dict[str, Any]:
        """Everything but the pixels, ready for JSON."""
        shift = {} if self.shift is None else {"shift": self.shift}
        return {
            "adapter": self.adapter,
            "adapter_digest": str(self.adapter_digest),
            "base": self.base.id,
            "base_revision": self.base.revision,
            "expressions": dict(self.expressions),
            "strength": self.strength,
            "stacked": [used.facts() for used in self.stacked],
            "seed": self.seed,
            "steps": self.steps,
            "size": list(self.size),
            **shift,
        }
