"""Every family through the engine: verified adapters on the tiny bases, with and without pooled vectors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save

from registry.admission import Policy, VerifiedAdapter, admit_candidate
from registry.digest import digest_bytes
from registry.families import BaseFacts, base_spec, family
from registry.manifest import (
    CARD_NAME,
    WEIGHTS_NAME,
    AdapterCard,
    BaseModelRef,
    ConditioningSpec,
    Ingredient,
    LoraFacts,
    TrainingLineage,
)
from serving import pipelines
from serving.engine import EditEngine
from serving.pipelines.base import PromptEmbeds
from trainer.portraits.bases import BUILDERS, build

FAMILIES = tuple(name for name in BUILDERS if name != "qwen-image-edit")  # that has tests of its own
POOLED = {"flux", "flux-kontext", "sd3", "sdxl"}
RANK = 2


class Watched:
    """A pipeline that notes what it was asked; every call still does its work."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self.asked: list[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def encode_prompts(self, images: Any, prompts: Any, size: Any = None) -> Any:
        assert len(images) == len(prompts)
        self.asked.append(list(prompts))
        return self._pipeline.encode_prompts(images, prompts, size)

    def begin(self, image_latents: torch.Tensor, prompts: Any, **options: Any) -> Any:
        self.prompts = prompts
        self.run = self._pipeline.begin(image_latents, prompts, **options)
        return self.run

    @property
    def latents(self) -> torch.Tensor:
        """Of the run that began last."""
        return self.run.latents


def adapter_for(name: str, folder: Path) -> VerifiedAdapter:
    """Random A and B for the attention of a tiny base."""
    facts = family(name)
    config = json.loads((folder / facts.prefix / "config.json").read_text())
    kinds = facts.presets["attention"]
    spec = base_spec(name, config)
    silent, random = facts.silent(spec), np.random.default_rng(0)
    tensors = {}
    for module, (out, into) in spec.items():
        if facts.block_of(module)[1] in kinds and module not in silent:
            tensors[f"{facts.prefix}.{module}.lora_A.weight"] = random.normal(size=(RANK, into)) / np.sqrt(
                into
            )
            tensors[f"{facts.prefix}.{module}.lora_B.weight"] = random.normal(size=(out, RANK)) * 0.3
    digest = digest_bytes(b"something")
    base = BaseModelRef(id=f"test/{name}", revision="1", family=name, license="Apache-2.0")
    card = AdapterCard(
        base=base,
        lora=LoraFacts(rank=RANK, alpha=float(RANK), targets=tuple(sorted(kinds)), dtype="F32"),
        conditioning=ConditioningSpec(template="show a {} expression", expressions=("happy", "sad")),
        license="Apache-2.0",
        ingredients=(
            Ingredient(name=base.id, kind="base", license=base.license, source="test"),
            Ingredient(name="renders", kind="dataset", license="Apache-2.0", source="test", digest=digest),
        ),
        training=TrainingLineage(
            recipe=digest, dataset=digest, seed=0, steps=1, code_version="test", run_id=None
        ),
    )
    known = BaseFacts(id=base.id, family=name, license=base.license, revision="1", config=config)
    files = {
        WEIGHTS_NAME: save({key: value.astype(np.float32) for key, value in tensors.items()}),
        CARD_NAME: card.canonical_bytes(),
    }
    return admit_candidate(files, Policy(bases={base.id: known}, allow_review=True))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Watched, VerifiedAdapter]]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("bases")
    return {
        name: (Watched(pipelines.load(name, build(name, root / name))), adapter_for(name, root / name))
        for name in FAMILIES
    }


@pytest.fixture(params=FAMILIES)
def served(
    request: pytest.FixtureRequest, loaded: Mapping[str, tuple[Watched, VerifiedAdapter]]
) -> Iterator[tuple[Watched, VerifiedAdapter, EditEngine]]:
    """A base with its adapter and an engine, which leaves the base as it was."""
    pipeline, adapter = loaded[request.param]
    engine = EditEngine(pipeline, base=adapter.card.base, allow_candidates=True)
    yield pipeline, adapter, engine
    engine.detach()


def test_a_sweep_interpolates_tokens_and_pooled_vector_alike(
    served: tuple[Watched, VerifiedAdapter, EditEngine], portrait: Image.Image
) -> None:
    pipeline, adapter, engine = served
    pipeline.asked.clear()
    rows = [{}, {"happy": 1.0}, {"happy": 0.5, "sad": 0.25}]
    results = engine.sweep(portrait, adapter, rows, seed=5, steps=2)
    asked = [f"show a {word} expression" for word in ("neutral", "happy", "sad")]
    assert pipeline.asked == [[prompt] for prompt in asked]  # each alone: its company must not matter
    assert len(results) == 3
    assert bool(torch.isfinite(pipeline.latents).all())
    encoded = PromptEmbeds.join([pipeline.encode_prompts([portrait], [prompt]) for prompt in asked])
    assert (encoded.pooled is not None) == (pipeline.family in POOLED)
    for ours, plain in (
        (pipeline.prompts.embeds, encoded.embeds),
        (pipeline.prompts.pooled, encoded.pooled),
    ):
        if plain is None:
            assert ours is None
            continue
        assert torch.equal(ours[0], plain[0])
        assert torch.equal(ours[1], plain[1])
        mixed = 0.25 * plain[0] + 0.5 * plain[1] + 0.25 * plain[2]
        torch.testing.assert_close(ours[2], mixed, rtol=0, atol=1e-5)


def test_rows_equal_single_edits_and_detaching_gives_the_base_back(
    served: tuple[Watched, VerifiedAdapter, EditEngine], portrait: Image.Image
) -> None:
    pipeline, adapter, engine = served
    rows = [{"happy": 1.0}, {"sad": 0.5}]
    engine.sweep(portrait, adapter, rows, strength=0.0, seed=1, steps=2)
    plain = pipeline.latents
    engine.sweep(portrait, adapter, rows, seed=1, steps=2)
    together = pipeline.latents
    engine.sweep(portrait, adapter, rows[1:], seed=1, steps=2)
    torch.testing.assert_close(pipeline.latents[0], together[1], rtol=0, atol=1e-4)
    assert float((together - plain).abs().max()) > 1e-3
    mixed, source = pipeline.prompts, pipeline.encode_images([portrait])
    engine.detach()
    bare = pipeline.denoise(source, mixed, seeds=[1], steps=2)
    torch.testing.assert_close(bare[0], plain[1], rtol=0, atol=1e-4)
