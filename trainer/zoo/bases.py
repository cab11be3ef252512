"""The zoo's base models: small variants of the portraits base, so that hundreds of adapters take minutes.

Each is the shipped portraits base with another transformer, at 32 x 32 pixels: 16 tokens of the picture, 16
of its source. Only the transformers are stored (``weights/<name>.safetensors``, float16); tokenizer, text
encoder and VAE are those of the portraits base. `pretrain` makes them as `trainer.portraits.editor` makes
the big one: they can edit portraits, and have never seen one of the twelve expression words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from serving.pipelines.qwen_image_edit import QwenImageEdit

PIXELS: Final = 32
_BATCH: Final = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallBase:
    """Sizes of a variant's transformer.

    Attributes:
        width: of its tokens.
        layers: how many blocks.
        head: width of an attention head.
        seed: of its initial weights and of its training.
        steps: of its training, 64 edits each.
    """

    width: int
    layers: int
    head: int
    seed: int
    steps: int


SMALL_BASES: Final[Mapping[str, SmallBase]] = MappingProxyType(
    {
        "small-1": SmallBase(width=64, layers=3, head=32, seed=101, steps=2500),
        "small-2": SmallBase(width=64, layers=2, head=16, seed=102, steps=2500),
        "small-3": SmallBase(width=64, layers=2, head=32, seed=103, steps=2200),
    }
)


def weights_path(name: str) -> Path:
    """Where the transformer of a variant is stored."""
    return Path(__file__).with_name("weights") / f"{name}.safetensors"


def base_id(name: str) -> str:
    """The id under which the registry knows a variant."""
    return f"adapter-foundry/portraits-{name}"


def small_base(name: str, *, trained: bool = True) -> QwenImageEdit:
    """Return a variant, ready for edits.

    Args:
        name: a key of SMALL_BASES.
        trained: with the shipped weights; otherwise as it is before its training.

    Raises:
        FileNotFoundError: its weights were not made yet.
    """
    import torch
    from safetensors.torch import load_file

    from serving.pipelines.qwen_image_edit import QwenImageEdit
    from trainer.portraits.base import base_path, build_transformer

    sizes = SMALL_BASES[name]
    torch.manual_seed(sizes.seed)
    transformer = build_transformer(sizes.width, sizes.layers, sizes.head)
    if trained:
        transformer.load_state_dict({k: v.float() for k, v in load_file(weights_path(name)).items()})
    pipe = QwenImageEdit.load(base_path()).pipe
    pipe.register_modules(transformer=transformer)
    return QwenImageEdit(pipe, PIXELS, 28)


def pretrain(name: str, say: Callable[[str], None] = print) -> Path:
    """Train a variant from nothing and store its EMA weights; the same steps give the same weights.

    Args:
        name: a key of SMALL_BASES; it takes about five minutes of one core.
        say: called with a line now and then.
    """
    import torch
    from safetensors.torch import save_file

    from trainer.portraits import editor

    pipe, steps = small_base(name, trained=False), SMALL_BASES[name].steps
    transformer = pipe.transformer.requires_grad_(True).train()
    editor.open_gates(transformer)
    bank = editor.prompt_bank(pipe)
    crowd, unseen = editor.draw_crowd(pipe, 2000, SMALL_BASES[name].seed), editor.draw_crowd(pipe, 64, 0)
    optimisers = editor.optimisers(transformer)
    rates = [one.param_groups[0]["lr"] for one in optimisers]
    ema = [p.detach().clone() for p in transformer.parameters()]
    schedule = editor.Schedule()
    generator = torch.Generator().manual_seed(SMALL_BASES[name].seed)
    for step in range(steps):
        batch = editor.draw_batch(crowd, bank, _BATCH, generator)
        sigma = editor.draw_sigma(_BATCH, generator)
        noise = torch.randn(batch.target.shape, generator=generator)
        transformer.zero_grad(set_to_none=True)
        loss = editor.flow_loss(pipe, batch, sigma, noise)
        loss.backward()  # type: ignore[no-untyped-call]
        for one, rate in zip(optimisers, rates, strict=True):
            one.param_groups[0]["lr"] = rate * schedule.factor(step, step / steps)
            one.step()
        torch._foreach_lerp_(
            ema, [p.detach() for p in transformer.parameters()], 1 - min(0.995, step / (step + 10))
        )
        if (step + 1) % 500 == 0:
            say(f"{name}: step {step + 1} of {steps}, loss {loss.item():.3f}")
    with torch.no_grad():
        torch._foreach_copy_(list(transformer.parameters()), ema)
    transformer.requires_grad_(False).eval()
    say(f"{name}: " + ", ".join(f"{k} {v:.2f}" for k, v in editor.held_out(pipe, unseen, bank).items()))
    path = weights_path(name)
    path.parent.mkdir(exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in transformer.state_dict().items()}, path, {"format": "pt"})
    return path
