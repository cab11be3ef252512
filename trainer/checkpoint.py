"""Checkpoints: everything a training needs to go on as if nothing had happened.

A checkpoint is a folder ``step-000100`` with ``tensors.safetensors`` (weights, average, moments of Adam) and
``state.json`` (step, key of the training, digest of the tensors). It appears under its name at once, and what
does not fit its digest is never chosen. No pickles.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from registry.digest import Digest, digest_bytes
from trainer.errors import CheckpointError
from trainer.stage import new_folder

if TYPE_CHECKING:
    import torch
    from torch.optim import AdamW

    from trainer.ema import Ema

_TENSORS, _STATE = "tensors.safetensors", "state.json"
_KEPT = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A state of a training after ``step`` optimiser steps; ``tensors`` are named "<group>/<parameter>"."""

    step: int
    key: Digest
    ema_updates: int
    seconds: float
    tensors: Mapping[str, torch.Tensor]

    def group(self, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors of one group: "weights", "ema", "exp_avg", "exp_avg_sq" or "adam_step"."""
        start = name + "/"
        return {key[len(start) :]: value for key, value in self.tensors.items() if key.startswith(start)}


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint into ``folder`` and remove all but the newest two; return its own folder."""
    from safetensors.torch import save as encode

    out = folder / f"step-{checkpoint.step:06d}"
    data = encode({name: value.detach().cpu().contiguous() for name, value in checkpoint.tensors.items()})
    state = {
        "step": checkpoint.step,
        "key": checkpoint.key,
        "ema_updates": checkpoint.ema_updates,
        "seconds": checkpoint.seconds,
        "tensors": digest_bytes(data),
    }
    with new_folder(out) as temporary:
        (temporary / _TENSORS).write_bytes(data)
        (temporary / _STATE).write_text(json.dumps(state, indent=1), "utf-8")
    for old in sorted(folder.glob("step-*"))[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return out


def latest(folder: Path, key: Digest) -> Checkpoint | None:
    """Return the newest whole checkpoint in ``folder``, or None if there is none.

    Raises:
        CheckpointError: it belongs to another recipe, dataset or base.
    """
    for path in sorted(folder.glob("step-*"), reverse=True):
        checkpoint = _read(path)
        if checkpoint is None:
            continue
        if checkpoint.key != key:
            raise CheckpointError(
                f"{path} belongs to another recipe, dataset or base",
                f"remove {folder} to train from the start, or choose another output folder",
            )
        return checkpoint
    return None


def _read(path: Path) -> Checkpoint | None:
    """Return the checkpoint in ``path``, or None if it is damaged."""
    from safetensors.torch import load

    try:
        state = json.loads((path / _STATE).read_text("utf-8"))
        data = (path / _TENSORS).read_bytes()
        if digest_bytes(data) != state["tensors"]:
            return None
        return Checkpoint(
            step=state["step"],
            key=Digest(state["key"]),
            ema_updates=state["ema_updates"],
            seconds=state["seconds"],
            tensors=load(data),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(kw_only=True)
class TrainingState:
    """Everything that a checkpoint keeps, and the way there and back."""

    parameters: Mapping[str, torch.nn.Parameter]
    optimiser: AdamW
    ema: Ema
    folder: Path
    key: Digest

    def save(self, step: int, seconds: float) -> None:
        """Write a checkpoint after ``step`` steps."""
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self.parameters.items():
            moments = self.optimiser.state[parameter]
            tensors[f"weights/{name}"] = parameter.detach()
            tensors[f"ema/{name}"] = self.ema.values[name]
            tensors[f"exp_avg/{name}"] = moments["exp_avg"]
            tensors[f"exp_avg_sq/{name}"] = moments["exp_avg_sq"]
            tensors[f"adam_step/{name}"] = moments["step"]
        self.folder.mkdir(parents=True, exist_ok=True)
        save(
            self.folder,
            Checkpoint(
                step=step, key=self.key, ema_updates=self.ema.updates, seconds=seconds, tensors=tensors
            ),
        )

    def restore(self) -> Checkpoint | None:
        """Load the newest checkpoint, if there is one."""
        found = latest(self.folder, self.key)
        if found is None:
            return None
        from trainer import lora

        lora.put(self.parameters, found.group("weights"))
        self.ema.load(found.group("ema"), found.ema_updates)
        first, second, steps = found.group("exp_avg"), found.group("exp_avg_sq"), found.group("adam_step")
        for name, parameter in self.parameters.items():
            self.optimiser.state[parameter] = {
                "step": steps[name],
                "exp_avg": first[name].to(parameter.device),
                "exp_avg_sq": second[name].to(parameter.device),
            }
        return found
