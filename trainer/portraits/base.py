"""The tiny base model: the real Qwen-Image-Edit classes at 64 x 64 pixels.

One token covers 8 x 8 pixels (a 4x VAE, then 2 x 2 packing), prompts keep the pipeline's template, whose
64-token prefix the pipeline drops. `build` writes a folder in diffusers layout with random weights;
`trainer.portraits.pretrain` trains them; the trained ones ship in ``weights/base``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.portraits.prompts import base_prompts, expression_prompts

if TYPE_CHECKING:
    from diffusers import AutoencoderKLQwenImage, QwenImageEditPlusPipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

BASE_ID = "adapter-foundry/portraits-base"
PIXELS = 64
CONDITION_PIXELS = 28  # one merged vision patch, so the picture is one token of the prompt
TEXT_WIDTH = 128
_SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip


def base_path() -> Path:
    """The folder of the shipped base model."""
    return Path(__file__).with_name("weights") / "base"


def build_tokenizer(template: str) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer with Qwen's splitting rule, trained on the pipeline's template and our
    prompts.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    plain = template.replace("<|im_start|>", "").replace("<|im_end|>", "")
    corpus = ([plain] * 3 + ["Picture 1: Picture 2: Picture 3: "] + base_prompts() + expression_prompts()) * 4
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=4096,
            min_frequency=2,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    model = json.loads(bpe.to_str())["model"]
    merges = [
        tuple(pair) if not isinstance(pair, str) else tuple(pair.split(" ")) for pair in model["merges"]
    ]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=merges,
        additional_special_tokens=list(_SPECIAL_TOKENS[1:]),
        pad_token="<|endoftext|>",  # noqa: S106 - a token of text
        eos_token="<|im_end|>",  # noqa: S106 - a token of text
    )


def build_text_encoder(
    tokenizer: Qwen2Tokenizer, width: int = TEXT_WIDTH
) -> Qwen2_5_VLForConditionalGeneration:
    """A random two-layer Qwen2.5-VL with large word vectors, so that words stay apart after two layers."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 2 * width,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 2048, "tie_word_embeddings": True,
            "rope_parameters":
                {"rope_type": "default", "mrope_section": _sections(width // 4), "rope_theta": 1e6},
            "bos_token_id": ids("<|endoftext|>"), "eos_token_id": ids("<|im_end|>"),
            "pad_token_id": ids("<|endoftext|>"),
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size":
            width, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size":
            112, "fullatt_block_indexes": [1], "in_channels": 3,
        },
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )  # fmt: skip
    encoder = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        encoder.get_input_embeddings().weight.mul_(25.0)
    return encoder


def _sections(head: int) -> list[int]:
    """Return how a head's rotary pairs are shared by time, height and width."""
    side = head // 2 * 3 // 8
    return [head // 2 - 2 * side, side, side]


def build_vae() -> AutoencoderKLQwenImage:
    """A 4x VAE with 16 channels."""
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=16,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, False],
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )


def build_transformer(width: int = 128, layers: int = 6, head: int = 32) -> QwenImageTransformer2DModel:
    """A small MMDiT with the double stream, modulation and rotary positions of the real one."""
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=head,
        num_attention_heads=width // head,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(head - 2 * (head * 3 // 8), head * 3 // 8, head * 3 // 8),
    )


def assemble(parts: dict[str, Any] | None = None, seed: int = 0) -> QwenImageEditPlusPipeline:
    """A pipeline of random parts, except those given by name (``vae``, ``transformer`` …)."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditPlusPipeline
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from serving.pipelines.qwen_image_edit import image_only_processor

    torch.manual_seed(seed)
    parts = dict(parts or {})
    if "tokenizer" not in parts:
        template = QwenImageEditPlusPipeline(**dict.fromkeys(PARTS)).prompt_template_encode
        parts["tokenizer"] = build_tokenizer(template)
    tokenizer = parts["tokenizer"]
    area = CONDITION_PIXELS**2
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": area, "longest_edge": area}, patch_size=14, merge_size=2, temporal_patch_size=2
    )
    return QwenImageEditPlusPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=1000, shift=2.0, use_dynamic_shifting=False
        ),
        vae=parts.get("vae") or build_vae(),
        text_encoder=parts.get("text_encoder") or build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        processor=image_only_processor(images, tokenizer),
        transformer=parts.get("transformer") or build_transformer(),
    )


PARTS = ("scheduler", "vae", "text_encoder", "tokenizer", "processor", "transformer")


def save(pipe: QwenImageEditPlusPipeline, folder: Path) -> None:
    """Write `pipe` in diffusers layout, loadable by the code that loads the published weights.

    Weights are stored as float16: half the size, and far finer than the training's noise.
    """
    from safetensors.torch import load_file, save_file

    pipe.save_pretrained(folder)
    for file in folder.rglob("*.safetensors"):
        halves = {name: value.half() for name, value in load_file(file).items()}
        save_file(halves, file, metadata={"format": "pt"})
    index = folder / "model_index.json"
    entries = json.loads(index.read_text())
    entries["processor"] = ["transformers", "Qwen2VLProcessor"]
    index.write_text(json.dumps(entries, indent=2) + "\n")
    sides = {"pixels": PIXELS, "condition_pixels": CONDITION_PIXELS}
    (folder / "resolution.json").write_text(json.dumps(sides) + "\n")


def build(folder: Path, seed: int = 0, **sizes: int) -> Path:
    """Write an untrained base of random weights, for tests and as the start of `pretrain`.

    Args:
        sizes: of `build_transformer` (``width``, ``layers``, ``head``).
    """
    import torch

    torch.manual_seed(seed)
    save(assemble({"transformer": build_transformer(**sizes)}, seed), folder)
    return folder
