"""How strong a LoRA file means its update to be: every place that states alpha is read, and all must agree.

A module's update is scale * B @ A with scale = alpha / rank (with rank-stabilised LoRA alpha / sqrt(rank)).
Alpha stands in a tensor beside the factors, in the header, in a file beside the LoRA, or nowhere: then
loaders take the rank for it, so that the scale is 1.
"""

from __future__ import annotations

import math
import re
import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from registry.content import Content
from registry.dialects.grammar import DENOISER, PEFT, PIXELSMILE, RELEASED_KINDS, DialectError
from registry.errors import shown
from registry.formats import TensorInfo
from registry.manifest import strict_json

MAX_ALPHA: Final = 8192.0
MAX_CONFIG_BYTES: Final = 1 << 20
CONFIG_NAME: Final = "adapter_config.json"
"""Where PEFT keeps what it knows of an adapter, beside the weights."""

RELEASED_RANK, RELEASED_ALPHA = 64, 128.0
"""Rank and alpha of the configuration that PixelSmile was trained with; its files state neither."""

NOWHERE: Final = "nobody: loaders take the rank for alpha"

HEADER_CONFIG: Final = "lora_adapter_metadata"
"""The entry of the header's metadata in which diffusers keeps the same."""

_HEADER_ALPHAS = ("ss_network_alpha", "lora_alpha", "network_alpha", "alpha", "transformer.lora_alpha")
_PRECISION: Final[Mapping[str, float]] = {"BF16": 2**-8, "F16": 2**-10}
_EXACT = 1e-6
_NUMBERS: Final[Mapping[str, str]] = {"F16": "<e", "F32": "<f", "F64": "<d", "I32": "<i", "I64": "<q"}

# Fields of a PEFT configuration that do not change what B @ A means.
_HARMLESS: Final = frozenset(
    {
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"),
        *("peft_type", "peft_version", "task_type", "auto_mapping", "inference_mode", "lora_dropout"),
        *("base_model_name_or_path", "revision", "target_modules", "exclude_modules", "layers_to_transform"),
        *("layers_pattern", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
    }
)
_MAX_PATTERNS = 2048
_PATTERN = re.compile(r"\^?[A-Za-z0-9_.]+", re.ASCII)
_HARMLESS_STARTS: Final = ("gaussian", "orthogonal")


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """A module's two factors in the file; ``rank`` is the number of rows of A."""

    module: str
    a: TensorInfo
    b: TensorInfo
    rank: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Claim:
    """A place that states the strength: the scale of each module, and how exact its numbers are."""

    where: str
    scales: Mapping[str, float]
    precision: float = _EXACT


@dataclass(frozen=True, kw_only=True, slots=True)
class Strength:
    """What the file means.

    Attributes:
        scales: module -> factor of its B @ A.
        source: where that stands, for people.
        stated: whether it stands anywhere.
    """

    scales: Mapping[str, float]
    source: str
    stated: bool = True


def resolve(
    dialect: str,
    factors: Sequence[Factors],
    alphas: Mapping[str, float],
    precision: float,
    metadata: Mapping[str, str],
    config: bytes | None,
    stated: float | None,
    kinds: frozenset[str],
    part: str = DENOISER,
) -> Strength:
    """Return the strength of every module.

    Args:
        dialect: the file's dialect.
        factors: the modules.
        alphas: module -> the value of its alpha tensor, for those that have one.
        precision: relative precision of those values.
        metadata: the header's.
        config: the PEFT configuration that lies beside the file, if any.
        stated: what the user says alpha is, if anything.
        kinds: the kinds of modules in the file.
        part: the denoiser's name in the pipeline, with a dot.

    Raises:
        DialectError: places disagree, a number is out of range, or the strength cannot be known.
        InvalidDocument: a configuration is not strict JSON.
    """
    claims = []
    if alphas:
        claims.append(_from_tensors(factors, alphas, precision))
    if HEADER_CONFIG in metadata:
        where = f"the header's {HEADER_CONFIG}"
        values = _unprefixed(header_config(metadata), where, part)
        claims.append(_Claim(where=where, scales=configured(values, where, factors)))
    if dialect == PEFT.dialect and config is not None:
        values = config_values(config, CONFIG_NAME)
        claims.append(_Claim(where=CONFIG_NAME, scales=configured(values, CONFIG_NAME, factors)))
    claims += _from_header(factors, metadata, uniform=len(set(alphas.values())) <= 1)
    if stated is not None:
        claims.append(_one_alpha("--alpha", stated, factors))
    _check_agreement(claims)
    if claims:
        return Strength(scales=claims[0].scales, source=claims[0].where)
    return _unstated(dialect, factors, kinds)


def number(content: Content, key: str, info: TensorInfo) -> float:
    """Return the one number of a tensor.

    Raises:
        DialectError: it has several, or the number is no alpha.
    """
    if math.prod(info.shape) != 1:
        raise DialectError(f"an alpha is one number, not {info.shape}", keys=[key])
    data = content[info.start : info.end]
    if info.dtype == "BF16":
        value = struct.unpack("<f", b"\0\0" + data)[0]
    else:
        value = struct.unpack(_NUMBERS[info.dtype], data)[0]
    return _alpha(value, key)


def precision_of(dtype: str) -> float:
    """Return how exactly a dtype holds a number, relative to it."""
    return _PRECISION.get(dtype, _EXACT)


def _alpha(value: Any, where: str) -> float:
    if type(value) not in (int, float) or not 0 < value <= MAX_ALPHA:  # NaN is refused, too
        raise DialectError(
            f"the alpha in {shown(where)} is {shown(value, 40)}; it must lie above 0 and up to {MAX_ALPHA:g}",
            "ask who trained the LoRA for the right value",
        )
    return float(value)


def _one_alpha(where: str, alpha: float, factors: Sequence[Factors]) -> _Claim:
    value = _alpha(alpha, where)
    return _Claim(where=where, scales={item.module: value / item.rank for item in factors})


def _from_tensors(factors: Sequence[Factors], alphas: Mapping[str, float], precision: float) -> _Claim:
    missing = [item.module for item in factors if item.module not in alphas]
    if missing:
        raise DialectError("some modules have an alpha and these have none", keys=missing)
    scales = {item.module: alphas[item.module] / item.rank for item in factors}
    return _Claim(where="the file's alpha tensors", scales=scales, precision=precision)


def _from_header(factors: Sequence[Factors], metadata: Mapping[str, str], *, uniform: bool) -> list[_Claim]:
    """Return what entries of the header claim; they know one alpha only, so not of a file with several."""
    claims = []
    for name in _HEADER_ALPHAS if uniform else ():
        try:
            value = float(metadata.get(name, ""))
        except ValueError:
            continue  # "None" and "Dynamic" state nothing
        if value != 0:  # kohya writes 0 for: the same as the rank
            claims.append(_one_alpha(f"the header's {name}", value, factors))
    return claims


def header_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the configuration in a header that has one, as it stands there; raises as `resolve`."""
    text = metadata[HEADER_CONFIG].encode("utf-8", "surrogatepass")
    return config_values(text, f"the header's {HEADER_CONFIG}")


def config_values(data: bytes, where: str) -> dict[str, Any]:
    """Return the fields of a configuration; raises as `resolve`."""
    value = strict_json(data, where, MAX_CONFIG_BYTES)
    if not isinstance(value, dict):
        raise DialectError(f"{where} is no JSON object")
    return value


def _unprefixed(values: Mapping[str, Any], where: str, part: str) -> dict[str, Any]:
    """Return the configuration of the denoiser; diffusers puts the part's name before each field."""
    if not any("." in name for name in values):
        return dict(values)
    others = [name for name in values if not name.startswith(part)]
    if others:
        raise DialectError(f"{where} is about other parts than {part[:-1]}", keys=others)
    return {name.removeprefix(part): value for name, value in values.items()}


def configured(values: Mapping[str, Any], where: str, factors: Sequence[Factors]) -> Mapping[str, float]:
    """Return the scale of each module by a PEFT configuration that says nothing beyond plain LoRA.

    Args:
        values: its fields, hostile.
        where: where it stands, for messages.
        factors: the modules.

    Raises:
        DialectError: it says more, or other ranks than the tensors have, or a number is out of range.
    """
    other = [name for name, value in values.items() if name not in _HARMLESS and value and value != "none"]
    if values.get("peft_type", "LORA") != "LORA":
        other.append("peft_type")
    start = values.get("init_lora_weights")
    if not (start is None or isinstance(start, bool) or start in _HARMLESS_STARTS):
        other.append("init_lora_weights")  # such as pissa: it changes the base's weights, too
    if not isinstance(values.get("use_rslora"), bool | None):
        other.append("use_rslora")  # PEFT takes everything that is not empty for a yes
    if other:
        raise DialectError(f"{where} asks for more than plain LoRA layers", keys=other)
    default_rank, default_alpha = values.get("r"), _alpha(values.get("lora_alpha"), f"{where}, lora_alpha")
    ranks = Patterns(values.get("rank_pattern"), f"{where}, rank_pattern")
    alphas = Patterns(values.get("alpha_pattern"), f"{where}, alpha_pattern")
    scales, wrong = {}, []
    for item in factors:
        if ranks.value(item.module, default_rank) != item.rank:
            wrong.append(item.module)
            continue
        alpha = _alpha(alphas.value(item.module, default_alpha), f"{where}, alpha_pattern")
        stabilised = values.get("use_rslora") is True
        scales[item.module] = alpha / (math.sqrt(item.rank) if stabilised else item.rank)
    if wrong:
        raise DialectError(f"the tensors have other ranks than {where} says", keys=wrong)
    return scales


class Patterns:
    """The patterns of a PEFT configuration: module names, or the ends of them after a dot.

    As regular expressions of a stranger they could run for ever, so only names are taken, in which a dot
    stands for any character as it does for PEFT. The first one that fits a module counts.

    Args:
        value: what the configuration says.
        where: where it says that, for messages.

    Raises:
        DialectError: it is no object of names.
    """

    def __init__(self, value: Any, where: str) -> None:
        values = {} if value is None else value
        if not isinstance(values, dict) or len(values) > _MAX_PATTERNS:
            raise DialectError(f"{where} is no object of at most {_MAX_PATTERNS} patterns")
        others = [name for name in values if not _PATTERN.fullmatch(name)]
        if others:
            raise DialectError(f"{where} has patterns that are more than a module's name", keys=others)
        self._values = list(values.values())
        self._by_length: dict[int, list[tuple[int, bool, re.Pattern[str]]]] = defaultdict(list)
        for number, pattern in enumerate(values):
            name = pattern.removeprefix("^")
            self._by_length[len(name)].append((number, name != pattern, re.compile(name)))

    def value(self, module: str, default: Any) -> Any:
        """Return the value of the first pattern that fits a module, or the default."""
        starts = [0, *(at + 1 for at, character in enumerate(module) if character == ".")]
        found = [
            number
            for start in starts
            for number, whole, name in self._by_length.get(len(module) - start, ())
            if not (whole and start) and name.fullmatch(module, start)
        ]
        return self._values[min(found)] if found else default


def _check_agreement(claims: Sequence[_Claim]) -> None:
    for claim in claims[1:]:
        first = claims[0]
        tolerance = first.precision + claim.precision
        wrong = [
            module
            for module, scale in first.scales.items()
            if not math.isclose(scale, claim.scales[module], rel_tol=tolerance)
        ]
        if wrong:
            left, right = first.scales[wrong[0]], claim.scales[wrong[0]]
            raise DialectError(
                f"{first.where} and {claim.where} disagree about the strength ({left:g} and {right:g} times "
                f"B @ A), in {len(wrong)} modules",
                "one of them was edited; ask who trained the LoRA for the right file",
                keys=wrong,
            )


def _unstated(dialect: str, factors: Sequence[Factors], kinds: frozenset[str]) -> Strength:
    """Return the strength of a file that says nothing about it."""
    if dialect == PIXELSMILE:
        if kinds == RELEASED_KINDS and {item.rank for item in factors} == {RELEASED_RANK}:
            claim = _one_alpha("the training configuration of PixelSmile", RELEASED_ALPHA, factors)
            return Strength(scales=claim.scales, source=claim.where)
        raise _unknown("the file has the layout of PixelSmile, which states no alpha, and is not its release")
    if dialect == PEFT.dialect:
        raise _unknown(f"PEFT keeps alpha in {CONFIG_NAME}, which does not lie beside the file")
    scales = {item.module: 1.0 for item in factors}
    return Strength(scales=scales, source=NOWHERE, stated=False)


def _unknown(why: str) -> DialectError:
    return DialectError(f"the strength is not known: {why}", "say what alpha the training had (--alpha)")
