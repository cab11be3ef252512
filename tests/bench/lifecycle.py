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

import numpy as np

from bench.commands import BASE, RANK, run
from fakes.adapters import card, encode, modules
from fakes.archives import site
from fakes.registries import PASSING
from registry.families import FAMILIES
from registry.formats import TensorInfo, write_container
from registry.manifest import CARD_NAME, WEIGHTS_NAME


def adapter(path: Path, seed: int) -> None:
    """Write an adapter, a tensor at a time."""
    path.mkdir()
    generator, silent = np.random.default_rng(seed), FAMILIES[BASE.family].silent(BASE.spec)
    tensors: dict[str, TensorInfo] = {}
    for module in modules(BASE):
        out, into = BASE.spec[module]
        for factor, shape in (("A", (RANK, into)), ("B", (out, RANK))):
            key = f"transformer.{module}.lora_{factor}.weight"
            tensors[key] = TensorInfo(dtype="BF16", shape=shape, start=0, end=0)

    def pieces(key: str) -> list[bytes]:
        shape, module = tensors[key].shape, key.removeprefix("transformer.").rpartition(".lora_")[0]
        if ".lora_B." in key and module in silent:
            return [encode(np.zeros(shape, np.float32), "BF16")]
        scale = 0.02 if ".lora_B." in key else shape[1] ** -0.5
        return [encode(generator.standard_normal(shape, np.float32) * np.float32(scale), "BF16")]

    with (path / WEIGHTS_NAME).open("wb") as stream:
        write_container(tensors, pieces, stream.write)
    (path / CARD_NAME).write_text(json.dumps(card(BASE, rank=RANK, dtype="BF16")))


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
            "sha256sum": run({}, "sha256sum", str(root / "adapter-1" / WEIGHTS_NAME)),
        }
        size = (root / "adapter-1" / WEIGHTS_NAME).stat().st_size
    figures = {
        name: {"wall_s": round(wall, 2), "cpu_s": round(cpu, 2), "peak_mb": round(peak)}
        for name, (wall, cpu, peak, _) in found.items()
    }
    print(json.dumps({"bench": "lifecycle", "adapter_bytes": size, **figures}))


if __name__ == "__main__":
    main()
