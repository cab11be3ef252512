"""What stages have in common: several processes may make the same folder, and a reader finds a whole one."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from trainer.stage import new_folder

_TIMES = 300


def make(out: Path, mark: str, told: Any) -> None:
    """Make a folder again and again, and tell what went wrong."""
    wrong = []
    for _ in range(_TIMES):
        try:
            with new_folder(out) as folder:
                for name in ("a", "b"):
                    (folder / name).write_text(mark)
        except OSError as error:
            wrong.append(repr(error))
    told.put(wrong)


def at_once(work: Callable[..., None], *given: tuple[object, ...]) -> list[list[str]]:
    """Do something in a process each, and return what each told."""
    context = get_context("spawn")
    told = context.Queue()
    processes = [context.Process(target=work, args=(*one, told)) for one in given]
    for process in processes:
        process.start()
    answers = [told.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    return answers


def test_processes_that_make_the_same_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "out"
    assert at_once(make, (out, "one"), (out, "two"), (out, "three")) == [[], [], []]
    assert (out / "a").read_text() == (out / "b").read_text()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_folder_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    for number, before in enumerate(("nothing", "empty", "full", "file", "link")):
        out = tmp_path / before
        if before == "file":
            out.write_text("x")
        elif before == "link":
            out.symlink_to(tmp_path / "full")
        elif before != "nothing":
            out.mkdir()
            (out / "old").touch() if before == "full" else None
        with new_folder(out) as folder:
            (folder / "new").write_text(str(number))
        assert [path.name for path in out.iterdir()] == ["new"]
    assert (tmp_path / "full" / "new").read_text() == "2"
