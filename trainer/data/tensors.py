"""Tensors by content key in a folder of safetensors files, shared by runs and processes.

A file is written beside its place and renamed, and never changed afterwards. Its header has a digest of every
tensor. A file that is shorter or longer than its header says is not read; each tensor is checked against its
digest whenever it comes from disk. Reads are plain reads, not memory maps: a file that is cut while it is
mapped kills the process, one that is read short is an error.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.digest import digest_bytes
from registry.manifest import canonical_json
from trainer.errors import CacheError

if TYPE_CHECKING:
    import torch

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_LONGEST_HEADER = 64 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """Where a tensor lies: its bytes in a file, and what they are."""

    path: Path
    begin: int
    size: int
    shape: tuple[int, ...]
    dtype: str
    digest: str


class TensorCache:
    """Tensors by content key; see the module. What other processes add is seen after `refresh`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._entries: dict[str, _Entry] = {}
        self._files: dict[str, tuple[str, ...]] = {}
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def refresh(self) -> None:
        """Take notice of files that came and went."""
        names = {path.name for path in self._folder.glob("tensors-*.safetensors")}
        for name in self._files.keys() - names:
            self._forget(name)
        for name in sorted(names - self._files.keys()):
            self._learn(self._folder / name)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return those of ``keys`` that are not there, in order."""
        return [key for key in keys if key not in self._entries]

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return self._entries[key].shape

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep ``tensors`` in a new file, named after its keys."""
        from safetensors.torch import save

        whole = {key: value.detach().contiguous().cpu() for key, value in tensors.items()}
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"tensors-{digest_bytes(canonical_json(sorted(tensors))).hex[:32]}.safetensors"
        temporary = self._folder / f".{path.stem}.{uuid.uuid4().hex}.tmp"
        try:
            temporary.write_bytes(save(whole, {key: _digest(value) for key, value in whole.items()}))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        self._forget(path.name)
        self._learn(path)

    def get(self, keys: Sequence[str]) -> list[torch.Tensor]:
        """Return the tensors of ``keys``, in order.

        Raises:
            CacheError: one of them was never cached, or is damaged.
        """
        self.require(keys)
        found = {key: self._read(self._entries[key]) for key in dict.fromkeys(keys)}
        damaged = sum(value is None for value in found.values())
        if damaged:
            raise self._lacking(damaged, len(keys), "are damaged in")
        return [found[key] for key in keys]

    def require(self, keys: Collection[str]) -> None:
        """Refuse to go on without all of ``keys``.

        Raises:
            CacheError: one of them was never cached.
        """
        if self.missing(keys):
            self.refresh()
        if missing := self.missing(keys):
            raise self._lacking(len(missing), len(keys), "are not in")

    def drop_damaged(self, keys: Iterable[str]) -> set[str]:
        """Read the tensors of those keys that are there; remove files with damaged ones.

        Returns:
            all keys of the removed files.
        """
        lost: set[str] = set()
        for key in keys:
            entry = self._entries.get(key)
            if entry is not None and self._read(entry) is None:
                lost.update(self._files.get(entry.path.name, ()))
                entry.path.unlink(missing_ok=True)
                self._forget(entry.path.name)
        return lost - self._entries.keys()

    def _lacking(self, count: int, total: int, how: str) -> CacheError:
        return CacheError(
            f"{count} of {total} tensors {how} the cache {self._folder}",
            "run `trainer train` again; it fills the cache for this dataset and base before it trains",
        )

    def _read(self, entry: _Entry) -> torch.Tensor | None:
        """Return a tensor from disk, or None if it is not the one that was written."""
        import torch

        raw = torch.empty(entry.size, dtype=torch.uint8)
        try:
            with entry.path.open("rb", buffering=0) as stream:
                stream.seek(entry.begin)
                done = stream.readinto(raw.numpy())
        except OSError:
            return None
        if done != entry.size or _digest(raw) != entry.digest:
            return None
        return raw.view(getattr(torch, entry.dtype)).reshape(entry.shape)

    def _learn(self, path: Path) -> None:
        """Index a file, unless it is not whole: a whole one may come under its name."""
        if entries := _entries(path):
            self._files[path.name] = tuple(entries)
            self._entries.update(entries)

    def _forget(self, name: str) -> None:
        for key in self._files.pop(name, ()):
            entry = self._entries.get(key)
            if entry is not None and entry.path.name == name:
                del self._entries[key]


def _digest(value: torch.Tensor) -> str:
    """Return 128 bits of the BLAKE3 of a contiguous tensor's bytes."""
    import torch
    from blake3 import blake3

    return blake3(value.reshape(-1).view(torch.uint8).numpy()).hexdigest(length=16)


def _entries(path: Path) -> dict[str, _Entry]:
    """Return what a safetensors file holds; nothing if it is not exactly as long as its header says."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(length)) if length <= _LONGEST_HEADER else {}
            whole = stream.seek(0, 2)
        digests = header.pop("__metadata__")
        if whole == 8 + length + max(item["data_offsets"][1] for item in header.values()):
            return {key: _entry(path, 8 + length, item, digests[key]) for key, item in header.items()}
    return {}


def _entry(path: Path, base: int, item: Mapping[str, Any], digest: str) -> _Entry:
    begin, end = item["data_offsets"]
    return _Entry(
        path=path,
        begin=base + begin,
        size=end - begin,
        shape=tuple(item["shape"]),
        dtype=_DTYPES[item["dtype"]],
        digest=digest,
    )
