"""Which folder or hub id is the base that an adapter names."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry.errors import UsageError as SettingError
from registry.manifest import BaseModelRef
from serving import bases, pipelines
from serving.bases import HubModel, fingerprint, folder_of, register, resolve
from serving.errors import BaseNotFound, UsageError, WrongBase
from serving.settings import load

PORTRAITS = BaseModelRef(
    id="adapter-foundry/portraits-base", revision="1", family="qwen-image-edit", license="Apache-2.0"
)
QWEN = PORTRAITS.model_copy(update={"id": "Qwen/Qwen-Image-Edit-2511", "revision": "abc123"})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Looks like a base in diffusers layout; nothing here loads it."""
    folder = tmp_path / "source"
    (folder / "vae").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "vae" / "config.json").write_text("{}")
    return folder


def test_a_registered_base_is_found(home: Path, source: Path) -> None:
    place = register(source, PORTRAITS)
    assert place == home / "bases" / "adapter-foundry--portraits-base" == folder_of(PORTRAITS.id)
    assert resolve(PORTRAITS) == place
    assert fingerprint(place) == fingerprint(source)
    assert [path.name for path in place.parent.iterdir()] == [place.name]


def test_registering_again_does_nothing_and_new_files_replace(source: Path) -> None:
    place = register(source, PORTRAITS)
    before = (place / "model_index.json").stat().st_ino
    register(source, PORTRAITS)
    assert (place / "model_index.json").stat().st_ino == before
    (source / "vae" / "config.json").write_text('{"new": 1}')
    register(source, PORTRAITS)
    assert (place / "vae" / "config.json").read_text() == '{"new": 1}'
    (place / "vae" / "config.json").write_text("damaged")
    register(source, PORTRAITS)
    assert (place / "vae" / "config.json").read_text() == '{"new": 1}'


def test_another_revision_is_refused(source: Path) -> None:
    register(source, PORTRAITS)
    with pytest.raises(WrongBase, match="at revision 2, not for"):
        resolve(PORTRAITS.model_copy(update={"revision": "2"}))


def test_a_base_of_the_hub_goes_to_the_hub_unless_registered(source: Path) -> None:
    assert resolve(QWEN) == HubModel(id=QWEN.id, revision="abc123")
    place = register(source, QWEN)
    assert resolve(QWEN) == place


def test_our_own_bases_never_go_to_the_hub() -> None:
    with pytest.raises(BaseNotFound, match="is not on this machine") as caught:
        resolve(PORTRAITS)
    assert caught.value.exit_code == 11
    assert "register-base" in caught.value.mend


def test_the_setting_names_a_folder(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTER_FOUNDRY_SERVING_BASES", f'{{"{QWEN.id}": "{source}"}}')
    with pytest.raises(BaseNotFound, match="does not say which base model it is"):
        resolve(QWEN)
    (source / bases.RECORD_NAME).write_text(QWEN.model_dump_json())
    assert resolve(QWEN) == source
    (source / bases.RECORD_NAME).write_text('{"id": "x"}')
    with pytest.raises(BaseNotFound, match="cannot be read"):
        resolve(QWEN)


def test_a_folder_without_a_pipeline_cannot_be_registered(tmp_path: Path) -> None:
    with pytest.raises(BaseNotFound, match=r"no model_index\.json"):
        register(tmp_path, PORTRAITS)
    assert not folder_of(PORTRAITS.id).exists()


def test_what_cannot_be_loaded_is_explained(tmp_path: Path) -> None:
    with pytest.raises(BaseNotFound, match="cannot be loaded"):
        pipelines.load("qwen-image-edit", tmp_path / "nothing")
    with pytest.raises(UsageError, match="families that can be served: qwen-image-edit, flux"):
        pipelines.load("cogview", tmp_path)


def test_settings_come_from_the_environment_and_are_checked() -> None:
    assert load({}).device == "cpu"
    assert load({"ADAPTER_FOUNDRY_SERVING_DEVICE": "cuda:1"}).device == "cuda:1"
    with pytest.raises(SettingError, match="unknown key") as caught:
        load({"ADAPTER_FOUNDRY_SERVING_DEVISE": "cpu"})
    assert "ADAPTER_FOUNDRY_SERVING_DEVICE" in caught.value.mend
    with pytest.raises(SettingError, match="'device' of serving is wrong"):
        load({"ADAPTER_FOUNDRY_SERVING_DEVICE": "toaster"})
