"""Where the figures and pictures of a training go: an MLflow run, and TensorBoard's files for who wants them.

The run lies in the registry's own database, or wherever MLFLOW_TRACKING_URI points. A training that was
stopped goes on in the same run; how figures get there is the matter of `trainer.outbox`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trainer.errors import TrainerError
from trainer.outbox import RUN_NAME, MlflowRun, Outbox, brief
from trainer.stage import STAGE_NAME, StageResult

if TYPE_CHECKING:
    from PIL import Image

_EVALUATION_TAG = "adapter_foundry.evaluation"
_SHOWN = (".png", ".html", ".json")


class Sink(Protocol):
    """Takes figures and pictures by step."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...

    def picture(self, step: int, name: str, image: Image.Image) -> None: ...

    def close(self, status: str) -> None: ...


class Tracker:
    """Hands everything to each of its sinks; without any it does nothing.

    Args:
        name: of the training.
        parameters: plain values by dotted name, digests among them.
        out: folder of the training; remembers there which MLflow run is its own.
        recipe: kept beside the run as ``recipe.json``.
        enabled: whether this process tracks at all.
        tensorboard: write event files into ``out/tensorboard``, too.

    Raises:
        registry.errors.NetworkError: MLflow makes no run for a training that has none yet. Later it may be
            away as long as it likes.
    """

    def __init__(
        self,
        name: str,
        parameters: Mapping[str, Any],
        *,
        out: Path,
        recipe: Mapping[str, Any],
        enabled: bool = True,
        tensorboard: bool = False,
    ) -> None:
        self.run_id: str | None = None
        self._sinks: list[Sink] = [_EventFiles(out / "tensorboard")] if tensorboard else []
        if enabled:
            run = MlflowRun(name, parameters, out, recipe)
            self.run_id = run.run_id
            self._sinks.append(run)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Take the metrics of a step; values that are not finite are left out."""
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        for sink in self._sinks:
            sink.metrics(step, finite)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Take a picture that was made after ``step`` steps."""
        for sink in self._sinks:
            sink.picture(step, name, image)

    def close(self, status: str = "FINISHED") -> None:
        """End the run: "FINISHED", "KILLED" (it will go on from a checkpoint) or "FAILED"."""
        for sink in self._sinks:
            sink.close(status)


class _EventFiles:
    """TensorBoard's event files."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrainerError(
                f"running.tensorboard needs the package tensorboard: {error}",
                "pip install 'adapter-foundry[large]', or leave running.tensorboard out: MLflow has the same",
            ) from None
        self._writer = SummaryWriter(str(folder))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        import numpy as np

        self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self, status: str) -> None:
        self._writer.close()


def log_evaluation(training: Path, evaluated: StageResult) -> str | None:
    """Add an evaluation to the MLflow run of its training: every figure, the pictures, the page, the JSON.

    Nothing is written twice; the run's tag says which evaluation it has. What the training could not tell
    comes first.

    Args:
        training: folder of the training, which remembers its run.
        evaluated: the evaluation; its facts are the figures, its PNG, HTML and JSON files become artifacts.

    Returns:
        why MLflow does not have it, or None: a page that cannot be written is no reason to judge again.
    """
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    from registry.settings import layout

    try:
        run = (training / RUN_NAME).read_text("utf-8").strip()
    except OSError:
        return "this training was not tracked"
    now = int(time.time() * 1000)
    try:
        client = MlflowClient(layout().tracking_uri)  # looks for a database by then
        Outbox(connect=lambda: client, run_id=run, out=training).send()
        if client.get_run(run).data.tags.get(_EVALUATION_TAG) == str(evaluated.digest):
            return None
        figures = [
            Metric(f"evaluation/{name}", float(value), now, 0)
            for name, value in evaluated.facts.items()
            if isinstance(value, int | float) and math.isfinite(value)
        ]
        for start in range(0, len(figures), 1000):
            client.log_batch(run, metrics=figures[start : start + 1000])
        for path in sorted(evaluated.folder.iterdir()):
            if path.suffix in _SHOWN and path.name != STAGE_NAME:
                client.log_artifact(run, str(path), "evaluation")
        client.set_tag(run, _EVALUATION_TAG, str(evaluated.digest))
    except Exception as error:  # of HTTP, databases and object stores
        return brief(error)
    return None


def parameters(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values as one flat mapping with dotted names."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        flat.update(parameters(item, name + ".") if isinstance(item, Mapping) else {name: item})
    return flat
