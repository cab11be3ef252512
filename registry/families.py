"""Facts about base-model families: what a LoRA may touch, with which shapes, under which licence.

A family is an architecture; a base is one model of it. Shapes come from the values of the transformer's
``config.json``, so that the model with sixty blocks and the tiny portrait model are checked by the same code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from registry.errors import UsageError, shown

# Module name, for example "transformer_blocks.0.attn.to_q" -> (out features, in features).
BaseSpec = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyFacts:
    """An architecture.

    Attributes:
        name: what cards write.
        prefix: the part of the pipeline that carries the LoRA; every key in a file begins with it.
        blocks: the name of the list of transformer blocks.
        targets: kind of module -> its (out, in) features in multiples of the model's width.
        silent_in_last_block: kinds whose output the last block discards. They never get a gradient, so an
            honest training leaves their B at exactly zero: anything else was not made by training.
        silent_rows_in_last_block: kind -> the half-open range of output features, in multiples of the width,
            that the last block discards although it uses the others: the same holds for those rows of B.
        presets: name -> kinds that recipes train together.
    """

    name: str
    prefix: str
    blocks: str
    targets: Mapping[str, tuple[int, int]]
    silent_in_last_block: frozenset[str]
    silent_rows_in_last_block: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    presets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def block_of(self, module: str) -> tuple[int, str]:
        """Return the block's index and the kind of a module that the base has."""
        index, kind = module.removeprefix(self.blocks + ".").split(".", 1)
        return int(index), kind


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseFacts:
    """A base model that adapters may be made for.

    ``config`` holds the values of the transformer's config.json that decide shapes.
    """

    id: str
    family: str
    license: str
    revision: str
    config: Mapping[str, int] = field(default_factory=dict)

    @property
    def spec(self) -> BaseSpec:
        """The modules that an adapter may change, with their shapes."""
        return base_spec(self.family, self.config)


_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_IMAGE_MLP = ("img_mlp.net.0.proj", "img_mlp.net.2")
_TEXT_MLP = ("txt_mlp.net.0.proj", "txt_mlp.net.2")

QWEN_IMAGE_EDIT: Final = FamilyFacts(
    name="qwen-image-edit",
    prefix="transformer",
    blocks="transformer_blocks",
    targets=MappingProxyType(
        {
            **{f"attn.{name}": (1, 1) for name in _ATTENTION},
            "img_mlp.net.0.proj": (4, 1),
            "img_mlp.net.2": (1, 4),
            "txt_mlp.net.0.proj": (4, 1),
            "txt_mlp.net.2": (1, 4),
            # Shift, scale and gate of both halves of a block. DiffSynth trains them by default, we do not.
            "img_mod.1": (6, 1),
            "txt_mod.1": (6, 1),
        }
    ),
    # The text stream ends in the last block: nothing reads it any more.
    silent_in_last_block=frozenset(
        {"attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2"}
    ),
    # The text's shift and scale reach the picture through the keys and values of the last attention. Its gate
    # and the three for the text's feed-forward do not: they act on what nothing reads any more.
    silent_rows_in_last_block=MappingProxyType({"txt_mod.1": (2, 6)}),
    presets=MappingProxyType(
        {
            "full": (*(f"attn.{name}" for name in _ATTENTION), *_IMAGE_MLP, *_TEXT_MLP),
            "attention": tuple(f"attn.{name}" for name in _ATTENTION),
            "image-stream": (*(f"attn.{name}" for name in _ATTENTION[:4]), *_IMAGE_MLP),
        }
    ),
)

FAMILIES: Final[Mapping[str, FamilyFacts]] = MappingProxyType({QWEN_IMAGE_EDIT.name: QWEN_IMAGE_EDIT})

KNOWN_BASES: Final[Mapping[str, BaseFacts]] = MappingProxyType(
    {
        facts.id: facts
        for facts in (
            BaseFacts(
                id="Qwen/Qwen-Image-Edit-2511",
                family="qwen-image-edit",
                license="Apache-2.0",
                revision="main",
                config={"num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128},
            ),
            BaseFacts(
                id="adapter-foundry/portraits-base",
                family="qwen-image-edit",
                license="Apache-2.0",
                revision="1",
                config={"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 32},
            ),
            *(
                BaseFacts(
                    id=f"adapter-foundry/portraits-{name}",
                    family="qwen-image-edit",
                    license="Apache-2.0",
                    revision="1",
                    config={"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": width},
                )
                # The bases of the scanner's zoo; `trainer.zoo.bases` makes them.
                for name, layers, heads, width in (
                    ("small-1", 3, 2, 32),
                    ("small-2", 2, 4, 16),
                    ("small-3", 2, 2, 32),
                )
            ),
        )
    }
)


def family(name: str) -> FamilyFacts:
    """Return the facts of a family.

    Raises:
        UsageError: there is no such family.
    """
    if name not in FAMILIES:
        raise UsageError(f"the family {shown(name)!r} is not known", "known families: " + ", ".join(FAMILIES))
    return FAMILIES[name]


def base_spec(family_name: str, config: Mapping[str, Any]) -> BaseSpec:
    """Return module name -> (out, in) for every module of a base that a LoRA may change.

    Args:
        family_name: a name in FAMILIES.
        config: the values of the transformer's config.json; ``num_layers``, ``num_attention_heads`` and
            ``attention_head_dim`` are read, each from 1 to 4096.

    Raises:
        UsageError: the family is not known, or a value is missing or out of range.
    """
    found = family(family_name)
    sizes: list[int] = []
    for key in ("num_layers", "num_attention_heads", "attention_head_dim"):
        value = config.get(key)
        if type(value) is not int or not 1 <= value <= 4096:
            raise UsageError(
                f"the transformer's config needs {key} from 1 to 4096, not {shown(value)}",
                "take the values from the base model's transformer/config.json",
            )
        sizes.append(value)
    layers, heads, head_width = sizes
    width = heads * head_width
    return MappingProxyType(
        {
            f"{found.blocks}.{index}.{kind}": (out * width, into * width)
            for index in range(layers)
            for kind, (out, into) in found.targets.items()
        }
    )
