"""What stages have in common: several processes may make the same folder, and a reader finds a whole one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from fakes.followed import wait_until
from trainer.data import build_triplets
from trainer.progress import Progress
from trainer.recipe import Recipe
from trainer.scoring import score
from trainer.stage import StageResult, new_folder
from trainer.synthesis import synthesise

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


def synthesised(recipe: Recipe, run: Path, out: Path, progress: Progress) -> StageResult:
    return synthesise(recipe, out, progress, data_folder=out.parent)


def scored(recipe: Recipe, run: Path, out: Path, progress: Progress) -> StageResult:
    return score(recipe, run / "images", out, progress, data_folder=out.parent)


def chosen(recipe: Recipe, run: Path, out: Path, progress: Progress) -> StageResult:
    return build_triplets(recipe, run / "images", run / "scored", out, progress)


@pytest.mark.parametrize("stage", [synthesised, scored, chosen])
def test_two_runs_of_a_stage_make_it_once(
    tiny_recipe: Recipe, tiny_run: Path, tmp_path: Path, stage: Callable[..., StageResult]
) -> None:
    """The first one has done its last part when the second one comes; that one must leave the parts there."""
    recipe = tiny_recipe.model_copy(update={"running": tiny_recipe.running.model_copy(update={"batch": 8})})
    at_the_end, go_on, told = threading.Event(), threading.Event(), []

    def held(stage: str, done: int, total: int, note: str = "") -> None:
        if done == total:
            at_the_end.set()
            go_on.wait(120)

    with ThreadPoolExecutor(2) as runs:
        first = runs.submit(stage, recipe, tiny_run, tmp_path / "out", held)
        try:
            wait_until(lambda: at_the_end.is_set() or first.done())
            second = runs.submit(stage, recipe, tiny_run, tmp_path / "out", lambda *news: told.append(news))
            wait_until(lambda: bool(told) or second.done())
            assert not second.done(), "it waits"
        finally:
            go_on.set()
        made, taken = first.result(), second.result()
    assert (made.reused, taken.reused) == (False, True)
    assert taken.digest == made.digest
    assert [news[1:] for news in told] == [
        (0, 0, "another run is at the same stage: waiting for what it makes")
    ]
    assert not list(tmp_path.glob(".*.parts"))
