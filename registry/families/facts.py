"""What is known about a family of base models, and what each of its modules is called.

A module is named as diffusers names it. The modules of the denoiser go by their plain names
(``transformer_blocks.0.attn.to_q``); those of a text encoder begin with the name of their part of the
pipeline (``text_encoder.text_model.encoder.layers.0.self_attn.q_proj``), and so do their kinds
(``text_encoder.self_attn.q_proj``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal

from registry.errors import UsageError, shown

BaseSpec = Mapping[str, tuple[int, int]]
"""Module name, for example "transformer_blocks.0.attn.to_q" -> (out features, in features)."""

Config = Mapping[str, Any]
"""The values of a config.json."""

Prediction = Literal["velocity", "epsilon", "v"]

MAX_SIZE: Final = 4096
"""Largest number of layers, heads or features of a head that is believed."""

_TEXT: Final = re.compile(r"((text_encoder(?:_\d)?)\.text_model\.encoder\.layers\.\d+)\.(.+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyFacts:
    """An architecture.

    Attributes:
        name: what cards write.
        prefix: the part of the pipeline that carries the LoRA, "transformer" or "unet"; the keys of its
            modules in a file begin with it.
        kinds: the kinds of its modules that may be trained.
        presets: name -> kinds that recipes train together.
        edits: whether the model looks at a source picture.
        prediction: what the model predicts.
        architecture: what a file's header calls it, in the words of ModelSpec.
        pixels: side of the square that a base takes where its folder says nothing.
        multiple: both sides of a training picture are multiples of so many pixels.
        text_encoders: the parts of the pipeline with a text encoder that may be trained -> their kinds,
            without the part's name.
        shapes: the denoiser's modules of these kinds, in the order of the forward pass, with their shapes,
            from the values of its config.json. It raises UsageError.
        lists: the names of the lists of blocks, in the order of the forward pass; blocks stand in
            ``transformer_blocks``-like lists, one inside another in U-Nets.
        silent_in_last_block: kinds whose output the last block of the first list discards. They never get a
            gradient, so an honest training leaves their B at exactly zero: anything else was not made by
            training.
        silent_rows_in_last_block: kind -> the half-open range of output features, in multiples of the input
            features, that the last block discards although it uses the others: the same holds for those rows
            of B.
        silent_last_layers: the text encoders whose last layer nobody reads; the same holds for it.
    """

    name: str
    prefix: str
    kinds: frozenset[str]
    presets: Mapping[str, tuple[str, ...]]
    edits: bool
    prediction: Prediction
    architecture: str
    pixels: int
    shapes: Callable[[Config], dict[str, tuple[int, int]]]
    lists: re.Pattern[str]
    multiple: int = 16
    text_encoders: Mapping[str, frozenset[str]] = field(default_factory=dict)
    silent_in_last_block: frozenset[str] = frozenset()
    silent_rows_in_last_block: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    silent_last_layers: frozenset[str] = frozenset()

    @property
    def all_kinds(self) -> frozenset[str]:
        """All kinds that may be trained, those of the text encoders with the part's name."""
        texts = {f"{part}.{kind}" for part, kinds in self.text_encoders.items() for kind in kinds}
        return self.kinds | texts

    def block_of(self, module: str) -> tuple[str, str]:
        """Return the block's name and the kind of a module that lies in a block.

        Raises:
            ValueError: it lies in none.
        """
        found = _TEXT.fullmatch(module)
        if found is not None:
            return found[1], f"{found[2]}.{found[3]}"
        plain = self.lists.fullmatch(module)
        if plain is None:
            raise ValueError(f"{shown(module)} lies in no block of the family {self.name}")
        return plain[1], plain[2]

    def is_target(self, module: str) -> bool:
        """Return whether a module, of the denoiser or of a text encoder, may be trained."""
        try:
            return self.block_of(module)[1] in self.all_kinds
        except ValueError:
            return False

    def key(self, module: str) -> str:
        """Return what a file calls a module: it names the part of the pipeline, too."""
        return module if _TEXT.fullmatch(module) else f"{self.prefix}.{module}"

    def silent(self, modules: Iterable[str]) -> frozenset[str]:
        """Return which of a model's modules never get a gradient.

        Args:
            modules: the targets of a whole model; the last block among them is the model's last.
        """
        named = [(module, *self.block_of(module)) for module in modules]
        last: dict[str, int] = {}
        for _, block, _ in named:
            where, index = _index(block)
            last[where] = max(index, last.get(where, 0))
        return frozenset(
            module
            for module, block, kind in named
            for where, index in [_index(block)]
            if index == last[where]
            and (
                (where == "transformer_blocks" and kind in self.silent_in_last_block)
                or where.partition(".")[0] in self.silent_last_layers
            )
        )

    def silent_rows(self, spec: BaseSpec) -> Mapping[str, slice]:
        """Return module -> the rows of B that never get a gradient, for those that have other rows, too."""
        if not self.silent_rows_in_last_block:
            return {}
        blocks = self.places(spec)
        last = max(blocks, key=lambda block: blocks[block])
        found = {}
        for kind, (start, stop) in self.silent_rows_in_last_block.items():
            into = spec[f"{last}.{kind}"][1]
            found[f"{last}.{kind}"] = slice(start * into, stop * into)
        return found

    def places(self, modules: Iterable[str]) -> Mapping[str, int]:
        """Return the blocks that some modules lie in -> their place in the forward pass, from 0.

        Text encoders stand behind the denoiser, so that its blocks keep their numbers.
        """
        blocks = sorted({self.block_of(module)[0] for module in modules}, key=_order)
        return {block: place for place, block in enumerate(blocks)}


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseFacts:
    """A base model that adapters may be made for.

    ``config`` holds the values of the denoiser's config.json that decide shapes, ``text_encoders`` those of
    the text encoders' by part of the pipeline; without a part's its modules are no targets.
    """

    id: str
    family: str
    license: str
    revision: str
    config: Config = field(default_factory=dict)
    text_encoders: Mapping[str, Config] = field(default_factory=dict)

    @property
    def spec(self) -> BaseSpec:
        """The modules that an adapter may change, with their shapes."""
        from registry.families import base_spec

        return base_spec(self.family, self.config, self.text_encoders)


def clip_shapes(part: str, config: Config) -> dict[str, tuple[int, int]]:
    """Return the modules of a CLIP text encoder that may be trained, with their shapes.

    Args:
        part: the part of the pipeline, "text_encoder" or "text_encoder_2".
        config: ``hidden_size``, ``intermediate_size`` and ``num_hidden_layers`` are read.

    Raises:
        UsageError: a value is missing or out of range.
    """
    width, inner, layers = sizes(
        config, "hidden_size", "intermediate_size", "num_hidden_layers", limit=1 << 16, where=part
    )
    kinds = {
        **{f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")},
        "mlp.fc1": (inner, width),
        "mlp.fc2": (width, inner),
    }
    return {
        f"{part}.text_model.encoder.layers.{layer}.{kind}": shape
        for layer in range(layers)
        for kind, shape in kinds.items()
    }


CLIP_KINDS: Final = frozenset(
    {*(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2"}
)
"""The kinds of modules of a CLIP text encoder that may be trained."""


def sizes(config: Config, *keys: str, limit: int = MAX_SIZE, where: str = "transformer") -> list[int]:
    """Return the values of a config, each from 1 to ``limit``.

    Raises:
        UsageError: a value is missing or out of range.
    """
    values: list[int] = []
    for key in keys:
        value = config.get(key)
        if type(value) is not int or not 1 <= value <= limit:
            raise UsageError(
                f"the {where}'s config needs {key} from 1 to {limit}, not {shown(value)}",
                f"take the values from the base model's {where}/config.json",
            )
        values.append(value)
    return values


def presets(**named: tuple[str, ...]) -> Mapping[str, tuple[str, ...]]:
    """Return presets by name; underscores stand for dashes."""
    return MappingProxyType({name.replace("_", "-"): kinds for name, kinds in named.items()})


def _index(block: str) -> tuple[str, int]:
    """The list that a block stands in, and its index there; a U-Net's middle counts as 0."""
    where, _, index = block.rpartition(".")
    return where, int(index)


_RANK: Final = {"transformer_blocks": 0, "single_transformer_blocks": 1, "down_blocks": 0, "mid_block": 1}


def _order(block: str) -> tuple[object, ...]:
    first = block.partition(".")[0]
    late = 9 if first.startswith("text_encoder") else _RANK.get(first, 2)
    return (late, first, *(int(part) for part in block.split(".") if part.isdigit()))
