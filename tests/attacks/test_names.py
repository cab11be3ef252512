"""Names that look like other names: a person reads `pixelsmile`, the bytes say something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from fakes.registries import NAME, PASSING, adapter_folder, copy_registry, objects, resign
from registry.client import Registry
from registry.errors import NotFound, RegistryError, UsageError
from registry.manifest import AdapterManifest
from registry.reference import Reference
from registry.signing.trust import version_path

LOOK_ALIKES = {
    "cyrillic i": "p\u0456xelsmile",
    "fullwidth": "\uff50ixelsmile",
    "zero width joiner": "pixel\u200dsmile",
    "right to left": "pixelsmile\u202e",
    "combining mark": "pixelsmi\u0301le",
    "upper case": "Pixelsmile",
    "dotless i": "p\u0131xelsmile",
    "kelvin sign": "\u212aitty",
    "trailing line break": "pixelsmile\n",
    "path": "../pixelsmile",
}


@pytest.fixture
def registry(home: Path) -> Registry:
    return copy_registry(home)


@pytest.mark.parametrize("name", LOOK_ALIKES.values(), ids=LOOK_ALIKES.keys())
def test_a_name_that_looks_like_another_is_never_published(
    registry: Registry, tmp_path: Path, name: str
) -> None:
    with pytest.raises(UsageError) as refusal:
        registry.push(adapter_folder(tmp_path / "adapter", seed=1), name, evaluation=PASSING)
    assert refusal.value.exit_code == 2
    assert refusal.value.message.isascii()
    assert refusal.value.message.isprintable()
    assert [row.reference for row in registry.list()] == [f"{NAME}:1"]


@pytest.mark.parametrize("alias", ["pr\u043ed", "prod\u200b", "PROD", "latest", "v1", "prod\n"])
def test_an_alias_that_looks_like_another_is_never_made(registry: Registry, alias: str) -> None:
    with pytest.raises(UsageError):
        registry.promote(f"{NAME}:1", alias)
    assert set(registry.authority.state().aliases()) == {f"{NAME}@prod"}


@pytest.mark.parametrize("name", LOOK_ALIKES.values(), ids=LOOK_ALIKES.keys())
def test_a_reference_that_looks_like_another_finds_nothing(registry: Registry, name: str) -> None:
    with pytest.raises(UsageError):
        Reference.parse(f"{name}@prod")


@pytest.mark.parametrize("name", LOOK_ALIKES.values(), ids=LOOK_ALIKES.keys())
def test_a_manifest_that_names_a_look_alike_is_no_manifest(registry: Registry, home: Path, name: str) -> None:
    (path,) = objects(home).glob("manifests/sha256/*")
    genuine = AdapterManifest.parse(path.read_bytes())
    forged = genuine.model_copy(update={"name": name})
    with pytest.raises(RegistryError):
        AdapterManifest.parse(forged.canonical_bytes())


def test_a_stolen_publisher_key_cannot_hide_a_version_behind_a_look_alike(
    registry: Registry, home: Path
) -> None:
    """Signed metadata may say anything; what is no plain name is not listed and cannot be asked for."""

    def change(signed: object) -> None:
        targets = signed.targets  # type: ignore[attr-defined]
        target = targets[version_path(f"{NAME}:1")]
        targets[version_path(f"{NAME}:1").replace(NAME, "p\u0456xelsmile")] = target

    resign(home, {"versions": change})
    assert [row.reference for row in registry.list()] == [f"{NAME}:1"]
    with pytest.raises(NotFound):
        registry.pull(f"{NAME}:2")
