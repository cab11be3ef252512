"""An adapter of 850 MB down from and up to an S3 server: ours against boto3 and against MLflow.

``python tests/bench/transfer.py`` prints one JSON line. Every transfer runs in a process of its own, which
reports its seconds without imports and its peak memory; ``command`` is the whole process as its caller waits
for it, which for MLflow is ``mlflow artifacts download`` through a tracking server. The rounds are
interleaved, and the fastest of each counts. The file cannot be compressed.

Ours verifies every chunk, and flushes the file to the disk; boto3 and MLflow do neither. So there are two
comparisons: ours without its flushes against boto3 is what verifying costs, and ours against boto3 with a
flush at its end is what a user waits for who wants the file to be there after a power cut.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

NAME = "pytorch_lora_weights.safetensors"
SIZE = 850 * 1000 * 1000
ROUNDS = int(os.environ.get("ROUNDS", "3"))
#: Part size in MiB and threads; boto3's own default is the first.
BOTO3 = {"boto3 8x10": (8, 10), "boto3 8x4": (8, 4), "boto3 16x4": (16, 4), "boto3 64x4": (64, 4)}
FLUSHED = " flushed"


# -- what a child process does: everything before the returned function is not measured --


def ours(bucket: str, folder: Path, entry: str, flushed: bool) -> Callable[[], None]:
    from registry.digest import FileEntry
    from registry.storage.stores import open_store
    from registry.transfer import download

    store, wanted = open_store(f"s3://{bucket}"), FileEntry.model_validate_json(entry)
    if not flushed:
        os.fsync = lambda descriptor: None
    return lambda: download(store, [wanted], folder)


def boto3(
    bucket: str, folder: Path, entry: str, flushed: bool, megabytes: int, threads: int
) -> Callable[[], None]:
    import boto3 as library
    from boto3.s3.transfer import TransferConfig
    from botocore.config import Config

    from registry.digest import FileEntry
    from registry.storage.base import file_key

    key = file_key(FileEntry.model_validate_json(entry))
    client = library.client("s3", config=Config(max_pool_connections=threads))
    config = TransferConfig(multipart_chunksize=megabytes << 20, max_concurrency=threads)

    def run() -> None:
        client.download_file(bucket, key, str(folder / NAME), Config=config)
        if flushed:
            with (folder / NAME).open("rb+") as stream:
                os.fsync(stream.fileno())

    return run


def mlflow(bucket: str, folder: Path, entry: str) -> Callable[[], None]:
    from mlflow.cli import cli

    from registry.digest import FileEntry
    from registry.storage.base import file_key

    uri = f"mlflow-artifacts:/{file_key(FileEntry.model_validate_json(entry))}"
    arguments = ["artifacts", "download", "-u", uri, "-d", str(folder)]
    return lambda: cli(arguments, standalone_mode=False)


def push(bucket: str, folder: Path, mode: str) -> Callable[[], None]:
    """Uploads ``folder``'s file: with its hashes at the same time, after them, or one of both alone."""
    from registry.content import FileContent
    from registry.digest import Fingerprint, digest_content
    from registry.storage.stores import open_store
    from registry.transfer import publish, upload

    store, content = open_store(f"s3://{bucket}"), FileContent(folder / NAME)

    def run() -> None:
        if mode == "overlapped":
            publish(store, {NAME: content})
            return
        found = Fingerprint.of(content)
        if mode == "hashing":
            digest_content(content)
        elif mode == "after another":
            upload(store, {NAME: content}, [found.entry(NAME, digest_content(content))])

    return run


def child(what: str, *arguments: str) -> None:
    bucket, folder, *rest = arguments
    flushed, what = what.endswith(FLUSHED), what.removesuffix(FLUSHED)
    if what in BOTO3:
        run = boto3(bucket, Path(folder), *rest, flushed, *BOTO3[what])
    elif what == "ours":
        run = ours(bucket, Path(folder), *rest, flushed)
    else:
        run = {"mlflow": mlflow, "push": push}[what](bucket, Path(folder), *rest)
    began, cpu = time.perf_counter(), time.process_time()
    run()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    # Not ru_maxrss, which a process inherits from the one that started it.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) * 1024 / 1e6
    print(json.dumps({"seconds": round(seconds, 2), "cpu": round(cpu, 2), "mb": round(peak)}))


# -- the parent --


def measure(environment: Mapping[str, str], what: str, *arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", what, *arguments]
    began = time.perf_counter()
    answer = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    waited = time.perf_counter() - began
    if answer.returncode:
        raise SystemExit(f"{what} failed:\n{answer.stderr[-3000:]}")
    figures: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    figures["command"] = round(waited, 2)
    print(f"  {what} {arguments[-1] if what == 'push' else ''} {figures}", file=sys.stderr)
    return figures


def best(rounds: list[dict[str, float]]) -> dict[str, float]:
    return min(rounds, key=lambda found: found["seconds"])


def main() -> None:
    from registry.content import FileContent
    from registry.storage.stores import open_store
    from registry.transfer import publish
    from servers import mlflow as mlflow_server
    from servers import weed

    root = Path(tempfile.mkdtemp(prefix="bench-transfer-"))
    load = os.getloadavg()[0]
    try:
        with weed.running(root) as server:
            bucket, environment = server.bucket(), {**server.environment(), "ADAPTER_FOUNDRY_HOME": str(root)}
            os.environ.update(environment)
            source = root / "source"
            source.mkdir()
            with (source / NAME).open("wb") as stream:
                for _ in range(SIZE // 1_000_000):
                    stream.write(os.urandom(1_000_000))
            with FileContent(source / NAME) as content:
                (entry,) = publish(open_store(f"s3://{bucket}"), {NAME: content}).entries
            with mlflow_server.running(f"s3://{bucket}", environment) as tracking:
                down = downloads(bucket, root, entry.model_dump_json(), environment, tracking.environment())
            up = uploads(server, source, environment)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    plain = min((name for name in BOTO3), key=lambda name: down[name]["seconds"])
    safe = min((name + FLUSHED for name in BOTO3), key=lambda name: down[name]["seconds"])
    mine, bare, theirs = down["ours" + FLUSHED], down["ours"], down["mlflow"]
    print(
        json.dumps(
            {
                "bench": "transfer",
                "bytes": SIZE,
                "load_before": round(load, 1),
                "download": mine,
                "download_not_flushed": bare,
                "fastest_boto3": {"configuration": plain, **down[plain]},
                "fastest_boto3_flushed": {"configuration": safe, **down[safe]},
                "mlflow_artifacts_download": theirs,
                "ratio_to_boto3_both_not_flushed": round(bare["seconds"] / down[plain]["seconds"], 2),
                "ratio_to_boto3_both_flushed": round(mine["seconds"] / down[safe]["seconds"], 2),
                "ratio_flushed_to_boto3_not_flushed": round(mine["seconds"] / down[plain]["seconds"], 2),
                "times_faster_than_mlflow": round(theirs["command"] / mine["command"], 2),
                "times_faster_than_mlflow_without_imports": round(theirs["seconds"] / mine["seconds"], 2),
                "upload": up,
            }
        )
    )


def downloads(
    bucket: str, root: Path, entry: str, environment: Mapping[str, str], tracking: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    found: dict[str, list[dict[str, float]]] = {}
    names = [name + flush for name in ("ours", *BOTO3) for flush in ("", FLUSHED)]
    for turn in range(ROUNDS):
        # Whoever comes after MLflow finds a machine without free memory, so that is not always the same.
        first = turn * len(names) // ROUNDS
        for what in (*names[first:], *names[:first], "mlflow"):
            folder = root / "down"
            folder.mkdir()
            account = tracking if what == "mlflow" else {}
            found.setdefault(what, []).append(
                measure({**environment, **account}, what, bucket, str(folder), entry)
            )
            shutil.rmtree(folder)
    return {what: best(rounds) for what, rounds in found.items()}


def uploads(server: object, source: Path, environment: Mapping[str, str]) -> dict[str, dict[str, float]]:
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(max(ROUNDS - 2, 1)):
        for mode in ("overlapped", "after another", "hashing"):
            bucket = server.bucket()  # type: ignore[attr-defined]
            found.setdefault(mode, []).append(measure(environment, "push", bucket, str(source), mode))
    return {mode: best(rounds) for mode, rounds in found.items()}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the servers end with it
        main()
