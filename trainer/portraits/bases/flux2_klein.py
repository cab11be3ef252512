"""A tiny FLUX.2-klein-4B: a Qwen3 deep enough for the layers 9, 18 and 27, and a VAE with statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.portraits.base import build_tokenizer
from trainer.portraits.bases import parts

# What Qwen3's own template makes of one user message without thinking.
_CHAT = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}"
    "{% endif %}{% endif %}"
)
_WIDTH = 16
_LAYERS = 28


def _tokenizer() -> Any:
    tokenizer = build_tokenizer(
        "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = _CHAT
    return tokenizer


def _text_encoder(tokenizer: Any) -> Any:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=_WIDTH,
            intermediate_size=2 * _WIDTH,
            num_hidden_layers=_LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    ).eval()
    with torch.no_grad():
        encoder.get_input_embeddings().weight.mul_(25.0)
    return encoder


def _vae() -> Any:
    """A VAE whose batch-norm statistics are not those of an identity."""
    from diffusers import AutoencoderKLFlux2

    made = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=8,
        sample_size=parts.PIXELS,
    ).eval()
    made.bn.running_mean.uniform_(-0.5, 0.5)
    made.bn.running_var.uniform_(0.5, 2.0)
    return made


def _transformer() -> Any:
    """A transformer whose shared modulation is strong enough for its blocks to matter."""
    import torch
    from diffusers import Flux2Transformer2DModel

    made = Flux2Transformer2DModel(
        in_channels=32,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * _WIDTH,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    ).eval()
    with torch.no_grad():
        for modulation in (
            made.double_stream_modulation_img,
            made.double_stream_modulation_txt,
            made.single_stream_modulation,
        ):
            modulation.linear.weight.mul_(8.0)
    return made


def build(folder: Path, seed: int = 2) -> Path:
    """Write the base."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline

    torch.manual_seed(seed)
    tokenizer = _tokenizer()
    pipe = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
        ),
        vae=_vae(),
        text_encoder=_text_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=_transformer(),
        is_distilled=True,
    )
    return parts.save(pipe, folder, prompt_tokens=parts.PROMPT_TOKENS)
