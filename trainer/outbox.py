"""What MLflow gets of a training, and when: a training neither waits for MLflow nor ends with it.

Figures and pictures are put into an `Outbox`, which a thread empties every half minute and whenever there is
much. While MLflow is away everything waits, within bounds, and is tried again. What still waits when the
training ends lies in ``mlflow-waiting.json`` of its folder: the same command sends it, whether the training
is done or goes on, and so does its evaluation in a flow. MLflow keeps a figure once that it gets twice, so
nothing has to be known about what arrived.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.errors import NetworkError
from registry.storage.database import masked
from trainer.stage import write_atomically

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from PIL import Image

RUN_NAME, WAITING_NAME = "mlflow-run.txt", "mlflow-waiting.json"
_EXPERIMENT = "adapter-foundry"
_MUCH, _AT_ONCE = 500, 1000
#: Some 40 MB of memory, and more steps than a training does while a server is mended.
_MOST_FIGURES = 200_000
#: Grids of a large base take tens of megabytes, and all of them lie in the training's folder anyway.
_MOST_PICTURES = 8
_AGAIN_SECONDS = 30.0
#: How long the end of a training waits for MLflow. Who is told to stop may be killed soon.
_LAST_SECONDS = {"FINISHED": 120.0}
_LAST_SECONDS_OF_OTHERS = 15.0
_LOG = logging.getLogger(__name__)

Figure = tuple[str, float, int, int]
"""Name, value, milliseconds since 1970, step."""


@dataclass(kw_only=True)
class Outbox:
    """What a run still has to get.

    Attributes:
        connect: gives the client; a database that is away makes none.
        run_id: whose figures they are.
        out: folder of the training, where `keep` leaves what waits.
        status: to be told, or None.
        away: the last try failed.
    """

    connect: Callable[[], MlflowClient]
    run_id: str
    out: Path
    status: str | None = None
    away: bool = False
    _figures: deque[Figure] = field(default_factory=lambda: deque(maxlen=_MOST_FIGURES))
    _sending: list[Figure] = field(default_factory=list)
    _pictures: deque[tuple[str, Image.Image]] = field(default_factory=lambda: deque(maxlen=_MOST_PICTURES))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        """Take up what `keep` left for this run."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            value = json.loads((self.out / WAITING_NAME).read_bytes())
            if value["run"] == self.run_id:
                self._figures.extend(
                    (str(key), float(x), int(at), int(step)) for key, x, at, step in value["figures"]
                )
                self.status = value["status"]

    @property
    def much(self) -> bool:
        """Whether there is enough to send it now."""
        return len(self._figures) > _MUCH or bool(self._pictures) or self.status is not None

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Take the figures of a step."""
        now = int(time.time() * 1000)
        with self._lock:
            self._figures.extend((key, float(value), now, step) for key, value in values.items())

    def add_picture(self, file: str, image: Image.Image) -> None:
        """Take a picture."""
        with self._lock:
            self._pictures.append((file, image))

    def tell(self, status: str) -> None:
        """Take how the run is by now; of an older one nothing is told any more."""
        with self._lock:
            self.status = status

    def send(self) -> None:
        """Send everything that waits; what has arrived does not wait any more, whatever fails after it.

        Raises:
            Exception: MLflow, or where it keeps pictures, does not take it; each has its own ones.
        """
        from mlflow.entities import Metric

        client = self.connect()
        while figures := self._next():
            client.log_batch(self.run_id, metrics=[Metric(*one) for one in figures])
            with self._lock:
                self._sending = []
        if (status := self.status) is not None:
            client.set_terminated(self.run_id, status)
        self._arrived(status)
        while self._pictures:
            file, image = self._pictures[0]
            client.log_image(self.run_id, image, artifact_file=file)
            with self._lock:
                if self._pictures[0][1] is image:  # or so many have come that it was dropped
                    self._pictures.popleft()

    def try_to_send(self) -> None:
        """Send, or remember that MLflow is away, and say once that it is."""
        try:
            self.send()
        except Exception as error:  # of HTTP, databases and object stores: none is a reason to stop
            if not self.away:
                _LOG.warning(
                    "MLflow does not take the figures of this training: %s. They wait and are sent when it "
                    "does; loss.jsonl and validation/ in %s have them meanwhile.", brief(error), self.out,
                )  # fmt: skip
            self.away = True
        else:
            if self.away:
                _LOG.warning("MLflow takes the figures of this training again.")
            self.away = False

    def keep(self) -> None:
        """Leave what still waits in the training's folder, but for pictures, which are there."""
        with self._lock:  # over the writing, too: a thread that still sends removes the file, see `_arrived`
            figures = [*self._sending, *self._figures]
            if not figures and self.status is None:
                return
            value = {"run": self.run_id, "status": self.status, "figures": figures}
            try:
                write_atomically(self.out / WAITING_NAME, json.dumps(value).encode())
            except OSError as error:
                _LOG.warning("%d figures for MLflow are lost: %s", len(figures), error)
                return
        _LOG.warning(
            "%d figures wait for MLflow in %s: the same command sends them, or the evaluation in a flow.",
            len(figures), self.out / WAITING_NAME,
        )  # fmt: skip

    def _arrived(self, status: str | None) -> None:
        """Note that MLflow has all figures and this status, unless more came meanwhile.

        A try may take minutes, and what came since may lie in the file by now: it goes when nothing waits.
        """
        with self._lock:
            if self.status == status:
                self.status = None
            if not self._sending and not self._figures and self.status is None:
                (self.out / WAITING_NAME).unlink(missing_ok=True)

    def _next(self) -> list[Figure]:
        """Return the figures of the next request; the same again until they have arrived."""
        with self._lock:
            if not self._sending:
                count = min(_AT_ONCE, len(self._figures))
                self._sending = [self._figures.popleft() for _ in range(count)]
            return self._sending


class MlflowRun:
    """The MLflow run of a training: its `Outbox`, and the thread that empties it.

    Args:
        name, parameters, recipe, out: see `trainer.tracking.Tracker`.

    Raises:
        NetworkError: there is no run yet, and MLflow makes none.
    """

    def __init__(
        self, name: str, parameters: Mapping[str, Any], out: Path, recipe: Mapping[str, Any]
    ) -> None:
        from mlflow import MlflowClient

        from registry.settings import layout

        place = layout()
        folder = place.home / "registry"
        # Without a location MLflow puts the pictures into the folder that this process happens to run in.
        pictures = (folder / "mlruns").as_uri() if place.tracking_uri.startswith("sqlite:///") else None
        if pictures is not None:
            folder.mkdir(parents=True, exist_ok=True)
        # A client of a database connects when it is made: one that cannot be made is tried for again later.
        connect = cache(partial(MlflowClient, place.tracking_uri))
        before = _before(connect, out)
        try:
            self.run_id = before or _begun(connect(), name, parameters, recipe, pictures)
        except Exception as error:
            raise NetworkError(
                f"MLflow at {masked(place.tracking_uri)} takes no run of this training: {brief(error)}",
                mend="see whether it answers and takes this account (MLFLOW_TRACKING_URI, "
                "MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD), and run the same command again",
            ) from error
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / RUN_NAME, self.run_id.encode())
        self._outbox = Outbox(connect=connect, run_id=self.run_id, out=out)
        self._outbox.status = "RUNNING" if before else None
        self._changed, self._closing, self._left = threading.Condition(), False, False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._outbox.add(step, values)
        self._look()

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        self._outbox.add_picture(f"{name}/step-{step:06d}.png", image)
        self._look()

    def close(self, status: str) -> None:
        """Tell how the training ended, and wait a while until everything has arrived."""
        self._outbox.tell(status)
        self._closing = True
        self._look()
        self._thread.join(_LAST_SECONDS.get(status, _LAST_SECONDS_OF_OTHERS))
        self._left = True
        self._outbox.keep()

    def _look(self) -> None:
        with self._changed:
            self._changed.notify()

    def _work(self) -> None:
        """Send until the end; MLflow may take minutes for a try, for it tries several times itself."""
        closing = False
        while not closing and not self._left:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closing or (self._outbox.much and not self._outbox.away), _AGAIN_SECONDS
                )
                closing = self._closing
            self._outbox.try_to_send()


def _before(connect: Callable[[], MlflowClient], out: Path) -> str | None:
    """Return the run that an earlier part of this training began, if it is still there.

    While MLflow does not answer it is: a second one would have half of the curve each.
    """
    from mlflow.exceptions import MlflowException

    try:
        run_id = (out / RUN_NAME).read_text("utf-8").strip()
    except OSError:
        return None
    try:
        stage = connect().get_run(run_id).info.lifecycle_stage if run_id else None
    except Exception as error:
        if isinstance(error, MlflowException) and error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        return run_id
    return run_id if stage == "active" else None


def _begun(
    client: MlflowClient,
    name: str,
    parameters: Mapping[str, Any],
    recipe: Mapping[str, Any],
    pictures: str | None,
) -> str:
    """Begin a run and return its id."""
    from mlflow.entities import Param

    found = client.get_experiment_by_name(_EXPERIMENT)
    experiment = (
        found.experiment_id if found else client.create_experiment(_EXPERIMENT, artifact_location=pictures)
    )
    run_id = str(client.create_run(experiment, run_name=name).info.run_id)
    client.log_batch(run_id, params=[Param(key, str(value)) for key, value in parameters.items()])
    client.log_dict(run_id, dict(recipe), "recipe.json")
    return run_id


def send_waiting(out: Path) -> None:
    """Send what a training that is done could not tell, if there is something, and wait a while for that.

    What MLflow does not take now waits for the next time.

    Args:
        out: folder of the training.
    """
    if not (out / WAITING_NAME).is_file():
        return

    def send() -> None:
        from mlflow import MlflowClient

        from registry.settings import layout

        try:
            run = (out / RUN_NAME).read_text("utf-8").strip()
            Outbox(connect=partial(MlflowClient, layout().tracking_uri), run_id=run, out=out).send()
        except Exception as error:  # of HTTP and databases: the training is done, whatever MLflow has of it
            _LOG.warning(
                "MLflow does not take what waits for it in %s: %s. The same command tries again.",
                out / WAITING_NAME, brief(error),
            )  # fmt: skip

    thread = threading.Thread(target=send, name="mlflow", daemon=True)
    thread.start()
    thread.join(_LAST_SECONDS["FINISHED"])
    if thread.is_alive():
        _LOG.warning("MLflow has not taken all of %s yet; the same command tries again.", out / WAITING_NAME)


def brief(error: Exception) -> str:
    """Return what MLflow, or where it keeps pictures, says of a failure: for people, without passwords."""
    return masked(str(error))
