"""How many replicas of each kind serve on a cluster, and what each of them may use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from registry.errors import shown
from serving.errors import UsageError


class Scale(BaseModel):
    """How many of each there are.

    Attributes:
        engines: replicas with a base model each.
        ingresses: replicas that speak HTTP.
        cpus, gpus: of each engine, may be fractions; Ray places by them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    engines: Annotated[int, Field(ge=1, le=1000)] = 2
    ingresses: Annotated[int, Field(ge=1, le=100)] = 2
    cpus: Annotated[float, Field(ge=0, le=1024)] = 1.0
    gpus: Annotated[float, Field(ge=0, le=64)] = 0.0


def scale_of(arguments: Mapping[str, Any]) -> Scale:
    """Return how many of each there are.

    Raises:
        UsageError: an argument is unknown or out of its range.
    """
    try:
        return Scale.model_validate(arguments)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(shown(part, 60) for part in first["loc"])
        raise UsageError(
            f"{where}: {first['msg']}", f"the arguments are {', '.join(Scale.model_fields)}"
        ) from None
