"""What names cost: publishing, refreshing and resolving one name among 10 and among 1,000 adapters.

    PYTHONPATH=tests python tests/bench/trust_scale.py [ADAPTERS]

No files are involved, only trust metadata in a folder; ten versions an adapter, one alias each. Prints one
JSON line: CPU milliseconds in this process (the best of five) and their ratio. docs/adr/0003-version-bins.md
cites it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from registry.digest import digest_bytes
from registry.reference import Reference
from registry.signing.authority import Authority
from registry.signing.edition import Edition
from registry.signing.refresh import TrustClient
from registry.signing.signers import KeyRing
from registry.signing.trust import NAMES, NAMES_FIELD, bin_role, version_path
from registry.storage.local import LocalObjects

VERSIONS = 10
ROUNDS = 5


def filled(folder: Path, adapters: int) -> Authority:
    """A registry whose names were signed at once."""
    from tuf.api.metadata import TargetFile

    store = LocalObjects(folder / "objects")
    authority = Authority(store, KeyRing(folder=folder / "keys"), TrustClient(store, folder / "trust"))
    authority.initialise()

    def change(edition: Edition) -> None:
        names = [f"adapter-{number:04}" for number in range(adapters)]
        for name in names:
            for version in range(1, VERSIONS + 1):
                path = version_path(f"{name}:{version}")
                custom = {"content": str(digest_bytes(name.encode())), "license": "MIT"}
                entry = TargetFile(
                    4000, {"sha256": digest_bytes(path.encode()).hex}, path, {"custom": custom}
                )
                edition.part(bin_role(name)).targets[path] = entry
            alias = TargetFile(4000, {"sha256": "ab" * 32}, f"{name}@prod", {"custom": {"version": 1}})
            edition.part("targets").targets[alias.path] = alias
        edition.part(NAMES).unrecognized_fields[NAMES_FIELD] = names

    authority.change(change)
    return authority


def milliseconds(work: Callable[[int], object]) -> float:
    """CPU time of some work, the best of some rounds."""
    best = float("inf")
    for number in range(ROUNDS):
        before = time.process_time()
        work(number)
        best = min(best, time.process_time() - before)
    return round(best * 1000, 1)


def main() -> None:
    """Measure both registries and print the line."""
    adapters = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    digest = digest_bytes(b"new")
    measured: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (10, adapters):
            authority = filled(Path(folder) / str(count), count)
            warm = TrustClient(authority.store, Path(folder) / str(count) / "trust", max_age=3600)
            publish = milliseconds(lambda n, a=authority: a.add_version(f"adapter-0005:{n + 11}", digest, 1))  # type: ignore[misc]
            measured[count] = {
                "publish": publish,
                "refresh": milliseconds(lambda _, a=authority: a.client.refresh()),  # type: ignore[misc]
                "resolve_version": milliseconds(
                    lambda _, a=authority: a.client.refresh().resolve(Reference.parse("adapter-0005:3"))  # type: ignore[misc]
                ),
                "resolve_alias_warm": milliseconds(
                    lambda _, w=warm: w.current().resolve(Reference.parse("adapter-0005@prod"))  # type: ignore[misc]
                ),
                "every_version": milliseconds(lambda _, w=warm: w.current().versions()),  # type: ignore[misc]
            }
    small, large = measured[10], measured[adapters]
    print(
        json.dumps(
            {
                "bench": "trust_scale",
                "adapters": adapters,
                "versions_each": VERSIONS,
                "cpu_ms": measured,
                "ratio": {name: round(large[name] / small[name], 2) for name in small},
            }
        )
    )


if __name__ == "__main__":
    main()
