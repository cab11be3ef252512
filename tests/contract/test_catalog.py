"""The index in MLflow: one suite on a SQLite file, on PostgreSQL, and on a server with accounts."""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fakes.adapters import clean_adapter
from registry.digest import Digest, digest_bytes, file_entry
from registry.errors import NetworkError, UsageError
from registry.index import CatalogModel
from registry.manifest import CARD_NAME, AdapterCard, AdapterManifest
from registry.storage.catalog import MlflowCatalog
from servers.mlflow import PUBLISHER, READER, MlflowServer
from servers.postgres import Postgres

FILES = clean_adapter()
ENTRIES = tuple(file_entry(name, data) for name, data in FILES.items())
CARD = AdapterCard.parse(FILES[CARD_NAME])
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Backend:
    """A kind of MLflow, and the account that tests use with it."""

    kind: str
    catalog: MlflowCatalog
    uri: str

    def client(self) -> Any:
        """MLflow's own client, for what a person does in the MLflow UI."""
        from mlflow.tracking import MlflowClient

        return MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)


@pytest.fixture(scope="session")
def sqlite_index(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('index')}/deep/mlflow.db"


@pytest.fixture(scope="session")
def postgres_index(postgres: Postgres) -> str:
    return postgres.database()


@pytest.fixture(params=["sqlite", "postgresql", "server"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    if request.param == "server":
        server: MlflowServer = request.getfixturevalue("mlflow_server")
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        uri = server.uri
    else:
        uri = request.getfixturevalue("sqlite_index" if request.param == "sqlite" else "postgres_index")
    return Backend(request.param, MlflowCatalog(uri), uri)


@pytest.fixture
def name() -> str:
    """An adapter that nobody has indexed: the indexes live as long as the session."""
    return f"pixelsmile-{os.getpid()}-{next(_numbers)}"


def manifest_of(name: str, version: int = 1) -> AdapterManifest:
    return AdapterManifest.make(CARD, name=name, version=version, files=ENTRIES)


def source_of(manifest: AdapterManifest) -> str:
    return f"s3://adapters/models/{manifest.files[-1].blake3}"


def record(backend: Backend, name: str, version: int = 1, **tags: str) -> Digest:
    manifest = manifest_of(name, version)
    backend.catalog.record(manifest, manifest.digest, source_of(manifest), tags)
    return manifest.digest


def model(backend: Backend, name: str) -> CatalogModel:
    return backend.catalog.survey()[name]


def test_a_version_is_indexed_with_its_tags(backend: Backend, name: str) -> None:
    backend.catalog.prepare()
    digest = record(backend, name, scan="pass", evaluation="pass")
    (version,) = model(backend, name).versions
    assert (version.number, version.digest, version.source) == (1, digest, source_of(manifest_of(name)))
    assert version.tags == {
        "adapter_foundry.digest": digest,
        "adapter_foundry.reference": f"{name}:1",
        "license": "LicenseRef-Proprietary",
        "base": "tests/tiny-base",
        "base_revision": "1",
        "rank": "4",
        "scan": "pass",
        "evaluation": "pass",
    }
    described = backend.client().get_registered_model(name).description
    assert f"registry show {name}" in described


def test_indexing_again_changes_only_what_differs(backend: Backend, name: str) -> None:
    digest = record(backend, name, scan="review", **{"metric.top1": "0.9"})
    client = backend.client()
    client.set_model_version_tag(name, "1", "license", "MIT")
    client.set_model_version_tag(name, "1", "reviewed by", "Zoë")
    client.set_model_version_tag(name, "1", "adapter_foundry.revoked", "no reason")
    record(backend, name, scan="pass")
    (version,) = model(backend, name).versions
    assert version.digest == digest
    assert version.tags["scan"] == "pass"
    assert version.tags["license"] == "LicenseRef-Proprietary"
    assert version.tags["reviewed by"] == "Zoë"  # a person's own
    assert not {"metric.top1", "adapter_foundry.revoked"} & set(version.tags)


def test_a_training_run_that_mlflow_has_is_linked(backend: Backend, name: str) -> None:
    client = backend.client()
    experiment = client.create_experiment(f"portraits-{name}")
    run = client.create_run(experiment).info.run_id
    for number, run_id in ((1, run), (2, "0" * 32)):  # a server refuses to link a run that it does not have
        lineage = CARD.training.model_copy(update={"run_id": run_id})
        card = CARD.model_copy(update={"training": lineage})
        manifest = AdapterManifest.make(card, name=name, version=number, files=ENTRIES)
        backend.catalog.record(manifest, manifest.digest, source_of(manifest))
    assert client.get_model_version(name, "1").run_id == run
    assert not client.get_model_version(name, "2").run_id


def test_an_alias_is_made_moved_and_removed(backend: Backend, name: str) -> None:
    first, second = record(backend, name, 1), record(backend, name, 2)
    backend.catalog.point(name, "prod", first)
    backend.catalog.point(name, "staging", second)
    assert model(backend, name).aliases == {"prod": 1, "staging": 2}
    backend.catalog.point(name, "prod", second)
    backend.catalog.point(name, "staging", None)
    assert model(backend, name).aliases == {"prod": 2}


def test_removing_what_is_not_there_is_no_error(backend: Backend, name: str) -> None:
    backend.catalog.point(name, "prod", None)
    backend.catalog.remove(name)
    record(backend, name)
    backend.catalog.point(name, "prod", None)
    backend.catalog.remove(name, 7)
    assert model(backend, name).aliases == {}


def test_an_alias_of_an_unknown_version_is_explained(backend: Backend, name: str) -> None:
    record(backend, name)
    with pytest.raises(NetworkError, match="does not know") as caught:
        backend.catalog.point(name, "prod", digest_bytes(b"another"))
    assert "reconcile" in caught.value.mend


def test_mlflow_counts_as_the_registry_does(backend: Backend, name: str) -> None:
    """Version 2 was signed and never indexed; `models:/name/3` has to be version 3 all the same."""
    record(backend, name, 1)
    digest = record(backend, name, 3)
    assert [(found.number, found.digest) for found in model(backend, name).versions][1:] == [(3, digest)]


def test_entries_and_models_are_removed(backend: Backend, name: str) -> None:
    record(backend, name, 1)
    second = record(backend, name, 2)
    backend.catalog.point(name, "prod", second)
    backend.catalog.remove(name, 2)
    assert [found.number for found in model(backend, name).versions] == [1]
    assert model(backend, name).aliases == {}
    backend.catalog.remove(name)
    assert name not in backend.catalog.survey()


def test_a_survey_reads_page_by_page(backend: Backend, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from registry.storage import catalog

    whole = catalog._pages
    for number in range(1, 4):
        record(backend, name, number)
        record(backend, f"{name}-{number}")
    monkeypatch.setattr(catalog, "_pages", lambda search, size: whole(search, 2))
    view = backend.catalog.survey()
    assert [found.number for found in view[name].versions] == [1, 2, 3]
    assert {f"{name}-{number}" for number in (1, 2, 3)} <= view.keys()


def test_the_source_is_the_one_that_mlflow_loads(name: str, sqlite_index: str) -> None:
    """Somebody with the database can change what is loaded and leave what is shown."""
    import sqlite3

    backend = Backend("sqlite", MlflowCatalog(sqlite_index), sqlite_index)
    digest = record(backend, name)
    backend.catalog.point(name, "prod", digest)
    with sqlite3.connect(sqlite_index.removeprefix("sqlite:///")) as database:
        database.execute("UPDATE model_versions SET storage_location='s3://evil/x' WHERE name=?", (name,))
    database.close()
    (version,) = model(backend, name).versions
    assert version.source == "s3://evil/x"


@pytest.fixture
def at_once() -> Iterator[Callable[[Callable[[int], Any]], list[Any]]]:
    with ThreadPoolExecutor(8) as pool:
        yield lambda work: list(pool.map(work, range(8)))


def test_racing_first_aliases_and_tags_all_succeed(
    backend: Backend, name: str, at_once: Callable[[Callable[[int], Any]], list[Any]]
) -> None:
    digest = record(backend, name)
    at_once(lambda _: backend.catalog.point(name, "prod", digest))
    at_once(lambda _: record(backend, name, scan="pass", evaluation="pass"))
    found = model(backend, name)
    assert found.aliases == {"prod": 1}
    assert found.versions[0].tags["scan"] == "pass"


def test_racing_first_versions_share_one_model(
    backend: Backend, name: str, at_once: Callable[[Callable[[int], Any]], list[Any]]
) -> None:
    digests = at_once(lambda number: record(backend, name, number + 1))
    assert {found.digest for found in model(backend, name).versions} == set(digests)


# -- who may, and what cannot work --


def signed_in(server: MlflowServer, monkeypatch: pytest.MonkeyPatch, account: str) -> MlflowCatalog:
    for key, value in server.environment(account).items():
        monkeypatch.setenv(key, value)
    return MlflowCatalog(server.uri)


def test_an_account_without_rights_is_told_which_it_needs(
    mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    manifest = manifest_of(name)
    catalog = signed_in(mlflow_server, monkeypatch, PUBLISHER)
    catalog.record(manifest, manifest.digest, source_of(manifest))
    reader = signed_in(mlflow_server, monkeypatch, READER)
    assert reader.survey()[name].versions[0].digest == manifest.digest
    with pytest.raises(UsageError, match="refuses this account") as caught:
        reader.point(name, "prod", manifest.digest)
    assert "MANAGE" in caught.value.mend


def test_a_wrong_password_is_explained_and_not_shown(
    mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = signed_in(mlflow_server, monkeypatch, PUBLISHER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "open-sesame")
    with pytest.raises(UsageError, match="name or the password") as caught:
        catalog.survey()
    assert "MLFLOW_TRACKING_PASSWORD" in caught.value.mend
    assert "open-sesame" not in str(caught.value)


def test_a_server_refuses_a_store_on_a_local_disk(
    mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch, name: str, tmp_path: Path
) -> None:
    manifest = manifest_of(name)
    catalog = signed_in(mlflow_server, monkeypatch, PUBLISHER)
    with pytest.raises(UsageError, match="refuses the object store") as caught:
        catalog.record(manifest, manifest.digest, f"{tmp_path.as_uri()}/models/1")
    assert "S3" in caught.value.mend


@pytest.mark.parametrize(
    "uri",
    ["http://tester:open-sesame@127.0.0.1:1", "postgresql+psycopg://tester:open-sesame@127.0.0.1:1/index"],
)
def test_an_index_that_does_not_answer_is_a_network_error(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    catalog = MlflowCatalog(uri)
    manifest = manifest_of(f"n-{uuid.uuid4().hex}")
    with pytest.raises(NetworkError) as caught:
        catalog.record(manifest, manifest.digest, source_of(manifest))
    assert caught.value.exit_code == 20
    assert "open-sesame" not in str(caught.value) + catalog.uri


def test_without_mlflow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="MLflow") as caught:
        MlflowCatalog("sqlite:////tmp/none.db").require()
    assert "catalog" in caught.value.mend
