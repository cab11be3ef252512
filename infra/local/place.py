"""Where a platform keeps its things, and whether a folder may be one."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.local.errors import WrongFolder

FORMAT = 1
#: The kernel takes no longer path of a socket; supervisord adds its process id for a moment.
LONGEST_SOCKET = 107 - len(".4194304")
_LEAST_FREE = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Folders of one platform.

    Attributes:
        home: its data folder, the ``ADAPTER_FOUNDRY_HOME`` of everything that it runs.
    """

    home: Path

    @property
    def services(self) -> Path:
        """What the services keep; the rest of the data folder is as anywhere."""
        return self.home / "services"

    @property
    def record(self) -> Path:
        """What was decided once: format, path, database, ports."""
        return self.services / "platform.json"

    @property
    def secrets(self) -> Path:
        """Passwords and keys of the services."""
        return self.services / "secrets.json"

    @property
    def logs(self) -> Path:
        """One log a service, and supervisord's."""
        return self.services / "logs"

    @property
    def run(self) -> Path:
        """What was started, and with what."""
        return self.services / "run"

    @property
    def socket(self) -> Path:
        """Where supervisord takes orders."""
        return self.services / "supervisor.sock"

    def log(self, name: str) -> Path:
        """The log of a service."""
        return self.logs / f"{name}.log"


def place(home: Path) -> Place:
    """Return the platform of a data folder: the folder ``platform`` in it, or itself where it is one."""
    inside = Place(home=home)
    return inside if inside.record.is_file() else Place(home=home / "platform")


def claim(where: Place) -> None:
    """Make the folders of a platform, or make sure that they are one of this format and path.

    Raises:
        WrongFolder: they are not, cannot be written, or the disk is full.
    """
    if len(str(where.socket)) > LONGEST_SOCKET:
        raise WrongFolder(
            f"the path {where.home} is too long: a socket in it would have {len(str(where.socket))} "
            f"characters, and the system takes {LONGEST_SOCKET}",
            "set ADAPTER_FOUNDRY_HOME to a shorter path",
        )
    kept = read(where)
    if not kept and _strangers(where):
        raise WrongFolder(
            f"{where.services} has files, and no platform made them",
            "move them away, or set ADAPTER_FOUNDRY_HOME to another folder",
        )
    if kept:
        _require_ours(where, kept)
    try:
        _require_room(where)
        for folder in (where.home, where.services, where.logs, where.run):
            folder.mkdir(parents=True, exist_ok=True)
            if folder != where.home:
                folder.chmod(0o700)
        with tempfile.TemporaryFile(dir=where.services) as probe:
            probe.write(b"room?")
    except OSError as error:
        raise WrongFolder(
            f"{where.home} cannot be written: {error.strerror}",
            "make it writable for you, or set ADAPTER_FOUNDRY_HOME to another folder",
        ) from error
    if not kept:
        keep(where, {"format": FORMAT, "home": str(where.home), "id": secrets.token_hex(8)})


def _strangers(where: Place) -> bool:
    """Whether others have files there; a start that was cut off leaves empty folders and half a record."""
    return where.services.is_dir() and any(
        any(one.iterdir()) if one.is_dir() else not one.name.startswith(f".{where.record.name}-")
        for one in where.services.iterdir()
    )


def _require_room(where: Place) -> None:
    nearest = next(one for one in (where.home, *where.home.parents) if one.exists())
    free = shutil.disk_usage(nearest).free
    if free < _LEAST_FREE:
        raise WrongFolder(
            f"the disk of {where.home} has {free >> 20} MB left, and databases that run out of it stop",
            f"make {_LEAST_FREE >> 20} MB free, or set ADAPTER_FOUNDRY_HOME to a folder on another disk",
        )


def _require_ours(where: Place, kept: Mapping[str, Any]) -> None:
    if kept.get("format") != FORMAT:
        raise WrongFolder(
            f"the platform in {where.home} has the format {kept.get('format')!r}, and this is {FORMAT}",
            "use the version of adapter-foundry that made it, or restore a backup with this one",
        )
    if kept.get("home") != str(where.home):
        raise WrongFolder(
            f"the platform in {where.home} was made in {kept.get('home')}: it is a copy, or it was moved",
            "move it back; to move a platform, back it up where it was, and make a new one of that: "
            "python -m infra.local restore DIR (docs/operations/local.md)",
        )


def read(where: Place) -> dict[str, Any]:
    """Return what was decided once; empty for a new platform.

    Raises:
        WrongFolder: the file is damaged.
    """
    try:
        value = json.loads(where.record.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise WrongFolder(
            f"{where.record} cannot be read: {error}", "make it readable for you, or restore it from a backup"
        ) from error
    if not isinstance(value, dict):
        raise WrongFolder(f"{where.record} is damaged", "restore it from a backup")
    return value


def keep(where: Place, values: Mapping[str, Any]) -> dict[str, Any]:
    """Add decisions to those that were made, and return all of them."""
    found = {**read(where), **values}
    write(where.record, json.dumps(found, indent=1, sort_keys=True) + "\n")
    return found


def write(path: Path, text: str) -> None:
    """Write a file that only its owner reads, so that it is either whole or as it was."""
    handle, waiting = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(waiting, path)
    except BaseException:
        Path(waiting).unlink(missing_ok=True)
        raise
