"""How a run does its stages: as Prefect tasks whose outputs lie in folders that are named after their inputs.

A stage is reused when Prefect has its result under the same key *and* its folder is still there. The key is
made of the digests of everything that goes in, of the code that does the work, and of the folder's place in
the data folder: what is made again elsewhere, to see whether the same comes out, has a record of its own. The
result is JSON, never a pickle. What a reused stage made is read from the folder, not from the record.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.display import Display
from flows.errors import FlowError, StageFailed
from registry.digest import Digest
from trainer.parts import Mapper, here
from trainer.provenance import NOT_MAKING as NOT_MAKING
from trainer.provenance import code_digest as code_digest
from trainer.stage import STAGE_NAME, StageResult, stage_key, touch, used

if TYPE_CHECKING:
    from prefect import State, Task

#: The facts that a person looks for first.
HEADLINES = (
    *("verdict", "top1_accuracy", "base_top1_accuracy", "structural_confusion", "control_linearity"),
    *("identity_ratio", "paired_psnr", "psnr_gain", "steps", "loss_first", "loss_last", "validation_loss"),
)


def made(folder: Path) -> StageResult:
    """Return the result that a stage left in its folder."""
    return StageResult.from_json({**json.loads((folder / STAGE_NAME).read_bytes()), "folder": str(folder)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """A stage that was done.

    Attributes:
        result: what it made.
        seconds: how long it took here, reused or not.
        run: id of its Prefect task run.
    """

    result: StageResult
    seconds: float
    run: str


@dataclass(kw_only=True)
class Job:
    """One run of a recipe: does stages in order and remembers how they went.

    Attributes:
        home: data folder.
        root: folder of the recipe's stage folders.
        display: shows progress.
        mapper: does the parts of stages that have some.
        reuse_only: a stage whose result is not there is refused.
        done: the stages so far, by name.
        runs: ids of all task runs, also of one that failed.
    """

    home: Path
    root: Path
    display: Display
    mapper: Mapper = here
    reuse_only: bool = False
    done: dict[str, Done] = field(default_factory=dict)
    runs: list[str] = field(default_factory=list)
    _states: list[State[Any]] = field(default_factory=list)
    _used: set[Path] = field(default_factory=set)

    def folder(self, stage: str, key: Digest) -> Path:
        """Return the folder of a stage's output for these inputs."""
        return self.root / f"{stage}-{key.hex[:16]}"

    def shared(self, *, asks: bool) -> Mapper:
        """Return the mapper of a stage whose parts ask an API, or compute."""
        computing = getattr(self.mapper, "computing", None)
        return self.mapper if asks or computing is None else computing()

    def spread(self) -> Mapper:
        """Return the mapper of a stage of which each part fills a machine's cores or GPU by itself."""
        spreading = getattr(self.mapper, "spreading", None)
        return self.mapper if spreading is None else spreading()

    def cached(
        self, task: Task[..., Any], *, key: Mapping[str, Any], out: Path | None = None, **parameters: Any
    ) -> StageResult:
        """Do a stage, unless its result for these inputs is there.

        Args:
            task: returns `StageResult.as_json`; takes ``out`` and ``progress`` beside the parameters.
            key: digests and other JSON values of everything that decides the output.
            out: folder of the output; None names it after the key.
            parameters: what the task is called with.
        """
        digest = stage_key(task.name, **key)
        folder = out or self.folder(task.name, digest)
        with self._using(folder):
            there = folder.is_dir() if out else (folder / STAGE_NAME).is_file()
            if self.reuse_only and not there:
                raise FlowError(
                    f"the stage {task.name} of this recipe has not been done on this machine",
                    "run the deployment training (or the whole pipeline) with the same recipe first",
                )
            place = folder.relative_to(self.home) if folder.is_relative_to(self.home) else folder
            record = stage_key(task.name, inputs=str(digest), folder=place.as_posix())
            cached = task.with_options(
                cache_key_fn=lambda *_: f"{task.name}-{record.hex}",
                refresh_cache=not there,
                persist_result=True,
                result_serializer="json",
            )
            return self._do(cached, {**parameters, "out": folder}, folder)

    def always(self, task: Task[..., Any], **parameters: Any) -> StageResult:
        """Do a stage on every run: what protects or proves something is never taken from a cache."""
        from prefect.cache_policies import NO_CACHE

        with self._using():
            return self._do(task.with_options(cache_policy=NO_CACHE, persist_result=False), parameters)

    def keep(self, ahead: timedelta = timedelta()) -> None:
        """Note that what this run has used until now is in use, and for so long if nobody notes it again."""
        for folder in self._used:
            touch(folder, ahead)

    def summary(self, **about: str) -> dict[str, Any]:
        """Return what was done as JSON values, beside what the caller says ``about`` it."""
        stages = [
            {
                "stage": name,
                "seconds": round(done.seconds, 2),
                "reused": done.result.reused,
                "facts": in_words(done.result.facts),
                "digest": str(done.result.digest),
                "folder": str(done.result.folder),
                "task_run": done.run,
            }
            for name, done in self.done.items()
        ]
        return {**about, "stages": stages}

    @contextmanager
    def _using(self, folder: Path | None = None) -> Iterator[None]:
        """Keep a clean-up away from what this run uses, now and behind it; see `flows.garbage`."""
        if folder is not None:
            self._used.add(folder)
        with ExitStack() as stack:
            for root in {self.root, *(one.parent for one in self._used)}:
                if root.parent == self.home / "runs":  # a clean-up comes nowhere else
                    stack.enter_context(used(root))
            self.keep()
            try:
                yield
            finally:
                self.keep()

    def _do(
        self, task: Task[..., Any], parameters: Mapping[str, Any], folder: Path | None = None
    ) -> StageResult:
        started = time.monotonic()
        with self.display.stage(task.name, task.description or ""):
            state = task(**parameters, progress=self.display, return_state=True, wait_for=self._states[-1:])
        run = str(state.state_details.task_run_id)
        self.runs.append(run)
        if not state.is_completed() and not state.is_failed() and not state.is_crashed():
            raise StageFailed(f"the stage {task.name} ended as {state.name}", "run the same command again")
        result = StageResult.from_json(state.result())
        if folder is not None and state.name == "Cached":
            result = replace(_lying(folder, result), reused=True)
        if folder is not None and result.folder != folder:
            raise StageFailed(
                f"the stage {task.name} says that its output lies in {result.folder}, not in {folder}",
                f"remove {folder} and run the same command again",
            )
        seconds = time.monotonic() - started
        self._states.append(state)
        self.done[task.name] = Done(result=result, seconds=seconds, run=run)
        self.display.done(seconds, result.reused, in_words(result.facts))
        return result


def _lying(folder: Path, recorded: StageResult) -> StageResult:
    """Return what a stage left in its folder, as the folder tells it.

    Prefect's record may be of an earlier attempt: a stage that was done again and killed before Prefect wrote
    that down has another output than the record says. It also names the folder as it was called then, and a
    data folder may have been moved since.
    """
    return made(folder) if (folder / STAGE_NAME).is_file() else replace(recorded, folder=folder)


def in_words(facts: Mapping[str, Any], limit: int = 8) -> str:
    """Return the plain facts of a stage as one line: numbers and short words, what matters most first."""
    order = sorted(facts, key=lambda name: HEADLINES.index(name) if name in HEADLINES else len(HEADLINES))
    words = []
    for name in order:
        value, label = facts[name], name.replace("_", " ")
        if "." in name:  # the same measure on something else: see the report
            continue
        if isinstance(value, float):
            words.append(f"{label} {value:.4g}")
        elif isinstance(value, bool | int) or (isinstance(value, str) and len(value) <= 40):
            words.append(f"{label} {value}")
    return ", ".join(words[:limit])
