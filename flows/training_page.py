"""What a training shows in Prefect's page while it runs: how far it is, and where its figures go."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uuid import UUID

PROGRESS, TRACKING = "training-progress", "training-figures"
_SECONDS = 10.0


class Gauge:
    """The progress bar of a training, moved every ten seconds at most: each move is a request."""

    def __init__(self) -> None:
        self._artifact: UUID | None = None
        self._moved = 0.0

    def show(self, done: int, total: int) -> None:
        """Show ``done`` of ``total`` steps."""
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        share = 100.0 * done / max(1, total)
        now = time.monotonic()
        if self._artifact is None:
            text = "Steps of the training that are done."
            # Prefect's functions are typed for both ways of calling them; this is the synchronous one.
            self._artifact = create_progress_artifact(share, key=PROGRESS, description=text)  # type: ignore[assignment]
        elif now - self._moved < _SECONDS and done < total:
            return
        else:
            update_progress_artifact(self._artifact, share)
        self._moved = now


def show_tracking(run: str) -> None:
    """Show the way to an MLflow run: a link where there is a server, a command where there is none."""
    from prefect.artifacts import create_link_artifact, create_markdown_artifact

    from registry.settings import layout
    from registry.storage.database import without_passwords

    uri = layout().tracking_uri
    named = without_passwords(uri)
    if uri.startswith(("http://", "https://")):
        from mlflow import MlflowClient

        experiment = MlflowClient(uri).get_run(run).info.experiment_id
        link = f"{named.rstrip('/')}/#/experiments/{experiment}/runs/{run}"
        create_link_artifact(link, link_text=f"MLflow run {run}", key=TRACKING)
        return
    create_markdown_artifact(
        f"The training's figures are in MLflow's run `{run}`.\n\n    mlflow ui --backend-store-uri {named}",
        key=TRACKING,
    )
