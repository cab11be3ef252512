"""What an edit is asked with and answered with, and the limits of both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from registry.digest import Digest
from registry.errors import shown
from registry.manifest import BaseModelRef
from serving.errors import UsageError

MAX_EXPRESSIONS = 12
MAX_STEPS = 100
MAX_SWEEP = 64
DEFAULT_STEPS = 8

ExpressionName = Annotated[str, StringConstraints(min_length=1, max_length=64)]


class EditRequest(BaseModel):
    """One edit of one picture.

    Attributes:
        image: the bytes of a PNG, JPEG or WebP file, or a Pillow image.
        expressions: expression -> intensity, in the adapter's signed range; empty asks for the neutral face.
        adapter: reference or digest of the adapter that has to answer; None takes the attached one.
        strength: of the adapter, 0 (the base alone) to the signed maximum.
        seed: of the starting noise; the same request gives the same picture.
        steps: denoising steps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)

    image: bytes | Image.Image
    expressions: Annotated[Mapping[ExpressionName, float], Field(max_length=MAX_EXPRESSIONS)]
    adapter: Annotated[str, StringConstraints(min_length=1, max_length=300)] | None = None
    strength: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] = DEFAULT_STEPS

    @field_validator("expressions")
    @classmethod
    def _finite(cls, expressions: Mapping[str, float]) -> Mapping[str, float]:
        for name, intensity in expressions.items():
            if not math.isfinite(intensity):
                raise ValueError(f"the intensity of {name!r} is not a finite number")
        return expressions

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


@dataclass(frozen=True, kw_only=True, slots=True)
class EditResult:
    """An edited picture and everything that made it.

    Attributes:
        image: RGB, at the base's own side.
        adapter: the reference that the adapter was pulled by; None for an unsigned candidate.
        adapter_digest: of the manifest, or of the weights of a candidate.
        base: the base model.
    """

    image: Image.Image
    adapter: str | None
    adapter_digest: Digest
    base: BaseModelRef
    expressions: Mapping[str, float]
    strength: float
    seed: int
    steps: int

    def facts(self) -> dict[str, Any]:
        """Everything but the pixels, ready for JSON."""
        return {
            "adapter": self.adapter,
            "adapter_digest": str(self.adapter_digest),
            "base": self.base.id,
            "base_revision": self.base.revision,
            "expressions": dict(self.expressions),
            "strength": self.strength,
            "seed": self.seed,
            "steps": self.steps,
        }
