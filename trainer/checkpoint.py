"""Checkpoints: everything a training needs to go on as if nothing had happened.

A checkpoint is a folder ``step-000100`` with ``tensors.safetensors`` (weights, average, the optimiser's
tensors) and ``state.json`` (step, key of the training, the optimiser's numbers, digest of the tensors, and a
digest of all that). It appears under its name at once and is on the disk by then; what does not fit its
digests is never chosen. No pickles.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.digest import Digest, digest_bytes
from trainer import optimisers
from trainer.errors import CheckpointError
from trainer.provenance import continued, kept
from trainer.stage import new_folder

if TYPE_CHECKING:
    import torch

    from registry.manifest import Provenance
    from trainer.ema import Ema
    from trainer.parallel import Processes

_TENSORS, _STATE, _PREFIX = "tensors.safetensors", "state.json", "step-"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A state of a training after ``step`` optimiser steps.

    Attributes:
        step: how many were done.
        key: digest of recipe, dataset, base and code.
        seconds: that all runs of this training took together.
        numbers: JSON values; floats come back to the bit.
        tensors: named "<group>/<parameter>".
    """

    step: int
    key: Digest
    seconds: float
    numbers: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]

    def group(self, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors of one group: "weights", "ema" or "optimiser"."""
        start = name + "/"
        return {key[len(start) :]: value for key, value in self.tensors.items() if key.startswith(start)}


def save(folder: Path, checkpoint: Checkpoint, keep: int = 2) -> Path:
    """Write a checkpoint into ``folder`` and remove all but the newest ``keep``; return its own folder.

    Raises:
        CheckpointError: it could not be written; the older ones are as they were.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    out = folder / f"{_PREFIX}{checkpoint.step:06d}"
    try:
        with new_folder(out) as temporary:
            save_file(dict(checkpoint.tensors), temporary / _TENSORS)
            body = {
                "step": checkpoint.step,
                "key": checkpoint.key,
                "seconds": checkpoint.seconds,
                "numbers": checkpoint.numbers,
                "tensors": _file_digest(temporary / _TENSORS),
            }
            whole = {"digest": _digest(body), "state": body}
            (temporary / _STATE).write_text(json.dumps(whole, indent=1), "utf-8")
            for path in (temporary / _TENSORS, temporary / _STATE, temporary):
                _to_disk(path)
        _to_disk(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint {out} could not be written: {error}",
            "make room on the disk and run the same command again; it goes on from the checkpoint before",
        ) from None
    # One of a later step is damaged, or this training would have gone on from it.
    later = [path for path in _all(folder) if _step(path) > checkpoint.step]
    for path in [*later, *_all(folder)[keep + len(later) :]]:
        shutil.rmtree(path, ignore_errors=True)
    return out


def latest(folder: Path, key: Digest) -> Checkpoint | None:
    """Return the newest whole checkpoint in ``folder``, or None if there is none.

    Raises:
        CheckpointError: it belongs to another recipe, dataset, base or version of the code.
    """
    for path in _all(folder):
        checkpoint = _read(path)
        if checkpoint is None:
            continue
        if checkpoint.key != key:
            raise CheckpointError(
                f"{path} belongs to another recipe, dataset, base or version of this program",
                f"remove {folder} to train from the start, or choose another output folder",
            )
        return checkpoint
    return None


def _all(folder: Path) -> list[Path]:
    """Return the folders of the checkpoints, whole or not, the newest first."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name[len(_PREFIX) :].isdecimal()]
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name[len(_PREFIX) :])


def _read(path: Path) -> Checkpoint | None:
    """Return the checkpoint in ``path``, or None if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        whole = json.loads((path / _STATE).read_text("utf-8"))
        state = whole["state"]
        if _digest(state) != whole["digest"] or _file_digest(path / _TENSORS) != state["tensors"]:
            return None
        return Checkpoint(
            step=state["step"],
            key=Digest(state["key"]),
            seconds=state["seconds"],
            numbers=state["numbers"],
            tensors=load_file(path / _TENSORS),
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def _digest(body: Mapping[str, Any]) -> Digest:
    """Return the digest of JSON values; not RFC 8785, which has no infinity."""
    return digest_bytes(json.dumps(body, sort_keys=True).encode())


def _file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"


def _to_disk(path: Path) -> None:
    """Return when a file or a folder will survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(kw_only=True)
class TrainingState:
    """Everything that a checkpoint keeps, and the way there and back.

    Attributes:
        parameters, optimiser, ema: what is trained.
        folder: of the checkpoints; that of the main process counts, the others need none.
        key: digest of recipe, dataset, base and version of the program.
        made: by which sources, on which machines.
        processes: who takes part.
        keep: so many checkpoints stay.
        steps: how many steps the state stands for; None while it is in the middle of one.
    """

    parameters: Mapping[str, torch.nn.Parameter]
    optimiser: torch.optim.Optimizer
    ema: Ema
    folder: Path
    key: Digest
    made: Provenance
    processes: Processes
    keep: int
    steps: int | None = 0
    _saved: int = 0
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))
    _writing: Future[Path] | None = None

    def save(self, seconds: float, numbers: Mapping[str, Any], *, wait: bool = True) -> None:
        """Take a copy of the state and write it, in the background unless ``wait``.

        Only the main process does that, and only for a whole step that was not saved before.

        Raises:
            CheckpointError: this one or the one before could not be written.
        """
        self.settle()
        if self.steps is None or self.steps == self._saved or not self.processes.main:
            return
        tensors, of_optimiser = optimisers.state(self.optimiser, list(self.parameters))
        groups = {
            "weights": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "ema": self.ema.values,
            "optimiser": tensors,
        }
        taken = Checkpoint(
            step=self.steps,
            key=self.key,
            seconds=seconds,
            numbers={
                **numbers,
                "ema_updates": self.ema.updates,
                "optimiser": of_optimiser,
                "made": kept(self.made),
            },
            tensors={
                f"{group}/{name}": value.to("cpu", copy=True).contiguous()
                for group, values in groups.items()
                for name, value in values.items()
            },
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._writing, self._saved = self._writer.submit(save, self.folder, taken, self.keep), self.steps
        if wait:
            self.settle()

    def settle(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            CheckpointError: it could not be written.
        """
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except CheckpointError:
            self._saved = 0
            raise

    def close(self) -> None:
        """Wait for what is being written."""
        self._writer.shutdown()

    def restore(self) -> Checkpoint | None:
        """Take up the main process's newest checkpoint, if there is one, on all processes.

        Raises:
            CheckpointError: see `latest`; or other sources made it, or nobody knows which.
        """
        found = _from_main(self.folder, self.key, self.processes)
        if found is None:
            return None
        from trainer import lora

        self.made = continued(self.made, found.numbers.get("made"), self.folder)
        self.steps = self._saved = found.step
        lora.put(self.parameters, found.group("weights"))
        self.ema.load(found.group("ema"), found.numbers["ema_updates"])
        optimisers.put(
            self.optimiser, list(self.parameters), found.group("optimiser"), found.numbers["optimiser"]
        )
        return found


def _from_main(folder: Path, key: Digest, processes: Processes) -> Checkpoint | None:
    """Return the newest checkpoint of the main process; the others need not see its disk."""
    import torch

    found, problem = None, None
    if processes.main:
        for left in folder.glob(f".{_PREFIX}*"):  # of a process that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        try:
            found = latest(folder, key)
        except CheckpointError as error:
            problem = [error.message, error.mend]
    about = None
    if found is not None and processes.count > 1:
        shapes = {name: [str(value.dtype)[6:], list(value.shape)] for name, value in found.tensors.items()}
        about = [found.step, found.seconds, found.numbers, shapes]
    about, problem = processes.tell([about, problem])
    if problem is not None:
        raise CheckpointError(*problem)
    if about is None:
        return found
    step, seconds, numbers, shapes = about
    tensors = found.tensors if found is not None else {
        name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in shapes.items()
    }  # fmt: skip
    tensors = {name: processes.copy(tensors[name]) for name in shapes}
    return Checkpoint(step=step, key=key, seconds=seconds, numbers=numbers, tensors=tensors)
