"""How adapters that were distilled to few steps want to be run: how many steps, and at which noise levels.

A base's own schedule spends more steps on noise the larger the picture is. Distilled adapters learnt one
schedule for all sizes: Qwen-Image-Lightning an exponential shift with base_shift = max_shift = log(3), which
is the level s moved to 3 s / (1 + 2 s), and no stretching to a last level. A schedule is no part of what is
signed: it is configured beside the adapter, and pictures say which one they were made with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from serving.errors import UsageError

if TYPE_CHECKING:
    from serving.adapters import Stack

Shift = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]


class Schedule(BaseModel):
    """How an adapter wants to be run.

    Attributes:
        steps: where a request names none.
        shift: noise level s becomes shift * s / (1 + (shift - 1) * s); None is the base's own schedule.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: Annotated[int, Field(ge=1, le=100)] | None = None
    shift: Shift | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """How a run is run: its steps, and the shift of its noise levels if they are not the base's own."""

    steps: int
    shift: float | None = None


def course(schedules: Mapping[str, Schedule], stack: Stack, asked: int | None, default: int) -> Course:
    """Return how the adapters of a stack are run together.

    Args:
        schedules: name of an adapter -> its schedule.
        stack: adapters and their strengths; one at strength 0 has no say.
        asked: steps that a request names.
        default: steps where neither the request nor an adapter names any.

    Raises:
        UsageError: two of the adapters want different schedules.
    """
    wanted: dict[str, Schedule] = {}
    for adapter, strength in stack:
        name = "" if adapter.manifest is None else adapter.manifest.name
        if name in schedules and strength:
            wanted[name] = schedules[name]
    found = next(iter(wanted.values()), Schedule())
    if any(other != found for other in wanted.values()):
        raise UsageError(
            f"the adapters {' and '.join(wanted)} want different schedules", "stack only one of them"
        )
    return Course(steps=asked or found.steps or default, shift=found.shift)


def shifted(steps: int, shift: float) -> list[float]:
    """Return ``steps + 1`` noise levels from 1 to 0, evenly apart and then shifted."""
    even = [1 - index / steps for index in range(steps)]
    return [*(shift * level / (1 + (shift - 1) * level) for level in even), 0.0]
