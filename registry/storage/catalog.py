"""MLflow as the index: what people see in ``mlflow ui`` and what other tools find.

MLflow is told about versions and aliases after they are signed, and is never asked for a decision: whoever
rewrites its database makes no client load anything. Versions carry their digest as a tag, because MLflow
counts versions by itself and may have been reset.

A version's source is an MLflow model directory of the ``mlflow.diffusers`` flavor in the object store.
Loading it through MLflow skips every check of admission; it is there for inspection and for tools that
cannot do otherwise.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from registry.digest import Digest, stream_entry
from registry.errors import DigestMismatch, NetworkError, UsageError
from registry.manifest import WEIGHTS_NAME, AdapterManifest
from registry.storage.base import ObjectStore, blob_key, model_prefix, read

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

WEIGHTS_FOLDER = "adapter_weights"
DIGEST_TAG = "adapter_foundry.digest"
_MLMODEL = "MLmodel"
# MLflow leaves this note beside a model that is loaded through it from a folder; it means nothing to us.
_WRITTEN_BY_MLFLOW = "registered_model_meta"


class MlflowCatalog:
    """A `Catalog` in MLflow's model registry.

    Args:
        tracking_uri: any URI that MLflow understands, such as ``sqlite:////home/me/mlflow.db``.
    """

    def __init__(self, tracking_uri: str) -> None:
        self._uri = tracking_uri

    def require(self) -> None:
        """Checks that MLflow can be used, before anything is written.

        Raises:
            UsageError: MLflow is not installed.
        """
        if importlib.util.find_spec("mlflow") is None:
            raise UsageError(
                "publishing needs MLflow, which is not installed",
                mend="pip install 'adapter-foundry[catalog]'",
            )

    def prepare(self) -> None:
        """Creates the database, so that ``mlflow ui`` works from the start.

        Raises:
            NetworkError: MLflow failed.
        """
        with self._client() as client:
            client.search_registered_models(max_results=1)

    def record(self, manifest: AdapterManifest, digest: Digest, source: str) -> None:
        """See `Catalog.record`.

        Raises:
            NetworkError: MLflow failed.
        """
        tags = {
            DIGEST_TAG: str(digest),
            "adapter_foundry.reference": f"{manifest.name}:{manifest.version}",
            "license": manifest.license,
            "base": manifest.base.id,
            "base_revision": manifest.base.revision,
            "rank": str(manifest.lora.rank),
        }
        with self._client() as client:
            if not client.search_registered_models(f"name = '{manifest.name}'"):
                client.create_registered_model(
                    manifest.name, description="LoRA adapter; `registry show` has the truth."
                )
            if self._find(client, manifest.name, digest) is None:
                client.create_model_version(
                    manifest.name,
                    source,
                    tags=tags,
                    description=manifest.description,
                    run_id=manifest.training.run_id,
                )

    def point(self, name: str, alias: str, digest: Digest) -> None:
        """See `Catalog.point`.

        Raises:
            NetworkError: MLflow failed, or does not know the version.
        """
        with self._client() as client:
            version = self._find(client, name, digest)
            if version is None:
                raise NetworkError(
                    f"MLflow does not know {name}@{digest}", mend="push the adapter again to index it"
                )
            client.set_registered_model_alias(name, alias, str(version.version))

    def _find(self, client: MlflowClient, name: str, digest: Digest) -> ModelVersion | None:
        found: list[Any] = list(client.search_model_versions(f"name = '{name}'"))
        return next((version for version in found if version.tags.get(DIGEST_TAG) == digest), None)

    @contextlib.contextmanager
    def _client(self) -> Iterator[MlflowClient]:
        """A client whose failures are explained errors of ours."""
        self.require()
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        # The creation of a database is no news for somebody who asked for a registry.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        if self._uri.startswith("sqlite:///"):
            Path(self._uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        try:
            yield MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)
        except MlflowException as error:
            raise NetworkError(
                f"the MLflow index {self._uri} failed: {error.message}",
                mend="what was signed stays signed; run the same command again to bring the index up to date",
            ) from error


def model_file(manifest: AdapterManifest, digest: Digest) -> bytes:
    """The ``MLmodel`` file of a version: a pure function of the manifest, so that it can be checked.

    Args:
        manifest: the version.
        digest: its digest.

    Returns:
        YAML in UTF-8.
    """
    lines = [
        "flavors:",
        "  diffusers:",
        "    adapter_type: lora",
        f"    adapter_weights: {WEIGHTS_FOLDER}",
        f"    base_model: {json.dumps(manifest.base.id)}",
        f"    base_model_revision: {json.dumps(manifest.base.revision)}",
        "metadata:",
        f"  digest: {json.dumps(str(digest))}",
        f"  reference: {json.dumps(f'{manifest.name}:{manifest.version}')}",
        f"model_uuid: {json.dumps(digest.hex[:32])}",
    ]
    return ("\n".join(lines) + "\n").encode()


def write_model(store: ObjectStore, manifest: AdapterManifest, digest: Digest) -> str:
    """Writes the MLflow model directory of a version, whose weights are in the store already.

    Returns:
        The URI of the directory.
    """
    prefix = model_prefix(digest)
    store.copy(blob_key(manifest.file(WEIGHTS_NAME).sha256), f"{prefix}{WEIGHTS_FOLDER}/{WEIGHTS_NAME}")
    store.put(prefix + _MLMODEL, [model_file(manifest, digest)])
    return f"{store.uri}/{prefix.rstrip('/')}"


def check_model(store: ObjectStore, manifest: AdapterManifest, digest: Digest) -> None:
    """Compares the MLflow model directory of a version, if it is there, with what the manifest says.

    Nothing is ever loaded from it by us; but who finds it changed should not trust the store.

    Raises:
        DigestMismatch: a file in it was changed or does not belong there.
    """
    prefix = model_prefix(digest)
    weights = manifest.file(WEIGHTS_NAME)
    for key in store.keys(prefix):
        name = key.removeprefix(prefix)
        if name == f"{WEIGHTS_FOLDER}/{WEIGHTS_NAME}":
            with store.open(key) as view, store.open(blob_key(weights.sha256)) as blob:
                genuine = _same_file(view, blob) or stream_entry(WEIGHTS_NAME, view) == weights
        elif name == _WRITTEN_BY_MLFLOW:
            continue
        else:
            genuine = name == _MLMODEL and read(store, key) == model_file(manifest, digest)
        if not genuine:
            raise DigestMismatch(
                f"the object {key} is not what the signed manifest says",
                mend="the store may have been tampered with; remove the object and push again",
            )


def _same_file(left: BinaryIO, right: BinaryIO) -> bool:
    """Whether two streams read one file under two names, whose bytes were verified already."""
    try:
        return os.path.sameopenfile(left.fileno(), right.fileno())
    except OSError:  # not files of this machine
        return False
