"""kill -9 in every stage of the pipeline: what the next run repeats, and what is lost.

    PYTHONPATH=tests python tests/bench/kills.py --table

One recipe is run again and again. Each run is killed in the next stage - the command, the server, the
training and every other process of it at once, as a power cut would - until one comes through. What was
repeated is read off the disk: a stage that was done again has a new ``stage.json``, a training says at which
checkpoint it went on. Prints one JSON object; ``--table`` writes the same as a table to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from fakes.pipelines import command, registry, small_recipe

REPOSITORY = Path(__file__).resolve().parent.parent.parent
#: A kill: the stage, and seconds after it began. What takes less than that is killed at its end.
KILLS: tuple[tuple[str, float], ...] = (
    *(("synthesise", 0.1), ("score", 0.05), ("triplets", 0.05), ("cache", 3.0), ("train", 0.0)),
    *(("evaluate", 1.0), ("scan", 0.02), ("licences", 0.0), ("push", 0.5), ("approve", 0.0)),
    *(("promote", 0.05), ("pull", 0.0), ("edit", 0.1)),
)
STEPS, CHECKPOINT_EVERY, STEPS_AT_THE_KILL = 24, 5, 8
#: Stages that leave a folder named after their inputs; the others run every time.
KEPT = ("synthesise", "score", "triplets", "cache", "train", "evaluate", "edit")
_PATIENCE = 600.0


@dataclass(frozen=True, kw_only=True)
class Killed:
    """What one kill left, and what the run after it made of that.

    Attributes:
        stage: in which it was killed.
        after: seconds after the stage began.
        processes: how many were killed.
        left: processes of the run that lived on.
        redone: stages that had been complete and were done again.
        steps: of the training at the kill, and how many of them were done again; None outside of it.
    """

    stage: str
    after: float
    processes: int
    left: int
    redone: tuple[str, ...]
    steps: tuple[int, int] | None = None


def longer(file: Path) -> Path:
    """Give a recipe's training enough steps to be killed between two checkpoints."""
    recipe = yaml.safe_load(file.read_text("utf-8"))
    recipe["optimiser"] |= {"steps": STEPS}
    recipe["running"] |= {"checkpoint_every": CHECKPOINT_EVERY, "log_every": 1}
    file.write_text(yaml.safe_dump(recipe))
    return file


def kill_in(
    home: Path, words: Sequence[str], stage: str, ready: Callable[[float], bool]
) -> tuple[int, int, float]:
    """Run a flow and kill all of it in a stage, once ``ready(seconds since it began)``.

    Args:
        home: its data folder.
        words: what Python is called with.
        stage: its name.
        ready: whether it is time.

    Returns:
        how many processes were killed, how many of them live on, seconds since the stage began.

    Raises:
        RuntimeError: the run ended before.
    """
    environment = {**os.environ, "ADAPTER_FOUNDRY_HOME": str(home), "OMP_NUM_THREADS": "1"}
    environment.pop("PREFECT_HOME", None)
    run = subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    said: list[str] = []
    began, ended = threading.Event(), threading.Event()

    def listen() -> None:
        for line in run.stderr or ():
            said.append(line)
            words = line.split()
            if began.is_set() and line.startswith("      ") and (" s: " in line or "reused: " in line):
                ended.set()
            if len(words) > 1 and words[0].startswith("[") and words[1] == f"{stage}:":
                began.set()

    threading.Thread(target=listen, daemon=True).start()
    try:
        if not _wait(began.is_set, run):
            raise RuntimeError(f"the run ended before {stage}:\n{''.join(said[-15:])}")
        begun = time.monotonic()
        while not ready(time.monotonic() - begun) and not ended.is_set() and run.poll() is None:
            time.sleep(0.005)
        after = time.monotonic() - begun
    finally:
        family = kill_tree(run)
    _, alive = psutil.wait_procs(family, timeout=120)
    return len(family), len(alive), after


def _wait(until: Callable[[], bool], run: subprocess.Popen[str]) -> bool:
    end = time.monotonic() + _PATIENCE
    while not until() and run.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    return until()


def kill_tree(run: subprocess.Popen[str]) -> list[psutil.Process]:
    """SIGKILL a process and all below it, stopped first so that nobody sees the others die."""
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(run.pid)
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in [root, *root.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
                    if process not in family:
                        family.append(process)
    run.wait()
    return family


def marks(home: Path) -> dict[str, tuple[int, int]]:
    """Return what tells a stage's output from one that was made again, by folder."""
    found = {}
    for path in home.glob("runs/*/*/stage.json"):
        if path.parent.name.rpartition("-")[0] in KEPT:
            status = path.stat()
            found[path.parent.name] = (status.st_ino, status.st_mtime_ns)
    return found


def lines(home: Path) -> int:
    """Return how many steps the training has on record."""
    return sum(len(path.read_bytes().splitlines()) for path in home.glob("runs/*/train-*/loss.jsonl"))


def checkpoint(home: Path) -> int:
    """Return the step of the newest checkpoint."""
    names = [path.name for path in home.glob("runs/*/train-*/checkpoints/step-*")]
    return max((int(name.rpartition("-")[2]) for name in names), default=0)


def kill_in_each(home: Path, recipe: Path, kills: Sequence[tuple[str, float]]) -> list[Killed]:
    """Run a recipe, killed in one stage after the other; compare what was complete before each kill."""
    done: list[Killed] = []
    for stage, seconds in kills:
        before = marks(home)

        def ready(passed: float, stage: str = stage, seconds: float = seconds) -> bool:
            return lines(home) >= STEPS_AT_THE_KILL if stage == "train" else passed >= seconds

        processes, left, after = kill_in(home, ["-m", "flows.pipeline", str(recipe)], stage, ready)
        again = {name for name, mark in marks(home).items() if before.get(name, mark) != mark}
        row = Killed(
            stage=stage,
            after=round(after, 2),
            processes=processes,
            left=left,
            redone=tuple(sorted(again)),
            steps=(lines(home), lines(home) - checkpoint(home)) if stage == "train" else None,
        )
        print(row, file=sys.stderr, flush=True)
        done.append(row)
    return done


def finish(home: Path, recipe: Path) -> tuple[dict[str, Any], float]:
    """Run to the end; return the summary and the seconds."""
    begun = time.monotonic()
    run = command(home, "-m", "flows.pipeline", str(recipe), "--json")
    if run.returncode != 0:
        raise RuntimeError(run.stderr)
    return json.loads(run.stdout), time.monotonic() - begun


def weights(home: Path) -> str:
    """Return the digest of the trained weights."""
    (path,) = home.glob("runs/*/train-*/stage.json")
    return str(json.loads(path.read_bytes())["digest"])


def versions(home: Path) -> list[str]:
    """Return the versions that the registry lists."""
    listed = json.loads(registry(home, "list", "--json").stdout)
    rows = listed["adapters"] if isinstance(listed, dict) else listed
    return [row["reference"] for row in rows]


def leftovers(home: Path) -> list[str]:
    """Return what killed runs left half-made in the run folder: hidden names."""
    return sorted(path.name for path in (home / "runs").glob("*/.*"))


def measure(kills: Sequence[tuple[str, float]], work: Path) -> dict[str, Any]:
    """Kill, finish, run once more, and compare with a run that nobody disturbed."""
    homes = {name: work / name for name in ("killed", "undisturbed")}
    for home in homes.values():
        home.mkdir(parents=True)
    recipe = longer(small_recipe(REPOSITORY, work / "small.yaml"))
    rows = kill_in_each(homes["killed"], recipe, kills)
    before = marks(homes["killed"])
    summary, seconds = finish(homes["killed"], recipe)
    redone = [name for name, mark in marks(homes["killed"]).items() if before.get(name, mark) != mark]
    trained = next(row for row in homes["killed"].glob("runs/*/train-*/stage.json"))
    _, unchanged = finish(homes["killed"], recipe)
    again = [name for name, mark in marks(homes["killed"]).items() if before.get(name, mark) != mark]
    _, undisturbed = finish(homes["undisturbed"], recipe)
    times = {"last_run": seconds, "unchanged": unchanged, "undisturbed": undisturbed}
    return {
        "kills": [asdict(row) for row in rows],
        "redone_at_the_end": sorted({*redone, *again}),
        "resumed_from": json.loads(trained.read_bytes())["facts"]["resumed_from"],
        "same_weights": weights(homes["killed"]) == weights(homes["undisturbed"]),
        "versions": versions(homes["killed"]),
        "alias": summary["adapter"],
        "leftovers": leftovers(homes["killed"]),
        "seconds": {name: round(value, 1) for name, value in times.items()},
    }


def table(value: dict[str, Any]) -> str:
    """Return the measurement for people."""
    rows = ["| killed in | after | processes | left | done again | steps of the training |"]
    rows += ["| --- | --- | --- | --- | --- | --- |"]
    for row in value["kills"]:
        steps = "" if row["steps"] is None else f"{row['steps'][0]} done, {row['steps'][1]} repeated"
        again = ", ".join(row["redone"]) or "nothing that was complete"
        rows.append(
            f"| {row['stage']} | {row['after']} s | {row['processes']} | {row['left']} | {again} | {steps} |"
        )
    rest = {name: one for name, one in value.items() if name != "kills"}
    return "\n".join([*rows, "", *(f"{name}: {one}" for name, one in rest.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", default=",".join(stage for stage, _ in KILLS), help="comma separated")
    parser.add_argument("--table", action="store_true")
    chosen = parser.parse_args()
    kills = [(stage, seconds) for stage, seconds in KILLS if stage in chosen.stages.split(",")]
    work = Path(tempfile.mkdtemp(prefix="kills-"))
    try:
        value = measure(kills, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(json.dumps(value, sort_keys=True))
    if chosen.table:
        print(table(value), file=sys.stderr)


if __name__ == "__main__":
    main()
