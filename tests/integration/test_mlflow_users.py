"""What a team sees that uses MLflow and nothing else, and what happens when somebody changes MLflow by hand.

Objects in S3, the index on an MLflow server with accounts, the audit log in PostgreSQL: all of them real.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fakes.registries import NAME, PASSING, adapter_files, adapter_folder
from registry.cli import main
from registry.client import Registry
from registry.digest import digest_bytes
from registry.manifest import WEIGHTS_NAME
from servers.mlflow import MlflowServer
from servers.postgres import Postgres
from servers.weed import Weed
from trainer.stage import StageResult, write_result
from trainer.tracking import Tracker, log_evaluation

pytestmark = pytest.mark.integration

MISMATCH = 13


@pytest.fixture
def team(
    home: Path,
    tmp_path: Path,
    weed: Weed,
    mlflow_server: MlflowServer,
    postgres: Postgres,
    monkeypatch: pytest.MonkeyPatch,
) -> Registry:
    """A team's registry with two versions; ``prod`` means the first one."""
    settings = {
        **weed.environment(),
        **mlflow_server.environment(),
        "ADAPTER_FOUNDRY_STORE": f"s3://{weed.bucket()}/adapters",
        "ADAPTER_FOUNDRY_LEDGER": postgres.database(),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    if _client().search_registered_models(f"name = '{NAME}'"):
        _client().delete_registered_model(NAME)  # of the test before: the server lives as long as the session
    registry = Registry.init(home)
    for seed in (0, 1):
        registry.push(adapter_folder(tmp_path / f"adapter-{seed}", seed), NAME, evaluation=PASSING)
    registry.approve(f"{NAME}:1", "a person", "looks right")
    registry.promote(f"{NAME}:1", "prod")
    return registry


def _client() -> Any:
    """MLflow's own client, for what a person does in the MLflow UI."""
    from mlflow.tracking import MlflowClient

    return MlflowClient()


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    """The exit code of a command, and the object that it prints."""
    with pytest.raises(SystemExit) as ended:
        main([*words, "--json"])
    return int(ended.value.code or 0), json.loads(capsys.readouterr().out)


def test_mlflow_loads_the_promoted_files(team: Registry) -> None:
    import mlflow.diffusers

    loaded = mlflow.diffusers.load_model(f"models:/{NAME}@prod")
    assert loaded.adapter_type == "lora"
    assert (loaded.base_model, loaded.base_model_revision) == ("adapter-foundry/portraits-base", "1")
    assert loaded.weight_name == WEIGHTS_NAME
    assert (Path(loaded.adapter_path) / WEIGHTS_NAME).read_bytes() == adapter_files(0)[WEIGHTS_NAME]
    numbered = mlflow.diffusers.load_model(f"models:/{NAME}/2")
    assert (Path(numbered.adapter_path) / WEIGHTS_NAME).read_bytes() == adapter_files(1)[WEIGHTS_NAME]


@pytest.mark.slow
def test_mlflow_puts_the_adapter_on_a_base_of_the_callers_choice(team: Registry, repository: Path) -> None:
    import mlflow.diffusers
    from safetensors.torch import load

    from serving.pipelines.qwen_image_edit import QwenImageEdit

    base = repository / "trainer" / "portraits" / "weights" / "base"
    # Without torchvision transformers cannot load a processor with a video part; ours has none.
    processor = QwenImageEdit.load(base).pipe.processor
    loaded = mlflow.diffusers.load_model(f"models:/{NAME}@prod")
    pipe = loaded.load_pipeline(base_model=str(base), device="cpu", processor=processor)

    signed = load(adapter_files(0)[WEIGHTS_NAME])
    on_base = dict(pipe.transformer.named_parameters())
    for key in ("transformer_blocks.0.attn.to_q.lora_A", "transformer_blocks.3.attn.to_out.0.lora_B"):
        wanted = signed[f"transformer.{key}.weight"]
        assert on_base[f"{key}.default_0.weight"].float().equal(wanted.float())


def test_mlflow_shows_what_is_signed(team: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    client = _client()
    version = client.get_model_version_by_alias(NAME, "prod")
    _, shown = run(capsys, "show", f"{NAME}:1")
    tags = version.tags
    assert int(version.version) == 1
    assert tags["adapter_foundry.digest"] == shown["digest"]
    assert tags["license"] == shown["manifest"]["license"]
    assert (tags["scan"], tags["evaluation"], tags["metric.top1"]) == ("pass", "pass", "0.93")
    assert tags["adapter_foundry.manifest"].startswith(team.store.uri + "/manifests/")
    assert tags["adapter_foundry.statements"].startswith(team.store.uri + "/statements/")
    assert version.source.startswith(team.store.uri + "/models/")
    assert "registry show" in client.get_registered_model(NAME).description
    code, report = run(capsys, "reconcile")
    assert (code, report["differences"]) == (0, [])


def test_a_training_run_keeps_its_artifacts_beside_the_adapters(
    team: Registry, weed: Weed, mlflow_server: MlflowServer
) -> None:
    """The server's own artifacts go through it into S3; the registry's files never pass the server."""
    client = _client()
    run = client.create_run(client.create_experiment(f"portraits-{team.store.uri}"))
    client.log_text(run.info.run_id, "loss: 0.1", "training.txt")
    bucket, _, prefix = mlflow_server.artifacts.removeprefix("s3://").partition("/")
    found = weed.client().list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]
    assert [one["Key"] for one in found if one["Key"].endswith(f"{run.info.run_id}/artifacts/training.txt")]


def evaluated(folder: Path, accuracy: float) -> StageResult:
    """An evaluation's folder, as far as MLflow gets it."""
    folder.mkdir()
    for name in ("contact_sheet.png", "curves.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "report.html").write_text("<p>report</p>")
    (folder / "evaluation.json").write_text(json.dumps({"accuracy": accuracy}))
    digest = digest_bytes((folder / "evaluation.json").read_bytes())
    facts = {"verdict": "passed", "top1_accuracy": accuracy, "top1_accuracy.base": 0.1, "gain": float("nan")}
    result = StageResult(stage="evaluate", folder=folder, key=digest, digest=digest, facts=facts)
    write_result(folder, result)
    return result


def test_an_evaluation_is_shown_by_the_run_of_its_training(team: Registry, tmp_path: Path) -> None:
    training, client = tmp_path / "train", _client()
    tracker = Tracker("small", {"seed": 1}, out=training, recipe={"name": "small"})
    tracker.metrics(1, {"train/loss": 0.5})
    tracker.close()
    run = str(tracker.run_id)

    first = evaluated(tmp_path / "first", 0.9)
    assert log_evaluation(training, first) is None
    assert log_evaluation(training, first) is None, "nothing to do"
    found = client.get_run(run)
    assert found.info.status == "FINISHED"
    assert found.data.metrics == {
        "train/loss": 0.5,
        "evaluation/top1_accuracy": 0.9,
        "evaluation/top1_accuracy.base": 0.1,
    }
    assert len(client.get_metric_history(run, "evaluation/top1_accuracy")) == 1
    files = {one.path for one in client.list_artifacts(run, "evaluation")}
    names = ("contact_sheet.png", "curves.png", "evaluation.json", "report.html")
    assert files == {f"evaluation/{name}" for name in names}

    second = evaluated(tmp_path / "second", 0.95)
    assert log_evaluation(training, second) is None
    assert client.get_run(run).data.metrics["evaluation/top1_accuracy"] == 0.95
    downloaded = client.download_artifacts(run, "evaluation/evaluation.json", str(tmp_path))
    assert json.loads(Path(downloaded).read_bytes()) == {"accuracy": 0.95}

    client.delete_run(run)
    problem = log_evaluation(training, evaluated(tmp_path / "third", 0.8))
    assert problem is not None
    assert "deleted" in problem
    assert log_evaluation(tmp_path / "elsewhere", first) == "this training was not tracked"


def test_an_alias_moved_by_hand_is_reported_and_mended_and_never_believed(
    team: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    client = _client()
    client.set_registered_model_alias(NAME, "prod", "2")
    client.set_registered_model_alias(NAME, "champion", "2")
    client.set_model_version_tag(NAME, "1", "license", "MIT")

    pulled = Registry.open().pull(f"{NAME}@prod")
    assert pulled.reference == f"{NAME}:1"

    code, report = run(capsys, "reconcile")
    assert code == MISMATCH
    assert {(one["kind"], one["subject"]) for one in report["differences"]} == {
        ("alias moved", f"{NAME}@prod"),
        ("alias nobody signed", f"{NAME}@champion"),
        ("other tag", f"{NAME}:1"),
    }
    assert client.get_model_version_by_alias(NAME, "prod").version in (2, "2")  # a report changes nothing

    code, report = run(capsys, "reconcile", "--repair")
    assert (code, report["repaired"], report["left"]) == (0, True, 0)
    assert int(client.get_model_version_by_alias(NAME, "prod").version) == 1
    assert set(client.get_registered_model(NAME).aliases) == {"prod"}
    assert client.get_model_version(NAME, "1").tags["license"] == "LicenseRef-Proprietary"
    assert run(capsys, "reconcile")[0] == 0

    code, log = run(capsys, "log", "--verify", "--last", "3")
    assert code == 0
    assert {(row["action"], row["subject"]) for row in log["entries"]} == {
        ("reconcile", f"{NAME}@prod"),
        ("reconcile", f"{NAME}@champion"),
        ("reconcile", f"{NAME}:1"),
    }
    assert log["verified"]["not_yet_anchored"] == 0


def test_a_model_deleted_and_made_anew_is_rebuilt_with_its_numbers(
    team: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow.diffusers

    client = _client()
    before = {version.number: version for version in team.catalog.survey()[NAME].versions}
    client.delete_registered_model(NAME)
    client.create_registered_model(NAME)
    for number in (2, 1):  # the numbers are used again, the other way round
        client.create_model_version(NAME, before[number].source, tags=dict(before[number].tags))
    client.set_registered_model_alias(NAME, "prod", "1")

    code, report = run(capsys, "reconcile")
    assert code == MISMATCH
    assert ("other number", f"{NAME}:1") in {(one["kind"], one["subject"]) for one in report["differences"]}
    assert Registry.open().pull(f"{NAME}@prod").reference == f"{NAME}:1"

    code, _ = run(capsys, "reconcile", "--repair")
    assert code == 0
    after = {version.number: version for version in team.catalog.survey()[NAME].versions}
    assert after == before
    loaded = mlflow.diffusers.load_model(f"models:/{NAME}@prod")
    assert (Path(loaded.adapter_path) / WEIGHTS_NAME).read_bytes() == adapter_files(0)[WEIGHTS_NAME]


def test_a_foreign_source_and_a_foreign_version_are_removed(
    team: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    client = _client()
    tags = dict(client.get_model_version(NAME, "1").tags)
    client.delete_model_version(NAME, "1")  # its alias goes with it
    evil = client.create_model_version(NAME, "s3://somewhere/else", tags=tags)
    client.set_registered_model_alias(NAME, "prod", str(evil.version))
    client.create_model_version(NAME, "s3://somewhere/else")

    code, report = run(capsys, "reconcile")
    assert code == MISMATCH
    found = {(one["kind"], one["subject"]) for one in report["differences"]}
    assert ("other source", f"{NAME}:1") in found
    assert ("version nobody signed", f"{NAME} 4") in found

    assert run(capsys, "reconcile", "--repair")[0] == 0
    assert run(capsys, "reconcile")[0] == 0
    sources = {version.source for version in team.catalog.survey()[NAME].versions}
    assert "s3://somewhere/else" not in sources


def test_a_revoked_version_leaves_its_alias_in_mlflow(
    team: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.exceptions import MlflowException

    team.revoke(f"{NAME}:1", "a backdoor was found")
    client = _client()
    with pytest.raises(MlflowException):
        client.get_model_version_by_alias(NAME, "prod")
    assert client.get_model_version(NAME, "1").tags["adapter_foundry.revoked"] == "a backdoor was found"
    assert run(capsys, "reconcile")[0] == 0
    client.set_registered_model_alias(NAME, "prod", "1")
    assert run(capsys, "reconcile")[0] == MISMATCH
