"""What the tiny bases share: tokenizers made in code, text encoders, a VAE, and writing a folder.

Every word of the portrait world is one token of the CLIP and T5 tokenizers; other text is spelled in letters.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.portraits.prompts import base_prompts, expression_prompts

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

PIXELS = 64
PROMPT_TOKENS = 32
_CLIP_LENGTH = 77


def words() -> list[str]:
    """The words of all portrait prompts, sorted."""
    return sorted({word for prompt in base_prompts() + expression_prompts() for word in prompt.split()})


def clip_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """A byte-level BPE tokenizer with CLIP's splitting rule; each portrait word is merged into one token.

    Args:
        pad: the token that fills a prompt up; "!" in the second tokenizers of SDXL and SD 3.
    """
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges([[*word[:-1], f"{word[-1]}</w>"] for word in words()])
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=_CLIP_LENGTH)


def _merges(pieces: list[list[str]]) -> list[tuple[str, str]]:
    """Byte-pair merges, the most frequent pair first, until every word is one piece.

    The trainer of `tokenizers` gives other ids in each process where words have a mark at their end.
    """
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in pieces for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in pieces:
            for place in range(len(word) - 2, -1, -1):
                if tuple(word[place : place + 2]) == best:
                    word[place : place + 2] = ["".join(best)]
    return merges


def t5_tokenizer(length: int = PROMPT_TOKENS) -> T5Tokenizer:
    """A unigram tokenizer of the portrait words and of single characters.

    Args:
        length: the most tokens of a prompt.
    """
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [(chr(code), -8.0) for code in range(0x21, 0x7F)]
    pieces = [("▁", -8.0), *((f"▁{word}", -1.0) for word in words())]
    return T5Tokenizer(vocab=[*special, *pieces, *letters], extra_ids=0, model_max_length=length)


def clip_text(tokenizer: CLIPTokenizer, width: int, *, projection: bool) -> CLIPTextModel:
    """A random two-layer CLIP text model with large word vectors, so that words stay apart.

    Args:
        projection: whether it is a `CLIPTextModelWithProjection`, to ``width`` numbers.
    """
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=_CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()
    with torch.no_grad():
        encoder.get_input_embeddings().weight.mul_(25.0)
    return encoder


def t5(tokenizer: T5Tokenizer, width: int) -> T5EncoderModel:
    """A random two-layer T5 (v1.1) encoder."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=width // 4,
        num_heads=4,
        d_ff=2 * width,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config).eval()


def vae(
    channels: int, *, scaling: float, shift: float | None = None, quant_conv: bool = True
) -> AutoencoderKL:
    """An 8x VAE of small width with ``channels`` latent channels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=PIXELS,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=quant_conv,
        use_post_quant_conv=quant_conv,
    ).eval()


def save(pipe: DiffusionPipeline, folder: Path, **resolution: int) -> Path:
    """Write ``pipe`` to ``folder`` with float16 weights, and ``resolution.json`` beside it.

    Args:
        resolution: what it says beside ``pixels``.
    """
    from safetensors.torch import load_file, save_file

    pipe.save_pretrained(folder)
    for file in folder.rglob("*.safetensors"):
        halves = {
            name: value.half() if value.is_floating_point() else value
            for name, value in load_file(file).items()
        }
        save_file(halves, file, metadata={"format": "pt"})
    (folder / "resolution.json").write_text(json.dumps({"pixels": PIXELS, **resolution}) + "\n")
    return folder
