"""The tiny bases: small, the same bytes every time, loaded by the real code, and they tell words apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from registry.families import FAMILIES
from serving import pipelines
from trainer.portraits.bases import BUILDERS, build
from trainer.portraits.prompts import base_prompts, expression_prompts

TINY = sorted(set(BUILDERS) - {"qwen-image-edit"})  # that one has tests of its own


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: build(name, root / name) for name in TINY}


@pytest.fixture(params=TINY)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def test_every_family_has_a_tiny_base() -> None:
    assert set(BUILDERS) == set(FAMILIES)


def test_it_is_small_and_always_the_same(folders: Mapping[str, Path], name: str, tmp_path: Path) -> None:
    again = contents(build(name, tmp_path / "again"))
    assert again == contents(folders[name])
    assert sum((folders[name] / file).stat().st_size for file in again) < 1_300_000
    assert "resolution.json" in again
    assert not any(file.endswith((".bin", ".pt", ".ckpt")) for file in again)


def test_it_is_what_its_family_says(folders: Mapping[str, Path], name: str) -> None:
    pipeline: Any = pipelines.load(name, folders[name])
    facts = FAMILIES[name]
    assert pipeline.family == name
    assert pipeline.process.prediction == facts.prediction
    assert pipeline.transformer is getattr(pipeline.pipe, facts.prefix)
    assert set(getattr(pipeline, "text_encoders", {})) == set(facts.text_encoders)
    assert all(side % pipeline.multiple == 0 for side in pipeline.size)
    before = [parameter.requires_grad for parameter in pipeline.transformer.parameters()]
    assert not any(before)


def test_every_prompt_has_as_many_tokens_and_says_something_else(
    folders: Mapping[str, Path], name: str
) -> None:
    pipeline: Any = pipelines.load(name, folders[name])
    prompts = base_prompts() + expression_prompts()[1:]
    for part, component in pipeline.pipe.components.items():
        if part.startswith("tokenizer") and component is not None:
            lengths = {len(component(prompt)["input_ids"]) for prompt in prompts}
            assert len(lengths) == 1, part
    picture = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
    with torch.no_grad():
        found = pipeline.encode_prompts([picture] * len(prompts), prompts)
    for rows in (found.embeds.flatten(1), found.pooled):
        if rows is not None:
            distances = torch.cdist(rows, rows) + 1e9 * torch.eye(len(rows))
            assert float(distances.min()) > 0.05
