"""The shipped base: the real classes, the pipeline's own conventions, and what it was taught."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from serving.pipelines.base import pixels_of
from serving.pipelines.qwen_image_edit import QwenImageEdit, single_frame
from trainer.portraits import base_path
from trainer.portraits.autoencoder import pictures, psnr, reconstruction
from trainer.portraits.base import build_vae
from trainer.portraits.editor import draw_crowd, held_out, prompt_bank
from trainer.portraits.prompts import KEEP, TEMPLATE, base_prompts, expression_prompts
from trainer.portraits.renderer import EXPRESSIONS, identity, render


@pytest.fixture(scope="module")
def base() -> QwenImageEdit:
    return QwenImageEdit.load(base_path())


def portraits(count: int) -> list[Image.Image]:
    return [Image.fromarray(render(identity(90_000 + i, "human"), np.zeros(12))) for i in range(count)]


def test_the_template_prefix_is_what_the_pipeline_drops(base: QwenImageEdit) -> None:
    prefix = base.pipe.prompt_template_encode.split("{}")[0]
    assert len(base.pipe.tokenizer(prefix)["input_ids"]) == base.pipe.prompt_template_encode_start_idx == 64


def test_all_prompts_have_one_length(base: QwenImageEdit) -> None:
    prompts = base_prompts() + expression_prompts()
    assert {len(base.pipe.tokenizer(prompt)["input_ids"]) for prompt in prompts} == {4}


def test_the_expression_words_are_new_to_the_base() -> None:
    taught = {word for prompt in base_prompts() for word in prompt.split()}
    assert not taught & set(EXPRESSIONS)


def test_a_prompt_is_encoded_as_the_pipeline_encodes_it(base: QwenImageEdit) -> None:
    picture = portraits(1)[0]
    prompt = TEMPLATE.format("happy")
    small = picture.resize((28, 28), Image.Resampling.LANCZOS)
    theirs, mask = base.pipe.encode_prompt(prompt, image=[small])
    ours = base.encode_prompts([picture], [prompt])
    assert mask is None
    assert bool(ours.mask.all())
    assert torch.allclose(ours.embeds, theirs, atol=1e-5)


def test_prompts_of_unequal_length_are_padded_and_masked(base: QwenImageEdit) -> None:
    ours = base.encode_prompts(portraits(2), ["show a happy expression", "show a very happy expression now"])
    assert ours.mask.sum(1).tolist() == [17, ours.embeds.shape[1]]
    assert float(ours.embeds[0, 17:].abs().max()) == 0
    alone = base.encode_prompts(portraits(1), ["show a happy expression"])
    assert torch.allclose(ours.embeds[:1, :17], alone.embeds, atol=1e-4)


def test_one_edit_equals_the_pipelines_own_call(base: QwenImageEdit) -> None:
    """Our batched parts and diffusers' __call__ differ in nothing but the fixed megapixel."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

    picture = portraits(1)[0]
    latents, prompts = base.encode_images([picture]), base.encode_prompts([picture], [KEEP])
    ours = base.decode(base.denoise(latents, prompts, seeds=[5], steps=3))[0]
    before = module.VAE_IMAGE_SIZE
    module.VAE_IMAGE_SIZE = 64 * 64
    try:
        theirs = base.pipe(
            image=[picture],
            prompt_embeds=prompts.embeds,
            prompt_embeds_mask=prompts.mask,
            latents=base.noise([5], latents, base.size),
            height=64,
            width=64,
            num_inference_steps=3,
            true_cfg_scale=1.0,
            output_type="pt",
        ).images[0]
    finally:
        module.VAE_IMAGE_SIZE = before
    assert torch.allclose((ours + 1) / 2, theirs, atol=2e-3)


def test_the_flat_vae_gives_the_same_numbers() -> None:
    torch.manual_seed(0)
    vae = build_vae().eval()
    x = torch.randn(1, 3, 1, 64, 64)
    with torch.no_grad():
        video = vae.decode(vae.encode(x).latent_dist.mode()).sample
        single_frame(vae)
        flat = vae.decode(vae.encode(x).latent_dist.mode()).sample
    assert torch.allclose(video, flat, atol=1e-5)


def test_the_noise_of_a_row_depends_on_its_seed_alone(base: QwenImageEdit) -> None:
    like = torch.zeros(3, 64, 64)
    assert torch.equal(base.noise([1, 2, 3], like, base.size)[1], base.noise([2], like[:1], base.size)[0])


def test_the_vae_reconstructs_unseen_people(base: QwenImageEdit) -> None:
    assert reconstruction(base.pipe.vae, pictures(48, 777)) >= 30


def test_the_base_keeps_and_edits_unseen_people(base: QwenImageEdit) -> None:
    crowd, bank = draw_crowd(base, 48, 4242), prompt_bank(base, 1)
    quality = held_out(base, crowd, bank)
    assert quality["keep_psnr"] >= 27
    lazy = psnr(base.decode(crowd.latents[:48, 0].float()), base.decode(crowd.latents[:48, 1].float()))
    assert quality["moves_psnr"] >= lazy + 2


def test_keeping_a_portrait_returns_its_pixels(base: QwenImageEdit) -> None:
    people = portraits(8)
    kept = base.decode(
        base.denoise(
            base.encode_images(people), base.encode_prompts(people, [KEEP] * 8), seeds=range(8), steps=4
        )
    )
    assert psnr(kept, pixels_of(people, base.size)) >= 27


def test_the_weights_stay_small() -> None:
    folder = Path(base_path()).parent
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 40_000_000


def test_the_folder_loads_with_diffusers_names() -> None:
    index = json.loads((base_path() / "model_index.json").read_text())
    assert index["_class_name"] == "QwenImageEditPlusPipeline"
    assert index["processor"] == ["transformers", "Qwen2VLProcessor"]


def test_a_rebuild_goes_on_from_the_weights_that_are_there(tmp_path: Path) -> None:
    from trainer.portraits.rebuild import _open

    first = _open(tmp_path / "base", "cpu").transformer.state_dict()
    first = {name: value.clone() for name, value in first.items()}
    second = _open(tmp_path / "base", "cpu").transformer.state_dict()
    gates = second["transformer_blocks.0.img_mod.1.bias"].view(6, -1)
    assert torch.allclose(gates[2], torch.tensor(0.3), atol=1e-3)
    assert all(torch.allclose(first[name], second[name], atol=1e-3) for name in first)
