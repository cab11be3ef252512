"""What a clean-up removes from the store and from this machine; see `flows.maintenance`.

Folders of stages, with their pictures, latents and checkpoints, and answers of paid APIs are kept for ever
unless an age is given: they are hours and money. The age counts from when something was used last, and what
is in use stays: a run locks its recipe's folders while a stage of it goes on, and one that waits for people
has touched what it will go on with ahead, for as long as it may wait. What editors did for evaluations costs
minutes: it is kept so that what production runs is measured once.
"""

from __future__ import annotations

import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypedDict

from flows.errors import FlowError
from registry.client import Registry
from registry.errors import Explained, RegistryError
from trainer.evaluation.evaluating import FOLDER as EVALUATIONS
from trainer.stage import unused

#: Folders of stages and what they leave while they work, below ``runs/<recipe>``; also those that earlier
#: versions made, and what is left of a run folder that was being gathered. The run folder itself stays.
_STAGE = re.compile(r"\.?[a-z]+-[0-9a-f]{16}([.-].+)?|\.?(scan|pulled|folder)(\..+)?|\.latest\..+", re.ASCII)

#: Below ``evaluations``: in "measured" what an editor did, the judges' own error, and what is left of either
#: or of an adapter's probes (of earlier versions under the one name "safety"); in "fetched" versions that
#: somebody was compared with. The reports beside them stay.
_DISPOSABLE = {
    "measured": re.compile(
        r"\.?(?P<owner>((truth|probes)-)?[0-9a-f]{32}|safety(?=-[0-9a-f]{16}\.parts))([.-].+)?", re.ASCII
    ),
    "fetched": re.compile(r"\.?(?P<owner>[0-9a-f]{64})(\.gone)?", re.ASCII),
}
_GONE = ".gone"  # how a folder ends that is being removed, or that a removal which was killed has left
_NOT_LEFT = "-"


_Found = tuple[Path, Path | None]  # what may go, and what is locked while somebody uses it


class Removed(TypedDict):
    """A row of the table: the place it was in, its name there, its size, and why it is still there."""

    where: str
    name: str
    bytes: int
    left: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Collected:
    """What a clean-up did, also one that could not go on.

    Attributes:
        rows: what it removed, or would remove, and what it could not remove.
        error: why it ended early; None if it did not.
    """

    rows: tuple[Removed, ...]
    error: RegistryError | None = None

    @property
    def removed(self) -> list[Removed]:
        """The rows of what is gone, or would be."""
        return [row for row in self.rows if row["left"] == _NOT_LEFT]

    @property
    def refusal(self) -> Explained | None:
        """What has to be looked after; None if all is well."""
        left = [row for row in self.rows if row["left"] != _NOT_LEFT]
        if self.error is not None or not left:
            return self.error
        return FlowError(
            f"{len(left)} things could not be removed, the first is {left[0]['name']}: {left[0]['left']}",
            "look who owns them and whether the disk is well, then start collect-garbage again",
        )


def collect(
    *,
    store: bool,
    adapters: bool,
    grace: timedelta,
    run_folders: timedelta | None,
    evaluations: timedelta | None,
    paid_answers: timedelta | None,
    dry_run: bool,
) -> Collected:
    """Remove what nobody needs, and tell what; see `registry.upkeep`.

    What cannot be removed is told and left. What the registry refuses ends it: nothing that comes behind is
    looked at, and what was removed before is told.

    Args:
        store: objects that nothing signed refers to.
        adapters: cached adapters that were revoked or that no name means any more.
        grace: for both of them.
        run_folders: stage folders that nobody has used for so long; None leaves all.
        evaluations: what editors did for evaluations that nobody has used for so long; None leaves all.
        paid_answers: answers that nobody has used for so long; None leaves all.
        dry_run: only tell.

    Raises:
        RegistryError: the registry cannot be opened; nothing was removed.
    """
    from registry import upkeep

    registry = Registry.open()
    rows: list[Removed] = []
    try:
        if store:
            found = upkeep.clean(registry, grace, dry_run=dry_run)
            rows += [_row("store", one.key, one.size) for one in (*found.objects, *found.unfinished)]
        if adapters:
            pruned = upkeep.prune(registry, None, grace, dry_run=dry_run)
            rows += [_row("cached adapters", name, size) for name, size in pruned.removed.items()]
    except RegistryError as error:
        return Collected(rows=tuple(rows), error=error)
    home = registry.place.home
    for where, paths, age in (
        ("run folders", _stages(home / "runs"), run_folders),
        ("evaluations", _disposable(home / EVALUATIONS), evaluations),
        ("paid answers", _files(home / "apis" / "answers"), paid_answers),
    ):
        if age is not None:
            rows += _dropped(where, paths, home, time.time() - age.total_seconds(), dry_run)
    return Collected(rows=tuple(rows))


def _row(where: str, name: str, size: int, left: str = _NOT_LEFT) -> Removed:
    return {"where": where, "name": name, "bytes": size, "left": left}


def _stages(runs: Path) -> Iterator[_Found]:
    for recipe in sorted(runs.glob("*")):
        for folder in _folders(recipe, _STAGE):
            yield folder, recipe


def _disposable(evaluations: Path) -> Iterator[_Found]:
    for name, pattern in _DISPOSABLE.items():
        for folder in _folders(evaluations / name, pattern):
            match = pattern.fullmatch(folder.name)
            assert match is not None, "only such names were looked for"
            yield folder, folder.with_name(match["owner"])


def _folders(place: Path, names: re.Pattern[str]) -> Iterator[Path]:
    for folder in sorted(place.iterdir()) if place.is_dir() and not place.is_symlink() else ():
        if names.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
            yield folder


def _files(folder: Path) -> Iterator[_Found]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield path, None


def _dropped(
    where: str, found: Iterable[_Found], home: Path, before: float, dry_run: bool
) -> Iterator[Removed]:
    """Remove what nobody has touched since ``before`` and nobody uses now, and tell it."""
    for path, owner in found:
        name, size = str(path.relative_to(home)), 0
        try:
            with nullcontext(True) if owner is None else unused(owner) as free:
                touched, size = _looked_at(path)
                if free and (touched < before or path.name.endswith(_GONE)):
                    if not dry_run:
                        _remove(path)
                    yield _row(where, name, size)
        except FileNotFoundError:
            continue  # somebody is at work in it
        except OSError as error:
            yield _row(where, name, size, error.strerror or str(error))


def _looked_at(path: Path) -> tuple[float, int]:
    """When something in it was touched last, and how many bytes it has."""
    found = [one.lstat() for one in (path, *path.rglob("*"))]
    return max(one.st_mtime for one in found), sum(one.st_size for one in found if stat.S_ISREG(one.st_mode))


def _remove(path: Path) -> None:
    """Remove a file, or a folder in such a way that nobody ever sees half of it."""
    if not path.is_dir():
        path.unlink()
        return
    if not path.name.endswith(_GONE):
        path = path.rename(path.with_name(f".{path.name.lstrip('.')}{_GONE}"))
    shutil.rmtree(path)
