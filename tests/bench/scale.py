"""A registry with 1,000 adapters of 10 versions each, against one with ten adapters, in one run.

    PYTHONPATH=tests python tests/bench/scale.py [ADAPTERS]

Names are signed in one edition, for ten thousand pushes would measure pushes; what is timed are the commands
of a user in their own processes: ``list`` (all names), ``versions``, ``show`` and ``pull`` of one, with
a refresh of trust each. Prints one JSON line: CPU seconds of each (the best of five), and their ratio.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from fakes.registries import NAME, copy_registry
from registry.client import Registry
from registry.digest import digest_bytes
from registry.signing.edition import Edition
from registry.signing.trust import NAMES, NAMES_FIELD, ROOT_FIELD, bin_role, version_path

VERSIONS = 10
ROUNDS = 5


def fill(registry: Registry, adapters: int) -> None:
    """Sign the names of many versions at once."""
    from tuf.api.metadata import TargetFile

    def change(edition: Edition) -> None:
        names = set(edition.state.names())
        for number in range(adapters):
            name = f"adapter-{number:04}"
            names.add(name)
            for version in range(1, VERSIONS + 1):
                digest = digest_bytes(f"{name}:{version}".encode())
                path = version_path(f"{name}:{version}")
                custom = {"base": "tests/base", "license": "MIT", "description": "an adapter of a bench"}
                entry = TargetFile(4000, {"sha256": digest.hex}, path, {"custom": custom})
                entry.unrecognized_fields[ROOT_FIELD] = 1
                edition.part(bin_role(name)).targets[path] = entry
        edition.part(NAMES).unrecognized_fields[NAMES_FIELD] = sorted(names)

    registry.authority.change(change)


def cpu_seconds(home: Path, *arguments: str) -> float:
    """The best of some runs of a command in its own process."""
    best = float("inf")
    for _ in range(ROUNDS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "registry.cli", *arguments],
            env=os.environ | {"ADAPTER_FOUNDRY_HOME": str(home)},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return best


def main() -> None:
    """Measure both registries and print the line."""
    adapters = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    commands = {
        "list": ("list",),
        "versions": ("versions", NAME),
        "show": ("show", f"{NAME}:1"),
        "pull": ("pull", f"{NAME}@prod"),
    }
    measured: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (10, adapters):
            home = Path(folder) / str(count)
            fill(copy_registry(home), count)
            measured[count] = {name: cpu_seconds(home, *words) for name, words in commands.items()}
    line = {
        "bench": "registry_scale",
        "adapters": adapters,
        "versions_each": VERSIONS,
        "cpu_s": {
            count: {name: round(seconds, 3) for name, seconds in figures.items()}
            for count, figures in measured.items()
        },
        "ratio": {name: round(measured[adapters][name] / measured[10][name], 2) for name in commands},
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
