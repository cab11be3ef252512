"""MLflow as the index: what people see in ``mlflow ui`` and what other tools find.

MLflow is told about versions and aliases after they are signed, and is never asked for a decision: whoever
rewrites its database makes no client load anything. Versions carry their digest as a tag, because MLflow
counts versions by itself and may have been reset; ``registry reconcile`` compares the two.

A version's source is an MLflow model directory of the ``mlflow.diffusers`` flavor in the object store.
Loading it through MLflow skips every check of admission; it is there for inspection and for tools that
cannot do otherwise.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from registry.digest import Digest
from registry.errors import NetworkError, RegistryError, UsageError, shown
from registry.index import DIGEST_TAG, CatalogModel, CatalogVersion, CatalogView, is_ours, manifest_tags
from registry.manifest import AdapterManifest
from registry.storage import database
from registry.storage.mlmodel import check_model, write_model

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

__all__ = ["MlflowCatalog", "check_model", "write_model"]

_MEND: Final = "what was signed stays signed; run the same command again to bring the index up to date"
_ATTEMPTS: Final = 6
_GAP: Final = 64
# MLflow's own defaults make a dead server cost minutes.
_PATIENCE: Final = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
_T = TypeVar("_T")


class MlflowCatalog:
    """The index in MLflow's model registry.

    Args:
        tracking_uri: ``sqlite:////file.db``, ``postgresql+psycopg://…``, or ``http(s)://`` of an MLflow
            server, whose account is in ``MLFLOW_TRACKING_USERNAME`` and ``MLFLOW_TRACKING_PASSWORD``.
    """

    def __init__(self, tracking_uri: str) -> None:
        self._uri = tracking_uri

    @property
    def uri(self) -> str:
        """Where the index is, for people: without a password."""
        return database.masked(self._uri)

    def require(self) -> None:
        """Check that MLflow can be used, before anything is written.

        Raises:
            UsageError: MLflow is not installed.
        """
        if importlib.util.find_spec("mlflow") is None:
            raise UsageError(
                "publishing needs MLflow, which is not installed",
                mend="pip install 'adapter-foundry[catalog]'",
            )

    def prepare(self) -> None:
        """Create the database, so that ``mlflow ui`` works from the start.

        Raises:
            NetworkError: MLflow failed.
            UsageError: it refuses the account.
        """
        with self._client() as client:
            client.search_registered_models(max_results=1)

    def record(
        self,
        manifest: AdapterManifest,
        digest: Digest,
        source: str,
        tags: Mapping[str, str] | None = None,
        *,
        number: int | None = None,
    ) -> None:
        """Index a signed version, or bring its tags up to date.

        Args:
            manifest: the version.
            digest: its digest.
            source: URI of its model directory.
            tags: what else the registry says about it (see `registry.index`), all of it: tags of the
                registry that are not among them are removed.
            number: how MLflow counts it, where that is known; None finds the entry by its digest.

        Raises:
            NetworkError: MLflow failed.
            UsageError: it refuses the account or the source.
        """
        wanted = manifest_tags(manifest, digest) | dict(tags or {})
        with self._client() as client:
            found = self._find(client, manifest.name, digest, number)
            if found is None:
                self._create(client, manifest, source, wanted)
                return
            name, version, present = manifest.name, str(found.version), dict(found.tags)
            for key, value in wanted.items():
                if present.get(key) != value:
                    _again(partial(client.set_model_version_tag, name, version, key, value))
            for key in present.keys() - wanted.keys():
                if is_ours(key):
                    client.delete_model_version_tag(name, version, key)

    def point(self, name: str, alias: str, digest: Digest | None, *, number: int | None = None) -> None:
        """Make an alias mean a version, or nothing (None); `number` as in `record`.

        Raises:
            NetworkError: MLflow failed, or does not know the version.
            UsageError: it refuses the account.
        """
        with self._client() as client:
            from mlflow.exceptions import MlflowException

            if digest is None:
                try:
                    client.delete_registered_model_alias(name, alias)
                except MlflowException as error:
                    if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                        raise
                return
            version = self._find(client, name, digest, number)
            if version is None:
                raise NetworkError(
                    f"MLflow does not know {name}@{digest}", mend="`registry reconcile --repair` indexes it"
                )
            _again(lambda: client.set_registered_model_alias(name, alias, str(version.version)))

    def remove(self, name: str, number: int | None = None) -> None:
        """Take one entry out of the index, or a whole model; no error if it is not there. Files are kept.

        Raises:
            NetworkError: MLflow failed.
            UsageError: it refuses the account.
        """
        with self._client() as client:
            from mlflow.exceptions import MlflowException

            try:
                if number is None:
                    client.delete_registered_model(name)
                else:
                    client.delete_model_version(name, str(number))
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise

    def survey(self) -> CatalogView:
        """Return everything that the index says.

        Sources are those of which MLflow says that it would load them, for versions that have an alias.

        Raises:
            NetworkError: MLflow failed.
            UsageError: it refuses the account.
        """
        with self._client() as client:
            versions: dict[str, list[CatalogVersion]] = {}
            aliases = {
                model.name: {alias: int(number) for alias, number in model.aliases.items()}
                for model in _pages(client.search_registered_models, 1000)
            }
            for found in _pages(client.search_model_versions, 1000):
                number, source = int(found.version), str(found.source)
                if number in aliases.get(found.name, {}).values():
                    source = str(client.get_model_version_download_uri(found.name, str(number)))
                view = CatalogVersion(number=number, source=source, tags=dict(found.tags))
                versions.setdefault(found.name, []).append(view)
        return {
            name: CatalogModel(
                name=name,
                versions=tuple(sorted(versions.get(name, ()), key=lambda version: version.number)),
                aliases=pointing,
            )
            for name, pointing in aliases.items()
        }

    # -- parts --

    def _create(
        self, client: MlflowClient, manifest: AdapterManifest, source: str, tags: Mapping[str, str]
    ) -> None:
        """Adds a version; numbers that MLflow has missed are skipped, so that it counts as we do."""
        from mlflow.exceptions import MlflowException

        name = manifest.name
        if not client.search_registered_models(f"name = '{name}'"):
            described = (
                f"LoRA adapter for {manifest.base.id}. This is an index for people: what is approved is "
                f"signed elsewhere. `registry show {name}:<version>` tells the truth, and "
                f"`registry pull {name}@<alias>` verifies what it fetches."
            )
            try:
                _again(lambda: client.create_registered_model(name, description=described))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
        run = _run(client, manifest.training.run_id)
        for _ in range(_GAP + 1):
            made = _again(
                lambda: client.create_model_version(
                    name,
                    source,
                    run_id=run,
                    tags=dict(tags),
                    description=manifest.description,
                    await_creation_for=None,
                )
            )
            if int(made.version) >= manifest.version:
                return
            if manifest.version - int(made.version) > _GAP:
                return
            client.delete_model_version(name, str(made.version))

    def _find(
        self, client: MlflowClient, name: str, digest: Digest, number: int | None
    ) -> ModelVersion | None:
        """The entry with a number, or the one that claims the digest: of several, the first."""
        if number is not None:
            return client.get_model_version(name, str(number))
        query = f"name = '{name}' and tags.`{DIGEST_TAG}` = '{digest}'"
        found: list[Any] = list(client.search_model_versions(query))
        return min(found, key=lambda version: int(version.version), default=None)

    @contextlib.contextmanager
    def _client(self) -> Iterator[MlflowClient]:
        """A client whose failures are explained errors of ours."""
        self.require()
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        # The creation of a database is no news for somebody who asked for a registry.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        if self._uri.startswith("sqlite:///"):
            Path(self._uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        elif self._uri.startswith(database.POSTGRESQL):
            database.reach(self._uri)  # MLflow would try for minutes
        try:
            yield MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)
        except MlflowException as error:
            raise _explained(error, self.uri) from error


def _explained(error: MlflowException, uri: str) -> RegistryError:
    """Return what MLflow raised as an error that says what to do."""
    message, code = shown(database.without_passwords(str(error.message))), error.error_code
    if code in ("PERMISSION_DENIED", "UNAUTHENTICATED") or "error code 401" in message:
        why = message if code == "PERMISSION_DENIED" else "it does not know the name or the password"
        return UsageError(
            f"the MLflow server {uri} refuses this account: {why}",
            mend="set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD of an account with MANAGE on the "
            f"adapter; {_MEND}",
        )
    if code == "INVALID_PARAMETER_VALUE" and "Invalid model version source" in message:
        return UsageError(
            f"the MLflow server {uri} refuses the object store: {message}",
            mend="a server indexes no files of a local disk; use a store in S3, or an MLflow database",
        )
    return NetworkError(f"the MLflow index {uri} failed: {message}", mend=_MEND)


def _run(client: MlflowClient, run_id: str | None) -> str | None:
    """Return the training run if this index has it: a server refuses to link one that it does not know."""
    from mlflow.exceptions import MlflowException

    try:
        return None if run_id is None else str(client.get_run(run_id).info.run_id)
    except MlflowException:
        return None


def _again(call: Callable[[], _T]) -> _T:
    """Call something that MLflow answers with an error if somebody else did the same at that moment."""
    from mlflow.exceptions import MlflowException

    for attempt in range(_ATTEMPTS - 1):
        try:
            return call()
        except MlflowException as error:
            if not any(word in str(error.message) for word in ("IntegrityError", "UniqueViolation")):
                raise
            time.sleep(random.uniform(0, 0.05 * 2**attempt))
    return call()


def _pages(search: Callable[..., Any], size: int) -> Iterator[Any]:
    """Everything that a search finds, page by page."""
    token = None
    while True:
        page = search(max_results=size, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
