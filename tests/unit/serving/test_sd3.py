"""What is particular to Stable Diffusion 3.5: a missing T5, shifted schedules, positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from serving.pipelines import load
from trainer.portraits.bases import sd3

PROMPTS = ["show a happy expression", "show a neutral expression"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd3.build(tmp_path_factory.mktemp("sd3") / "base")


def edited(pipeline: Any, latents: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    prompts = pipeline.encode_prompts([], PROMPTS)
    found: torch.Tensor = pipeline.denoise(latents, prompts, seeds=[3, 4], steps=5, size=size)
    return found


def published(base: Path, latents: torch.Tensor, size: tuple[int, int], strength: float, **how: Any) -> Any:
    from diffusers import StableDiffusion3Img2ImgPipeline

    absent = {} if (base / "text_encoder_3").is_dir() else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Img2ImgPipeline.from_pretrained(base, **absent)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler.register_to_config(**how)
    return pipe(
        prompt=PROMPTS, image=latents, height=size[0], width=size[1], strength=strength,
        num_inference_steps=5, guidance_scale=1.0, output_type="latent",
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
    ).images  # fmt: skip


def test_a_missing_t5_works_as_in_diffusers(tmp_path: Path) -> None:
    folder = sd3.build(tmp_path / "base", with_t5=False)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]
    pipeline = load("sd3", folder)
    prompts = pipeline.encode_prompts([], PROMPTS)
    assert prompts.embeds.shape == (2, 77 + 256, 48)
    assert not bool(prompts.embeds[:, 77:].any())
    assert bool(prompts.mask.all())
    latents = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(1))
    found = edited(pipeline, latents, (64, 64))
    wanted = published(folder, pipeline.unpack(latents), (64, 64), pipeline.strength)
    assert torch.allclose(found, pipeline.pack(wanted), atol=1e-5)


def test_both_clips_and_t5_are_read(base: Path) -> None:
    prompts = load("sd3", base).encode_prompts([], PROMPTS)
    assert prompts.embeds.shape == (2, 77 + 256, 48)
    assert prompts.pooled is not None
    assert prompts.pooled.shape == (2, 48)
    assert bool(prompts.embeds[:, 77:].any())
    assert not bool(prompts.embeds[:, :77, 48:].any())
    assert not torch.equal(prompts.pooled[0], prompts.pooled[1])


@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
def test_a_schedule_that_shifts_with_the_size_is_followed(base: Path, size: tuple[int, int]) -> None:
    how = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
    pipeline = load("sd3", base)
    count = size[0] * size[1] // 64
    latents = torch.randn(2, count, 16, generator=torch.Generator().manual_seed(1))
    plain = edited(pipeline, latents, size)
    pipeline.pipe.scheduler.register_to_config(**how)
    found = edited(pipeline, latents, size)
    wanted = published(base, pipeline.unpack(latents, size), size, pipeline.strength, **how)
    assert torch.allclose(found, pipeline.pack(wanted), atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-3)


def test_a_level_is_the_schedulers_sigma(base: Path) -> None:
    """The model is asked at a thousand times the level that training noised with."""
    pipeline = load("sd3", base)
    scheduler = pipeline.pipe.scheduler
    scheduler.set_timesteps(7)
    assert torch.allclose(pipeline.timestep(scheduler.sigmas[:-1]), scheduler.timesteps)
    clean, noise = torch.ones(1, 64, 16), -torch.ones(1, 64, 16)
    level = scheduler.sigmas[2:3]
    wanted = scheduler.scale_noise(clean, scheduler.timesteps[2:3], noise)
    assert torch.allclose(pipeline.process.noisy(clean, noise, level), wanted)
