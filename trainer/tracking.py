"""One MLflow run for a training: its parameters, loss curves and digests, in the registry's own database."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

_EXPERIMENT = "adapter-foundry"


class Tracker:
    """Collects metrics and writes them in batches; with ``enabled=False`` it does nothing."""

    def __init__(self, name: str, parameters: Mapping[str, Any], *, enabled: bool = True) -> None:
        self.run_id: str | None = None
        self._waiting: list[Any] = []
        if not enabled:
            return
        from mlflow import MlflowClient
        from mlflow.entities import Param

        from registry.settings import layout

        place = layout()
        if place.tracking_uri.startswith("sqlite:///"):
            place.home.joinpath("registry").mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(place.tracking_uri)
        found = self._client.get_experiment_by_name(_EXPERIMENT)
        experiment = found.experiment_id if found else self._client.create_experiment(_EXPERIMENT)
        self.run_id = self._client.create_run(experiment, run_name=name).info.run_id
        self._client.log_batch(
            self.run_id, params=[Param(key, str(value)) for key, value in parameters.items()]
        )

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Take the metrics of a step; values that are not finite are left out."""
        if self.run_id is None:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._waiting += [
            Metric(key, value, now, step) for key, value in values.items() if math.isfinite(value)
        ]
        if len(self._waiting) > 500:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        for start in range(0, len(self._waiting), 1000):
            self._client.log_batch(self.run_id, metrics=self._waiting[start : start + 1000])
        self._waiting = []

    def close(self, status: str = "FINISHED") -> None:
        """End the run: "FINISHED", "KILLED" (it will go on from a checkpoint) or "FAILED"."""
        if self.run_id is not None:
            self.flush()
            self._client.set_terminated(self.run_id, status)


def parameters(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values as one flat mapping with dotted names."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        flat.update(parameters(item, name + ".") if isinstance(item, Mapping) else {name: item})
    return flat
