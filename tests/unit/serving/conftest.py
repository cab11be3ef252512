"""A base model of random weights, built once, and adapters of random weights for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fakes.adapters import TRAINED_KINDS
from registry.admission import Policy, VerifiedAdapter, admit_candidate
from registry.digest import digest_bytes
from registry.families import QWEN_IMAGE_EDIT, BaseFacts, base_spec
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

BASE = BaseModelRef(
    id="adapter-foundry/portraits-base", revision="test", family="qwen-image-edit", license="Apache-2.0"
)
TINY = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
ALL_TARGETS = TRAINED_KINDS

Make = Callable[..., VerifiedAdapter]


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in diffusers layout: two layers of width 32."""
    from trainer.portraits.base import build

    return build(tmp_path_factory.mktemp("base") / "tiny", seed=3, width=32, layers=2, head=16)


@pytest.fixture(scope="session")
def loaded_pipeline(tiny_base: Path) -> Any:
    """The loaded base, shared by all tests of the session."""
    import torch

    from serving.pipelines import load

    torch.set_num_threads(1)
    return load("qwen-image-edit", tiny_base)


@pytest.fixture
def pipeline(loaded_pipeline: Any) -> Iterator[Any]:
    """The loaded base; what a test attached is taken off again."""
    from serving.layers import unwrap

    yield loaded_pipeline
    unwrap(loaded_pipeline.transformer)


@pytest.fixture(scope="session")
def portrait() -> Image.Image:
    """A picture with some structure."""
    rows = np.linspace(0, 255, 64)[:, None, None]
    columns = np.linspace(255, 0, 64)[None, :, None]
    pixels = np.broadcast_to((rows + columns) / 2 * [1.0, 0.7, 0.4], (64, 64, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def card_for(
    *,
    rank: int = 4,
    targets: tuple[str, ...] = ALL_TARGETS,
    base: BaseModelRef = BASE,
    conditioning: dict[str, Any] | None = None,
    dtype: str = "F32",
) -> AdapterCard:
    """A card that the licence policy accepts."""
    digest = digest_bytes(b"something")
    spec = {"template": "show a {} expression", "expressions": ("happy", "sad", "surprised")}
    return AdapterCard(
        base=base,
        lora=LoraFacts(rank=rank, alpha=float(rank), targets=targets, dtype=dtype),
        conditioning=ConditioningSpec(**{**spec, **(conditioning or {})}),
        license="Apache-2.0",
        ingredients=(
            Ingredient(name=base.id, kind="base", license=base.license, source="test"),
            Ingredient(name="renders", kind="dataset", license="Apache-2.0", source="test", digest=digest),
        ),
        training=TrainingLineage(
            recipe=digest, dataset=digest, seed=0, steps=1, code_version="test", run_id=None
        ),
    )


def weights_for(
    card: AdapterCard, seed: int = 0, scale: float = 0.3, config: dict[str, int] = TINY
) -> dict[str, np.ndarray]:
    """Random A and B for every target of ``card``; B is zero where no gradient ever comes."""
    random = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    spec = base_spec("qwen-image-edit", config)
    silent = QWEN_IMAGE_EDIT.silent(spec)
    for module, (out, into) in spec.items():
        if QWEN_IMAGE_EDIT.block_of(module)[1] not in card.lora.targets:
            continue
        rank = card.lora.rank
        a = random.normal(size=(rank, into)) / np.sqrt(into)
        b = (
            np.zeros((out, rank))
            if module in silent
            else random.normal(size=(out, rank)) * scale / np.sqrt(rank)
        )
        tensors[f"transformer.{module}.lora_A.weight"] = a.astype(np.float32)
        tensors[f"transformer.{module}.lora_B.weight"] = b.astype(np.float32)
    return tensors


def files_of(card: AdapterCard, tensors: dict[str, np.ndarray]) -> dict[str, bytes]:
    """The adapter folder as bytes."""
    from safetensors.numpy import save

    return {WEIGHTS_NAME: save(tensors), CARD_NAME: card.canonical_bytes()}


def policy_for(config: dict[str, int] = TINY, base: BaseModelRef = BASE) -> Policy:
    """A policy that knows the test's base."""
    facts = BaseFacts(
        id=base.id, family=base.family, license=base.license, revision=base.revision, config=config
    )
    return Policy(bases={base.id: facts}, allow_review=True)


@pytest.fixture(scope="session")
def make_adapter() -> Make:
    """Makes candidates: ``make_adapter(seed, rank=…, targets=…, config=…)``; ``config`` is of the base."""

    def make(
        seed: int = 0,
        *,
        scale: float = 0.3,
        config: dict[str, int] = TINY,
        keep: Callable[[str], bool] = lambda key: True,
        dtype: str = "F32",
        **card: Any,
    ) -> VerifiedAdapter:
        made = card_for(dtype=dtype, **card)
        tensors = weights_for(made, seed, scale, config)
        kept = {key: tensor for key, tensor in tensors.items() if keep(key)}
        if dtype == "F16":
            kept = {key: tensor.astype(np.float16) for key, tensor in kept.items()}
        return admit_candidate(files_of(made, kept), policy_for(config, made.base))

    return make
