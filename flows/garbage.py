"""What a clean-up removes from the store and from this machine; see `flows.maintenance`.

Folders of stages, with their pictures, latents and checkpoints, and answers of paid APIs are kept for ever
unless an age is given: they are hours and money. One that is in use is young, because its files are.
What editors did for evaluations costs minutes: it is kept so that what production runs is measured once.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TypedDict

from registry.client import Registry
from trainer.evaluation.evaluating import FOLDER as EVALUATIONS

#: Folders of stages and what they leave while they work, below ``runs/<recipe>``.
_STAGE = re.compile(r"\.?[a-z]+-[0-9a-f]{16}(\..+)?", re.ASCII)

#: Below ``evaluations``: in "measured" what an editor did, the judges' own error, and what is left of either;
#: in "fetched" versions that somebody was compared with. The reports beside them stay.
_DISPOSABLE = {
    "measured": re.compile(r"\.?(truth-)?[0-9a-f]{32}([.-].+)?", re.ASCII),
    "fetched": re.compile(r"[0-9a-f]{64}", re.ASCII),
}


class Removed(TypedDict):
    """A row of the table: the place it was in, its name there, its size."""

    where: str
    name: str
    bytes: int


def collect(
    *,
    store: bool,
    adapters: bool,
    grace: timedelta,
    run_folders: timedelta | None,
    evaluations: timedelta | None,
    paid_answers: timedelta | None,
    dry_run: bool,
) -> list[Removed]:
    """Remove what nobody needs, and tell what; see `registry.upkeep`.

    Args:
        store: objects that nothing signed refers to.
        adapters: cached adapters that were revoked or that no name means any more.
        grace: for both of them.
        run_folders: stage folders in which nothing was touched for so long; None leaves all.
        evaluations: what editors did for evaluations that nobody has used for so long; None leaves all.
        paid_answers: answers that were not touched for so long; None leaves all.
        dry_run: only tell.

    Raises:
        RegistryError: see `registry.upkeep.clean`; what was found before is gone then, and nothing else.
    """
    from registry import upkeep

    registry = Registry.open()
    rows: list[Removed] = []
    if store:
        found = upkeep.clean(registry, grace, dry_run=dry_run)
        rows += [_row("store", one.key, one.size) for one in (*found.objects, *found.unfinished)]
    if adapters:
        pruned = upkeep.prune(registry, None, grace, dry_run=dry_run)
        rows += [_row("cached adapters", name, size) for name, size in pruned.removed.items()]
    home = registry.place.home
    for where, folders, age in (
        ("run folders", _stages(home / "runs"), run_folders),
        ("evaluations", _disposable(home / EVALUATIONS), evaluations),
    ):
        for folder in _old(folders, age) if age is not None else ():
            rows.append(_row(where, str(folder.relative_to(home)), _bytes(folder)))
            if not dry_run:
                shutil.rmtree(folder)
    if paid_answers is not None:
        answers = home / "apis" / "answers"
        for path in _old(_files(answers), paid_answers):
            rows.append(_row("paid answers", str(path.relative_to(home)), _bytes(path)))
            if not dry_run:
                path.unlink()
    return rows


def _row(where: str, name: str, size: int) -> Removed:
    return {"where": where, "name": name, "bytes": size}


def _stages(runs: Path) -> Iterator[Path]:
    for recipe in sorted(runs.glob("*")):
        yield from _folders(recipe, _STAGE)


def _disposable(evaluations: Path) -> Iterator[Path]:
    for name, pattern in _DISPOSABLE.items():
        yield from _folders(evaluations / name, pattern)


def _folders(place: Path, names: re.Pattern[str]) -> Iterator[Path]:
    for folder in sorted(place.iterdir()) if place.is_dir() and not place.is_symlink() else ():
        if names.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
            yield folder


def _files(folder: Path) -> Iterator[Path]:
    yield from (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())


def _old(paths: Iterator[Path], age: timedelta) -> Iterator[Path]:
    """Yield those in which nothing was touched for so long."""
    before = time.time() - age.total_seconds()
    for path in paths:
        if max(one.lstat().st_mtime for one in (path, *path.rglob("*"))) < before:
            yield path


def _bytes(path: Path) -> int:
    return sum(one.lstat().st_size for one in (path, *path.rglob("*")) if one.is_file())
