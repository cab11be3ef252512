"""What all stages have in common: a folder that appears at once, a result that can be reused.

A stage writes into a hidden folder beside its output and renames it when all is there, so a reader never sees
half a stage. ``stage.json`` in the folder keeps the result and its key: the digest of everything that decides
it. A stage that finds its own key in the output has nothing to do.

A clean-up takes what nobody has used for long. So whoever uses a folder touches it, and holds a lock beside
it meanwhile, which dies with its process.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

from registry.digest import Digest, digest_bytes
from registry.manifest import canonical_json
from trainer.progress import Progress

STAGE_NAME = "stage.json"
#: Tells apart the processes of pods that share a data folder: their numbers are often equal.
_POD = uuid.uuid4().hex[:8]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageResult:
    """What a stage made.

    Attributes:
        stage: name of the stage.
        folder: where its output lies.
        key: digest of everything that decided the output.
        digest: digest of the output itself.
        facts: counts and other plain JSON values, for tables and logs.
        reused: the output was there already.
    """

    stage: str
    folder: Path
    key: Digest
    digest: Digest
    facts: Mapping[str, Any] = field(default_factory=dict)
    reused: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        return {
            "stage": self.stage,
            "folder": str(self.folder),
            "key": str(self.key),
            "digest": str(self.digest),
            "facts": dict(self.facts),
            "reused": self.reused,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StageResult:
        """Return the result that `as_json` wrote."""
        return cls(
            stage=value["stage"],
            folder=Path(value["folder"]),
            key=Digest(value["key"]),
            digest=Digest(value["digest"]),
            facts=value["facts"],
            reused=value["reused"],
        )


def stage_key(stage: str, **inputs: Any) -> Digest:
    """Return the digest of a stage's name and of the JSON values that decide its output."""
    return digest_bytes(canonical_json({"stage": stage, **inputs}))


def finished(out: Path, key: Digest) -> StageResult | None:
    """Return the result that lies in ``out``, or None unless it was made from the same ``key``."""
    try:
        value = json.loads((out / STAGE_NAME).read_text("utf-8"))
        result = StageResult.from_json({**value, "folder": str(out)})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return replace(result, reused=True) if result.key == key else None


def write_result(folder: Path, result: StageResult) -> None:
    """Write ``result`` into ``folder``; the last thing that a stage does."""
    write_atomically(folder / STAGE_NAME, json.dumps(result.as_json(), indent=1, sort_keys=True).encode())


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes ``out`` (replacing an older one) if the block ends well."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(out, "tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        replace_folder(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(new: Path, out: Path) -> None:
    """Rename ``new`` to ``out``; an older ``out`` is moved away first and removed afterwards.

    Others may do the same meanwhile: each of them succeeds, and the last one's folder stays.
    """
    old = _beside(out, "old")
    while True:
        try:
            new.rename(out)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        shutil.rmtree(old, ignore_errors=True)
        with suppress(FileNotFoundError):
            out.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path, ending: str) -> Path:
    """Return a hidden name beside a path that is this process's alone."""
    return path.with_name(f".{path.name}.{os.getpid()}-{_POD}.{ending}")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is either absent, old or complete, even after a power cut."""
    temporary = _beside(path, "tmp")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def lock_of(folder: Path) -> Path:
    """Return the file that is locked by whoever makes or uses a folder.

    It stays, because one that is removed can be locked by two.
    """
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def used(folder: Path) -> Iterator[None]:
    """Keep a clean-up away from a folder; any number of processes may do so at once."""
    with _lock(folder) as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        yield


@contextmanager
def unused(folder: Path) -> Iterator[bool]:
    """Keep all others away from a folder; False where somebody uses it or is making it."""
    with _lock(folder) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        yield free


@contextmanager
def alone(folder: Path, busy: Callable[[], object]) -> Iterator[None]:
    """Let one at a time, thread or process, make a folder; the lock dies with its process.

    Args:
        folder: what is made; it need not be there.
        busy: is called when somebody else is at it, before the wait for the end of that.
    """
    with _lock(folder) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy()
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def making(stage: str, out: Path, key: Digest, progress: Progress) -> Iterator[StageResult | None]:
    """Let one run at a time make a stage's output; a second one waits and takes what the first has made.

    Args:
        stage: its name.
        out: folder of the output.
        key: of the output.
        progress: is told that another run is at it.

    Yields:
        what lies in ``out``, or None where it has still to be made.
    """
    if done := finished(out, key):
        yield done
        return
    busy = "another run is at the same stage: waiting for what it makes"
    with alone(out, lambda: progress(stage, 0, 0, busy)):
        yield finished(out, key)


def _lock(folder: Path) -> IO[bytes]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return lock_of(folder).open("ab")


def touch(folder: Path, ahead: timedelta = timedelta()) -> None:
    """Note that a folder is used now, or that somebody will want it for so long."""
    with suppress(OSError):  # it was not made, or belongs to somebody else, who looks after it
        until = max(folder.stat().st_mtime, time.time() + ahead.total_seconds())
        os.utime(folder, (until, until))
