"""The corpus of hostile adapters through other scanners of models, the reference reader, and this one.

``PYTHONPATH=tests python tests/bench/scanners.py --peers DIR`` prints one JSON line; ``DIR`` is the ``bin``
of an environment with modelscan, modelaudit, picklescan, fickling and adaptersentry; what is missing there is
skipped, and said. ``--table`` prints a table, too. Each tool runs as its command does, with its exit codes:

    flagged   it says that the file is bad
    failed    it says that it could not read the file or not finish; who demands "exit code 0" is safe, too
    crashed   it died of an exception of its own, or was stopped after a minute
    nothing   it says that it looked at nothing (modelscan's 3)
    missed    it says that the file is fine

A hostile file that is not flagged is a miss; a clean one that is flagged, or fails, is a false alarm. The
tools are loaded once and forked for each file, so that starting Python a thousand times is not measured.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fakes.adapters import RANK
from fakes.hostile_files import LAYERS, Files
from fakes.hostile_judge import judged
from fakes.hostile_tensors import CASES, clean, population
from registry.manifest import WEIGHTS_NAME

OURS = "adapter-foundry"
OUTCOMES = ("flagged", "failed", "crashed", "nothing", "missed")
SECONDS = 60

# Runs in the peers' environment: argv lists as JSON lines on stdin, results as JSON lines on stdout.
_RUNNER = r"""
import importlib.metadata, json, os, sys, tempfile, time, traceback
(entry,) = importlib.metadata.entry_points(group="console_scripts", name=sys.argv[1])
sys.path[:] = [path for path in sys.path if path]
command = entry.load()
def child(arguments, output):
    os.dup2(output, 1); os.dup2(output, 2)
    sys.argv = [entry.name, *arguments]
    code = 0
    try:
        code = command()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc(); code = 70
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)
print(json.dumps({"version": entry.dist.version}), flush=True)
for line in sys.stdin:
    with tempfile.TemporaryFile() as output:
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            child(json.loads(line), output.fileno())
        code = None
        while code is None and time.monotonic() - started < float(sys.argv[2]):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(0.01)
        if code is None:
            os.kill(pid, 9); os.waitpid(pid, 0)
        output.seek(0)
        text = output.read().decode("utf-8", "replace")
    crashed = code is None or code < 0 or "Traceback (most recent call last)" in text
    result = {"code": code, "crashed": crashed, "text": text[-400:], "seconds": time.monotonic() - started}
    print(json.dumps(result), flush=True)
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """Another scanner.

    Attributes:
        name: its command and its package.
        arguments: of one path.
        each: it takes files; else it takes a folder. "weights" for the weights alone.
        flagged, failed, nothing: what its exit codes mean.
    """

    name: str
    arguments: Callable[[str], list[str]]
    each: str
    flagged: frozenset[int]
    failed: frozenset[int]
    nothing: frozenset[int] = frozenset()

    def outcome(self, result: Mapping[str, object]) -> str:
        code = result["code"]
        if result["crashed"]:
            return "crashed"
        for name in ("flagged", "failed", "nothing"):
            if code in getattr(self, name):
                return name
        return "missed" if code == 0 else "crashed"


PEERS = (
    Peer(
        name="modelscan",
        arguments=lambda path: ["scan", "-p", path],
        each="folder",
        flagged=frozenset({1}),
        failed=frozenset({2, 4}),
        nothing=frozenset({3}),
    ),
    Peer(
        name="picklescan",
        arguments=lambda path: ["-p", path],
        each="folder",
        flagged=frozenset({1}),
        failed=frozenset({2}),
    ),
    Peer(
        name="fickling",
        arguments=lambda path: ["--check-safety", "--json-output", os.devnull, path],
        each="files",
        flagged=frozenset({1}),
        failed=frozenset({2}),
    ),
    Peer(
        name="modelaudit",
        arguments=lambda path: ["scan", "--strict", "--no-cache", "--format", "json", path],
        each="folder",
        flagged=frozenset({1}),
        failed=frozenset({2}),
    ),
    Peer(
        name="adaptersentry",
        arguments=lambda path: [
            "scan",
            "--policy",
            "strict",
            "--fail-on",
            "review",
            "--format",
            "json",
            path,
        ],
        each="weights",
        flagged=frozenset({2}),
        failed=frozenset({1}),
    ),
)


def written(folder: Path) -> list[tuple[str, str, Path]]:
    """Write the corpus; (layer, name, folder) of each file, clean ones last."""
    found = []
    everything: list[tuple[str, str, Files]] = [(case.layer, case.name, case.files()) for case in CASES]
    everything += [("clean", name, files) for name, (files, _) in clean().items()]
    for number, (layer, name, files) in enumerate(everything):
        place = folder / f"{number:03}"
        place.mkdir()
        for file, data in files.items():
            (place / file).write_bytes(data)
        found.append((layer, name, place))
    return found


def run_peer(peer: Peer, peers: Path, places: Sequence[Path], home: Path) -> tuple[str, list[str]]:
    """Return a peer's version and its outcome for each folder."""
    environment = {
        "HOME": str(home),
        "PATH": os.environ["PATH"],
        **dict.fromkeys(("DO_NOT_TRACK", "NO_ANALYTICS", "PROMPTFOO_DISABLE_TELEMETRY", "NO_COLOR"), "1"),
    }
    process = subprocess.Popen(
        [str(peers / "python"), "-c", _RUNNER, peer.name, str(SECONDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=home,
        env=environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    version = json.loads(process.stdout.readline())["version"]
    outcomes = []
    for place in places:
        files = {"folder": [place], "files": sorted(place.iterdir()), "weights": [place / WEIGHTS_NAME]}
        results = []
        for path in files[peer.each]:
            process.stdin.write(json.dumps(peer.arguments(str(path))) + "\n")
            process.stdin.flush()
            results.append(peer.outcome(json.loads(process.stdout.readline())))
        outcomes.append(min(results, key=OUTCOMES.index))
    process.stdin.close()
    process.wait()
    return version, outcomes


def run_reference(places: Sequence[Path]) -> tuple[str, list[str]]:
    """The reference reader: a file that it opens is one that a loader gets."""
    import safetensors

    outcomes = []
    for place in places:
        try:
            with safetensors.safe_open(place / WEIGHTS_NAME, framework="numpy") as opened:
                list(opened.keys())
            outcomes.append("missed")
        except Exception:
            outcomes.append("flagged")
    return safetensors.__version__, outcomes


def run_ours() -> tuple[str, list[str]]:
    from importlib.metadata import version

    population()
    verdicts = [judged(case.files(), {"rank": RANK, **case.card})["verdict"] for case in CASES]
    for name, (files, canonical) in clean().items():
        facts = {"rank": RANK, "dtype": name.split()[-1]}
        verdicts.append(judged(files, facts, canonical=canonical)["verdict"])
    return version(OURS), ["missed" if verdict == "pass" else "flagged" for verdict in verdicts]


def table(results: Mapping[str, Mapping[str, Mapping[str, int]]], versions: Mapping[str, str]) -> str:
    """A table: flagged, and behind a slash with what failed; crashes in brackets."""
    names = [*results]
    counts = {layer: sum(results[names[0]][layer].values()) for layer in (*LAYERS, "clean")}
    lines = ["| layer (files) | " + " | ".join(f"{name} {versions[name]}" for name in names) + " |"]
    lines.append("| --- |" + " ---: |" * len(names))
    for layer in (*LAYERS, "clean"):
        cells = []
        for name in names:
            found = results[name][layer]
            cell = str(found["flagged"])
            cell += f" / {found['flagged'] + found['failed']}" if found["failed"] else ""
            cell += f" ({found['crashed']} crashed)" if found["crashed"] else ""
            cells.append(cell)
        label = f"{layer} ({counts[layer]})" if layer != "clean" else f"clean, false alarms ({counts[layer]})"
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def everything(
    peers: Path | None, folder: Path
) -> tuple[list[tuple[str, str, Path]], dict[str, list[str]], dict[str, str], dict[str, float]]:
    """Run all tools that are there: the corpus, and by tool its outcomes, its version and its seconds."""
    (folder / "home").mkdir()
    (folder / "corpus").mkdir()
    corpus = written(folder / "corpus")
    places = [place for _, _, place in corpus]
    runs: dict[str, Callable[[], tuple[str, list[str]]]] = {
        OURS: run_ours,
        "safe_open": lambda: run_reference(places),
    }
    for peer in PEERS:
        if peers is not None and (peers / peer.name).exists():
            runs[peer.name] = functools.partial(run_peer, peer, peers, places, folder / "home")
    outcomes, versions, seconds = {}, {}, {}
    for name, run in runs.items():
        started = time.perf_counter()
        versions[name], outcomes[name] = run()
        seconds[name] = round(time.perf_counter() - started, 1)
        print(f"{name} {versions[name]}: {seconds[name]} s", file=sys.stderr)
    return corpus, outcomes, versions, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peers", type=Path, help="the bin folder of an environment with the other scanners")
    parser.add_argument("--table", action="store_true", help="print a table, too")
    parser.add_argument("--misses", action="store_true", help="name what is missed here, or everywhere else")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scanners-") as temporary:
        corpus, outcomes, versions, seconds = everything(options.peers, Path(temporary))
    results: dict[str, dict[str, dict[str, int]]] = {}
    for name, found in outcomes.items():
        counted = {layer: Counter(dict.fromkeys(OUTCOMES, 0)) for layer in (*LAYERS, "clean")}
        for (layer, _, _), outcome in zip(corpus, found, strict=True):
            counted[layer][outcome] += 1
        results[name] = {layer: dict(counts) for layer, counts in counted.items()}
    hostile = [index for index, (layer, _, _) in enumerate(corpus) if layer != "clean"]
    others = [name for name in outcomes if name != OURS]
    unseen = [index for index in hostile if all(outcomes[name][index] != "flagged" for name in others)]
    line = {
        "bench": "scanners",
        "hostile": len(hostile),
        "clean": len(corpus) - len(hostile),
        "missed": sum(outcomes[OURS][index] != "flagged" for index in hostile),
        "missed_by_every_other": len(unseen),
        "skipped": [peer.name for peer in PEERS if peer.name not in outcomes],
        "versions": versions,
        "seconds": seconds,
        "results": results,
    }
    print(json.dumps(line))
    if options.table:
        print(table(results, versions))
    if options.misses:
        for where, indices in (
            ("here", [index for index in hostile if outcomes[OURS][index] != "flagged"]),
            ("by every other", unseen),
        ):
            for index in indices:
                print(f"missed {where}: {corpus[index][0]}: {corpus[index][1]}")


if __name__ == "__main__":
    main()
