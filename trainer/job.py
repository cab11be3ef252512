"""A training as a file, for processes that others start."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from registry.digest import Digest
from trainer.errors import TrainerError
from trainer.recipe import Recipe
from trainer.stage import write_atomically

if TYPE_CHECKING:
    from trainer.data.dataset import Dataset

JOB = "job.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a process needs to know to take part in a training; see `train`.

    Attributes:
        version: of the dataset that is asked for; None takes what lies there.
    """

    recipe: Recipe
    dataset: Path
    cache: Path
    base_path: Path
    out: Path
    track: bool = True
    version: Digest | None = None

    def data(self) -> Dataset:
        """Open the dataset.

        Raises:
            DataError: there is no whole one.
            TrainerError: it is not the one that is asked for.
        """
        from trainer.data.dataset import Dataset

        data = Dataset.open(self.dataset)
        if self.version not in (None, data.digest):
            raise TrainerError(
                f"{self.dataset} holds the dataset {data.digest} by now, not {self.version}",
                "somebody has replaced it since this training was asked for: run the same command again",
            )
        return data

    def write(self) -> Path:
        """Write the job into its output folder and return the file."""
        self.out.mkdir(parents=True, exist_ok=True)
        folders = {"dataset": self.dataset, "cache": self.cache, "base_path": self.base_path, "out": self.out}
        places = {name: str(folder.resolve()) for name, folder in folders.items()}
        # Only what was said: some rules ask whether a field was given at all.
        recipe = self.recipe.model_dump(mode="json", exclude_unset=True)
        value = {"recipe": recipe, **places, "track": self.track, "version": self.version}
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
                version=None if value.get("version") is None else Digest(value["version"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainerError(
                f"{path} is not the file of a training: {error}",
                "make it on every machine with `trainer train RECIPE --prepare-only`",
            ) from None
