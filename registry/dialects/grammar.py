"""How trainers and loaders spell the keys of a LoRA file: one table for reading and for writing.

A key is a prefix, a module of the base, and the name of one of the module's tensors. A dialect is a prefix
with a pair of names; kohya also flattens the module's dots to underscores. Modules are found in the base's
list and nowhere else, so that a flattened name is inverted by looking it up and never by guessing.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from registry.errors import InvalidDocument, shown
from registry.families import QWEN_IMAGE_EDIT, BaseSpec, FamilyFacts

Role = Literal["A", "B", "alpha"]

_SHOWN_KEYS = 5
_MEND = "export the LoRA again from the program that trained it, with LoRA layers of the transformer only"


Problem = Literal[
    "other",
    "key",
    "text encoder",
    "magnitude",
    "method",
    "weight",
    "module",
    "mixture",
    "alone",
    "shape",
    "dtype",
]


class DialectError(InvalidDocument):
    """A LoRA file cannot be mapped whole.

    Attributes:
        what: the message without the keys.
        keys: the keys that it is about, all of them; the message names the first few.
        problem: what is wrong with them, for who asks in code.
    """

    def __init__(
        self, message: str, mend: str = _MEND, keys: Iterable[str] = (), problem: Problem = "other"
    ) -> None:
        self.what = message
        self.keys = tuple(keys)
        self.problem: Problem = problem
        super().__init__(f"{message}: {names(self.keys)}" if self.keys else message, mend)


@dataclass(frozen=True, kw_only=True, slots=True)
class Spelling:
    """A way to spell keys.

    Attributes:
        dialect: who spells them so.
        prefix: what stands before the module.
        a, b: what stands after it, for the two factors of B @ A.
        flat: whether the module's dots are underscores.
    """

    dialect: str
    prefix: str
    a: str
    b: str
    flat: bool = False

    def key(self, module: str, role: Role, facts: FamilyFacts | None = None) -> str:
        """Return the key of one of a module's tensors.

        Args:
            module: its name, as in the base's spec.
            role: which tensor.
            facts: the family, where its denoiser may be no ``transformer``.
        """
        stem = module.replace(".", "_") if self.flat else module
        whole = self.prefix + stem
        if facts is not None and self.prefix == DENOISER:
            whole = facts.key(module)
        return whole + {"A": self.a, "B": self.b, "alpha": ALPHA}[role]


ALPHA: Final = ".alpha"
DENOISER: Final = "transformer."
"""The part of the pipeline that carries the LoRA; the table says so for U-Nets, too, whose files say
``unet.``."""
TEXT: Final = "text_encoder"
_AB: Final = (".lora_A.weight", ".lora_B.weight")
_DEFAULT: Final = (".lora_A.default.weight", ".lora_B.default.weight")
_DOWN_UP: Final = (".lora_down.weight", ".lora_up.weight")
_DOTTED: Final = (".lora.down.weight", ".lora.up.weight")


def _spelling(dialect: str, prefix: str, pair: tuple[str, str], *, flat: bool = False) -> Spelling:
    return Spelling(dialect=dialect, prefix=prefix, a=pair[0], b=pair[1], flat=flat)


DIFFUSERS: Final = _spelling("diffusers", DENOISER, _AB)
OLD_DIFFUSERS: Final = _spelling("old diffusers", DENOISER, _DOTTED)
PEFT: Final = _spelling("PEFT", "base_model.model.", _AB)
KOHYA: Final = _spelling("kohya", "lora_unet_", _DOWN_UP, flat=True)
COMFYUI: Final = _spelling("ComfyUI", "diffusion_model.", _AB)
DIFFSYNTH: Final = _spelling("DiffSynth", "", _DEFAULT)

SPELLINGS: Final[tuple[Spelling, ...]] = (
    DIFFUSERS,
    _spelling("diffusers", DENOISER, _DEFAULT),
    OLD_DIFFUSERS,
    _spelling("OneTrainer", DENOISER, _DOWN_UP),
    PEFT,
    _spelling("PEFT", "base_model.model.", _DEFAULT),
    KOHYA,
    COMFYUI,
    _spelling("ComfyUI", "diffusion_model.", _DEFAULT),
    _spelling("ComfyUI", "diffusion_model.", _DOWN_UP),
    DIFFSYNTH,
    _spelling("DiffSynth", "", _AB),
    _spelling("LightX2V", "", _DOWN_UP),
)
"""Every spelling that is read; no key is of two of them."""

WRITABLE: Final[Mapping[str, Spelling]] = {
    "diffusers": DIFFUSERS,
    "peft": PEFT,
    "kohya": KOHYA,
    "comfyui": COMFYUI,
    "diffsynth": DIFFSYNTH,
}
"""What ``registry convert --to`` writes, by the name that people type."""

TAKEN: Final[Mapping[str, frozenset[str]]] = {
    QWEN_IMAGE_EDIT.name: frozenset(WRITABLE),
    **dict.fromkeys(("sd15", "sdxl"), frozenset({"diffusers", "peft", "kohya"})),
}
"""Family -> the dialects in which loaders take its modules by diffusers' names. The programs behind the
others name the modules as the original code does, fuse or split them, and drop names that they do not know
without a word; "diffusers" and "peft" are taken for every family."""

PIXELSMILE: Final = "PixelSmile"
"""The layout of the released PixelSmile files: a helper renamed the attention of the image stream to the old
diffusers spelling and left all other modules in the new one."""

RENAMED_KINDS: Final = frozenset({"attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"})
"""The kinds of modules that the helper renames (``convert_state_dict_to_diffusers`` of diffusers)."""

RELEASED_KINDS: Final = RENAMED_KINDS | {
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
}
"""The kinds of modules that PixelSmile trains."""

_PREFIXES: Final = sorted({spelling.prefix for spelling in SPELLINGS}, key=len, reverse=True)

# What is no LoRA layer of the transformer, and why it is refused. The first that fits counts.
_REFUSED: Final[tuple[tuple[re.Pattern[str], str, Problem], ...]] = (
    (
        re.compile(
            r"^(lora_te\d*_|lora_prior_te|text_encoders?[._]|text_encoder_\d|text_model\.|te\d*[._]"
            r"|base_model\.model\.(text_model|text_encoder)|conditioner\.|cond_stage_model\.|qwen_vl\.)"
        ),
        "they change a text encoder that adapters of this base may not change, or in a spelling that is not "
        "read: it is the lever of published LoRA backdoors",
        "text encoder",
    ),
    (
        re.compile(r"^(vae|first_stage_model|image_encoder|lora_vae)[._]"),
        "they change the VAE or the image encoder; adapters change the transformer only",
        "text encoder",
    ),
    (
        re.compile(r"dora_scale$|lora_magnitude_vector"),
        "they are DoRA, which also rescales the base's weights: no B @ A says the same",
        "magnitude",
    ),
    (
        re.compile(r"\.hada_"),
        "they are LoHa, a product of two products: no B @ A of this rank is it",
        "method",
    ),
    (re.compile(r"\.lokr_"), "they are LoKr, a Kronecker product: no B @ A of this rank is it", "method"),
    (
        re.compile(r"\.(oft_|boft_|oft_blocks|ia3_|glora_|vera_lambda|lora_mid\.|reshape_weight$)"),
        "they are of another method than LoRA",
        "method",
    ),
    (
        re.compile(r"(\.|_)(diff|diff_b|diff_m|set_weight|w_norm|b_norm)$|\.bias$|base_layer\.weight$"),
        "they replace or shift whole weights or biases, which an adapter file does not carry",
        "weight",
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedKey:
    """What a key names: a module of the base and one of its tensors.

    ``spelling`` is None for alpha, which all dialects with the same prefix spell alike.
    """

    key: str
    module: str
    role: Role
    prefix: str
    spelling: Spelling | None


def names(keys: Sequence[str]) -> str:
    """Return the first few keys and how many more there are, escaped."""
    few = ", ".join(shown(key, 120) for key in keys[:_SHOWN_KEYS])
    return few if len(keys) <= _SHOWN_KEYS else f"{few} and {len(keys) - _SHOWN_KEYS} more"


def parse(
    keys: Sequence[str], spec: BaseSpec, base: str, facts: FamilyFacts = QWEN_IMAGE_EDIT
) -> tuple[str, list[ParsedKey]]:
    """Return the file's dialect and what each key names.

    Args:
        keys: the names of all tensors, each once.
        spec: the modules that an adapter of the base may change; they decide what keys mean.
        base: the base's name, for messages.
        facts: its family, which names the parts of the pipeline.

    Raises:
        DialectError: a key is of no known dialect, of a module that the base has not, or of another dialect
            than the others.
    """
    texts = tuple(f"{part}." for part in facts.text_encoders)
    _refuse_other_methods([key for key in keys if not _of_text_encoder(key, texts, spec)])
    flat: dict[str, list[str]] = defaultdict(list)
    for module in spec:
        if not module.startswith(TEXT):  # of a text encoder only diffusers' own spelling is taken
            flat[module.replace(".", "_")].append(module)
    parsed, unknown, foreign, ambiguous = [], [], [], []
    for key in keys:
        parts = _split(key, facts, texts)
        if parts is None:
            unknown.append(key)
            continue
        prefix, stem, role, spelling = parts
        if prefix == KOHYA.prefix:
            candidates = flat.get(stem, [])
        else:
            known = stem in spec and stem.startswith(TEXT) == key.startswith(texts)
            candidates = [stem] if known else []
        if len(candidates) > 1:
            ambiguous.append(key)
        elif not candidates:
            foreign.append(key)
        else:
            parsed.append(
                ParsedKey(key=key, module=candidates[0], role=role, prefix=prefix, spelling=spelling)
            )
    if unknown:
        raise DialectError("the keys are of no LoRA dialect that is known", keys=unknown, problem="key")
    if ambiguous:
        raise DialectError(f"the keys name several modules of {base}", keys=ambiguous, problem="module")
    if foreign:
        raise DialectError(
            f"{base} has no such modules that an adapter may change",
            "choose the base that the LoRA was trained on (--base), or train without these modules",
            keys=foreign,
            problem="module",
        )
    return _dialect(parsed), parsed


def _refuse_other_methods(keys: Sequence[str]) -> None:
    for pattern, why, problem in _REFUSED:
        found = [key for key in keys if pattern.search(key)]
        if found:
            raise DialectError(f"{len(found)} keys cannot be imported, {why}", keys=found, problem=problem)


def _of_text_encoder(key: str, parts: tuple[str, ...], spec: BaseSpec) -> bool:
    """Return whether a key of diffusers names a module of a text encoder that adapters may change."""
    return key.startswith(parts) and any(key.endswith(end) and key[: -len(end)] in spec for end in _AB)


def _split(
    key: str, facts: FamilyFacts, texts: tuple[str, ...]
) -> tuple[str, str, Role, Spelling | None] | None:
    """Return prefix, stem, role and spelling of a key, or None when it is none of a known dialect."""
    prefix = next(prefix for prefix in _PREFIXES if key.startswith(prefix))
    rest = key[len(prefix) :]
    if facts.prefix + "." != DENOISER:
        if prefix == DENOISER:
            rest = key  # another base's: a module that this one has not
        elif key.startswith(facts.prefix + "."):
            prefix, rest = DENOISER, key.removeprefix(facts.prefix + ".")
    if key.startswith(texts) and prefix == "":
        prefix = DENOISER  # diffusers names this part itself; the stem is the module's whole name
    if rest.endswith(ALPHA):
        return prefix, rest[: -len(ALPHA)], "alpha", None
    for spelling in SPELLINGS:
        if spelling.prefix == prefix:
            if rest.endswith(spelling.a):
                return prefix, rest[: -len(spelling.a)], "A", spelling
            if rest.endswith(spelling.b):
                return prefix, rest[: -len(spelling.b)], "B", spelling
    return None


def _dialect(parsed: Sequence[ParsedKey]) -> str:
    """Return the one dialect of all keys."""
    first: dict[str, str] = {}
    for item in parsed:
        style = f"the prefix {item.prefix!r}" if item.spelling is None else item.spelling.key("*", "A")
        first.setdefault(style, item.key)
    spellings = {item.spelling for item in parsed if item.spelling is not None}
    if len({item.prefix for item in parsed}) == 1:
        if len(spellings) == 1:
            return next(iter(spellings)).dialect
        if spellings == {DIFFUSERS, OLD_DIFFUSERS} and all(_as_released(item) for item in parsed):
            return PIXELSMILE
    if not spellings:
        raise DialectError(
            "the file has no LoRA layers, only", keys=[item.key for item in parsed], problem="alone"
        )
    raise DialectError(
        "the keys are of several dialects, of which loaders read one and drop the others without a word",
        keys=list(first.values()),
        problem="mixture",
    )


def _as_released(item: ParsedKey) -> bool:
    renamed = any(item.module.endswith("." + kind) for kind in RENAMED_KINDS)
    return item.spelling is None or (item.spelling == OLD_DIFFUSERS) == renamed
