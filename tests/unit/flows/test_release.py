"""What a run alone looks at: two runs of one recipe do not share it, and none leaves it when it ends."""

from __future__ import annotations

import io
import json
import os
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from prefect.exceptions import Pause
from prefect.logging import disable_run_logger
from prefect.settings import PREFECT_API_KEY, temporary_settings

from fakes.plain_jobs import PlainJob
from fakes.registries import NAME, adapter_folder, copy_registry
from fakes.releases import report
from flows.display import Display
from flows.errors import Rejected
from flows.folder import EDITS, LATEST, PORTRAIT
from flows.parameters import Approval
from flows.release import SCAN_PAGE, gathered, nothing_left, of_this_run, publish, pull, scan
from flows.stages import Done, Job
from registry.approving import note_rejection
from registry.client import Registry
from registry.digest import digest_bytes
from registry.errors import ScanRefused
from registry.manifest import WEIGHTS_NAME
from registry.reference import Reference
from serving.errors import BaseNotFound
from trainer.progress import silent
from trainer.recipe import load
from trainer.stage import StageResult

_TIMES = 4


def other_stages(folder: Path, seed: int) -> dict[str, StageResult]:
    """What stages before and after have left, which have folders of their own."""
    adapter_folder(folder / "train" / "adapter", seed)
    (folder / "evaluate").mkdir(exist_ok=True)
    (folder / "evaluate" / "report.html").write_text(str(seed))
    (folder / "edit").mkdir(exist_ok=True)
    (folder / "edit" / "edits.json").write_text(json.dumps([{"portrait": PORTRAIT}]))
    (folder / "edit" / PORTRAIT).write_text(str(seed))
    digest = digest_bytes(b"other")
    return {
        stage: StageResult(stage=stage, folder=folder / stage, key=digest, digest=digest)
        for stage in ("train", "evaluate", "edit")
    }


def release(home: Path, seed: int, told: Any) -> None:
    """Do again and again what a run does at its end, and tell what went wrong."""
    os.environ |= {"ADAPTER_FOUNDRY_HOME": str(home), "PREFECT__RUNTIME__FLOW_RUN__ID": f"run-{seed}"}
    stages, wrong = other_stages(home / f"stages-{seed}", seed), []
    for _ in range(_TIMES):
        job = Job(home=home, root=home / "runs" / "same", display=Display(2, io.StringIO()))
        try:
            of_run = dict(stages)
            for task, given in ((scan, {"adapter": stages["train"].folder / "adapter"}),
                                (pull, {"home": home, "reference": f"{NAME}@prod"})):  # fmt: skip
                made = task.fn(**given, out=of_this_run(job, task.name), progress=silent)
                of_run[task.name] = StageResult.from_json(made)
            job.done = {name: Done(result=one, seconds=0.0, run="run") for name, one in of_run.items()}
            gathered(job, adapter=str(seed))
        except Exception as error:  # told to the test
            wrong.append(repr(error))
    told.put(wrong)


def test_two_runs_of_one_recipe_do_not_disturb_each_other(home: Path) -> None:
    copy_registry(home)
    context = get_context("spawn")
    told = context.Queue()
    processes = [context.Process(target=release, args=(home, seed, told)) for seed in (1, 2)]
    for process in processes:
        process.start()
    assert [told.get(timeout=600) for _ in processes] == [[], []]
    for process in processes:
        process.join()
    root = home / "runs" / "same"
    assert [path.name for path in root.iterdir() if not path.name.endswith(".lock")] == [LATEST]
    summary = json.loads((root / LATEST / "run.json").read_text())
    seed = summary["adapter"]
    assert (
        (root / LATEST / "report.html").read_text() == (root / LATEST / EDITS / PORTRAIT).read_text() == seed
    )
    weights = digest_bytes((root / LATEST / "adapter" / WEIGHTS_NAME).read_bytes())
    assert f"stages-{seed}" in (root / LATEST / SCAN_PAGE).read_text()
    by_stage = {stage["stage"]: stage for stage in summary["stages"]}
    assert by_stage["scan"]["digest"] == str(weights)
    assert {by_stage[name]["folder"] for name in ("scan", "pull")} == {str(root / LATEST)}


def published(home: Path, approval: Approval) -> list[str]:
    """Release a second adapter where nobody has registered its base; return what lies in the run's folder.

    Raises:
        Explained: the release failed.
    """
    stages = other_stages(home / "stages", 1)
    (stages["evaluate"].folder / "evaluation.json").write_text(report().model_dump_json())
    job = PlainJob(home=home, root=home / "runs" / "mine", display=Display(13, io.StringIO()))
    # A key for no server: with neither of them an event starts one.
    with disable_run_logger(), temporary_settings({PREFECT_API_KEY: "of nobody"}):
        publish(job, load("pixelsmile-portraits"), stages["train"], stages["evaluate"], approval)
    return left_in(home)


def left_in(home: Path) -> list[str]:
    """What lies in the run's folder but for locks."""
    return [path.name for path in (home / "runs" / "mine").iterdir() if not path.name.endswith(".lock")]


def test_a_release_whose_edits_fail_leaves_neither_the_pulled_adapter_nor_its_scan(home: Path) -> None:
    copy_registry(home)
    with pytest.raises(BaseNotFound):
        published(home, "automatic")
    assert Registry.open(home).show(f"{NAME}@prod").listed.reference == f"{NAME}:2", "it came to the edits"
    assert left_in(home) == []


def test_the_page_of_the_scan_stays_for_who_decides_later_and_not_behind_a_rejection(home: Path) -> None:
    registry = copy_registry(home)
    (scanned,) = published(home, "later")
    assert (home / "runs" / "mine" / scanned / SCAN_PAGE).is_file()
    reference = Reference.parse(f"{NAME}:2")
    note_rejection(registry, reference, registry.show(str(reference)).listed.digest, "Lee", "blurs mouths")
    with pytest.raises(Rejected):
        published(home, "later")
    assert left_in(home) == []


@pytest.mark.parametrize(("end", "stays"), [
    (Pause(), ["pull", "scan"]), (ScanRefused("it hides data", "train again"), ["scan"]),
    (SystemExit(143), []), (OSError("no space left"), []),
])  # fmt: skip
def test_who_waits_goes_on_with_all_of_it_and_a_refused_scan_can_be_looked_at(
    home: Path, end: BaseException, stays: list[str]
) -> None:
    job = PlainJob(home=home, root=home / "runs" / "mine", display=Display(13, io.StringIO()))
    for stage in (scan.name, pull.name):
        (of_this_run(job, stage) / "files").mkdir(parents=True)
    with pytest.raises(type(end)), nothing_left(job):
        raise end
    assert sorted(name.split("-")[0] for name in left_in(home)) == stays
