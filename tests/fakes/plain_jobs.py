"""A run of a recipe without Prefect: its stages are called as the plain functions that they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.stages import Done, Job
from trainer.progress import silent
from trainer.stage import StageResult


class PlainJob(Job):
    """A job that keeps no records: a stage whose folder is there says itself that it has nothing to do."""

    def _do(self, task: Any, parameters: Mapping[str, Any], folder: Path | None = None) -> StageResult:
        result = StageResult.from_json(task.fn(**parameters, progress=silent))
        self.done[task.name] = Done(result=result, seconds=0.0, run="run")
        return result
