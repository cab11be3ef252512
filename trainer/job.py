"""A training as a file, for processes that others start."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from trainer.errors import TrainerError
from trainer.recipe import Recipe
from trainer.stage import write_atomically

JOB = "job.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a process needs to know to take part in a training; see `train`."""

    recipe: Recipe
    dataset: Path
    cache: Path
    base_path: Path
    out: Path
    track: bool = True

    def write(self) -> Path:
        """Write the job into its output folder and return the file."""
        self.out.mkdir(parents=True, exist_ok=True)
        folders = {"dataset": self.dataset, "cache": self.cache, "base_path": self.base_path, "out": self.out}
        places = {name: str(folder.resolve()) for name, folder in folders.items()}
        # Only what was said: some rules ask whether a field was given at all.
        recipe = self.recipe.model_dump(mode="json", exclude_unset=True)
        value = {"recipe": recipe, **places, "track": self.track}
        write_atomically(self.out / JOB, json.dumps(value, indent=1).encode())
        return self.out / JOB

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the job in a file.

        Raises:
            TrainerError: the file is none.
        """
        try:
            value = json.loads(path.read_text("utf-8"))
            return cls(
                recipe=Recipe.model_validate(value["recipe"]),
                dataset=Path(value["dataset"]),
                cache=Path(value["cache"]),
                base_path=Path(value["base_path"]),
                out=Path(value["out"]),
                track=bool(value["track"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainerError(
                f"{path} is not the file of a training: {error}",
                "make it on every machine with `trainer train RECIPE --prepare-only`",
            ) from None
