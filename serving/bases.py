"""Base models on this machine: which folder, or which hub id, is the base that an adapter names.

A folder says which base it is in ``base.json``; an adapter runs on the very id and revision it was made for.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from registry.digest import Digest
from registry.errors import shown
from registry.manifest import BaseModelRef
from registry.settings import home as default_home
from serving.errors import BaseNotFound, WrongBase
from serving.settings import ServingSettings
from serving.settings import load as load_settings

RECORD_NAME = "base.json"
# Ids of this project live on this machine only: asking a hub for them would fetch a stranger's files.
_LOCAL_PREFIX = "adapter-foundry/"


class BaseRecord(BaseModelRef):
    """What ``base.json`` says: the base in a folder, and the digest of its files as registered."""

    digest: Digest | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class HubModel:
    """A base that diffusers fetches from the model hub."""

    id: str
    revision: str


def folder_of(base_id: str, home: Path | None = None) -> Path:
    """The folder of a registered base: ``<home>/bases/<id with / as -->``."""
    return (default_home() if home is None else home) / "bases" / base_id.replace("/", "--")


def fingerprint(folder: Path) -> Digest:
    """Return one digest over the names and the contents of a base's files; ``base.json`` is left out."""
    total = hashlib.sha256()
    for path in sorted(item for item in folder.rglob("*") if item.is_file()):
        name = path.relative_to(folder).as_posix()
        if name == RECORD_NAME:
            continue
        with path.open("rb") as stream:
            total.update(f"{name}\0sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return Digest("sha256:" + total.hexdigest())


def register(folder: Path, base: BaseModelRef, home: Path | None = None) -> Path:
    """Copy a base in diffusers layout into the data folder, where `resolve` finds it.

    Registering the same files again does nothing; other files under the same id replace the old ones.

    Returns:
        The folder in the data folder.

    Raises:
        BaseNotFound: ``folder`` holds no pipeline in diffusers layout.
    """
    if not (folder / "model_index.json").is_file():
        raise BaseNotFound(
            f"{folder} holds no base model (there is no model_index.json)",
            "give the folder that save_pretrained wrote, or a snapshot of the hub",
        )
    place = folder_of(base.id, home)
    record = BaseRecord(**base.model_dump(), digest=fingerprint(folder))
    if place.is_dir() and _record(place) == record and fingerprint(place) == record.digest:
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    waiting = Path(tempfile.mkdtemp(prefix=".register-", dir=place.parent))
    try:
        fresh = waiting / "new"
        shutil.copytree(folder, fresh, ignore=shutil.ignore_patterns(RECORD_NAME))
        (fresh / RECORD_NAME).write_text(record.model_dump_json(indent=2) + "\n", "utf-8")
        if place.exists():
            os.replace(place, waiting / "old")
        os.replace(fresh, place)
    finally:
        shutil.rmtree(waiting, ignore_errors=True)
    return place


def resolve(
    base: BaseModelRef, home: Path | None = None, settings: ServingSettings | None = None
) -> Path | HubModel:
    """Return where the base is: a folder that says it is this very base, or the hub.

    Looked for in the setting ``bases``, then in the data folder, then on the hub.

    Raises:
        BaseNotFound: it is a base of this project that nobody registered here, or a folder without base.json.
        WrongBase: the folder holds another base or another revision.
    """
    mapped = (load_settings(home=home) if settings is None else settings).bases.get(base.id)
    folder = mapped.expanduser() if mapped is not None else folder_of(base.id, home)
    if not folder.is_dir():
        if mapped is None and not base.id.startswith(_LOCAL_PREFIX):
            return HubModel(id=base.id, revision=base.revision)
        raise BaseNotFound(
            f"the base model {base.id} is not on this machine ({folder} does not exist)",
            f"run `serving register-base FOLDER --id {base.id} --revision {base.revision}`; "
            "`make demo` does it for the portraits base",
        )
    record = _record(folder)
    if record is None:
        raise BaseNotFound(
            f"{folder} does not say which base model it is",
            f"write {RECORD_NAME} there (id, revision, family, license), or use `serving register-base`",
        )
    require_same(record, base)
    return folder


def require_same(present: BaseModelRef, wanted: BaseModelRef) -> None:
    """Refuse a base that is not the one an adapter was made for.

    Raises:
        WrongBase: id, revision or family differ.
    """
    for what in ("id", "family", "revision"):
        have, want = getattr(present, what), getattr(wanted, what)
        if have != want:
            raise WrongBase(
                f"the adapter was made for the base {wanted.id} at revision {wanted.revision}, "
                f"not for {present.id} at revision {present.revision} ({what} {have!r} is not {want!r})",
                "serve it on its own base, or train an adapter for this one",
            )


def _record(folder: Path) -> BaseRecord | None:
    path = folder / RECORD_NAME
    try:
        return BaseRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise BaseNotFound(
            f"{path} cannot be read: {shown(error)}",
            "register the base model again with `serving register-base`",
        ) from error
