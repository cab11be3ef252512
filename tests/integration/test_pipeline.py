"""The main job, whole and real but small: through a managed Prefect server into the registry and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fakes.pipelines import command, registry, small_recipe
from flows.server import attached, managed_server, task_runs
from registry.settings import layout

CACHED = {"synthesise", "score", "triplets", "cache", "train", "evaluate", "edit"}
#: Six people cannot show that none of these got worse.
NOT_WORSE = ("paired_psnr", "identity_similarity", "top1_accuracy")
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
    charts = {"summary.png", "confusion.png", "curves.png", "blends.png", "worst.png"}
    pictures = {"contact_sheet.png", "portrait.png"} | charts
    papers = {"evaluation.json", "report.html", "scan.html", "manifest.json", "run.json"}
    for name in pictures | papers | {"adapter/pytorch_lora_weights.safetensors"}:
        assert (folder / name).stat().st_size > 0
    kinds = {path.name.split(".")[0] for path in (folder / "statements").iterdir()}
    assert kinds == {"training", "evaluation", "scan", "licence", "approval"}
    assert json.loads((folder / "edits" / "edits.json").read_text())[0]["adapter_digest"] == first["digest"]


def test_the_evaluation_is_shown_by_prefect_and_by_the_mlflow_run_of_the_training(
    data_folder: Path, first: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = json.loads((Path(first["folder"]) / "evaluation.json").read_text())
    assert report["against"] is None, "nothing was promoted before it"
    with managed_server(data_folder) as server, attached(data_folder, server.url):
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            found = {one.key: one.data for one in client.read_artifacts(limit=200)}
    rows = {row["metric"]: row for row in json.loads(found["evaluation"])}
    assert rows.keys() == {row["name"] for row in report["metrics"]}
    assert rows["paired_psnr"]["now"] == rows["paired_psnr"]["difference"] == "-"
    for key in ("summary", "contact-sheet", "confusion", "curves", "blends", "worst"):
        assert found[key].startswith("data:image/jpeg;base64,")
        assert len(found[key]) <= 300_000
    assert {row["probe"] for row in json.loads(found["probes"])} == {one["title"] for one in report["probes"]}
    assert "report.html" in found["evaluation-report"]

    from mlflow import MlflowClient

    monkeypatch.setenv("ADAPTER_FOUNDRY_HOME", str(data_folder))
    training = next(Path(one["folder"]) for one in first["stages"] if one["stage"] == "train")
    run = (training / "mlflow-run.txt").read_text()
    client = MlflowClient(layout().tracking_uri)
    metrics = client.get_run(run).data.metrics
    (psnr,) = [row["value"]["value"] for row in report["metrics"] if row["name"] == "paired_psnr"]
    assert metrics["evaluation/paired_psnr"] == pytest.approx(psnr)
    files = {Path(one.path).name for one in client.list_artifacts(run, "evaluation")}
    assert files >= {"report.html", "evaluation.json", "summary.png", "contact_sheet.png"}


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


def test_what_may_be_worse_than_what_production_runs_is_evaluated_beside_it_and_refused(
    data_folder: Path, repository: Path, first: dict[str, Any]
) -> None:
    worse = small_recipe(repository, data_folder / "worse.yaml")
    recipe = yaml.safe_load(worse.read_text())
    recipe["optimiser"] |= {"steps": 2, "warmup_steps": 1}
    recipe["evaluation"]["identities"] = {"human": 4, "anime": 2}  # as few as a rule takes
    worse.write_text(yaml.safe_dump(recipe))
    rules = [f"[gates.prod.metrics.{name}]\nmax_regression = 0.0" for name in NOT_WORSE]
    policy = data_folder / "registry" / "policy.toml"
    policy.write_text("\n".join(f'{rule}\ndirection = "higher"' for rule in rules))
    try:
        done = command(data_folder, "-m", "flows.pipeline", str(worse), "--json")
    finally:
        policy.unlink()
    assert done.returncode == 14, done.stdout + done.stderr
    assert "compared with pixelsmile:1" in done.stderr
    (said,) = [line for line in done.stderr.splitlines() if "GATE MISSED" in line][:1]
    assert any(name in said for name in NOT_WORSE)
    assert "95 % interval" in said
    assert "for example" in said
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
