"""One step of several runs, in which only the run that breaks it fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serving.memory import was_short

if TYPE_CHECKING:
    from serving.runs import Run

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stepped:
    """How a step went.

    Attributes:
        errors: of each run; None of those that took the step.
        too_large: the device had no memory for all of the runs together, and had it for each alone.
    """

    errors: Sequence[Exception | None]
    too_large: bool = False


def step(advance: Callable[[Sequence[Run]], None], runs: Sequence[Run]) -> Stepped:
    """Take one step of all runs together; when that fails, of each alone.

    Args:
        advance: takes a step of some runs, whole or not at all.
    """
    before = [run.step for run in runs]
    broke = _error(advance, runs)
    if broke is None:
        return Stepped(errors=[None] * len(runs))
    if len(runs) == 1:
        return Stepped(errors=[broke])
    _log.warning("a batch of %d runs failed (%s); each goes on alone", len(runs), type(broke).__name__)
    errors = [
        None if run.step > steps else _error(advance, [run]) for run, steps in zip(runs, before, strict=True)
    ]
    return Stepped(errors=errors, too_large=was_short(broke) and not any(errors))


def _error(advance: Callable[[Sequence[Run]], None], runs: Sequence[Run]) -> Exception | None:
    try:
        advance(runs)
    except Exception as error:
        return error
    return None
