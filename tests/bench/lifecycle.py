"""Life cycle on adapters of 849 MB (Qwen-Image-Edit-2511, rank 64, all targets) in a folder.

    PYTHONPATH=tests python tests/bench/lifecycle.py

Every command runs in a process of its own. Prints one JSON line: wall and CPU seconds and peak memory of
``diff`` of two versions, ``mirror export``, ``mirror import``, ``doctor --deep`` and ``gc``; the peer in the
same run is ``sha256sum`` over the weights.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.commands import BASE, RANK, run
from fakes.adapters import card, container, factors, folder
from fakes.archives import site
from fakes.registries import PASSING


def adapter(path: Path, seed: int) -> None:
    """Write an adapter in a process of its own, whose memory is not this one's."""
    path.mkdir()
    values = factors(BASE, rank=RANK, seed=seed)
    for name, data in folder(container(values, "BF16"), card(BASE, rank=RANK, dtype="BF16")).items():
        (path / name).write_bytes(data)


def main() -> None:
    """Measure and print the line."""
    if sys.argv[1:]:
        adapter(Path(sys.argv[1]), int(sys.argv[2]))
        return
    registry = (sys.executable, "-m", "registry.cli")
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        home = {"ADAPTER_FOUNDRY_HOME": str(root / "home")}
        away = {"ADAPTER_FOUNDRY_HOME": str(root / "away")}
        (root / "evaluation.json").write_text(json.dumps(PASSING))
        run(home, *registry, "init")
        for number in (1, 2):
            path = root / f"adapter-{number}"
            subprocess.run([sys.executable, __file__, str(path), str(number)], check=True)
            evaluation = ("--evaluation", str(root / "evaluation.json"))
            run(home, *registry, "push", str(path), "--name", "big", *evaluation)
            run(home, *registry, "approve", f"big:{number}", "--by", "the bench", "--reason", "to measure")
        site(root / "away", root / "home")
        archive = str(root / "big.tar")
        found = {
            "diff": run(home, *registry, "diff", "big:1", "big:2"),
            "mirror_export": run(home, *registry, "mirror", "export", archive, "big:1"),
            "mirror_import": run(away, *registry, "mirror", "import", archive),
            "mirror_import_again": run(away, *registry, "mirror", "import", archive),
            "doctor_deep": run(home, *registry, "doctor", "--deep"),
            "gc": run(home, *registry, "gc"),
            "sha256sum": run({}, "sha256sum", str(root / "adapter-1" / "pytorch_lora_weights.safetensors")),
        }
        size = (root / "adapter-1" / "pytorch_lora_weights.safetensors").stat().st_size
    figures = {
        name: {"wall_s": round(wall, 2), "cpu_s": round(cpu, 2), "peak_mb": round(peak)}
        for name, (wall, cpu, peak, _) in found.items()
    }
    print(json.dumps({"bench": "lifecycle", "adapter_bytes": size, **figures}))


if __name__ == "__main__":
    main()
