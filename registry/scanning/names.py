"""What a key that is no LoRA factor of the canonical dialect wants to be.

Every key that is not taken is explained: another part of the pipeline, another method, a whole weight, a name
that imitates another, or a second name of a tensor that is there already.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

_OTHER_PARTS: Final = re.compile(
    r"^(base_model\.model\.|transformer\.|unet\.|model\.|pipe\.|pipeline\.)*"
    r"(text_encoder|text_model|te\d*[._]|lora_te|lora_prior_te|clip|t5|qwen_vl|qwen2|language_model|conditioner"
    r"|cond_stage_model|vae|lora_vae|first_stage|image_encoder|visual\.|vision|tokenizer|scheduler"
    r"|safety_checker)",
    re.IGNORECASE,
)
_STRENGTH: Final = re.compile(
    r"(^|[._])alpha$|\.(scale|scaling|magnitude_vector)(\.|$)|lora_magnitude|dora_scale", re.IGNORECASE
)
_METHOD: Final = re.compile(
    r"\.(hada_|lokr_|oft_|boft_|oft_blocks|ia3_|glora_|vera_|lora_mid|lora_embedding|on_input|b[12]\.weight"
    r"|lora_ga|hra_|fourierft|road_|shira_|waveft_|prompt_|prefix_)",
    re.IGNORECASE,
)
_WHOLE: Final = re.compile(
    r"(^|[._])(diff|diff_b|diff_m|set_weight|reshape_weight|w_norm|b_norm)$|(^|[._])(bias|weight)\s*$"
    r"|base_layer\.|modules_to_save|original_module|running_(mean|var)$",
    re.IGNORECASE,
)

_PREFIX: Final = re.compile(
    r"^(transformer[._](?!blocks)|base_model\.model\.|base_model\.|diffusion_model\.|model\.|module\.|unet\."
    r"|lora_unet_|lora_transformer_|lycoris_)+",
    re.IGNORECASE,
)
_FACTORS: Final = (
    (re.compile(r"[._]lora[._]?(a|down)([._][a-z0-9]+)?[._]weight\s*$", re.IGNORECASE), "A"),
    (re.compile(r"[._]lora[._]?(b|up)([._][a-z0-9]+)?[._]weight\s*$", re.IGNORECASE), "B"),
)
# Characters and pairs that a person takes for each other, and the one that stands for them.
_ALIKE: Final = str.maketrans(
    {"0": "o", "1": "l", "i": "l", "|": "l", "5": "s", "8": "b", "9": "g", "q": "g"}
)
_NUMBER: Final = re.compile(r"\d+")

_WHY: Final = (
    (_OTHER_PARTS, "ADP-STR-002", "adapters of this base may not change that part"),
    (_STRENGTH, "ADP-MET-002", "it scales a module"),
    (_METHOD, "ADP-STR-014", "no factor of B @ A"),
    (_WHOLE, "ADP-STR-013", "it is no LoRA factor"),
)


def explained(key: str) -> tuple[str, str] | None:
    """Return the rule that a key breaks and the evidence; None when it resembles nothing that is known."""
    rules = _WHY if same_tensor(key) is None else _WHY[:-1]
    return next(((rule, why) for pattern, rule, why in rules if pattern.search(key)), None)


def other_part(module: str) -> bool:
    """Return whether a module, which is none of the transformer's, is of another part of the pipeline."""
    return _OTHER_PARTS.search(module) is not None


def same_tensor(key: str) -> str | None:
    """Return one name for all spellings of a factor's key, or None when the key is no factor's.

    Prefixes of other programs, the old names of the factors, the name of PEFT's adapter, dots and
    underscores, upper and lower case, leading zeros and blanks make no difference to it.
    """
    for pattern, factor in _FACTORS:
        match = pattern.search(key)
        if match is not None:
            return f"{_plain(_PREFIX.sub('', key[: match.start()].strip()))}#{factor}"
    return None


def stem(key: str) -> str:
    """Return a key without the canonical prefix and without a factor's name, however they are written."""
    for pattern, _ in _FACTORS:
        key = pattern.sub("", key)
    return re.sub(r"^\s*(transformer|unet)\.", "", key, count=1, flags=re.IGNORECASE)


def twins(keys: Iterable[str]) -> list[tuple[str, str]]:
    """Return the pairs of keys that are spellings of one tensor: a key, and the first one that it repeats."""
    first: dict[str, str] = {}
    found = []
    for key in keys:
        name = same_tensor(key)
        if name is not None and first.setdefault(name, key) != key:
            found.append((key, first[name]))
    return found


class Imitations:
    """Finds the module that a name imitates.

    Args:
        modules: the names of the base's modules.
    """

    def __init__(self, modules: Iterable[str]) -> None:
        self._real: Mapping[str, str] = {_skeleton(name): name for name in modules}

    def of(self, name: str) -> str | None:
        """Return the module that ``name``, which is none, looks like; or None."""
        return self._real.get(_skeleton(name))


def _plain(name: str) -> str:
    lower = _NUMBER.sub(lambda match: str(int(match[0][:18])), name.lower())
    return re.sub(r"[\s._-]+", "_", lower).strip("_")


def _skeleton(name: str) -> str:
    """Return what is left of a name when everything that looks alike is the same."""
    bare = _plain(name).replace("_", "").translate(_ALIKE)
    return bare.replace("rn", "m").replace("vv", "w")
