"""SD 3.5, SDXL and SD 1.5: an edit is diffusers' own, batches do not mix, gradients reach what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from registry.families import family as registry_family
from serving.errors import BaseNotFound
from serving.pipelines import load
from serving.pipelines.base import PromptEmbeds, pixels_of
from trainer.portraits.bases import build

FAMILIES = "sd15", "sdxl", "sd3"
PROMPTS = ["show a happy expression", "show a neutral expression"]
SQUARE, WIDE = (64, 64), (48, 80)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: build(family, folder / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def pipelines(bases: dict[str, Path]) -> dict[str, Any]:
    torch.set_num_threads(1)
    return {family: load(family, folder) for family, folder in bases.items()}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pipeline(family: str, pipelines: dict[str, Any]) -> Any:
    return pipelines[family]


def pictures(count: int) -> list[Image.Image]:
    """Soft gradients in random colours, larger than any size that is asked for."""
    source = np.random.default_rng(5)
    corners = source.integers(0, 256, (count, 3, 3, 3), dtype=np.uint8)
    return [Image.fromarray(row).resize((96, 96), Image.Resampling.BICUBIC) for row in corners]


def sample(pipeline: Any, count: int, size: tuple[int, int]) -> tuple[torch.Tensor, PromptEmbeds]:
    """Latents of pictures, and as many prompts."""
    with torch.no_grad():
        images = pictures(count)
        return pipeline.encode_images(images, size), pipeline.encode_prompts(
            images, (PROMPTS * count)[:count], size
        )


def published(family: str, base: Path) -> Any:
    """diffusers' image-to-image pipeline on the same base."""
    import diffusers

    names = {"sd15": "StableDiffusion", "sdxl": "StableDiffusionXL", "sd3": "StableDiffusion3"}
    extra = {"safety_checker": None} if family == "sd15" else {}
    kind = getattr(diffusers, names[family] + "Img2ImgPipeline")
    found = kind.from_pretrained(base, use_safetensors=True, **extra)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.mark.parametrize("size", [SQUARE, WIDE])
@pytest.mark.parametrize(("steps", "strength"), [(6, 0.6), (3, 1.0), (4, 0.1)])
def test_an_edit_is_that_of_diffusers(
    family: str, pipeline: Any, bases: dict[str, Path], size: tuple[int, int], steps: int, strength: float
) -> None:
    """The same prompts, source latents, noise, strength and steps, without guidance: the same pictures."""
    latents, prompts = sample(pipeline, 2, size)
    pipeline.strength = strength
    ours = pipeline.denoise(latents, prompts, seeds=[3, 4], steps=steps, size=size)
    with torch.no_grad():
        shown = (pipeline.decode(ours, size) / 2 + 0.5).clamp(0, 1)
    sides = {"height": size[0], "width": size[1]} if family == "sd3" else {}
    theirs = published(family, bases[family])(
        prompt=PROMPTS,
        image=pipeline.unpack(latents, size),
        strength=max(strength, 1.01 / steps),
        num_inference_steps=steps,
        guidance_scale=1.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        output_type="pt",
        **sides,
    ).images
    assert shown.shape == theirs.shape == (2, 3, *size)
    assert float(theirs.std()) > 0.01
    assert torch.allclose(shown, theirs, atol=2e-5)


@pytest.mark.parametrize("size", [SQUARE, WIDE])
def test_latents_are_the_vaes_mean_in_its_scale(pipeline: Any, size: tuple[int, int]) -> None:
    latents, _ = sample(pipeline, 2, size)
    vae = pipeline.pipe.vae
    with torch.no_grad():
        mean = vae.encode(pixels_of(pictures(2), size)).latent_dist.mean
        wanted = (mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
        assert torch.allclose(pipeline.unpack(latents, size), wanted, atol=1e-6)
        assert torch.allclose(pipeline.decode(latents, size), vae.decode(mean).sample, atol=1e-4)
    assert latents.shape == (2, size[0] * size[1] // 64, vae.config.latent_channels)
    assert torch.equal(pipeline.pack(pipeline.unpack(latents, size)), latents)


def test_a_vae_with_means_and_deviations_is_followed(family: str, bases: dict[str, Path]) -> None:
    """Fine-tuned bases of SDXL give them; latents then are normal by channel."""
    pipeline = load(family, bases[family])
    plain, _ = sample(pipeline, 1, SQUARE)
    channels = plain.shape[2]
    mean, std = torch.linspace(-1, 1, channels), torch.linspace(0.5, 2, channels)
    pipeline.pipe.vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    found, _ = sample(pipeline, 1, SQUARE)
    scale = pipeline.pipe.vae.config.scaling_factor
    assert torch.allclose(found, (plain - mean * scale) / std, atol=1e-5)
    with torch.no_grad():
        pipeline.pipe.vae.register_to_config(latents_mean=None, latents_std=None)
        wanted = pipeline.decode(plain)
        pipeline.pipe.vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
        assert torch.allclose(pipeline.decode(found), wanted, atol=1e-4)


@pytest.mark.parametrize("size", [SQUARE, WIDE])
def test_a_row_does_not_depend_on_its_batch(pipeline: Any, size: tuple[int, int]) -> None:
    latents, prompts = sample(pipeline, 3, size)
    level = torch.tensor([0.05, 0.5, 0.95])
    with torch.no_grad():
        together = pipeline.predict(latents, latents, prompts, level, size)
        alone = [
            pipeline.predict(latents[row], latents[row], prompts.rows(row), level[row], size)
            for row in (slice(0, 1), slice(1, 2), slice(2, 3))
        ]
    assert together.shape == latents.shape
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_the_source_is_not_looked_at(pipeline: Any) -> None:
    latents, prompts = sample(pipeline, 1, SQUARE)
    level = torch.tensor([0.5])
    with torch.no_grad():
        one, other = (pipeline.predict(latents, seen, prompts, level) for seen in (latents, -latents))
    assert torch.equal(one, other)
    assert pipeline.sees_image is False


def test_prompt_and_level_matter(pipeline: Any) -> None:
    latents, prompts = sample(pipeline, 2, SQUARE)
    latents = latents[:1].repeat(2, 1, 1)
    with torch.no_grad():
        found = pipeline.predict(latents, latents, prompts, torch.tensor([0.5, 0.5]))
        later = pipeline.predict(latents, latents, prompts, torch.tensor([0.9, 0.9]))
    assert not torch.allclose(found[0], found[1], atol=1e-5)
    assert not torch.allclose(found[0], later[0], atol=1e-5)
    assert bool(prompts.mask.all())


def test_an_edit_can_be_watched_and_stopped(pipeline: Any) -> None:
    latents, prompts = sample(pipeline, 1, SQUARE)
    pipeline.strength = 1.0
    seen: list[torch.Tensor] = []

    def watch(step: int, state: torch.Tensor) -> bool:
        assert step == len(seen)
        seen.append(state)
        return step < 1

    result = pipeline.denoise(latents, prompts, seeds=[1], steps=5, on_step=watch)
    assert len(seen) == 2
    assert torch.equal(result, seen[-1])
    assert result.shape == latents.shape


def test_a_seed_alone_decides_the_noise_of_its_row(pipeline: Any) -> None:
    latents, prompts = sample(pipeline, 2, SQUARE)
    both = pipeline.denoise(latents, prompts, seeds=[7, 8], steps=4)
    second = pipeline.denoise(latents[1:], prompts.rows(slice(1, 2)), seeds=[8], steps=4)
    other = pipeline.denoise(latents[1:], prompts.rows(slice(1, 2)), seeds=[9], steps=4)
    assert torch.allclose(both[1:], second, atol=1e-5)
    assert not torch.allclose(second, other, atol=1e-2)


def test_every_module_that_may_be_trained_gets_a_gradient(family: str, bases: dict[str, Path]) -> None:
    """Through the prediction and through decoded pixels; the silent ones and frozen weights get none."""
    from peft import LoraConfig

    pipeline, facts = load(family, bases[family]), registry_family(family)
    latents, prompts = sample(pipeline, 1, SQUARE)
    modules = [name for name, _ in pipeline.transformer.named_modules() if facts.is_target(name)]
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=modules, init_lora_weights=False))
    level = torch.tensor([0.4])
    noisy = pipeline.process.noisy(latents, torch.randn_like(latents), level)
    predicted = pipeline.predict(noisy, latents, prompts, level)
    clean = pipeline.process.clean(noisy, predicted, level)
    pipeline.decode(clean).square().mean().backward()
    named = dict(pipeline.transformer.named_parameters())
    moved = {
        name.partition(".lora_")[0]
        for name, value in named.items()
        if "lora_" in name and value.grad is not None and float(value.grad.abs().max()) > 0
    }
    assert moved == set(modules) - facts.silent(modules)
    assert {facts.block_of(name)[1] for name in modules} >= set(facts.presets["attention"])
    frozen = [value for name, value in named.items() if "lora_" not in name]
    assert all(value.grad is None and not value.requires_grad for value in frozen)
    assert all(value.grad is None for value in pipeline.pipe.vae.parameters())


def test_frozen_text_encoders_keep_nothing_and_trained_ones_get_gradients(
    family: str, bases: dict[str, Path]
) -> None:
    from peft import LoraConfig

    pipeline = load(family, bases[family])
    assert pipeline.encode_prompts(pictures(1), PROMPTS[:1]).embeds.requires_grad is False
    pipeline.pipe.text_encoder.add_adapter(
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    latents, _ = sample(pipeline, 1, SQUARE)
    prompts = pipeline.encode_prompts(pictures(1), PROMPTS[:1])
    pipeline.predict(latents, latents, prompts, torch.tensor([0.5])).square().mean().backward()
    grads = [value.grad for name, value in pipeline.pipe.text_encoder.named_parameters() if "lora_" in name]
    assert len(grads) == 8
    # SDXL reads the layer before the last of this encoder, and no pooled vector of it.
    assert [grad is not None for grad in grads] == [True] * 4 + [family != "sdxl"] * 4


def test_half_precision_keeps_the_vae_where_it_does_not_overflow(family: str, bases: dict[str, Path]) -> None:
    pipeline = load(family, bases[family], dtype=torch.float16)
    assert pipeline.transformer.dtype == torch.float16
    assert pipeline.pipe.vae.dtype == torch.float32
    latents, prompts = sample(pipeline, 1, SQUARE)
    assert latents.dtype == prompts.embeds.dtype == torch.float16
    result = pipeline.denoise(latents, prompts, seeds=[1], steps=2)
    assert bool(torch.isfinite(pipeline.decode(result)).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_that_is_no_base_says_what_to_do(family: str, tmp_path: Path) -> None:
    with pytest.raises(BaseNotFound, match="register"):
        load(family, tmp_path)


def test_sizes_are_multiples_that_the_denoiser_can_halve(pipelines: dict[str, Any]) -> None:
    assert {name: (found.size, found.multiple) for name, found in pipelines.items()} == {
        "sd15": ((64, 64), 16),
        "sdxl": ((64, 64), 16),
        "sd3": ((64, 64), 16),
    }
