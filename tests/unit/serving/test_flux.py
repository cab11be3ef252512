"""The FLUX families: edits equal those of diffusers' own pipelines, batches their rows; LoRA in and out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from serving import pipelines
from serving.errors import BaseNotFound
from serving.pipelines.base import PromptEmbeds
from trainer.portraits.bases import build

FAMILIES = ("flux", "flux-kontext", "flux2-klein")
TOKENS = 32
PROMPTS = ["show a happy expression", "show a sad expression"]
SIZES = ((64, 64), (64, 96))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {family: build(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def loaded(folders: Mapping[str, Path]) -> Mapping[str, Any]:
    torch.set_num_threads(1)
    return {family: pipelines.load(family, folder) for family, folder in folders.items()}


@pytest.fixture(params=FAMILIES)
def pipeline(request: pytest.FixtureRequest, loaded: Mapping[str, Any]) -> Any:
    return loaded[request.param]


def pictures(size: tuple[int, int] = (64, 64)) -> list[Image.Image]:
    random = np.random.default_rng(7)
    return [Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)) for _ in PROMPTS]


def unit(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels / 2 + 0.5).clamp(0, 1)


def edited(pipeline: Any, size: tuple[int, int], seeds: list[int], steps: int) -> torch.Tensor:
    images = pictures(size)
    latents = pipeline.denoise(
        pipeline.encode_images(images, size),
        pipeline.encode_prompts(images, PROMPTS, size),
        seeds=seeds,
        steps=steps,
        size=size,
    )
    return pipeline.decode(latents, size)


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("strength", "steps"), [(0.6, 5), (1.0, 3), (0.25, 4)])
def test_an_edit_with_flux_is_that_of_the_image_to_image_pipeline(
    loaded: Mapping[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
    strength: float,
    steps: int,
) -> None:
    from diffusers import FluxImg2ImgPipeline

    pipeline = loaded["flux"]
    monkeypatch.setattr(pipeline, "strength", strength)
    theirs = FluxImg2ImgPipeline(**pipeline.pipe.components)(
        prompt=PROMPTS,
        # As latents: from pixels the pipeline would draw a sample of the VAE's distribution.
        image=pipeline.pipe._unpack_latents(pipeline.encode_images(pictures(size), size), *size, 8),
        height=size[0],
        width=size[1],
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=3.5,
        generator=generators([3, 4]),
        max_sequence_length=TOKENS,
        output_type="pt",
    ).images
    torch.testing.assert_close(unit(edited(pipeline, size, [3, 4], steps)), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_an_edit_with_kontext_is_that_of_its_pipeline(
    loaded: Mapping[str, Any], size: tuple[int, int]
) -> None:
    pipeline = loaded["flux-kontext"]
    theirs = pipeline.pipe(
        prompt=PROMPTS,
        image=pictures(size),
        height=size[0],
        width=size[1],
        max_area=size[0] * size[1],
        num_inference_steps=3,
        guidance_scale=2.5,
        generator=generators([3, 4]),
        max_sequence_length=TOKENS,
        output_type="pt",
        _auto_resize=False,
    ).images
    torch.testing.assert_close(unit(edited(pipeline, size, [3, 4], 3)), theirs, rtol=0, atol=1e-5)


def test_flux_is_told_one_guidance_in_training_and_another_at_inference(loaded: Mapping[str, Any]) -> None:
    pipeline = loaded["flux"]
    assert (pipeline.training_guidance, pipeline.guidance) == (1.0, 3.5)
    assert loaded["flux-kontext"].guidance == 2.5
    inputs = given(pipeline)
    seen = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["guidance"].tolist()), with_kwargs=True
    )
    try:
        pipeline.predict(*inputs)
        pipeline.denoise(inputs[1], inputs[2], seeds=[0, 1], steps=1)
    finally:
        hook.remove()
    assert seen == [[1.0, 1.0], [3.5, 3.5]]


def test_an_edit_of_little_strength_takes_one_step(
    loaded: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = loaded["flux"]
    monkeypatch.setattr(pipeline, "strength", 0.01)
    steps = []
    _, latents, prompts, _ = given(pipeline)
    pipeline.denoise(
        latents, prompts, seeds=[0, 1], steps=4, on_step=lambda step, latents: steps.append(step) or True
    )
    assert steps == [0]


def given(
    pipeline: Any, size: tuple[int, int] = (64, 64)
) -> tuple[torch.Tensor, torch.Tensor, PromptEmbeds, torch.Tensor]:
    """Noisy latents, source latents, prompts and levels of two rows."""
    images = pictures(size)
    latents = pipeline.encode_images(images, size)
    level = torch.tensor([0.3, 0.8])
    noisy = pipeline.process.noisy(latents, pipeline.noise([1, 2], latents, size), level)
    return noisy, latents, pipeline.encode_prompts(images, PROMPTS, size), level


@pytest.mark.parametrize("size", SIZES)
def test_a_batch_is_its_rows(pipeline: Any, size: tuple[int, int]) -> None:
    noisy, latents, prompts, level = given(pipeline, size)
    together = pipeline.predict(noisy, latents, prompts, level, size)
    assert together.shape == noisy.shape
    for row in range(2):
        part = slice(row, row + 1)
        alone = pipeline.predict(noisy[part], latents[part], prompts.rows(part), level[part], size)
        torch.testing.assert_close(together[part], alone, rtol=0, atol=1e-5)
        encoded = pipeline.encode_prompts(pictures(size)[part], PROMPTS[part], size)
        torch.testing.assert_close(encoded.embeds, prompts.embeds[part], rtol=0, atol=1e-4)
        again = pipeline.encode_images(pictures(size)[part], size)
        torch.testing.assert_close(again, latents[part], rtol=0, atol=1e-5)


class Waiting(TorchDispatchMode):
    """Notes operations that make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(
            word in str(function) for word in ("_local_scalar_dense", "nonzero", "masked_select", "equal")
        ):
            self.waits.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_prediction_never_waits_for_the_device(pipeline: Any) -> None:
    inputs = given(pipeline)
    with Waiting() as watched:
        pipeline.predict(*inputs)
    assert watched.waits == []
    with Waiting() as watched:
        assert bool(inputs[3].sum() > 0)
    assert watched.waits == ["aten._local_scalar_dense.default"]


@pytest.mark.parametrize("size", SIZES)
def test_shapes_follow_the_size(pipeline: Any, size: tuple[int, int]) -> None:
    assert (pipeline.size, pipeline.multiple) == ((64, 64), 16)
    latents = pipeline.encode_images(pictures(size), size)
    assert latents.shape[:2] == (2, size[0] * size[1] // 256)
    assert pipeline.decode(latents, size).shape == (2, 3, *size)
    prompts = pipeline.encode_prompts(pictures(size), PROMPTS, size)
    assert prompts.embeds.shape[:2] == prompts.mask.shape == (2, TOKENS)
    assert bool(prompts.mask.all())
    assert (prompts.pooled is None) == (pipeline.family == "flux2-klein")


@pytest.mark.parametrize("size", SIZES)
def test_decoding_undoes_what_encoding_did_to_the_vaes_latents(pipeline: Any, size: tuple[int, int]) -> None:
    """Normalisation and packing cancel out: what is left is the VAE's own round trip."""
    from serving.pipelines.base import pixels_of

    vae, pixels = pipeline.pipe.vae, pixels_of(pictures(size), size)
    with torch.no_grad():
        plain = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        ours = pipeline.decode(pipeline.encode_images(pictures(size), size), size)
    torch.testing.assert_close(ours, plain, rtol=0, atol=5e-5)


def test_noise_belongs_to_the_seed(pipeline: Any) -> None:
    like = pipeline.encode_images(pictures())
    noise = pipeline.noise([5, 6], like, (64, 64))
    assert torch.equal(noise[1:], pipeline.noise([6], like[:1], (64, 64)))
    assert not torch.equal(noise[0], noise[1])
    whole = edited(pipeline, (64, 64), [5, 6], 2)
    assert torch.equal(whole, edited(pipeline, (64, 64), [5, 6], 2))


def test_the_base_is_frozen_and_decoding_is_differentiable(pipeline: Any) -> None:
    assert not any(parameter.requires_grad for parameter in pipeline.transformer.parameters())
    latents = pipeline.encode_images(pictures()).requires_grad_()
    pipeline.decode(latents).square().mean().backward()
    assert float(latents.grad.abs().max()) > 0


@pytest.mark.parametrize("family", ["flux", "flux-kontext"])
def test_only_an_editing_family_looks_at_the_source(loaded: Mapping[str, Any], family: str) -> None:
    pipeline = loaded[family]
    noisy, latents, prompts, level = given(pipeline)
    same = torch.equal(
        pipeline.predict(noisy, latents, prompts, level), pipeline.predict(noisy, -latents, prompts, level)
    )
    assert same == (family == "flux")


@pytest.mark.parametrize("family", ["flux", "flux-kontext"])
def test_a_lora_in_the_text_encoder_gets_gradients(folders: Mapping[str, Path], family: str) -> None:
    from peft import LoraConfig

    pipeline = pipelines.load(family, folders[family])
    assert not pipeline.encode_prompts([], PROMPTS).pooled.requires_grad
    text = pipeline.text_encoders["text_encoder"]
    text.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    noisy, latents, _, level = given(pipeline)
    prompts = pipeline.encode_prompts([], PROMPTS)
    assert not prompts.embeds.requires_grad  # T5 stays frozen
    pipeline.predict(noisy, latents, prompts, level).square().mean().backward()
    trained = [weight for weight in text.parameters() if weight.requires_grad]
    assert len(trained) == 8
    assert all(float(weight.grad.abs().max()) > 0 for weight in trained)


def blocks_of(transformer: torch.nn.Module) -> list[str]:
    return [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and "transformer_blocks." in name
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_learns_and_its_file_gives_the_same_model_in_diffusers(
    folders: Mapping[str, Path], family: str, tmp_path: Path
) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file

    trained, fresh = (pipelines.load(family, folders[family]) for _ in range(2))
    modules = blocks_of(trained.transformer)
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=modules, init_lora_weights=False)
    trained.transformer.add_adapter(config, adapter_name="mine")
    inputs = given(trained)
    trained.predict(*inputs).square().mean().backward()
    tensors = {}
    for name in modules:
        layer = trained.transformer.get_submodule(name)
        for side in ("lora_A", "lora_B"):
            weight = getattr(layer, side)["mine"].weight
            # Nothing is silent: the text goes on from the double blocks into the single ones.
            assert weight.grad is not None, name
            tensors[f"transformer.{name}.{side}.weight"] = weight.detach().clone()
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    with torch.no_grad():
        plain = fresh.predict(*inputs)
        fresh.pipe.load_lora_weights(tmp_path)
        wrapped = [name for name, module in fresh.transformer.named_modules() if hasattr(module, "lora_A")]
        assert sorted(wrapped) == sorted(modules)
        theirs = fresh.predict(*inputs)
        torch.testing.assert_close(theirs, trained.predict(*inputs), rtol=0, atol=1e-5)
    assert float((theirs - plain).abs().max()) > 1e-2


def test_positions_are_made_once_for_each_size(pipeline: Any) -> None:
    first = pipeline.positions((64, 96), TOKENS, torch.device("cpu"))
    assert pipeline.positions((64, 96), TOKENS, torch.device("cpu")) is first
    assert len(first[0]) == TOKENS
    assert len(first[1]) == (24 if pipeline.family == "flux" else 48)


def test_a_folder_without_such_a_base_is_explained(tmp_path: Path) -> None:
    with pytest.raises(BaseNotFound, match="cannot be loaded"):
        pipelines.load("flux2-klein", tmp_path)


def test_a_base_without_resolution_has_the_published_defaults(loaded: Mapping[str, Any]) -> None:
    for pipeline in loaded.values():
        plain: Callable[[Any], Any] = type(pipeline)
        made = plain(pipeline.pipe)
        assert (made.size, made.prompt_tokens) == ((1024, 1024), 512)
