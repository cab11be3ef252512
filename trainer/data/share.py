"""Encoding on several GPUs of one machine: a process each, that fills its share of one cache.

They need no meeting point: shares are by number, and the cache itself says what is there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

from trainer.errors import CacheError
from trainer.parent import end_with_parent
from trainer.progress import Progress
from trainer.recipe import Recipe


def encode_in_processes(
    recipe: Recipe, dataset: Path, base_path: Path, out: Path, progress: Progress, processes: int
) -> None:
    """Fill a cache in ``processes`` processes; process r computes on GPU r.

    They end when this process does, however that ends.

    Args:
        recipe, dataset, base_path, out: as in `trainer.data.cache_dataset`.
        progress: is told what the first process tells.
        processes: how many.

    Raises:
        CacheError: one of them failed; the others are ended, and what they had encoded is kept.
    """
    job = {
        "parent": os.getpid(),
        "recipe": recipe.model_dump(mode="json"),
        "dataset": str(dataset),
        "base_path": str(base_path),
        "out": str(out),
    }
    command = [sys.executable, "-m", "trainer.data.share", json.dumps(job)]
    started: list[subprocess.Popen[str]] = []
    failed: list[int] = []

    def end_all() -> None:
        for process in started:
            process.terminate()

    def watch(rank: int) -> None:
        if started[rank].wait():
            failed.append(rank)
            end_all()  # those that remain would wait for its share

    with ThreadPoolExecutor(processes) as watchers:
        try:
            for rank in range(processes):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                words = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
                started.append(
                    subprocess.Popen(command, env={**os.environ, **place}, stdout=words, text=True)
                )
            watched = [watchers.submit(watch, rank) for rank in range(processes)]
            for line in started[0].stdout or ():
                with suppress(ValueError, TypeError):
                    progress(*json.loads(line))
            wait(watched)
        finally:
            end_all()
            for process in started:
                process.wait()
    if failed:
        raise CacheError(
            f"the encoding process {failed[0]} of {processes} ended with status "
            f"{started[failed[0]].returncode}",
            "look at its message above, then run the same command again; what was encoded is kept",
        )


def _worker(job: dict[str, object]) -> None:
    """Be one of the processes; its number is in the environment."""
    end_with_parent()  # the thread that started this one waits for it
    if os.getppid() != job["parent"]:  # it ended while this one was still importing
        sys.exit(128 + signal.SIGTERM)
    from trainer.data.cache import cache_dataset

    def tell(stage: str, done: int, total: int, note: str = "") -> None:
        if os.environ["RANK"] == "0":
            print(json.dumps([stage, done, total, note]), flush=True)

    places = (Path(str(job[name])) for name in ("dataset", "base_path", "out"))
    cache_dataset(Recipe.model_validate(job["recipe"]), *places, tell)


if __name__ == "__main__":
    _worker(json.loads(sys.argv[1]))
