"""Stages that are made in parts: each part is done once, by whoever has time, and kept until all are there.

A stage cuts its work into parts that know nothing of each other. What maps them is a `Mapper`: this process
by default, or several processes of this machine; Prefect tasks on threads or on a Ray cluster in a flow. A
part writes its files under names of their content and leaves its answer as ``part-00007.json``; a part that
has an answer is not done again, so a stage that was killed goes on where it was. All workers share the
folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

from registry.digest import Digest
from trainer.progress import Progress
from trainer.stage import write_atomically

Part = Mapping[str, Any]
"""What a part is given: a number, and JSON values and paths that decide what it does."""

PartFunction = Callable[..., dict[str, Any]]
"""Does a part: ``function(folder, **part)`` returns JSON values. It is importable by name, so that it can be
sent to another machine, and doing it twice makes the same."""


#: A stage has at most so many parts if it cuts its work with `portions`.
MOST = 24


class Mapper(Protocol):
    """Does parts, in any order and in any place."""

    def __call__(self, stage: str, function: PartFunction, parts: Sequence[Part]) -> Iterator[None]:
        """Call ``function(**part)`` for each part and yield when one is done.

        Args:
            stage: name of the work, for people.
            function: importable by name.
            parts: its keyword arguments, each picklable.

        Raises:
            Exception: what a part raised, after those under way have ended.
        """


def here(stage: str, function: PartFunction, parts: Sequence[Part]) -> Iterator[None]:
    """Do parts in this process, one after the other."""
    for part in parts:
        function(**part)
        yield


def processes(count: int) -> Mapper:
    """Return a mapper that shares parts between so many processes of this machine.

    They are spawned, not forked: a fork of a process that runs torch threads can hang.
    """

    def mapper(stage: str, function: PartFunction, parts: Sequence[Part]) -> Iterator[None]:
        if count < 2 or len(parts) < 2:
            yield from here(stage, function, parts)
            return
        with ProcessPoolExecutor(min(count, len(parts)), get_context("spawn")) as pool:
            waiting = [pool.submit(function, **part) for part in parts]
            try:
                for done in as_completed(waiting):
                    done.result()
                    yield
            finally:
                for one in waiting:
                    one.cancel()

    return mapper


def do_part(function: PartFunction, folder: Path, number: int, part: Part) -> dict[str, Any]:
    """Do a part unless it was done, and return its answer; what a mapper calls, wherever it runs."""
    path = _answer(folder, number)
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        answer = function(folder, **part)
        write_atomically(path, json.dumps(answer, sort_keys=True).encode())
    return dict(json.loads(path.read_bytes()))


def in_parts(
    stage: str,
    out: Path,
    key: Digest,
    function: PartFunction,
    parts: Sequence[Part],
    mapper: Mapper = here,
    progress: Progress | None = None,
) -> tuple[Path, list[dict[str, Any]]]:
    """Do all parts that are not done yet.

    Args:
        stage: its name.
        out: folder of the stage's output; the parts lie beside it until `forget`.
        key: of the stage; parts of another key are other parts.
        function: does one part.
        parts: what each is given, in order.
        mapper: does them.
        progress: is told after each part.

    Returns:
        the folder of the parts, with the files that they wrote, and their answers in order.
    """
    folder = folder_of(out, key)
    folder.mkdir(parents=True, exist_ok=True)
    open_parts = [
        {"function": function, "folder": folder, "number": number, "part": part}
        for number, part in enumerate(parts)
        if not _answer(folder, number).is_file()
    ]
    done = len(parts) - len(open_parts)
    for _ in mapper(stage, do_part, open_parts):
        done += 1
        if progress is not None:
            progress(stage, done, len(parts), "parts")
    answers = [json.loads(_answer(folder, number).read_bytes()) for number in range(len(parts))]
    return folder, answers


def folder_of(out: Path, key: Digest) -> Path:
    """Return where the parts of a stage lie until they are put together."""
    return out.with_name(f".{out.name}-{key.hex[:16]}.parts")


def forget(out: Path, key: Digest) -> None:
    """Remove the parts of a stage whose output is complete."""
    shutil.rmtree(folder_of(out, key), ignore_errors=True)


def slices(count: int, size: int) -> list[tuple[int, int]]:
    """Return begin and end of pieces of at most ``size``, which together are ``range(count)``."""
    return [(begin, min(begin + size, count)) for begin in range(0, count, size)]


def portions(count: int, size: int) -> list[tuple[int, int]]:
    """Return `slices` of at least ``size``, and larger where there would be more than `MOST`.

    Each part costs an orchestrator a record, so a large stage has larger parts, not more of them.
    """
    return slices(count, max(size, -(-count // MOST)))


def _answer(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.json"
