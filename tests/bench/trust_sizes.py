"""How large the trust metadata of a registry are, and what signing and reading take, by number of adapters.

    PYTHONPATH=tests python tests/bench/trust_sizes.py ADAPTERS [ADAPTERS …]

No files are involved, only trust metadata in a folder, filled as `trust_scale.py` fills it: ten versions an
adapter, one alias each. Prints one JSON line for each size: bytes of each role's newest file, and CPU
milliseconds: signing everything, a reader's first refresh and first version, publishing one version, and the
reader's refresh after that. docs/operations/capacity.md cites it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from trust_scale import VERSIONS, filled

from registry.digest import digest_bytes
from registry.reference import Reference
from registry.signing.refresh import TrustClient


def sizes(objects: Path) -> dict[str, int]:
    """Bytes of each role's newest file; of the bins their number, the largest and the sum."""
    newest: dict[str, tuple[int, int]] = {}
    for path in objects.rglob("*.json"):
        number, _, role = path.stem.partition(".")
        if not role:
            role, number = number, "0"
        if int(number) >= newest.get(role, (-1, 0))[0]:
            newest[role] = int(number), path.stat().st_size
    found = {role: size for role, (_, size) in sorted(newest.items())}
    bins = [found.pop(role) for role in list(found) if role.startswith("versions-")]
    return {**found, "bins": len(bins), "bin_largest": max(bins), "bin_sum": sum(bins)}


def main() -> None:
    """Measure each size that is asked for."""
    for adapters in map(int, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as folder:
            clock = time.process_time
            begun = clock()
            authority = filled(Path(folder), adapters)
            signed = clock()
            client = TrustClient(authority.store, Path(folder) / "reader")
            root = Path(folder) / "objects"
            client.pin(next(root.rglob("1.root.json")).read_bytes())
            first = clock()
            state = client.refresh()
            seen = clock()
            state.resolve(Reference.parse("adapter-0005:3"))
            resolved = clock()
            authority.add_version("adapter-0005:11", digest_bytes(b"new"), 1)
            published = clock()
            client.refresh()
            again = clock()
            line = {
                "bench": "trust_sizes",
                "adapters": adapters,
                "versions_each": VERSIONS,
                "bytes": sizes(root),
                "cpu_ms": {
                    "sign_everything": round((signed - begun) * 1000),
                    "first_refresh": round((seen - first) * 1000, 1),
                    "first_version": round((resolved - seen) * 1000, 1),
                    "publish": round((published - resolved) * 1000, 1),
                    "refresh_after_a_publication": round((again - published) * 1000, 1),
                },
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
