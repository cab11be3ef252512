"""The noising process of the U-Nets, and what is particular to SD 1.5 and XL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import UsageError
from serving.pipelines import load
from serving.pipelines.base import PromptEmbeds
from serving.pipelines.process import VariancePreserving
from trainer.portraits.bases import sd15, sdxl

PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}
ALL = torch.arange(1000)
LEVELS = ALL / 999


def scheduler(prediction: str, **settings: object) -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type=PREDICTIONS[prediction], **settings,
    )  # fmt: skip


def pair(seed: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, 4, generator=source), torch.randn(rows, 3, 4, generator=source)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_target_gives_the_picture_back_at_every_step(prediction: str) -> None:
    process = VariancePreserving.of_scheduler(scheduler(prediction))
    clean, noise = pair(1, 1000)
    noisy, target = process.noisy(clean, noise, LEVELS), process.target(clean, noise, LEVELS)
    assert torch.allclose(process.clean(noisy, target, LEVELS), clean, atol=5e-5)


@given(level=st.floats(0, 1), seed=st.integers(0, 1 << 31), prediction=st.sampled_from(sorted(PREDICTIONS)))
def test_the_target_gives_the_picture_back_at_every_level(level: float, seed: int, prediction: str) -> None:
    process = VariancePreserving.of_scheduler(scheduler(prediction))
    clean, noise = pair(seed, 1)
    levels = torch.tensor([level])
    noisy, target = process.noisy(clean, noise, levels), process.target(clean, noise, levels)
    assert torch.allclose(process.clean(noisy, target, levels), clean, atol=5e-5)
    # The noise of the very same step, whichever way it is looked at.
    step = int(process.timestep(levels))
    kept = float(scheduler(prediction).alphas_cumprod[step])
    assert float(process.snr(levels)) == pytest.approx(kept / (1 - kept), rel=1e-5)
    assert torch.allclose(noisy, kept**0.5 * clean + (1 - kept) ** 0.5 * noise, atol=1e-5)
    assert abs(step - level * 999) <= 0.5 + 1e-3


@pytest.mark.parametrize("zero_snr", [False, True])
def test_it_is_the_process_of_diffusers(zero_snr: bool) -> None:
    theirs = scheduler("v", rescale_betas_zero_snr=zero_snr)
    ours = VariancePreserving.of_scheduler(theirs)
    clean, noise = pair(2, 1000)
    assert torch.allclose(ours.noisy(clean, noise, LEVELS), theirs.add_noise(clean, noise, ALL), atol=1e-6)
    assert torch.allclose(
        ours.target(clean, noise, LEVELS), theirs.get_velocity(clean, noise, ALL), atol=1e-6
    )


def test_the_signal_to_noise_ratio_falls_and_is_that_of_the_schedule() -> None:
    from diffusers.training_utils import compute_snr

    theirs = scheduler("epsilon")
    found = VariancePreserving.of_scheduler(theirs).snr(LEVELS)
    assert torch.allclose(found, compute_snr(theirs, ALL), rtol=1e-4)
    assert bool((found.diff() < 0).all())
    assert float(found.min()) > 0


def test_a_schedule_that_ends_in_pure_noise_is_safe_for_v() -> None:
    process = VariancePreserving.of_scheduler(scheduler("v", rescale_betas_zero_snr=True))
    clean, noise = pair(3, 1000)
    noisy, target = process.noisy(clean, noise, LEVELS), process.target(clean, noise, LEVELS)
    assert float(process.snr(LEVELS)[-1]) == 0
    assert torch.equal(noisy[-1], noise[-1])
    assert torch.allclose(process.clean(noisy, target, LEVELS), clean, atol=5e-5)


def test_a_schedule_that_ends_in_pure_noise_is_refused_for_epsilon() -> None:
    with pytest.raises(UsageError, match="pure noise") as caught:
        VariancePreserving.of_scheduler(scheduler("epsilon", rescale_betas_zero_snr=True))
    assert "v_prediction" in caught.value.mend


def test_other_predictions_are_refused() -> None:
    from diffusers import DDPMScheduler

    with pytest.raises(UsageError, match="'sample'"):
        VariancePreserving.of_scheduler(DDPMScheduler(prediction_type="sample"))


def test_both_rows_of_a_batch_have_their_own_level() -> None:
    process = VariancePreserving.of_scheduler(scheduler("v"))
    clean, noise = pair(4, 2)
    together = process.noisy(clean, noise, torch.tensor([0.0, 1.0]))
    assert torch.allclose(together[0], clean[0], atol=0.2)
    assert torch.allclose(together[1], noise[1], atol=0.4)


def asked(pipeline: Any, *levels: float, size: tuple[int, int] = (64, 64)) -> dict[str, Any]:
    """What the U-Net is given when a prediction is asked for."""
    seen: dict[str, Any] = {}

    def keep(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    hook = pipeline.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    n = len(levels)
    latents = torch.zeros(n, size[0] * size[1] // 64, 4)
    try:
        with torch.no_grad():
            prompts = pipeline.encode_prompts([], ["show a happy expression"] * n)
            pipeline.predict(latents, latents, prompts, torch.tensor(levels), size)
    finally:
        hook.remove()
    return {**seen, "prompts": prompts}


def test_the_model_is_asked_at_the_step_of_the_process(tmp_path: Path) -> None:
    pipeline = load("sd15", sd15.build(tmp_path / "sd15"))
    levels = (0.0, 0.2504, 0.2506, 1.0)
    assert asked(pipeline, *levels)["timestep"].tolist() == [0, 250, 250, 999]
    assert pipeline.process.timestep(torch.tensor(levels)).tolist() == [0, 250, 250, 999]
    assert pipeline.process.prediction == "epsilon"


def test_a_base_that_predicts_v_is_one(tmp_path: Path) -> None:
    pipeline = load("sd15", sd15.build(tmp_path / "sd15", prediction="v_prediction"))
    assert pipeline.process.prediction == "v"


def test_a_base_for_inpainting_is_refused(tmp_path: Path) -> None:
    """It takes nine channels: latents, a mask, and the latents of what is left."""
    import diffusers

    folder = sd15.build(tmp_path / "sd15")
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    diffusers.UNet2DConditionModel.from_config(unet.config, in_channels=9).save_pretrained(folder / "unet")
    with pytest.raises(UsageError, match="9 channels"):
        load("sd15", folder)


def test_latents_keep_their_bits_over_a_coarser_denoiser(tmp_path: Path) -> None:
    """As while training, where the denoiser may compute in bf16 and latents are fp32."""
    pipeline = load("sd15", sd15.build(tmp_path / "sd15"))
    pipeline.transformer.register_forward_hook(lambda module, args, found: (found[0].bfloat16(),))
    prompts = pipeline.encode_prompts([], ["show a happy expression"])
    found = pipeline.denoise(torch.randn(1, 64, 4), prompts, seeds=[3], steps=4)
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())


def test_xl_is_told_the_size_and_the_pooled_prompt(tmp_path: Path) -> None:
    pipeline = load("sdxl", sdxl.build(tmp_path / "sdxl"))
    seen = asked(pipeline, 0.5, 0.5, size=(48, 80))
    assert seen["added_cond_kwargs"]["time_ids"].tolist() == [[48, 80, 0, 0, 48, 80]] * 2
    prompts: PromptEmbeds = seen["prompts"]
    assert prompts.pooled is not None
    assert torch.equal(seen["added_cond_kwargs"]["text_embeds"], prompts.pooled)
    assert prompts.pooled.shape == (2, 32)
    assert prompts.embeds.shape == (2, 77, 48)


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_an_edit_with_another_scheduler_is_that_of_diffusers(
    name: str, prediction: str, tmp_path: Path
) -> None:
    """One that draws noise on the way draws it from the row's own generator."""
    import diffusers

    base = sd15.build(tmp_path / "sd15", prediction=PREDICTIONS[prediction])
    pipeline = load("sd15", base)
    pipeline.pipe.scheduler = getattr(diffusers, name).from_config(pipeline.pipe.scheduler.config)
    theirs = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(base, safety_checker=None)
    theirs.scheduler = getattr(diffusers, name).from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(1))
    prompts = pipeline.encode_prompts([], ["show a happy expression"] * 2)
    found = pipeline.denoise(latents, prompts, seeds=[3, 4], steps=5)
    wanted = theirs(
        prompt=["show a happy expression"] * 2,
        image=pipeline.unpack(latents),
        strength=pipeline.strength,
        num_inference_steps=5,
        guidance_scale=1.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        output_type="latent",
    ).images
    assert torch.allclose(found, pipeline.pack(wanted), atol=1e-4)
