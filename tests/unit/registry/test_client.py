"""Registry: the way of an adapter, repeated and interrupted; and its index in MLflow."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fakes.registries import BASE, NAME, PASSING, adapter_files, adapter_folder, copy_registry, objects, one
from registry.admission import Origin
from registry.client import Registry
from registry.errors import NotFound, Unsigned, UsageError
from registry.manifest import CARD_NAME, WEIGHTS_NAME
from registry.storage.catalog import MlflowCatalog

PROD = f"{NAME}@prod"


@pytest.fixture
def registry(home: Path) -> Registry:
    return copy_registry(home)


def test_a_promoted_adapter_is_pulled_verified_and_kept(registry: Registry, home: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    pulled = registry.pull(PROD, progress=lambda *at: heard.append(at))
    assert (pulled.reference, pulled.manifest.name, pulled.warnings) == (f"{NAME}:1", NAME, ())
    assert heard[-1][0] == "download"
    assert heard[-1][1] == heard[-1][2] == sum(len(data) for data in adapter_files(0).values())
    folder = home / "cache" / "sha256" / pulled.digest.hex
    assert pulled.path == folder
    assert pulled.fetched_bytes == sum(len(data) for data in adapter_files(0).values())
    assert (folder / WEIGHTS_NAME).read_bytes() == adapter_files(0)[WEIGHTS_NAME]
    assert sorted(path.name for path in folder.iterdir()) == [CARD_NAME, "manifest.json", WEIGHTS_NAME]
    assert registry.verify(PROD).digest == pulled.digest
    adapter = registry.load(PROD)
    assert adapter.origin is Origin.REGISTRY
    assert (adapter.reference, adapter.digest) == (f"{NAME}:1", pulled.digest)


def test_every_form_of_reference_means_the_same(registry: Registry) -> None:
    digest = registry.pull(PROD).digest
    assert registry.pull(f"{NAME}:1").digest == digest
    assert registry.pull(f"{NAME}@{digest}").digest == digest


def test_a_warm_cache_downloads_nothing(registry: Registry, tmp_path: Path) -> None:
    heard: list[Any] = []
    registry.pull(PROD, tmp_path / "mine")
    again = registry.pull(PROD, tmp_path / "mine", progress=lambda *at: heard.append(at))
    assert (heard, again.fetched_bytes) == ([], 0)


def test_a_cache_is_warm_for_every_name_that_was_pulled_and_for_no_other_gate(
    registry: Registry, home: Path
) -> None:
    registry.promote(f"{NAME}:1", "staging")
    digest = registry.pull(PROD).digest
    registry.pull(f"{NAME}:1")
    shutil.rmtree(objects(home) / "manifests")  # whoever judges anew reads it
    for reference in (PROD, f"{NAME}:1", f"{NAME}@{digest}"):
        assert registry.pull(reference).digest == digest
    with pytest.raises(NotFound):
        registry.pull(f"{NAME}@staging")


def test_the_same_push_again_changes_nothing(registry: Registry, home: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in objects(home).rglob("*") if path.is_file()}
    result = registry.push(adapter_folder(tmp_path / "again"), NAME, evaluation=PASSING)
    assert (result.reference, result.uploaded_bytes, result.reused) == (f"{NAME}:1", 0, True)
    assert {path: path.stat().st_mtime_ns for path in objects(home).rglob("*") if path.is_file()} == before


def test_other_bytes_become_the_next_version(registry: Registry, tmp_path: Path) -> None:
    result = registry.push(adapter_folder(tmp_path / "second", seed=1), NAME, evaluation=PASSING)
    assert (result.version, result.reused) == (2, False)
    assert result.uploaded_bytes == len(adapter_files(1)[WEIGHTS_NAME]), "the card was there already"
    registry.approve(f"{NAME}:2", "a person", "better")
    promotion = registry.promote(f"{NAME}:2", "prod")
    assert (promotion.version, promotion.previous, promotion.reused) == (2, 1, False)
    assert registry.pull(PROD).reference == f"{NAME}:2"
    assert [(row.reference, row.aliases) for row in registry.list()] == [
        (f"{NAME}:1", ()),
        (f"{NAME}:2", ("prod",)),
    ]


def test_the_same_bytes_under_another_name_cost_no_upload(registry: Registry, tmp_path: Path) -> None:
    result = registry.push(adapter_folder(tmp_path / "again"), "twin")
    assert (result.reference, result.uploaded_bytes, result.reused) == ("twin:1", 0, False)


def test_approvals_and_promotions_are_found_again(registry: Registry, home: Path) -> None:
    count = len([*objects(home).glob("statements/*/*")])
    assert registry.approve(f"{NAME}:1", "a person", "looks right").reused
    assert registry.promote(f"{NAME}:1", "prod").reused
    assert len([*objects(home).glob("statements/*/*")]) == count
    assert not registry.approve(f"{NAME}:1", "somebody else", "me too").reused
    assert not registry.approve(f"{NAME}:1", "a person", "looks right", automatic=True).reused


@pytest.mark.parametrize(
    "step", ["upload", "put_manifest", "put_statement", "write_model", "log", "add_version", "index"]
)
def test_an_interrupted_push_is_repeated(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Killed before any step: nothing new is seen, and the same push completes it."""
    folder = adapter_folder(tmp_path / "second", seed=1)

    def killed(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    places = {
        "put_manifest": "registry.storage.shelf.put_manifest",
        "put_statement": "registry.storage.shelf.put_statement",
        "write_model": "registry.publishing.write_model",
        "add_version": "registry.signing.authority.Authority.add_version",
        "index": "registry.storage.catalog.MlflowCatalog.record",
        "log": "registry.storage.ledger.Ledger.append",
        "upload": "registry.storage.local.LocalObjects.put",
    }
    with monkeypatch.context() as patch:
        patch.setattr(places[step], killed)
        with pytest.raises(KeyboardInterrupt):
            registry.push(folder, NAME, evaluation=PASSING)
    assert registry.pull(PROD).reference == f"{NAME}:1"
    assert len(registry.list()) == (2 if step == "index" else 1)

    result = registry.push(folder, NAME, evaluation=PASSING)
    assert result.version == 2
    registry.approve(f"{NAME}:2", "a person", "better")
    registry.promote(f"{NAME}:2", "prod")
    assert registry.pull(PROD).reference == f"{NAME}:2"


def test_an_interrupted_push_of_something_else_takes_the_number(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("registry.signing.authority.Authority.add_version", killed)
        with pytest.raises(KeyboardInterrupt):
            registry.push(adapter_folder(tmp_path / "second", seed=1), NAME)
    result = registry.push(adapter_folder(tmp_path / "third", seed=2), NAME, evaluation=PASSING)
    assert result.version == 2
    registry.approve(f"{NAME}:2", "a person", "better")
    assert registry.verify(f"{NAME}:2").reference == f"{NAME}:2"


def test_show_tells_what_is_believed_and_what_is_not(registry: Registry, home: Path) -> None:
    found = registry.show(PROD)
    assert found.listed.aliases == ("prod",)
    assert found.manifest.base.id == BASE.id
    kinds = {view.kind: view.role for view in found.statements if view.signed}
    assert kinds == {
        "training": "publisher",
        "licence": "publisher",
        "scan": "scanner",
        "evaluation": "evaluator",
        "approval": "approver",
    }
    (evaluation,) = (view for view in found.statements if view.kind == "evaluation")
    assert evaluation.predicate == PASSING


def test_a_version_without_approval_is_shown_but_not_pulled(registry: Registry, tmp_path: Path) -> None:
    registry.push(adapter_folder(tmp_path / "second", seed=1), NAME, evaluation=PASSING)
    assert registry.show(f"{NAME}:2").manifest.version == 2
    with pytest.raises(Unsigned, match="approval"):
        registry.pull(f"{NAME}:2")


def test_a_statement_is_signed_by_its_own_role_only(registry: Registry) -> None:
    with pytest.raises(UsageError, match="evaluator"):
        registry.attest(f"{NAME}:1", "evaluation", PASSING, role="publisher")
    with pytest.raises(UsageError, match="kinds are"):
        registry.attest(f"{NAME}:1", "gossip", PASSING)  # type: ignore[arg-type]
    assert registry.attest(f"{NAME}:1", "evaluation", PASSING, role="evaluator").reused


@pytest.mark.parametrize("name", ["", "Upper", "a/b", "a@b", "../x"])
def test_a_wrong_name_is_refused_before_anything_is_written(
    registry: Registry, tmp_path: Path, name: str
) -> None:
    with pytest.raises(UsageError):
        registry.push(adapter_folder(tmp_path / "again"), name)


def test_words_are_needed_where_people_read_them(registry: Registry) -> None:
    with pytest.raises(UsageError, match="reason"):
        registry.approve(f"{NAME}:1", "a person", " ")
    with pytest.raises(UsageError, match="reason"):
        registry.revoke(f"{NAME}:1", "")


def test_a_folder_that_is_no_adapter_is_explained(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=CARD_NAME):
        registry.push(tmp_path, NAME)


def test_a_machine_without_a_registry_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="registry init"):
        Registry.open(tmp_path / "nothing").pull(PROD)


# -- MLflow --


def test_mlflow_shows_versions_and_aliases(registry: Registry, home: Path, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    registry.push(adapter_folder(tmp_path / "second", seed=1), NAME, evaluation=PASSING)
    registry.approve(f"{NAME}:2", "a person", "better")
    promotion = registry.promote(f"{NAME}:2", "prod")
    client = MlflowClient(f"sqlite:///{home}/registry/mlflow.db")
    assert [model.name for model in client.search_registered_models()] == [NAME]
    version = client.get_model_version_by_alias(NAME, "prod")
    assert version.tags["adapter_foundry.digest"] == promotion.digest
    assert version.tags["license"] == "LicenseRef-Proprietary"
    weights = registry.show(PROD).manifest.file(WEIGHTS_NAME)
    assert version.source == f"{objects(home).as_uri()}/models/{weights.blake3}"


def test_a_lost_index_is_written_again(registry: Registry, home: Path, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/new.db"
    catalog = MlflowCatalog(uri)
    manifest = registry.show(PROD).manifest
    for _ in range(2):
        catalog.record(manifest, manifest.digest, "file:///somewhere")
        catalog.point(NAME, "prod", manifest.digest)
    assert len(MlflowClient(uri).search_model_versions(f"name = '{NAME}'")) == 1


def test_mlflow_can_load_the_version(registry: Registry, home: Path) -> None:
    """The model directory is a real one of the diffusers flavor; using it does not disturb our own checks."""
    import mlflow.diffusers

    folder = one(home, "models/*/MLmodel").parent
    loaded = mlflow.diffusers.load_model(str(folder))
    assert (loaded.base_model, loaded.base_model_revision) == (BASE.id, BASE.revision)
    assert (Path(loaded.adapter_path) / WEIGHTS_NAME).read_bytes() == adapter_files(0)[WEIGHTS_NAME]
    (folder / "registered_model_meta").write_text("model_name: pixelsmile\n")
    assert registry.verify(PROD).reference == f"{NAME}:1"
