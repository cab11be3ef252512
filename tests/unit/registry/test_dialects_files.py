"""``registry import`` and ``registry convert``: what they write, say and leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fakes.adapters import RANK, card, changed, clean_adapter, container, factors
from fakes.dialects import lora_file, peft_config, spelled
from registry.cli import cli
from registry.digest import digest_bytes
from registry.errors import Explained
from registry.families import KNOWN_BASES
from registry.formats import read_header, serialise
from registry.manifest import CARD_NAME, WEIGHTS_NAME

BASE = KNOWN_BASES["adapter-foundry/portraits-base"]
EDIT_2511 = "Qwen/Qwen-Image-Edit-2511"
VALUES = factors(BASE)
DRAFT = "adapter.draft.json"


def registry(*command: object) -> dict[str, Any]:
    result = CliRunner().invoke(cli, [*map(str, command), "--json"], catch_exceptions=False)
    return json.loads(result.stdout)


def said(*command: object) -> str:
    return CliRunner().invoke(cli, [*map(str, command)], catch_exceptions=False).stdout


def canonical() -> bytes:
    weights = container(VALUES)
    return serialise(read_header(weights), weights)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(lora_file(spelled(VALUES, "kohya", alpha=4.0), {"ss_seed": "42"}))
    return path


def test_an_import_without_a_card_leaves_a_draft(tmp_path: Path, lora: Path) -> None:
    said_ = registry("import", lora, "--base", BASE.id, "--output", tmp_path / "made")
    assert (tmp_path / "made" / WEIGHTS_NAME).read_bytes() == canonical()
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [DRAFT, WEIGHTS_NAME]
    assert said_["digest"] == str(digest_bytes(canonical()))
    assert said_["strength"] == {
        "scales": [1.0],
        "source": "the file's alpha tensors",
        "ratio": 1.0,
        "exact": True,
    }
    assert (said_["dialect"], said_["modules"], said_["rank"], said_["card"]) == ("kohya", 72, RANK, DRAFT)
    draft = json.loads((tmp_path / "made" / DRAFT).read_text())
    assert draft["training"]["seed"] == 42
    assert draft["ingredients"][1]["digest"] == str(digest_bytes(lora.read_bytes()))
    assert "training.recipe" in said_["open_fields"]
    assert "training.seed" not in said_["open_fields"]


def test_the_open_fields_are_listed_to_people(tmp_path: Path, lora: Path) -> None:
    text = said("import", lora, "--base", BASE.id, "--output", tmp_path / "made")
    assert "1 x B @ A, stated by the file's alpha tensors" in text
    assert "72 of 84" in text
    assert "  conditioning.template\n" in text
    assert f"rename it to {CARD_NAME}" in text


def test_an_import_with_a_card_can_be_scanned_at_once(tmp_path: Path, lora: Path) -> None:
    own = tmp_path / "card.json"
    own.write_text(json.dumps(changed(card(BASE), "lora.alpha", 4.0)))
    registry("import", lora, "--base", BASE.id, "--output", tmp_path / "made", "--card", own)
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [CARD_NAME, WEIGHTS_NAME]
    assert registry("scan", tmp_path / "made")["verdict"] == "pass"


def test_a_card_of_another_adapter_is_refused(tmp_path: Path, lora: Path) -> None:
    (tmp_path / "card.json").write_text(json.dumps(card(BASE)))  # alpha 8
    command = [
        "import",
        lora,
        "--base",
        BASE.id,
        "--output",
        tmp_path / "made",
        "--card",
        tmp_path / "card.json",
    ]
    result = CliRunner().invoke(cli, [*map(str, command)])
    assert isinstance(result.exception, Explained)
    assert "lora.alpha is 8 in the card and 4 in the file" in result.exception.message
    assert not (tmp_path / "made").exists()


def test_pefts_configuration_is_read_beside_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(lora_file(spelled(VALUES, "PEFT")))
    (folder / "adapter_config.json").write_bytes(peft_config(RANK, 8.0))
    command = ("import", folder / "adapter_model.safetensors", "--base", BASE.id)
    said_ = registry(*command, "--output", tmp_path / "made")
    assert (said_["strength"]["scales"], said_["alpha"]) == ([2.0], 8.0)


def test_a_file_in_a_hubs_cache_is_a_link(tmp_path: Path, lora: Path) -> None:
    (tmp_path / "link.safetensors").symlink_to(lora)
    registry("import", tmp_path / "link.safetensors", "--base", BASE.id, "--output", tmp_path / "made")
    assert (tmp_path / "made" / WEIGHTS_NAME).read_bytes() == canonical()


@pytest.mark.parametrize("to", ["kohya", "comfyui", "peft", "diffsynth", "diffusers"])
def test_an_adapter_folder_there_and_back(tmp_path: Path, to: str) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name, data in clean_adapter(BASE).items():
        (folder / name).write_bytes(data)
    output = tmp_path / "converted/adapter_model.safetensors"
    said_ = registry("convert", folder, "--to", to, "--output", output)
    assert (said_["to"], said_["strength"]["exact"]) == (to, True)
    assert said_["digest"] == str(digest_bytes(output.read_bytes()))
    assert (output.parent / "adapter_config.json").exists() == (to == "peft")
    registry("convert", output, "--to", "diffusers", "--base", BASE.id, "--output", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == canonical()


def test_usage_is_explained(tmp_path: Path, lora: Path) -> None:
    out = tmp_path / "out"
    for command, explanation in (
        (
            ("import", lora, "--base", "nobody/nothing", "--output", out),
            "known bases: Qwen/Qwen-Image-Edit-2511",
        ),
        (("convert", lora, "--to", "comfyui", "--output", out), "--base"),
    ):
        result = CliRunner().invoke(cli, [*map(str, command)])
        assert isinstance(result.exception, Explained)
        assert result.exception.exit_code == 2
        assert explanation in str(result.exception)
    assert not out.exists()


def test_the_choices_of_the_command_are_the_dialects_that_are_written() -> None:
    from registry.commands.formats import convert
    from registry.dialects.grammar import WRITABLE

    option = next(parameter for parameter in convert.params if parameter.name == "to")
    assert set(option.type.choices) == set(WRITABLE)
