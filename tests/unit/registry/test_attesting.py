"""Statements that are signed one after the other: found again, and never so many that nobody could pull."""

from __future__ import annotations

from pathlib import Path

import pytest

from fakes.archives import site
from fakes.registries import NAME, PASSING, adapter_folder, copy_registry
from registry import intake, mirror
from registry.attesting import sign
from registry.client import Registry
from registry.errors import Conflict
from registry.formats import read_header
from registry.manifest import WEIGHTS_NAME
from registry.storage import shelf

RULE = "ADP-NUM-004"


@pytest.fixture
def registry(home: Path) -> Registry:
    return copy_registry(home)


def test_a_version_never_gets_more_statements_than_are_read(registry: Registry) -> None:
    manifest = registry.show(f"{NAME}:1").manifest
    there = shelf.read_statements(registry.store, manifest.digest)
    for number in range(shelf.MAX_STATEMENTS - len(there)):
        sign(registry, manifest, "evaluation", {"verdict": "pass", "number": number}, {})
    full = shelf.read_statements(registry.store, manifest.digest)
    assert len(full) == shelf.MAX_STATEMENTS
    with pytest.raises(Conflict, match="64 statements"):
        sign(registry, manifest, "evaluation", {"verdict": "pass", "number": -1}, full)
    again = sign(registry, manifest, "evaluation", {"verdict": "pass", "number": 0}, full)
    assert again.reused, "what is there already is found all the same"
    assert registry.load(f"{NAME}:1").reference == f"{NAME}:1"


def test_a_waived_version_is_carried_to_another_site(registry: Registry, home: Path, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "silenced", seed=4)
    weights = bytearray((folder / WEIGHTS_NAME).read_bytes())
    info = read_header(bytes(weights)).tensors["transformer.transformer_blocks.0.attn.to_q.lora_B.weight"]
    weights[info.start : info.end] = bytes(info.end - info.start)
    (folder / WEIGHTS_NAME).write_bytes(weights)
    reference = registry.push(folder, NAME, evaluation=PASSING, for_review=True).reference
    registry.waive(reference, RULE, by="Kim", reason="left out on purpose", days=30)
    registry.approve(reference, "a person", "looks right")
    elsewhere = site(tmp_path / "site", home)
    mirror.export(registry, tmp_path / "adapters.tar")
    taken = intake.take(elsewhere, tmp_path / "adapters.tar")
    assert (set(taken.references), taken.left_out) == ({f"{NAME}:1", reference}, ())
    assert elsewhere.load(reference).scan.verdict == "review"
