"""Settings of every floor: environment over file over defaults, one pydantic model a floor.

The file ``adapter-foundry.toml`` has one table a floor (``[registry]``, ``[serving]``, ``[trainer]``,
``[flows]``), and ``[platform]`` for `make up`. It is looked for at ``ADAPTER_FOUNDRY_CONFIG``, then in the
working directory, then in the data folder. In the environment the registry's keys are called
``ADAPTER_FOUNDRY_<KEY>``, those of the
other floors ``ADAPTER_FOUNDRY_<FLOOR>_<KEY>``; variables that other programs already read keep their
names. A wrong key is an error that names the nearest right one, never ignored.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from registry.errors import UsageError, shown

PREFIX = "ADAPTER_FOUNDRY_"
CONFIG_NAME = "adapter-foundry.toml"
FLOORS = ("registry", "serving", "trainer", "flows", "platform")

_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class StandardVariable:
    """Marks a field that is read from the environment variable of another program."""

    name: str


class RegistrySettings(BaseModel):
    """Settings of the registry.

    Attributes:
        store: where objects live, ``file:///folder`` or ``s3://bucket/prefix``; None is the folder of this
            machine's registry.
        cache: where pulled adapters are kept; None is ``<home>/cache``.
        ledger: database of the audit log, ``sqlite:///file`` or ``postgresql+psycopg://user@host/name``; None
            is the SQLite file of this machine's registry.
        mlflow_tracking_uri: the MLflow index; None is the SQLite file of this machine's registry.
        policy: TOML file of gates and licence policy; None is ``<home>/registry/policy.toml`` if that exists.
        actor: who works here, as the audit log names them; None is ``user@host``.
        key_passphrase: opens and encrypts the private key files; read it from the environment only.
        keys: URI of the private key of a role, where it is not the key file that ``registry init`` made.
        trust_max_age: seconds for which verified trust metadata is used without asking the store again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: str | None = None
    cache: Path | None = None
    ledger: str | None = None
    mlflow_tracking_uri: Annotated[str | None, StandardVariable("MLFLOW_TRACKING_URI")] = None
    policy: Path | None = None
    actor: str | None = None
    key_passphrase: SecretStr | None = None
    keys: Mapping[str, str] = Field(default_factory=dict)
    trust_max_age: Annotated[float, Field(ge=0, le=86400)] = 0.0

    @field_validator("store")
    @classmethod
    def _known_store(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("file:///", "s3://")):
            raise ValueError("a store is a URI such as file:///srv/adapters or s3://bucket/prefix")
        return value

    @field_validator("ledger")
    @classmethod
    def _known_database(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("sqlite:///", "postgresql")):
            raise ValueError(
                "a ledger is a URI such as sqlite:////srv/ledger.db or postgresql+psycopg://host/name"
            )
        return value


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where one machine keeps what belongs to the registry.

    Attributes:
        home: the data folder.
        settings: the registry's settings.
    """

    home: Path
    settings: RegistrySettings

    @property
    def store_uri(self) -> str:
        """The object store."""
        return self.settings.store or (self.home / "registry" / "objects").as_uri()

    @property
    def ledger_uri(self) -> str:
        """The database of the audit log."""
        return self.settings.ledger or f"sqlite:///{self.home / 'registry' / 'ledger.db'}"

    @property
    def policy(self) -> Path | None:
        """The policy file, or None for the policy that ships with the product."""
        default = self.home / "registry" / "policy.toml"
        return self.settings.policy or (default if default.is_file() else None)

    @property
    def actor(self) -> str:
        """Who works on this machine."""
        if self.settings.actor:
            return self.settings.actor
        import getpass
        import socket

        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # a container may run as a number without a name
            user = f"uid-{os.getuid()}"
        return f"{user}@{socket.gethostname()}"

    @property
    def keys(self) -> Path:
        """The folder of private key files."""
        return self.home / "registry" / "keys"

    @property
    def trust(self) -> Path:
        """The pinned root and the trust metadata that this machine has verified."""
        return self.home / "trust"

    @property
    def cache(self) -> Path:
        """The folder of pulled adapters."""
        return self.settings.cache or self.home / "cache"

    @property
    def tracking_uri(self) -> str:
        """The MLflow index."""
        return self.settings.mlflow_tracking_uri or f"sqlite:///{self.home / 'registry' / 'mlflow.db'}"


def home(env: Mapping[str, str] | None = None) -> Path:
    """The data folder of this machine, as an absolute path; it need not exist yet."""
    value = (os.environ if env is None else env).get(PREFIX + "HOME")
    return (
        Path(value).expanduser().absolute() if value else Path.home() / ".local" / "share" / "adapter-foundry"
    )


def layout(data_folder: Path | None = None, env: Mapping[str, str] | None = None) -> Layout:
    """The registry's layout under a data folder (default: `home()`), with its settings applied.

    Raises:
        UsageError: a setting is wrong.
    """
    folder = home(env) if data_folder is None else data_folder.expanduser().absolute()
    return Layout(home=folder, settings=load("registry", RegistrySettings, env, data_folder=folder))


def load(
    floor: str, model: type[_Model], env: Mapping[str, str] | None = None, data_folder: Path | None = None
) -> _Model:
    """Reads one floor's settings: environment over file over the model's defaults.

    Args:
        floor: one of `FLOORS`.
        model: the floor's pydantic model, with unknown keys forbidden.
        env: environment variables; None is the environment of this process.
        data_folder: data folder whose file is read; None is `home()`.

    Raises:
        UsageError: an unknown key, an unreadable file or a value of the wrong kind.
    """
    variables = os.environ if env is None else env
    table, source = _file_table(floor, variables, data_folder or home(variables))
    _refuse_unknown(table, model.model_fields, f"[{floor}] of {source}")
    values = table | _from_environment(floor, model, variables)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"the setting {shown(where)!r} of {floor} is wrong: {first['msg']}",
            mend=f"correct {_variable(floor, where.partition('.')[0])} in the environment or {source}",
        ) from error


def save(data_folder: Path, values: Mapping[str, str]) -> Path:
    """Writes the registry's settings of a new installation into its data folder.

    Args:
        data_folder: the data folder.
        values: settings of the table ``[registry]``.

    Returns:
        The file.

    Raises:
        UsageError: a value is wrong or holds a password, or the folder has a file that says something else.
    """
    for key, value in values.items():
        if urlsplit(value).password is not None:
            raise UsageError(
                f"the {key} holds a password, which does not belong into a file",
                mend=f"leave it out; set {_variable('registry', key)} or the service's own variable "
                "(PGPASSWORD, MLFLOW_TRACKING_PASSWORD, AWS_SECRET_ACCESS_KEY) in the environment",
            )
    lines = ["[registry]", *(f"{key} = {json.dumps(value)}" for key, value in sorted(values.items()))]
    text = "\n".join(lines) + "\n"
    path = data_folder / CONFIG_NAME
    data_folder.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        if path.read_text("utf-8") != text:
            raise UsageError(
                f"{path} exists and says something else", mend="edit that file, or choose another data folder"
            ) from None
    return path


def _variable(floor: str, key: str) -> str:
    return PREFIX + ("" if floor == "registry" else floor.upper() + "_") + key.upper()


def _file_table(floor: str, env: Mapping[str, str], data_folder: Path) -> tuple[dict[str, Any], str]:
    """The floor's table of the first configuration file that exists, and what to call that file."""
    named = env.get(PREFIX + "CONFIG")
    candidates = [Path(named)] if named else [Path(CONFIG_NAME), data_folder / CONFIG_NAME]
    for path in candidates:
        try:
            document = tomllib.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} cannot be read: {error}", mend="correct or remove that file") from error
        _refuse_unknown(document, FLOORS, str(path))
        table = document.get(floor, {})
        if not isinstance(table, dict):
            raise UsageError(f"{floor!r} in {path} is not a table", mend=f"write it as [{floor}]")
        return table, str(path)
    if named:
        raise UsageError(f"{named} does not exist", mend=f"correct or unset {PREFIX}CONFIG")
    return {}, CONFIG_NAME


def _from_environment(floor: str, model: type[BaseModel], env: Mapping[str, str]) -> dict[str, Any]:
    names: dict[str, str] = {}
    for key, field in model.model_fields.items():
        standard = next((mark for mark in field.metadata if isinstance(mark, StandardVariable)), None)
        names[standard.name if standard else _variable(floor, key)] = key
    other_floors = tuple(PREFIX + other.upper() + "_" for other in FLOORS if other not in ("registry", floor))
    if floor == "registry":
        mine = {name: value for name, value in env.items() if name.startswith(PREFIX)}
        known: set[str] = set(names) | {PREFIX + "HOME", PREFIX + "CONFIG"}
        mine = {name: value for name, value in mine.items() if not name.startswith(other_floors)}
    else:
        mine = {name: value for name, value in env.items() if name.startswith(_variable(floor, ""))}
        known = set(names)
    _refuse_unknown(mine, known, "the environment")
    return {key: _parsed(env[name]) for name, key in names.items() if env.get(name)}


def _parsed(value: str) -> Any:
    """Tables and lists are written as JSON in the environment; pydantic reads everything else from text."""
    if value[:1] not in ("{", "["):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _refuse_unknown(given: Iterable[str], known: Iterable[str], where: str) -> None:
    right = list(known)
    for key in given:
        if key not in right:
            near = difflib.get_close_matches(key, right, n=1, cutoff=0.0)
            raise UsageError(
                f"{where} has the unknown key {shown(key)!r}",
                mend=f"did you mean {near[0]!r}?" if near else "remove it",
            )
