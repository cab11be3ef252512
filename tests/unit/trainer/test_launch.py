"""Several processes: started by us or by accelerate; stopped, killed, on machines of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import torch.multiprocessing as multiprocessing
from prefect.logging import disable_run_logger

from fakes.trainings import (
    Hold,
    assert_same_tensors,
    assert_same_training,
    changed,
    curve,
    job_of,
    start,
    train_tiny,
    weights,
)
from flows.launching import launch
from flows.settings import FlowSettings
from registry.digest import Digest
from servers.ports import kept_port
from trainer import parallel, stage
from trainer.data import Dataset
from trainer.errors import TrainerError
from trainer.job import Job
from trainer.launch import _agreed, _divided, train
from trainer.parallel import Gradients, Processes
from trainer.progress import silent
from trainer.recipe import Recipe

STEPS = 40
PATIENCE = 600  # seconds, for machines that do much else
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Recipe) -> Recipe:
    """Long enough that there is much left to do when it is stopped."""
    return changed(
        changed(tiny_recipe, "optimiser", steps=STEPS), "running", log_every=1, checkpoint_every=1000
    )


@pytest.fixture(scope="module")
def alone(
    recipe: Recipe, tiny_run: Path, tiny_base: Path, tiny_pipeline, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What one process trains."""
    out = tmp_path_factory.mktemp("alone")
    train_tiny(recipe, tiny_run, tiny_base, tiny_pipeline, out)
    return out


@pytest.fixture(scope="module")
def together(
    recipe: Recipe, tiny_run: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What two processes train that nobody disturbs."""
    out, told = tmp_path_factory.mktemp("together"), []
    made = train(
        recipe, tiny_run / "dataset", tiny_run / "cache", tiny_base, out,
        lambda stage, done, total, note="": told.append((done, note)), processes=2, track=False,
    )  # fmt: skip
    assert (made.folder, made.reused) == (out, False)
    assert [done for done, _ in told] == list(range(1, STEPS + 1))
    assert all("loss" in note and "samples/s" in note for _, note in told)
    return out


def test_a_run_takes_what_another_makes_that_is_at_the_same_training(
    recipe: Recipe, alone: Path, tiny_run: Path, tiny_base: Path, tmp_path: Path
) -> None:
    out, made = shutil.copytree(alone, tmp_path / "train"), []
    job = Job.read(job_of(recipe, tiny_run, tiny_base, out))
    complete = (out / "stage.json").rename(tmp_path / "stage.json")

    def second() -> None:
        with disable_run_logger():
            made.append(launch(job, FlowSettings(processes=1), silent))

    with stage.alone(out, lambda: None):
        run = threading.Thread(target=second, daemon=True)
        run.start()
        run.join(5)
        assert run.is_alive(), "it waits"
        complete.rename(out / "stage.json")
    run.join(PATIENCE)
    assert [one.reused for one in made] == [True]
    assert not (out / "accelerate.json").exists(), "it has started nothing"


def test_a_dataset_that_was_replaced_is_not_trained_on_under_the_name_of_the_one_before(
    recipe: Recipe, tiny_run: Path, tiny_base: Path, tmp_path: Path
) -> None:
    written = Job.read(job_of(recipe, tiny_run, tiny_base, tmp_path / "train"))
    asked = replace(written, version=Digest(f"sha256:{'0' * 64}"))
    with disable_run_logger(), pytest.raises(TrainerError, match=r"holds the dataset .* by now, not .*0000"):
        launch(asked, FlowSettings(processes=1), silent)
    process = [sys.executable, "-m", "trainer.launch", str(asked.write())]
    told = subprocess.run(process, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (told.returncode, "by now" in told.stderr) == (TrainerError.exit_code, True)
    assert [path.name for path in (tmp_path / "train").iterdir()] == ["job.json"], "nothing was trained"
    assert replace(asked, version=Dataset.open(written.dataset).digest).data().folder == written.dataset


@pytest.fixture
def hold(tmp_path_factory: pytest.TempPathFactory) -> Hold:
    return Hold(tmp_path_factory.mktemp("hold"))


def family_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def trainers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that train, in the order of their ranks; helpers have the variables of theirs, too."""
    found: dict[int, psutil.Process] = {}
    for one in family_of(process):
        with suppress(psutil.NoSuchProcess):
            environment = one.environ()
            if "RANK" in environment:
                found.setdefault(int(environment["RANK"]), one)  # psutil names parents first
    return [found[rank] for rank in sorted(found)]


def rates(out: Path) -> list[float]:
    return [line["learning_rate"] for line in curve(out)]


def assert_close(one: Path, other: Path) -> None:
    """The same schedule and samples; only the order of sums differs."""
    assert rates(one) == rates(other)
    for first, second in zip(curve(one), curve(other), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=0.02)
    first, second = weights(one), weights(other)
    assert all(torch.allclose(first[name], second[name], atol=5e-3) for name in first)


@pytest.mark.slow
def test_two_processes_train_what_one_does(alone: Path, together: Path) -> None:
    assert_close(alone, together)
    facts = json.loads((together / "stage.json").read_text())["facts"]
    assert facts["steps"] == STEPS


@pytest.mark.slow
def test_sigterm_saves_ends_all_processes_and_accelerate_goes_on_to_the_bit(
    recipe: Recipe, tiny_run: Path, tiny_base: Path, together: Path, tmp_path: Path, hold: Hold
) -> None:
    """The launcher gets the signal; what `accelerate launch` makes of the rest equals the undisturbed two."""
    job = job_of(recipe, tiny_run, tiny_base, tmp_path)
    hold.at(3)
    with start(job, 2, **ONE_THREAD, **hold.environment) as process:
        hold.wait(process, PATIENCE)
        family = family_of(process)
        assert len(trainers(process)) == 2
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143, said
    assert "Interrupted" in said
    psutil.wait_procs(family, timeout=120)
    assert [one for one in family if one.is_running()] == []
    (kept,) = (tmp_path / "checkpoints").iterdir()
    steps = len(curve(tmp_path))
    assert 3 <= steps < STEPS
    assert kept.name == f"step-{steps:06d}"

    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "fp16", "--gradient_accumulation_steps", "4"]
    command += ["--dynamo_backend", "no", "--main_process_port", str(kept_port())]
    done = subprocess.run(
        [*command, "-m", "trainer.launch", str(job)],
        capture_output=True, text=True, env={**os.environ, **ONE_THREAD}, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{STEPS}/{STEPS}" in done.stderr  # told to people
    assert_same_training(together, tmp_path)


@pytest.mark.slow
def test_a_killed_process_ends_all_and_one_process_goes_on_with_the_same_schedule(
    recipe: Recipe, tiny_run: Path, tiny_base: Path, tiny_pipeline, alone: Path, tmp_path: Path, hold: Hold
) -> None:
    """Before that the second of two is asked to stop, and both do; then the second of two is killed.

    The main process notices that it is alone and saves its last whole step.
    """
    job = job_of(recipe, tiny_run, tiny_base, tmp_path)
    hold.at(2)
    with start(job, 2, **ONE_THREAD, **hold.environment) as process:
        hold.wait(process, PATIENCE)
        trainers(process)[1].terminate()
        hold.release()
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143, said
    stopped = len(curve(tmp_path))
    assert (tmp_path / "checkpoints" / f"step-{stopped:06d}" / "state.json").exists()

    hold.at(stopped + 2)
    with start(job, 2, **ONE_THREAD, **hold.environment) as process:
        hold.wait(process, PATIENCE)
        family = family_of(process)
        trainers(process)[1].kill()
        hold.release()
        _, said = process.communicate(timeout=PATIENCE)  # not the half hour that gloo would wait
    assert process.returncode == 1, said
    # Who is alone says why, unless torch's launcher comes first, which ends all when one is gone.
    assert re.search(
        r"^ProcessLost (another process of this training is gone|.* ended with status 1$)", said, re.M
    )
    psutil.wait_procs(family, timeout=120)
    assert [one for one in family if one.is_running()] == []
    steps = len(curve(tmp_path))
    assert steps >= stopped + 2
    assert (tmp_path / "checkpoints" / f"step-{steps:06d}" / "state.json").exists()

    result = train_tiny(recipe, tiny_run, tiny_base, tiny_pipeline, tmp_path)
    assert result.facts["resumed_from"] == steps
    assert_close(alone, tmp_path)


@pytest.mark.slow
def test_machines_without_a_common_disk_go_on_from_the_main_ones_checkpoint(
    recipe: Recipe, tiny_run: Path, tiny_base: Path, alone: Path, tmp_path: Path
) -> None:
    """Two processes, as torchrun would start them on two nodes, of which only the first has the checkpoint.

    The one that they begin from was made by one process; they continue its schedule.
    """
    outs = [tmp_path / "first", tmp_path / "second"]
    jobs = [job_of(recipe, tiny_run, tiny_base, out) for out in outs]
    shutil.copytree(alone / "checkpoints", outs[0] / "checkpoints")
    shutil.copy(alone / "loss.jsonl", outs[0] / "loss.jsonl")
    place = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(kept_port()),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
    }
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "trainer.launch", str(job)],
            stderr=subprocess.PIPE, text=True, env={**os.environ, **ONE_THREAD, **place, "RANK": str(rank)},
        )
        for rank, job in enumerate(jobs)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=PATIENCE)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], said
    assert_same_tensors(weights(alone), weights(outs[0]))
    assert sorted(path.name for path in outs[1].iterdir()) == ["job.json"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """What each of two real processes found when they talked to each other."""
    out = tmp_path_factory.mktemp("two")
    multiprocessing.start_processes(_talk, (str(out), kept_port()), nprocs=2, start_method="spawn")
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


def _talk(rank: int, out: str, port: int) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank)
    )
    processes = parallel.start()
    told = processes.tell({"from": rank, "text": "ä", "number": 0.1})
    gathered = processes.gather([rank, float("inf")])
    copied = processes.copy(torch.full((3,), rank + 5, dtype=torch.uint8)).tolist()
    values = {"a": torch.nn.Parameter(torch.ones(2)), "b": torch.nn.Parameter(torch.ones(3))}
    gradients = Gradients(values, processes)
    ((rank + 1) * (values["a"].sum() + 2 * values["b"].sum())).backward()
    sums, stop = gradients.add_up({"loss": torch.tensor(rank + 0.5)}, stop=rank == 1)
    same, own, other = "sha256:" + "7" * 64, "sha256:" + f"{rank}" * 64, []
    for key, code in ((same, same), (own, same), (same, own)):
        try:
            _agreed(processes, Digest(key), Digest(code))
        except TrainerError as error:
            other.append(error.message)
    found = {
        "main": processes.main, "told": told, "gathered": repr(gathered), "copied": copied, "sums": sums,
        "stop": stop, "a": values["a"].grad.tolist(), "b": values["b"].grad.tolist(), "other": other,
    }  # fmt: skip
    Path(out, f"{rank}.json").write_text(json.dumps(found))
    parallel.end()


@pytest.mark.slow
def test_processes_hear_the_same(two: list[dict[str, object]]) -> None:
    assert [one.pop("main") for one in two] == [True, False]
    assert two[0] == two[1]
    assert two[0]["told"] == {"from": 0, "text": "ä", "number": 0.1}
    assert two[0]["gathered"] == "[[0, inf], [1, inf]]"
    assert two[0]["copied"] == [5, 5, 5]


@pytest.mark.slow
def test_gradients_losses_and_the_wish_to_stop_are_summed_together(two: list[dict[str, object]]) -> None:
    assert two[0]["a"] == [3.0, 3.0]
    assert two[0]["b"] == [6.0, 6.0, 6.0]
    assert two[0]["sums"] == {"loss": 2.0, "gradient": pytest.approx((2 * 9 + 3 * 36) ** 0.5)}
    assert two[0]["stop"] is True  # though only the second was asked


@pytest.mark.slow
def test_processes_with_another_dataset_or_other_sources_are_refused_by_all(
    two: list[dict[str, object]],
) -> None:
    found = two[0]["other"]
    assert isinstance(found, list)
    assert len(found) == 2
    assert all("process 1 has another recipe, dataset, base or version" in message for message in found)


def test_gradients_alone() -> None:
    values = {"a": torch.nn.Parameter(torch.tensor([1.0, 2.0])), "unused": torch.nn.Parameter(torch.ones(1))}
    gradients = Gradients(values, Processes())
    for _ in range(2):
        (values["a"] ** 2).sum().backward()
    sums, stop = gradients.add_up({"loss": torch.tensor(3.0), "part": torch.tensor(2.0)}, stop=False)
    assert sums == {"loss": 3.0, "part": 2.0, "gradient": pytest.approx((16 + 64) ** 0.5)}
    assert stop is False
    gradients.scale(0.5)
    assert values["a"].grad is not None
    assert values["a"].grad.tolist() == [2.0, 4.0]
    gradients.clear()
    assert values["a"].grad.tolist() == [0.0, 0.0]


def test_more_processes_than_pairs_are_refused(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainerError, match="3 processes cannot share a step of 2 pairs") as caught:
        train(
            tiny_recipe, tiny_run / "dataset", tiny_run / "cache", tiny_base, tmp_path / "out", processes=3,
            track=False,
        )  # fmt: skip
    assert "batch_pairs" in caught.value.mend
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("pairs", "at_once", "count", "fits"),
    [
        (4, 1, 2, True),
        (4, 2, 2, True),
        (5, None, 2, True),
        (5, 1, 2, False),
        (5, 2, 2, False),
        (6, 2, 4, True),
    ],
)
def test_a_sharded_base_needs_equally_many_passes(
    pairs: int, at_once: int | None, count: int, fits: bool, tiny_recipe: Recipe
) -> None:
    recipe = changed(changed(tiny_recipe, "optimiser", batch_pairs=pairs), "running", micro_pairs=at_once)
    _divided(recipe, count)
    recipe = changed(recipe, "running", shard=True)
    if fits:
        _divided(recipe, count)
    else:
        with pytest.raises(TrainerError, match="same number of forward passes"):
            _divided(recipe, count)


def test_a_job_is_read_as_it_was_written(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tmp_path: Path
) -> None:
    path = job_of(tiny_recipe, tiny_run, tiny_base, tmp_path)
    job = Job.read(path)
    assert job.recipe.digest == tiny_recipe.digest
    assert job.recipe.running == tiny_recipe.running
    assert (job.dataset, job.out, job.track) == (tiny_run / "dataset", tmp_path, False)
    path.write_text("{}")
    with pytest.raises(TrainerError, match="is not the file of a training") as caught:
        Job.read(path)
    assert "--prepare-only" in caught.value.mend
