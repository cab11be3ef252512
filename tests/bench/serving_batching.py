"""Eight callers at one device: steps shared by all that ask, against one request after another.

    PYTHONPATH=tests OMP_NUM_THREADS=1 python tests/bench/serving_batching.py [CALLERS] [EDITS] [ROUNDS]

Prints one JSON line. Each caller sends its edits one after another, each with a seed and a portrait of its
own, on the shipped base. ``together_s`` is what all edits take through the scheduler, whose batches have up
to 16 rows; ``alone_s`` is the same with batches of one row, which is what a server does that holds a lock
around its pipeline. ``same`` is with one adapter for all callers, ``own`` with one for each. Nothing is
cached. Rounds alternate, figures are medians of processor seconds on one thread; ``speedup`` is their ratio.
``largest_difference`` is that between the pictures of both, in 8-bit levels.

``single_s`` is the latency (by the clock on the wall) of a single edit of four steps while another caller's
sweep of 64 rows and 20 steps is under way; ``behind_s`` that of the same edit when it is sent with the key of
the sweep, so that it waits for its turn behind the rows of the sweep.
"""

from __future__ import annotations

import json
import queue
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image

from fakes.adapters import clean_adapter
from registry.admission import Policy, VerifiedAdapter, admit_candidate
from registry.families import KNOWN_BASES
from registry.manifest import BaseModelRef
from serving.backend import Progress
from serving.engine import EditEngine
from serving.pipelines import load
from serving.quiet import quiet_libraries
from serving.scheduler import Scheduler
from serving.schema import SweepRequest
from trainer.portraits import base_path
from trainer.portraits.renderer import identity, render

BASE = KNOWN_BASES["adapter-foundry/portraits-base"]
STEPS = 8


def edit(
    scheduler: Scheduler, request: SweepRequest, adapter: VerifiedAdapter, key: str
) -> list[Image.Image]:
    """Send a request and wait for its pictures."""
    heard: queue.Queue[Any] = queue.Queue()
    scheduler.enter(scheduler.take(request, key=key, listener=heard.put), ((adapter, 1.0),))
    while isinstance(event := heard.get(timeout=300), Progress):
        pass
    if isinstance(event, Exception):
        raise event
    return [result.image for result in event]


def portrait(subject: int) -> Image.Image:
    """Somebody's portrait."""
    return Image.fromarray(render(identity(80_000 + subject, "human"), np.zeros(12)))


def admitted(seed: int) -> VerifiedAdapter:
    """An adapter of random weights."""
    return admit_candidate(clean_adapter(BASE, seed=seed), Policy(allow_review=True))


def serve(
    engine: EditEngine, asked: list[list[SweepRequest]], adapters: list[VerifiedAdapter], rows: int
) -> tuple[float, list[Image.Image]]:
    """Answer all callers' requests in batches of so many rows; return the seconds and the pictures."""
    scheduler = Scheduler(engine, max_rows=rows, max_waiting=1000)
    scheduler.start()

    def caller(number: int) -> list[Image.Image]:
        adapter = adapters[number % len(adapters)]
        return [edit(scheduler, request, adapter, str(number))[0] for request in asked[number]]

    with ThreadPoolExecutor(len(asked)) as pool:
        begun = time.process_time()
        pictures = [one for found in pool.map(caller, range(len(asked))) for one in found]
        taken = time.process_time() - begun
    scheduler.drain(0)
    return taken, pictures


def compare(
    engine: EditEngine, adapters: list[VerifiedAdapter], callers: int, edits: int, rounds: int
) -> dict[str, float]:
    """Figures of both ways with some adapters."""
    asked = [
        [
            SweepRequest(image=portrait(one), rows=({"happy": 0.8},), seed=one, steps=STEPS)
            for one in range(number * edits, (number + 1) * edits)
        ]
        for number in range(callers)
    ]
    found: dict[int, list[float]] = {16: [], 1: []}
    difference = 0
    for _ in range(rounds):
        pictures = []
        for rows, seconds in found.items():
            taken, made = serve(engine, asked, adapters, rows)
            seconds.append(taken)
            pictures.append(np.asarray([np.asarray(one, np.int16) for one in made]))
        difference = max(difference, int(np.abs(pictures[0] - pictures[1]).max()))
    return {
        "together_s": round(statistics.median(found[16]), 2),
        "alone_s": round(statistics.median(found[1]), 2),
        "speedup": round(statistics.median(a / t for t, a in zip(*found.values(), strict=True)), 2),
        "largest_difference": difference,
    }


def beside_a_sweep(engine: EditEngine, adapter: VerifiedAdapter, key: str) -> float:
    """Seconds of a single edit that comes when a sweep is under way."""
    scheduler = Scheduler(engine, max_rows=16, max_waiting=1000)
    scheduler.start()
    rows = tuple({"happy": n / 64} for n in range(64))
    heard: queue.Queue[Any] = queue.Queue()
    ticket = scheduler.take(
        SweepRequest(image=portrait(0), rows=rows, steps=20), key="sweep", listener=heard.put
    )
    scheduler.enter(ticket, ((adapter, 1.0),))
    heard.get(timeout=300)
    begun = time.perf_counter()
    edit(scheduler, SweepRequest(image=portrait(1), rows=({"happy": 0.5},), steps=4), adapter, key)
    taken = time.perf_counter() - begun
    scheduler.cancel(ticket)
    scheduler.drain(0)
    return taken


def main(count: int, edits: int, rounds: int) -> None:
    """Measure and print."""
    quiet_libraries()
    torch.set_num_threads(1)
    base = BaseModelRef(id=BASE.id, revision=BASE.revision, family=BASE.family, license=BASE.license)
    pipeline = load(base.family, base_path())
    engine = EditEngine(pipeline, base=base, allow_candidates=True, cache_memory=0)
    adapters = [admitted(seed) for seed in range(count)]
    serve(engine, [[SweepRequest(image=portrait(0), rows=({},), steps=1)]], adapters, 16)
    same = compare(engine, adapters[:1], count, edits, rounds)
    own = compare(engine, adapters, count, edits, rounds)
    engine.detach()
    cached = EditEngine(pipeline, base=base, allow_candidates=True)
    single, behind = (beside_a_sweep(cached, adapters[0], key) for key in ("another", "sweep"))
    print(json.dumps({
        "callers": count, "edits": count * edits, "rounds": rounds, "same": same, "own": own,
        "single_s": round(single, 2), "behind_s": round(behind, 2),
    }))  # fmt: skip


if __name__ == "__main__":
    values = [int(value) for value in sys.argv[1:]]
    main(*values, *(8, 4, 3)[len(values) :])
