"""The main job, whole and real but small: through a managed Prefect server into the registry and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fakes.pipelines import command, registry, small_recipe
from flows.server import managed_server, task_runs

CACHED = {"synthesise", "score", "triplets", "cache", "train", "evaluate", "edit"}
STAGES = [
    "synthesise", "score", "triplets", "cache", "train", "evaluate", "scan", "licences", "push", "approve",
    "promote", "pull", "edit",
]  # fmt: skip


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def recipe(data_folder: Path, repository: Path) -> Path:
    return small_recipe(repository, data_folder / "small.yaml")


@pytest.fixture(scope="module")
def first(data_folder: Path, recipe: Path) -> dict[str, Any]:
    """The summary of the first run."""
    done = command(data_folder, "-m", "flows.pipeline", str(recipe), "--json")
    assert done.returncode == 0, done.stderr
    assert "APPROVED AUTOMATICALLY" in done.stderr
    return json.loads(done.stdout)


def test_every_stage_is_done_in_order(first: dict[str, Any]) -> None:
    assert [stage["stage"] for stage in first["stages"]] == STAGES
    assert not any(stage["reused"] for stage in first["stages"])
    assert first["adapter"] == "pixelsmile@prod"


def test_the_run_folder_holds_what_a_person_looks_for(first: dict[str, Any]) -> None:
    folder = Path(first["folder"])
    pictures = {"contact_sheet.png", "intensity_strip.png", "portrait.png"}
    papers = {"evaluation.json", "report.html", "scan.html", "manifest.json", "run.json"}
    for name in pictures | papers | {"adapter/pytorch_lora_weights.safetensors"}:
        assert (folder / name).stat().st_size > 0
    kinds = {path.name.split(".")[0] for path in (folder / "statements").iterdir()}
    assert kinds == {"training", "evaluation", "scan", "licence", "approval"}
    assert json.loads((folder / "edits" / "edits.json").read_text())[0]["adapter_digest"] == first["digest"]


def test_every_task_run_is_recorded_after_the_process_has_ended(
    data_folder: Path, first: dict[str, Any]
) -> None:
    ids = [stage["task_run"] for stage in first["stages"]]
    with managed_server(data_folder) as server:
        assert task_runs(server.url, ids) == dict.fromkeys(ids, "COMPLETED")


def test_a_second_run_reuses_what_is_there_and_protects_again(
    data_folder: Path, recipe: Path, first: dict[str, Any]
) -> None:
    done = command(data_folder, "-m", "flows.pipeline", str(recipe), "--json")
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    reused = {stage["stage"] for stage in again["stages"] if stage["reused"]}
    assert reused >= CACHED | {"push"}
    assert "pull" not in reused
    assert again["made"] == []
    assert again["digest"] == first["digest"]


def test_the_commands_of_the_readme_work(data_folder: Path, first: dict[str, Any], tmp_path: Path) -> None:
    portrait = str(Path(first["folder"]) / "portrait.png")
    for words in (("list",), ("show", "pixelsmile@prod"), ("verify", "pixelsmile@prod")):
        assert registry(data_folder, *words).returncode == 0
    pulled = json.loads(registry(data_folder, "pull", "pixelsmile@prod", "--json").stdout)
    assert pulled["digest"] == first["digest"]
    edited = command(
        data_folder, "-m", "serving.cli", "edit", portrait, "--adapter", "pixelsmile@prod",
        "--expression", "surprised=0.8", "--expression", "fear=0.3",
        "--json", "-o", str(tmp_path / "out.png"),
    )  # fmt: skip
    assert edited.returncode == 0, edited.stderr
    assert json.loads(edited.stdout)["adapter_digest"] == first["digest"]
    assert (tmp_path / "out.png").stat().st_size > 0


def test_a_gate_that_fails_stops_the_promotion(
    data_folder: Path, repository: Path, first: dict[str, Any]
) -> None:
    strict = small_recipe(repository, data_folder / "strict.yaml", paired_psnr=90.0)
    done = command(data_folder, "-m", "flows.pipeline", str(strict), "--json")
    assert done.returncode == 14
    assert "paired_psnr" in done.stderr
    still = json.loads(registry(data_folder, "verify", "pixelsmile@prod", "--json").stdout)
    assert still["digest"] == first["digest"]


def test_a_changed_byte_in_the_store_is_refused(
    data_folder: Path, first: dict[str, Any], tmp_path: Path
) -> None:
    manifest = json.loads((Path(first["folder"]) / "manifest.json").read_text())
    weights = next(file for file in manifest["files"] if file["path"].endswith(".safetensors"))
    model = data_folder / "registry" / "objects" / "models" / weights["blake3"]
    blob = model / "adapter_weights" / weights["path"]
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    refused = registry(data_folder, "pull", "pixelsmile@prod", "--cache", str(tmp_path / "cache"))
    assert refused.returncode == 13
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not [path for path in left if path.suffix != ".lock"], "empty locks are all that stays"
