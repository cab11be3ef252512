"""Settings: environment over file over defaults; a wrong key names the nearest right one."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from registry import settings
from registry.errors import UsageError
from registry.settings import RegistrySettings


class ServingLike(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = 8
    bases: dict[str, str] = {}


def write(folder: Path, text: str) -> None:
    (folder / "adapter-foundry.toml").write_text(text)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_home_is_the_variable_or_the_default() -> None:
    assert settings.home({"ADAPTER_FOUNDRY_HOME": "/srv/data"}) == Path("/srv/data")
    assert settings.home({}) == Path.home() / ".local" / "share" / "adapter-foundry"


def test_everything_lies_under_home_by_default(tmp_path: Path) -> None:
    place = settings.layout(tmp_path, {})
    assert place.store_uri == f"file://{tmp_path}/registry/objects"
    assert place.ledger_uri == f"sqlite:///{tmp_path}/registry/ledger.db"
    assert place.policy is None
    assert "@" in place.actor
    assert place.cache == tmp_path / "cache"
    assert place.tracking_uri == f"sqlite:///{tmp_path}/registry/mlflow.db"


def test_environment_is_over_file_over_defaults(tmp_path: Path) -> None:
    write(tmp_path, '[registry]\nstore = "file:///from/file"\ncache = "/from/file"\n')
    env = {"ADAPTER_FOUNDRY_CACHE": "/from/environment", "MLFLOW_TRACKING_URI": "sqlite:///other.db"}
    place = settings.layout(tmp_path, env)
    assert place.store_uri == "file:///from/file"
    assert place.cache == Path("/from/environment")
    assert place.tracking_uri == "sqlite:///other.db"
    assert place.settings.key_passphrase is None


def test_the_working_directory_is_looked_at_before_the_data_folder(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write(data, '[registry]\ncache = "/of/data"\n')
    assert settings.layout(data, {}).cache == Path("/of/data")
    write(tmp_path, '[registry]\ncache = "/of/here"\n')
    assert settings.layout(data, {}).cache == Path("/of/here")


def test_a_passphrase_is_not_printed() -> None:
    found = settings.load("registry", RegistrySettings, {"ADAPTER_FOUNDRY_KEY_PASSPHRASE": "hunter2"})
    assert found.key_passphrase is not None
    assert "hunter2" not in repr(found)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ('[registry]\ncahce = "/x"\n', "'cache'"),
        ('[regsitry]\ncache = "/x"\n', "'registry'"),
        ('cache = "/x"\n', "unknown key"),
        ('registry = "x"\n', r"\[registry\]"),
        ("[registry\n", "cannot be read"),
        ('[registry]\nstore = "https://bucket"\n', "s3://bucket/prefix"),
        ('[registry]\nledger = "mysql://host/db"\n', "postgresql"),
        ("[registry]\ntrust_max_age = -1\n", "trust_max_age"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path: Path, text: str, hint: str) -> None:
    write(tmp_path, text)
    with pytest.raises(UsageError, match=hint):
        settings.layout(tmp_path, {})


def test_a_wrong_variable_names_the_nearest_right_one() -> None:
    with pytest.raises(UsageError, match="ADAPTER_FOUNDRY_STORE"):
        settings.load("registry", RegistrySettings, {"ADAPTER_FOUNDRY_STROE": "file:///x"})


def test_a_named_file_must_exist() -> None:
    with pytest.raises(UsageError, match="does not exist"):
        settings.load("registry", RegistrySettings, {"ADAPTER_FOUNDRY_CONFIG": "/nowhere.toml"})


def test_other_floors_have_their_own_table_and_prefix(tmp_path: Path) -> None:
    write(tmp_path, "[serving]\nsteps = 4\n")
    env = {"ADAPTER_FOUNDRY_SERVING_BASES": '{"a/b": "/bases/b"}', "ADAPTER_FOUNDRY_HOME": str(tmp_path)}
    found = settings.load("serving", ServingLike, env)
    assert found == ServingLike(steps=4, bases={"a/b": "/bases/b"})
    settings.load("registry", RegistrySettings, env)  # not its business
    with pytest.raises(UsageError, match="SERVING_STEPS"):
        settings.load("serving", ServingLike, {"ADAPTER_FOUNDRY_SERVING_STEP": "3"})
    with pytest.raises(UsageError, match="steps"):
        settings.load("serving", ServingLike, {"ADAPTER_FOUNDRY_SERVING_STEPS": "many"})
