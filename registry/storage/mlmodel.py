"""The MLflow model directory around a version's weights: what makes ``mlflow.diffusers.load_model`` read it.

The weights are stored once, and already where MLflow looks for them. Beside them lies ``MLmodel``, a pure
function of the base model and of the weights, so that it can be checked, and so that several versions with
the same weights share it. MLflow needs no other file; whatever else lies there does not belong there.
"""

from __future__ import annotations

import json
import re
from typing import Final

from registry.digest import FileEntry
from registry.errors import Conflict, DigestMismatch, shown
from registry.manifest import WEIGHTS_NAME, AdapterManifest
from registry.storage.base import ObjectStore, file_key, model_prefix, read

_WEIGHTS_FOLDER: Final = "adapter_weights"
_MLMODEL: Final = "MLmodel"
# MLflow leaves this note beside a model that is loaded through it from a folder; it means nothing to us.
_WRITTEN_BY_MLFLOW: Final = "registered_model_meta"
_MAX_BYTES: Final = 64 * 1024
_BASE: Final = re.compile(r'^    base_model: (".*")\n    base_model_revision: (".*")$', re.MULTILINE)


def model_file(base: str, revision: str, weights: FileEntry) -> bytes:
    """Return the ``MLmodel`` file: YAML in UTF-8.

    Args:
        base: id of the base model.
        revision: its revision.
        weights: the weights.
    """
    lines = [
        "flavors:",
        "  diffusers:",
        "    adapter_type: lora",
        f"    adapter_weights: {_WEIGHTS_FOLDER}",
        f"    base_model: {json.dumps(base)}",
        f"    base_model_revision: {json.dumps(revision)}",
        # Without a name diffusers would take the first file that it likes.
        f"    weight_name: {json.dumps(weights.path)}",
        "metadata:",
        f"  weights: {json.dumps(str(weights.sha256))}",
        f"model_size_bytes: {weights.size}",
        f"model_uuid: {json.dumps(weights.blake3[:32])}",
    ]
    return ("\n".join(lines) + "\n").encode()


def model_uri(store: ObjectStore, manifest: AdapterManifest) -> str:
    """Return the URI of a version's model directory."""
    return f"{store.uri}/{model_prefix(manifest.file(WEIGHTS_NAME)).rstrip('/')}"


def write_model(store: ObjectStore, manifest: AdapterManifest) -> str:
    """Complete the MLflow model directory of a version, whose weights are in the store already.

    Returns:
        The URI of the directory.

    Raises:
        Conflict: the same weights were published for another base model.
        DigestMismatch: the file that is there was changed.
    """
    key, expected = _key(manifest), _expected(manifest)
    if not store.put(key, expected):
        found = read(store, key, _MAX_BYTES)
        if found != expected:
            _refuse(key, found, manifest)
    return model_uri(store, manifest)


def check_model(store: ObjectStore, manifest: AdapterManifest) -> None:
    """Compare the MLflow model directory of a version, if it is there, with what the manifest says.

    Nothing is ever loaded from it by us except the weights, which are verified elsewhere; but who finds it
    changed should not trust the store.

    Raises:
        DigestMismatch: a file in it was changed or does not belong there.
    """
    weights = manifest.file(WEIGHTS_NAME)
    prefix = model_prefix(weights)
    for key in store.keys(prefix):
        name = key.removeprefix(prefix)
        if key == file_key(weights) or name == _WRITTEN_BY_MLFLOW:
            continue
        if name != _MLMODEL or read(store, key, _MAX_BYTES) != _expected(manifest):
            raise _changed(key)


def _key(manifest: AdapterManifest) -> str:
    return model_prefix(manifest.file(WEIGHTS_NAME)) + _MLMODEL


def _expected(manifest: AdapterManifest) -> bytes:
    return model_file(manifest.base.id, manifest.base.revision, manifest.file(WEIGHTS_NAME))


def _refuse(key: str, found: bytes, manifest: AdapterManifest) -> None:
    """Raise for a file that differs: an honest one names another base and nothing else."""
    named = _BASE.search(found.decode("utf-8", "replace"))
    if named is not None:
        base, revision = (_text(part) for part in named.groups())
        if model_file(base, revision, manifest.file(WEIGHTS_NAME)) == found:
            raise Conflict(
                f"these weights were published for the base model {shown(base)} at {shown(revision)}; now "
                f"the card says {manifest.base.id} at {manifest.base.revision}",
                mend="an adapter runs on the base that it was trained for; correct the card",
            )
    raise _changed(key)


def _text(quoted: str) -> str:
    try:
        return str(json.loads(quoted))
    except ValueError:
        return ""


def _changed(key: str) -> DigestMismatch:
    return DigestMismatch(
        f"the object {key} is not what the signed manifest says",
        mend="the store may have been tampered with; remove the object and push again",
    )
