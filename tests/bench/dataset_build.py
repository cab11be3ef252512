"""Building a dataset from drawn pictures: images a second and peak memory of each stage.

    PYTHONPATH=tests python tests/bench/dataset_build.py [--images 6000] [--keep DIR]

Prints one JSON line. The stages are the real ones (the renderer, the shipped judge, all filters that look at
no face), each in a process of its own, as in a flow. ``peak_mib`` is the most memory that a stage's process
and its children hold at once: resident pages, shared ones counted in each process, looked at every 50 ms.
Memory grows with the rows of the tables only: compare two numbers of images.

Three peers do parts of the work on the same bytes, in the same run and one process: ``files`` writes them as
plain files named by their sha256, which no store of pictures can beat by much; ``webdataset`` writes them
with webdataset's `ShardWriter`; ``drawing`` draws and packs pictures and keeps nothing, which is the least
that the first stage can take in one process. ``ratio`` is ours by theirs in images a second.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

STAGES = ("synthesise", "score", "triplets", "open")
_FACES = 37  # pictures of a person: neutral, and twelve expressions at three intensities
_SAMPLE = 6000  # pictures that the peers write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    if asked.stage:
        print(json.dumps(stage(asked.stage, asked.images, asked.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(measured(asked.images, asked.keep or Path(temporary))))


def measured(images: int, folder: Path) -> dict[str, Any]:
    """Run everything and return what is printed."""
    told: dict[str, Any] = {"bench": "dataset_build", "cpus": os.cpu_count()}
    for name in STAGES:
        found, peak = watched(name, images, folder)
        count = found.pop("images")
        seconds = found["seconds"]
        told[name] = found | {
            "images_a_second": round(count / seconds, 1),
            "peak_mib": round(peak / (1 << 20)),
        }
        told["images"] = count
    blobs = list((folder / "images" / "blobs").rglob("*.png"))[:_SAMPLE]
    told["bytes"] = {name: size(folder / name) for name in ("images", "scored", "dataset")}
    told["peers"] = {name: round(rate, 1) for name, rate in peers(blobs, folder).items()}
    told["ratio"] = {
        "triplets/files": ratio(told, "triplets", "files"),
        "triplets/webdataset": ratio(told, "triplets", "webdataset"),
        "synthesise/drawing": ratio(told, "synthesise", "drawing"),
    }
    return told


def ratio(told: dict[str, Any], ours: str, peer: str) -> float:
    """Return images a second of a stage by those of a peer."""
    return round(told[ours]["images_a_second"] / told["peers"][peer], 3)


def watched(name: str, images: int, folder: Path) -> tuple[dict[str, Any], int]:
    """Run a stage in a process of its own; return what it tells and its peak memory in bytes."""
    command = [sys.executable, __file__, "--stage", name, "--images", str(images), "--folder", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peak, ended = 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not ended.wait(0.05):
                peak = max(peak, sum(resident(one) for one in family(process.pid)))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            told, _ = process.communicate()
        finally:
            ended.set()
            watcher.join()
    if process.returncode:
        raise SystemExit(f"the stage {name} ended with {process.returncode}")
    return json.loads(told), peak


def family(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    found = [pid]
    for one in found:
        try:
            for task in os.scandir(f"/proc/{one}/task"):
                found += map(int, Path(task.path, "children").read_text().split())
        except OSError:
            continue  # it has ended meanwhile
    return found


def resident(pid: int) -> int:
    """Return the resident memory of a process in bytes."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def stage(name: str, images: int, folder: Path) -> dict[str, Any]:
    """Run a stage in this process."""
    from trainer import recipe as recipes
    from trainer.data import Dataset, build_triplets
    from trainer.recipe import Recipe
    from trainer.scoring import score
    from trainer.synthesis import synthesise

    values = recipes.load("pixelsmile-portraits").model_dump(mode="json", exclude_unset=True)
    people = max(2, round(images / _FACES))
    training = max(1, round(people * 0.92))
    values["data"] |= {
        "identities": {"human": training}, "validation": {"human": people - training},
        "filters": values["data"]["filters"] | {
            "min_confidence": 0.1, "min_sharpness": 100.0, "max_unchanged": 0, "max_duplicate": 16,
        },
    }  # fmt: skip
    recipe = Recipe.model_validate(values)
    stages: dict[str, Callable[[], Any]] = {
        "synthesise": lambda: synthesise(recipe, folder / "images"),
        "score": lambda: score(recipe, folder / "images", folder / "scored"),
        "triplets": lambda: (
            build_triplets(recipe, folder / "images", folder / "scored", folder / "dataset").facts
        ),
        "open": lambda: len(Dataset.open(folder / "dataset").triplets),
    }
    start = time.perf_counter()
    found = stages[name]()
    told: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 2), "images": people * _FACES}
    if name == "triplets":
        told |= {
            "triplets": found["triplets"],
            "left_out": {one["filter"]: one["left_out"] for one in found["filters"]["pictures"]},
        }
    return told


def peers(blobs: list[Path], folder: Path) -> dict[str, float]:
    """Return images a second of three peers on the same bytes."""
    data = [path.read_bytes() for path in blobs]
    found = {}
    for name, write in (("files", plain_files), ("webdataset", shards)):
        place = folder / f"peer-{name}"
        place.mkdir()
        start = time.perf_counter()
        write(data, place)
        found[name] = len(data) / (time.perf_counter() - start)
    return found | {"drawing": drawing(min(1000, len(data)))}


def plain_files(data: list[bytes], folder: Path) -> None:
    for one in data:
        (folder / sha256(one).hexdigest()).write_bytes(one)


def shards(data: list[bytes], folder: Path) -> None:
    import webdataset

    with webdataset.ShardWriter(str(folder / "%06d.tar"), maxcount=1000, verbose=0) as writer:
        for number, one in enumerate(data):
            writer.write({"__key__": f"{number:08d}", "png": one})


def drawing(count: int) -> float:
    """Return how many pictures a second are drawn and packed."""
    from trainer.data.blobs import encode_png
    from trainer.portraits.expressions import EXPRESSIONS
    from trainer.portraits.renderer import identity, one_hot, pose, render

    start = time.perf_counter()
    for number in range(count):
        person = identity(40000 + number // _FACES, "human")
        vector = one_hot(EXPRESSIONS[number % 12], 0.67)
        encode_png(render(person, vector, 64, pose(number // _FACES)))
    return count / (time.perf_counter() - start)


def size(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
