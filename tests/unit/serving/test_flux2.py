"""FLUX.2 klein: its edit, its text conditioning and its latents are those of diffusers' own pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from serving import pipelines
from serving.pipelines.base import pixels_of
from trainer.portraits.bases import build

TOKENS = 32
PROMPT = "show a happy expression"
SIZES = ((64, 64), (96, 64))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.set_num_threads(1)
    return pipelines.load("flux2-klein", build("flux2-klein", tmp_path_factory.mktemp("base") / "klein"))


def picture(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("steps", [1, 4])
def test_an_edit_is_that_of_the_pipeline(pipeline: Any, size: tuple[int, int], steps: int) -> None:
    image = picture(size)
    latents = pipeline.denoise(
        pipeline.encode_images([image], size),
        pipeline.encode_prompts([image], [PROMPT], size),
        seeds=[11],
        steps=steps,
        size=size,
    )
    ours = (pipeline.decode(latents, size) / 2 + 0.5).clamp(0, 1)
    theirs = pipeline.pipe(
        image=[image],
        prompt=PROMPT,
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(11),
        max_sequence_length=TOKENS,
        output_type="pt",
    ).images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_prompts_are_encoded_as_the_pipeline_encodes_them(pipeline: Any) -> None:
    prompts = [PROMPT, "make the hair red"]
    theirs, _ = pipeline.pipe.encode_prompt(prompts, max_sequence_length=TOKENS)
    ours = pipeline.encode_prompts([picture((64, 64))] * 2, prompts)
    torch.testing.assert_close(ours.embeds, theirs, rtol=0, atol=1e-5)
    assert ours.pooled is None


def test_the_logits_of_the_text_encoder_are_never_computed(pipeline: Any) -> None:
    ran = []
    hook = pipeline.pipe.text_encoder.lm_head.register_forward_hook(lambda *_: ran.append(True))
    try:
        pipeline.encode_prompts([picture((64, 64))], [PROMPT])
    finally:
        hook.remove()
    assert ran == []


@pytest.mark.parametrize("size", SIZES)
def test_latents_are_normalised_by_the_statistics_of_the_vae(pipeline: Any, size: tuple[int, int]) -> None:
    pixels = pixels_of([picture(size)], size)
    with torch.no_grad():
        theirs = pipeline.pipe._encode_vae_image(pixels, generator=None)
    ours = pipeline.encode_images([picture(size)], size)
    torch.testing.assert_close(ours, theirs.flatten(2).transpose(1, 2), rtol=0, atol=1e-5)
    assert float(pipeline.pipe.vae.bn.running_mean.abs().max()) > 0.1  # not the statistics of an identity


def test_positions_are_those_of_the_pipeline(pipeline: Any) -> None:
    pipe, latents = pipeline.pipe, torch.zeros(1, 32, 6, 4)
    text, pictures = pipeline.positions((96, 64), TOKENS, torch.device("cpu"))
    assert torch.equal(text, pipe._prepare_text_ids(torch.zeros(1, TOKENS, 8))[0])
    both = torch.cat([pipe._prepare_latent_ids(latents)[0], pipe._prepare_image_ids([latents])[0]])
    assert torch.equal(pictures, both)
