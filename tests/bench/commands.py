"""The registry on an adapter of 849 MB (Qwen-Image-Edit-2511, rank 64, all targets) in an S3 server.

    PYTHONPATH=tests python tests/bench/commands.py

Every command runs in a process of its own. Prints one JSON line: seconds and peak memory of
push (scan included) and of a cold pull, CPU seconds of a warm pull with a refresh of trust and without, of
``registry --help``; the peers in the same run are boto3's own download of the same object and a bare
``python -c pass``.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fakes.adapters import card, encode, modules
from fakes.registries import PASSING
from registry.families import FAMILIES, KNOWN_BASES
from registry.manifest import CARD_NAME, WEIGHTS_NAME
from servers import weed

BASE = KNOWN_BASES["Qwen/Qwen-Image-Edit-2511"]
RANK = 64
ROUNDS = 5
BOTO3 = """
import boto3, sys, time
from boto3.s3.transfer import TransferConfig
bucket, key, path, size, threads = sys.argv[1:]
config = TransferConfig(multipart_chunksize=int(size) << 20, max_concurrency=int(threads))
started = time.monotonic()
boto3.client("s3").download_file(bucket, key, path, Config=config)
print(time.monotonic() - started)
"""


def run(environment: Mapping[str, str], *command: str) -> tuple[float, float, float, str]:
    """Wall seconds, CPU seconds, peak MB and stdout of a command in its own process."""
    started = time.monotonic()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, env=os.environ | dict(environment), stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - started
        out.seek(0)
        text = out.read().decode()
    assert status == 0, f"{command} ended with {status}: {text}"
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, text


def adapter(path: Path) -> None:
    """Write the adapter, tensor by tensor."""
    path.mkdir()
    shapes = {}
    for module in modules(BASE):
        out, into = BASE.spec[module]
        shapes[f"transformer.{module}.lora_A.weight"] = (RANK, into)
        shapes[f"transformer.{module}.lora_B.weight"] = (out, RANK)
    silent = FAMILIES[BASE.family].silent(BASE.spec)
    table, at = {}, 0
    for key in sorted(shapes):
        size = 2 * math.prod(shapes[key])
        table[key] = {"dtype": "BF16", "shape": shapes[key], "data_offsets": [at, at + size]}
        at += size
    generator = np.random.default_rng(0)
    with (path / WEIGHTS_NAME).open("wb") as stream:
        text = json.dumps({"__metadata__": {"format": "pt"}, **table}).encode()
        stream.write(len(text).to_bytes(8, "little") + text)
        for key in sorted(shapes):
            module, _, factor = key.removeprefix("transformer.").partition(".lora_")
            nothing = module in silent and factor.startswith("B")
            values = 0.02 * generator.standard_normal(shapes[key], dtype=np.float32)
            stream.write(encode(np.zeros_like(values) if nothing else values, "BF16"))
    (path / CARD_NAME).write_text(json.dumps(card(BASE, rank=RANK, dtype="BF16")))


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def main() -> None:
    """Measure and print the line."""
    registry = (sys.executable, "-m", "registry.cli")
    with tempfile.TemporaryDirectory() as place, weed.running(_made(Path(place) / "weed")) as server:
        root = Path(place)
        adapter(root / "adapter")
        bucket = server.bucket()
        there = server.environment() | {
            "ADAPTER_FOUNDRY_HOME": str(root / "home"),
            "ADAPTER_FOUNDRY_STORE": f"s3://{bucket}/team",
        }
        (root / "evaluation.json").write_text(json.dumps(PASSING))
        run(there, *registry, "init")
        words = (str(root / "adapter"), "--name", "big", "--evaluation", str(root / "evaluation.json"))
        push = run(there, *registry, "push", *words)
        again = run(there, *registry, "push", *words)
        run(there, *registry, "approve", "big:1", "--by", "the bench", "--reason", "to measure")
        cold, peers = [], []
        objects = server.client().list_objects_v2(Bucket=bucket, Prefix="team/models/")["Contents"]
        key = max(objects, key=lambda found: found["Size"])["Key"]
        for number, (size, threads) in enumerate([(8, 10), (8, 4), (16, 8)]):
            cache = ("--cache", str(root / f"cache-{number}"))
            cold.append(run(there, *registry, "pull", "big:1", *cache))
            peer = (bucket, key, str(root / f"peer-{number}"), str(size), str(threads))
            peers.append(float(run(there, sys.executable, "-c", BOTO3, *peer)[3]))
        run(there, *registry, "pull", "big:1")
        fresh = there | {"ADAPTER_FOUNDRY_TRUST_MAX_AGE": "3600"}
        warm = min(run(there, *registry, "pull", "big:1")[1] for _ in range(ROUNDS))
        warm_fresh = min(run(fresh, *registry, "pull", "big:1")[1] for _ in range(ROUNDS))
        help_ = min(run(there, *registry, "--help")[1] for _ in range(ROUNDS))
        bare = min(run(there, sys.executable, "-c", "pass")[1] for _ in range(ROUNDS))
        line = {
            "bench": "registry",
            "adapter_bytes": (root / "adapter" / "pytorch_lora_weights.safetensors").stat().st_size,
            "push": {"wall_s": round(push[0], 2), "cpu_s": round(push[1], 2), "peak_mb": round(push[2])},
            "push_again": {"wall_s": round(again[0], 2), "cpu_s": round(again[1], 2)},
            "cold_pull": {
                "wall_s": round(min(found[0] for found in cold), 2),
                "peak_mb": round(max(found[2] for found in cold)),
                "ratio_to_boto3": round(min(found[0] for found in cold) / min(peers), 2),
            },
            "boto3_download_s": round(min(peers), 2),
            "cpu_s": {
                "warm_pull_refreshing": round(warm, 2),
                "warm_pull_fresh": round(warm_fresh, 2),
                "help": round(help_, 2),
                "bare_python": round(bare, 2),
            },
        }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
