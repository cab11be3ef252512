"""Swapping adapters on Qwen-Image-Edit-2511's full module tree against diffusers' delete and load.

    PYTHONPATH=tests python tests/bench/serving_swap.py [ROUNDS]

Prints one JSON line. The denoiser has all its 20.43 billion parameters in bfloat16, in memory that nobody
writes to or reads: what is measured is bookkeeping and the adapters' own bytes, not the model. The adapters
are of rank 64 (849 MB) and 32. Ours are verified ones; the peer's state dicts are in memory, too. Rounds
alternate, figures are medians of processor seconds, on one thread.

``swap_ratio`` is the peer's delete_adapters, load_lora_adapter and set_adapters over our swap between two
resident adapters, whole; ``attach_ratio`` is the same over bringing one to the device that was not there.
``cold_ratio`` is reading the file of 849 MB (warm page cache) and attaching what was read, over reading it
alone; verification comes once for each digest and is ``verify_s``. After each swap a layer of the tree is
asked whether it adds what the file says.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import commands
import torch
from safetensors.torch import load_file

from registry.admission import Policy, VerifiedAdapter, admit_candidate
from registry.manifest import CARD_NAME, WEIGHTS_NAME
from serving.adapters import AdapterSlots
from serving.quiet import quiet_libraries

PROBED = "transformer_blocks.59.attn.to_q"
RANKS = (64, 32)


def tree() -> torch.nn.Module:
    """The denoiser of the published base, its weights allocated and untouched."""
    from accelerate import init_empty_weights
    from diffusers import QwenImageTransformer2DModel

    with init_empty_weights():
        model = QwenImageTransformer2DModel(
            num_layers=60, attention_head_dim=128, num_attention_heads=24, joint_attention_dim=3584
        )
    return model.to(torch.bfloat16).to_empty(device="cpu").requires_grad_(False).eval()


class Base:
    """As much of a pipeline as adapters want."""

    family = "qwen-image-edit"

    def __init__(self, transformer: torch.nn.Module) -> None:
        self.transformer = transformer


def seconds(function: Any, *arguments: Any, **named: Any) -> float:
    """Processor seconds of a call."""
    begun = time.process_time()
    function(*arguments, **named)
    return time.process_time() - begun


def adapter(folder: Path, rank: int) -> tuple[VerifiedAdapter, float]:
    """Write an adapter of random tensors and admit it; also the seconds of the latter."""
    commands.RANK = rank
    commands.adapter(folder)
    files = {name: (folder / name).read_bytes() for name in (WEIGHTS_NAME, CARD_NAME)}
    begun = time.perf_counter()
    admitted = admit_candidate(files, Policy(allow_review=True))
    return admitted, time.perf_counter() - begun


def check(model: torch.nn.Module, folder: Path) -> None:
    """Assert that a layer of the tree now has the update of this file."""
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS_NAME, "pt") as file:
        a, b = (file.get_tensor(f"transformer.{PROBED}.lora_{side}.weight") for side in "AB")
    layer: Any = model.get_submodule(PROBED)
    x = torch.randn(1, 4, a.shape[1], dtype=torch.bfloat16)
    layer.base_layer.weight.data.zero_()
    layer.base_layer.bias.data.zero_()
    expected = torch.nn.functional.linear(torch.nn.functional.linear(x, a), b)
    torch.testing.assert_close(layer(x), expected, rtol=0.02, atol=0.02)


def ours(
    model: torch.nn.Module, folders: list[Path], adapters: list[VerifiedAdapter], rounds: int
) -> dict[str, float]:
    """Swaps between resident adapters, attaching what is not there, and from a file."""
    slots = AdapterSlots(Base(model))  # type: ignore[arg-type]
    swaps, attaches, cold = [], [], []
    for _ in range(rounds):
        slots.detach()
        attaches.append(seconds(slots.attach, adapters[0]))
        slots.detach()
        begun = time.process_time()
        data = (folders[0] / WEIGHTS_NAME).read_bytes()
        read = time.process_time() - begun
        attach = seconds(slots.attach, adapters[0])
        cold.append((read + attach) / read)
        del data
        slots.load(adapters[1])
        for turn in (1, 0, 1):
            swaps.append(seconds(slots.use, adapters[turn], 1.0))
            check(model, folders[turn])
    slots.detach()
    return {
        "swap_s": statistics.median(swaps), "attach_s": statistics.median(attaches),
        "cold_ratio": round(statistics.median(cold), 2),
    }  # fmt: skip


def theirs(model: Any, folders: list[Path], rounds: int) -> float:
    """Seconds in which diffusers replaces one adapter by another."""
    states = [load_file(folder / WEIGHTS_NAME) for folder in folders]

    def swap(turn: int) -> None:
        model.delete_adapters(["default"])
        model.load_lora_adapter(dict(states[turn]), prefix="transformer", adapter_name="default")
        model.set_adapters(["default"], 1.0)

    model.load_lora_adapter(dict(states[0]), prefix="transformer", adapter_name="default")
    found = []
    for index in range(rounds):
        turn = (index + 1) % 2
        found.append(seconds(swap, turn))
        check(model, folders[turn])
    model.delete_adapters(["default"])
    return statistics.median(found)


@torch.no_grad()
def main(rounds: int) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / str(rank) for rank in RANKS]
        made = [adapter(folder, rank) for folder, rank in zip(folders, RANKS, strict=True)]
        adapters = [one for one, _ in made]
        model = tree()
        found = ours(model, folders, adapters, rounds)
        peer = theirs(model, folders, rounds)
        size = (folders[0] / WEIGHTS_NAME).stat().st_size
    print(json.dumps({
        "bench": "serving_swap", "modules": sum(1 for _ in model.modules()), "bytes": size, "rounds": rounds,
        "swap_ms": round(1000 * found["swap_s"], 3), "attach_ms": round(1000 * found["attach_s"], 1),
        "diffusers_ms": round(1000 * peer, 1), "swap_ratio": round(peer / found["swap_s"]),
        "attach_ratio": round(peer / found["attach_s"], 1), "cold_ratio": found["cold_ratio"],
        "verify_s": round(made[0][1], 2),
    }))  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 5)
