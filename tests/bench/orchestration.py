"""What Prefect costs: synthesis, scoring and triplets of many pictures in a flow, against plain Python.

    PYTHONPATH=tests python tests/bench/orchestration.py [--items 10000] [--workers 2]

The work is the same, real and cheap: 64-pixel portraits are rendered, judged and made into triplets, shared
between as many processes. Prints one JSON line: task runs, seconds and CPU seconds of both (the flow's with
those of the Prefect server, from the call of the flow until every task run is recorded), and what the flow
took more, as a part of the plain seconds. The start of the server is not among them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ITEMS = 1000
"""Pictures of the short run; the figure of the docs has 10,000."""


def cpu() -> float:
    """CPU seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


@contextmanager
def measured(figures: dict[str, float], name: str) -> Iterator[None]:
    """Add wall and CPU seconds of a block."""
    wall, used = time.monotonic(), cpu()
    yield
    figures[f"{name}_seconds"] = round(time.monotonic() - wall, 2)
    figures[f"{name}_cpu_seconds"] = round(cpu() - used, 2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=ITEMS)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["ADAPTER_FOUNDRY_FLOWS_WORKERS"] = str(given.workers)
    with tempfile.TemporaryDirectory() as place:
        os.environ["ADAPTER_FOUNDRY_HOME"] = str(Path(place) / "home")
        Path(os.environ["ADAPTER_FOUNDRY_HOME"]).mkdir()
        print(json.dumps(run(Path(place), given.items, given.workers), sort_keys=True))


def run(place: Path, items: int, workers: int) -> dict[str, float]:
    """Do the work both ways and return the figures."""
    from trainer.data import build_triplets
    from trainer.parts import processes
    from trainer.recipe import change, load
    from trainer.scoring import score
    from trainer.synthesis import synthesise

    shipped = load("pixelsmile-portraits")
    faces = 1 + len(shipped.conditioning.expressions) * len(shipped.data.intensities)
    people = max(2, round(items / faces))
    changes = {"data.identities": {"human": people - 1}, "data.validation": {"human": 1}}
    recipe = change(shipped, changes)
    figures: dict[str, float] = {"items": people * faces, "workers": workers}
    shared = processes(workers)

    def quiet(stage: str, done: int, total: int, note: str = "") -> None:
        """Tell nobody."""

    with measured(figures, "plain"):
        images = synthesise(recipe, place / "images", quiet, mapper=shared)
        scores = score(recipe, images.folder, place / "scores", quiet, mapper=shared)
        plain = build_triplets(recipe, images.folder, scores.folder, place / "triplets", quiet, mapper=shared)
    figures |= flow(changes, str(plain.digest))
    figures["overhead"] = round(figures["flow_seconds"] / figures["plain_seconds"] - 1, 4)
    used = figures["flow_cpu_seconds"] + figures["server_cpu_seconds"]
    figures["cpu_overhead"] = round(used / figures["plain_cpu_seconds"] - 1, 4)
    return figures


def flow(changes: dict[str, object], expected: str) -> dict[str, float]:
    """Do the work in the flow and return its figures."""
    import psutil

    from flows.server import ask, attached, managed_server
    from flows.settings import prepare
    from registry.settings import home

    prepare(home())
    figures: dict[str, float] = {}
    with managed_server(home()) as server:
        from flows.job import dataset
        from flows.parameters import RecipeChoice

        process = psutil.Process(server.pid)
        with attached(home(), server.url):
            before = sum(process.cpu_times()[:2])
            with measured(figures, "flow"):
                made = dataset(RecipeChoice(changes=changes))
            figures["server_cpu_seconds"] = round(sum(process.cpu_times()[:2]) - before, 2)
            assert made["digest"] == expected, "the flow makes the same dataset"
            figures["task_runs"] = ask(f"{server.url}/task_runs/count", {})
    return figures


if __name__ == "__main__":
    main()
