"""The training of a flow: `accelerate launch` beside the flow, with what it says in the run's log."""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from prefect import get_run_logger

from flows import child, limits
from flows.errors import FlowError
from flows.settings import FlowSettings
from flows.training_page import Gauge, show_tracking
from registry.errors import Explained
from trainer import news
from trainer.job import Job
from trainer.launch import TELL, first_cause, found
from trainer.progress import Progress
from trainer.stage import StageResult, alone, write_atomically

CONFIG_NAME = "accelerate.json"
_LAST_LINES = 15


def launch(job: Job, settings: FlowSettings, progress: Progress) -> StageResult:
    """Do a training in processes of its own, unless it is complete, and return its result.

    It waits for another run that is at the same training, and takes what that made; else for GPU slots of the
    Prefect server. Whatever interrupts this function - a cancelled run, Ctrl-C - stops the training, which
    saves a checkpoint and has `FlowSettings.stop_seconds` for it.

    Raises:
        Explained: what the training itself said.
        FlowError: it ended without a word, or there are not as many GPU slots as it takes.
    """
    log = get_run_logger().info
    with alone(job.out, lambda: log("another run is at the same training: waiting for what it makes")):
        return found(job) or _train(job, settings, Listener(progress, log), log)


def _train(job: Job, settings: FlowSettings, listener: Listener, log: Callable[[str], None]) -> StageResult:
    config, processes = configuration(job.out, settings)
    with limits.gpus(processes, log):
        code = child.run(
            command(config, job.write(), processes),
            listener.hear,
            grace=settings.stop_seconds,
            environment={**os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(round(settings.stop_seconds))},
        )
    if done := found(job):
        return replace(done, reused=False)
    raise listener.why(code, job.out)


def configuration(out: Path, settings: FlowSettings) -> tuple[Path, int]:
    """Return accelerate's file for a training, and how many processes that starts on this machine.

    Without one of the user's own, a file in the training's folder says everything, so that what somebody once
    answered to `accelerate config` on this machine changes nothing.

    Raises:
        FlowError: the user's file cannot be read.
    """
    import torch

    if path := settings.accelerate_config:
        try:
            said = yaml.safe_load(path.read_text("utf-8"))
            return path, max(1, int(said["num_processes"]) // int(said.get("num_machines") or 1))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            raise FlowError(
                f"{path} is not a file of accelerate: {error!r}",
                "make it with `accelerate config --config_file FILE`, or unset "
                "ADAPTER_FOUNDRY_FLOWS_ACCELERATE_CONFIG",
            ) from None
    processes = settings.processes or max(1, torch.cuda.device_count())
    value = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU" if processes > 1 else "NO",
        "use_cpu": not torch.cuda.is_available(),
        "num_machines": 1,
        "machine_rank": 0,
        "num_processes": processes,
        "main_process_port": 0,
        "mixed_precision": "no",
    }
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / CONFIG_NAME, json.dumps(value, indent=1).encode())
    return out / CONFIG_NAME, processes


def command(config: Path, job: Path, processes: int) -> Sequence[str]:
    """Return the command line of a training that tells how far it is."""
    import torch

    # As many threads as in this process: the order of a sum depends on it, and with that the last bit.
    threads = torch.get_num_threads() if processes == 1 else 1
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--quiet"]
    return [
        *(*launcher, "--num_cpu_threads_per_process", str(threads)),
        *("--module", "trainer.launch", str(job), TELL),
    ]


class Listener:
    """Hears what a training says: progress moves a bar, an error is kept, any other line goes to the log."""

    def __init__(self, progress: Progress, log: Callable[[str], None]) -> None:
        self._progress, self._log = progress, log
        self._gauge = Gauge()
        self._problems: list[Explained] = []
        self._last: deque[str] = deque(maxlen=_LAST_LINES)

    def hear(self, stream: str, line: str) -> None:
        """Take a line of a stream."""
        told = news.read(line) if stream == "stdout" else None
        if told is None:
            self._last.append(line)
            self._log(line)
        elif "error" in told:
            self._problems.append(news.error_of(told))
        elif "run" in told:
            self._shown(show_tracking, told["run"])
        else:
            self._progress(**told)
            self._shown(self._gauge.show, told["done"], told["total"])

    def _shown(self, show: Callable[..., None], *values: Any) -> None:
        try:
            show(*values)
        except Exception as error:  # a page that cannot be drawn is no reason to stop a training
            self._log(f"Prefect's page does not show the training: {error!r}")

    def why(self, code: int, out: Path) -> Explained:
        """Return why a training that is not complete has ended with ``code``."""
        if self._problems:
            return first_cause(self._problems)
        how = f"by signal {code - 128}" if code > 128 else f"with status {code}"
        said = "".join(f"\n    {line}" for line in self._last)
        return FlowError(
            f"the training ended {how}{'; its last words:' if said else ' and said nothing'}{said}",
            "a process that is killed by signal 9 had often no memory left; correct what the words say, and "
            f"run the same again: it goes on from the last checkpoint in {out}",
        )
