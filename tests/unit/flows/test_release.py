"""Two runs of one recipe at the same time: each looks at its own, and the run folder is of one of them."""

from __future__ import annotations

import io
import json
import os
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fakes.registries import NAME, adapter_folder, copy_registry
from flows.display import Display
from flows.folder import EDITS, LATEST, PORTRAIT
from flows.release import SCAN_PAGE, gathered, of_this_run, pull, scan
from flows.stages import Done, Job
from registry.digest import digest_bytes
from registry.manifest import WEIGHTS_NAME
from trainer.progress import silent
from trainer.stage import StageResult

_TIMES = 4


def other_stages(folder: Path, seed: int) -> dict[str, StageResult]:
    """What stages before and after have left, which have folders of their own."""
    adapter_folder(folder / "train" / "adapter", seed)
    (folder / "evaluate").mkdir()
    (folder / "evaluate" / "report.html").write_text(str(seed))
    (folder / "edit").mkdir()
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
