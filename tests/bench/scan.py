"""The scanner on an adapter of 849 MB (Qwen-Image-Edit-2511, rank 64, twelve targets), layers 1 to 5.

    PYTHONPATH=tests python tests/bench/scan.py [--peers DIR]

Every measurement runs in a process of its own, with BLAS on one thread as the command line sets it. Prints
one JSON line: seconds and peak memory of the scan (without the file's digest, which admission has already) on
two processors and on one, of reading and hashing the file, the ratio of the two, and of modelaudit and
adaptersentry from the virtual environment DIR. The population is one of a hundred made-up adapters, so that
the weights are judged. Seconds of CPU and the load of the machine stand beside the seconds of the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from commands import BASE, RANK, adapter, run

from registry.families import FAMILIES
from registry.manifest import CARD_NAME, WEIGHTS_NAME
from registry.scanning.population import Population
from registry.scanning.product import measure
from registry.scanning.spectra import summarise

ROUNDS = 3
SCAN = """
import json, sys, time
from pathlib import Path
from registry.content import FileContent
from registry.digest import Digest
from registry.manifest import AdapterCard
from registry.scanning import scan
from registry.scanning.population import load
folder = Path(sys.argv[1])
card = AdapterCard.parse((folder / "adapter.json").read_bytes())
known = Digest("sha256:" + "0" * 64)  # what the file's digest is does not matter here
population = load(Path(sys.argv[2]))
started = time.monotonic()
with FileContent(folder / "pytorch_lora_weights.safetensors") as weights:
    report = scan(weights, card, digest=known, population=population)
print(json.dumps({"s": time.monotonic() - started, "verdict": report.verdict, "modules": len(report.modules),
                  "space": report.space.verdict if report.space else None,
                  "rules": sorted({found.rule for found in report.findings})}))
"""
HASH = """
import sys, time
from pathlib import Path
from registry.content import FileContent
from registry.digest import digest_content
started = time.monotonic()
with FileContent(Path(sys.argv[1])) as weights:
    digest_content(weights)
print(time.monotonic() - started)
"""
BLAS = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
CENSUS = 100


def population(path: Path) -> None:
    """Write a population of made-up adapters: the shape of a real one, with four blocks each."""
    generator = np.random.default_rng(1)
    family, rows = FAMILIES[BASE.family], []
    places = family.places(BASE.spec)
    modules = [
        (name, places[block], kind, shape)
        for name, shape in BASE.spec.items()
        for block, kind in [family.block_of(name)]
    ]
    for _ in range(CENSUS):
        updates = []
        for name, block, kind, (out, into) in modules:
            if block < 2:
                a = generator.standard_normal((8, into // 24), dtype=np.float32)
                b = generator.standard_normal((out // 24, 8), dtype=np.float32)
                updates.append(measure(a, b, module=name, block=block, kind=kind))
        rows.append(summarise(updates))
    made = Population.make(base=BASE.id, rank=RANK, recipe="bench", kind="weights", rows=rows)
    path.write_bytes(made.to_bytes())


def measured(program: str, *words: str, cores: Sequence[int], rounds: int) -> tuple[float, float, float, str]:
    """Wall and CPU seconds, peak MB and output of the quietest of some rounds on the given processors."""
    command = ("taskset", "-c", ",".join(map(str, cores)), sys.executable, "-c", program, *words)
    return min(run(BLAS, *command) for _ in range(rounds))


def peer(command: Sequence[str]) -> dict[str, float | int | str]:
    """Wall seconds, peak MB and exit code of another scanner."""
    started = time.monotonic()
    try:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except OSError as error:
        return {"not_run": str(error.strerror)}
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return {
        "wall_s": round(time.monotonic() - started, 2),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mb": round(usage.ru_maxrss / 1024),
        "exit_code": code,
    }


def main() -> None:
    """Measure and print the line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, help="bin folder of the other scanners' virtual environment")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="The quietest of so many counts.")
    options = parser.parse_args()
    peers, rounds = options.peers, options.rounds
    cores = sorted(os.sched_getaffinity(0))[:2]
    with tempfile.TemporaryDirectory() as place:
        folder, census = Path(place) / "adapter", Path(place) / "population.json"
        adapter(folder)
        population(census)
        weights = folder / WEIGHTS_NAME
        read = measured(HASH, str(weights), cores=cores, rounds=rounds)
        two = measured(SCAN, str(folder), str(census), cores=cores, rounds=rounds)
        one = measured(SCAN, str(folder), str(census), cores=cores[:1], rounds=rounds)
        said = json.loads(two[3])
        line = {
            "bench": "scan",
            "adapter_bytes": weights.stat().st_size,
            "cores": len(cores),
            "scan": {
                "wall_s": round(said["s"], 2),
                "process_wall_s": round(two[0], 2),
                "cpu_s": round(two[1], 2),
                "peak_mb": round(two[2]),
                "modules": said["modules"],
                "verdict": said["verdict"],
                "weight_space": said["space"],
                "rules": said["rules"],
            },
            "one_core": {"wall_s": round(json.loads(one[3])["s"], 2), "peak_mb": round(one[2])},
            "hash_s": round(float(read[3]), 2),
            "hash_cpu_s": round(read[1], 2),
            "ratio_to_hash": round(said["s"] / float(read[3]), 2),
            "cpu_ratio_to_hash": round(two[1] / read[1], 2),
            "load_average": round(os.getloadavg()[0], 1),
        }
        if peers is not None:
            (folder / CARD_NAME).unlink()  # they judge the weights alone
            line["peers"] = {
                "modelaudit": peer([str(peers / "modelaudit"), "scan", str(weights)]),
                "adaptersentry": peer([str(peers / "adaptersentry"), "scan", str(weights)]),
            }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
