"""The file format of adapters: a safetensors container with diffusers' LoRA keys.

The header is read by this module's own bounded, strict parser before any library sees the bytes: the
reference reader accepts a repeated header key and lets the last one win, so that two readers may see two
adapters in one file. The dialect is diffusers': ``transformer.transformer_blocks.0.attn.to_q.lora_A.weight``
(rank x in) and ``...lora_B.weight`` (out x rank), alpha folded into B, and ``...lora_magnitude_vector``
(out) for DoRA; ``unet.`` or ``text_encoder.`` stands in front of the modules of these parts. Other dialects
are recognised only to explain a refusal; ``registry.dialects`` reads them, with the same parser under the
rules ``FOREIGN``.

The file is long because the parser, its rules and the writer of one format belong together: whoever changes
one of them has to see the others.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from registry.content import CHUNK_BYTES, Content
from registry.errors import InvalidDocument, shown

MAX_WEIGHTS_BYTES: Final = 4 << 30
MAX_HEADER_BYTES: Final = 4 << 20
MAX_TENSORS: Final = 8192
MAX_KEY_LENGTH: Final = 256
MAX_METADATA_ENTRIES: Final = 64
MAX_METADATA_BYTES: Final = 16 << 10
DTYPE_BYTES: Final[Mapping[str, int]] = {"F16": 2, "BF16": 2, "F32": 4}

_MAX_DIMENSIONS = 4
_MAX_DIMENSION = 1 << 24
_MAX_NESTING = 3
_METADATA = "__metadata__"
_TEXT = "text_encoder"
_KEY = re.compile(
    r"(transformer|unet|text_encoder(?:_[0-9])?)\.([A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*)"
    r"\.lora_(?:(A|B)\.weight|(magnitude)_vector)",
    re.ASCII,
)
_TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)
_PRINTABLE = re.compile(r"[\x20-\x7e]*", re.ASCII)
_SURROGATE = re.compile("[\ud800-\udfff]")
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_BLANKS = re.compile(r"[\t\n\r]|  ")
_ESCAPE = re.compile(r"\\(?:u00(?:[2-6][0-9A-Fa-f]|7[0-9A-Ea-e])|(.))")
_MAX_PADDING = 255
"""Writers pad the header so that the data is aligned: to 8 bytes most, to 256 some."""

# Where a key of another dialect shows itself, and how that dialect is called.
_FOREIGN: Final = (
    (re.compile(r"^lora_unet_|\.lora_(down|up)\.weight$"), "kohya"),
    (re.compile(r"^base_model\.model\."), "PEFT"),
    (re.compile(r"^diffusion_model\."), "ComfyUI"),
    (re.compile(r"\.lora_[AB]\.default\.weight$"), "DiffSynth"),
    (re.compile(r"\.lora\.(down|up)\.weight$"), "old diffusers"),
    (re.compile(r"^transformer_blocks\."), "bare module names"),
)

Problem = Literal[
    "size",
    "magic",
    "header-length",
    "json",
    "duplicate-key",
    "entry",
    "dtype",
    "offsets",
    "layout",
    "metadata",
    "spelling",
    "alignment",
]


class FormatError(InvalidDocument):
    """A container is not what the format demands.

    Attributes:
        problem: which demand it breaks.
    """

    def __init__(
        self,
        problem: Problem,
        message: str,
        mend: str = "export the adapter again; the trainer writes this format",
    ) -> None:
        super().__init__(message, mend)
        self.problem: Problem = problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """What a container may have beyond what every reader agrees on; all of it stays bounded.

    Attributes:
        text: the header's encoding, "ascii" or "utf-8". Names of tensors are printable ASCII in any case.
        printable: metadata must be printable ASCII.
        metadata_entries: at most so many entries of metadata.
        metadata_bytes: at most so many characters of metadata, names included.
        numbers: dtypes that a tensor of one element may have besides DTYPE_BYTES, with their bytes; with
            any, such a tensor may also have the shape [].
        neat: the header has no whitespace, escapes or padding that no writer needs, and every tensor begins
            at a multiple of its number's bytes.
    """

    text: Literal["ascii", "utf-8"] = "ascii"
    printable: bool = True
    metadata_entries: int = MAX_METADATA_ENTRIES
    metadata_bytes: int = MAX_METADATA_BYTES
    numbers: Mapping[str, int] = field(default_factory=dict)
    neat: bool = True


CANONICAL: Final = Rules()
"""Adapters of this registry."""

FOREIGN: Final = Rules(
    text="utf-8",
    printable=False,
    metadata_entries=4096,
    metadata_bytes=MAX_HEADER_BYTES,
    numbers={"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I32": 4, "I64": 8},
    neat=False,
)
"""LoRA files of other trainers: they write alpha as a number without a shape, and much into the metadata."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """A tensor in a container: its dtype, its shape and its bytes as a half-open range of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """A container's table of contents; ``tensors`` are in the order of their bytes."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraKey:
    """A parsed key: the base's module, and what it is of the module's update.

    Attributes:
        module: as in the spec of a base: a text encoder's begins with its part of the pipeline.
        factor: a factor of B @ A, or the lengths that DoRA gives the rows of the updated weight.
        part: the part of the pipeline that the key names.
    """

    module: str
    factor: Literal["A", "B", "magnitude"]
    part: str = "transformer"

    @property
    def tensor(self) -> str:
        """What stands behind the module, without "weight"."""
        return "lora_magnitude_vector" if self.factor == "magnitude" else f"lora_{self.factor}"

    def __str__(self) -> str:
        module = self.module if self.part.startswith(_TEXT) else f"{self.part}.{self.module}"
        return f"{module}.{self.tensor}" + ("" if self.factor == "magnitude" else ".weight")


def parse_key(key: str) -> LoraKey | None:
    """Return what a key names in the diffusers dialect, or None when it is none of its keys."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    part, module = match[1], match[2]
    if module.startswith(_TEXT) and not part.startswith(_TEXT):
        return None  # else a module would have two names, and a text encoder hide behind the denoiser
    return LoraKey(
        module=f"{part}.{module}" if part.startswith(_TEXT) else module,
        factor="magnitude" if match[4] else "A" if match[3] == "A" else "B",
        part=part,
    )


def foreign_dialect(key: str) -> str | None:
    """Return the name of the other dialect that ``key`` seems to be written in, or None."""
    return next((name for pattern, name in _FOREIGN if pattern.search(key)), None)


def read_header(content: Content, rules: Rules = CANONICAL) -> Header:
    """Return the table of contents of a safetensors container.

    It is strict: what this returns has one reading. Nothing is allocated beyond the header, whose length is
    bounded; the data is not read.

    Args:
        content: the container, hostile.
        rules: what it may have; the layout of the data is strict under any rules.

    Raises:
        FormatError: the container breaks one of the format's demands.
    """
    length = _header_length(content)
    try:
        text = content[8 : 8 + length].decode(rules.text)
    except UnicodeDecodeError:
        raise FormatError("json", f"the header is not {rules.text.upper()}") from None
    table = _header_json(text)
    metadata = _metadata(table.pop(_METADATA, {}), rules)
    if not 1 <= len(table) <= MAX_TENSORS:
        raise FormatError("entry", f"the file has {len(table)} tensors; 1 to {MAX_TENSORS} are allowed")
    origin = 8 + length
    tensors = {key: _tensor(key, value, origin, rules) for key, value in table.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_layout(ordered, origin, len(content))
    if rules.neat:
        _check_spelling(text)
        _check_alignment(ordered)
    return Header(tensors=ordered, metadata=metadata)


def serialise(header: Header, content: Content) -> bytes:
    """Return the canonical container of the same tensors.

    Tensors are sorted by key, the header holds no metadata beyond ``format`` and has one spelling, so that
    two files with the same tensors become the same bytes and nothing but tensors is left of the file.
    """
    # Its value is its buffer: the container is in memory once.
    sink = io.BytesIO()
    serialise_to(header, content, sink.write)
    return sink.getvalue()


def serialise_to(header: Header, content: Content, write: Callable[[bytes], object]) -> None:
    """Write what ``serialise`` returns, piece by piece.

    Args:
        header: the table of contents of ``content``.
        content: a container; at most CHUNK_BYTES of it are held at a time.
        write: takes the pieces in order, all of each.
    """

    def pieces(info: TensorInfo) -> Iterable[bytes]:
        for start in range(info.start, info.end, CHUNK_BYTES):
            yield content[start : min(start + CHUNK_BYTES, info.end)]

    write_container(header.tensors, lambda key: pieces(header.tensors[key]), write)


def write_container(
    tensors: Mapping[str, TensorInfo],
    pieces: Callable[[str], Iterable[bytes]],
    write: Callable[[bytes], object],
) -> None:
    """Write a container in the canonical form.

    Args:
        tensors: key -> dtype and shape; where the tensor lies in another file does not matter.
        pieces: the bytes of a key's tensor, in order; asked once for each key, in the order of the file.
        write: takes the pieces of the container in order, all of each.
    """
    table: dict[str, Any] = {_METADATA: {"format": "pt"}}
    offset = 0
    for key in sorted(tensors):
        info = tensors[key]
        size = math.prod(info.shape) * DTYPE_BYTES[info.dtype]
        table[key] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    text += b" " * (-len(text) % 8)
    write(len(text).to_bytes(8, "little") + text)
    for key in sorted(tensors):
        for piece in pieces(key):
            write(piece)


def _header_length(content: Content) -> int:
    size = len(content)
    if size < 10:
        raise FormatError("size", f"the file has {size} bytes: too short for a safetensors file")
    if size > MAX_WEIGHTS_BYTES:
        raise FormatError("size", f"the file has {size} bytes; at most {MAX_WEIGHTS_BYTES} are allowed")
    length = int.from_bytes(content[:8], "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise FormatError(
            "header-length",
            f"the header claims {length} bytes; it needs 2 to {MAX_HEADER_BYTES}, within the file",
        )
    return length


class _DuplicateKey(ValueError):
    pass


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateKey(f"the header has the key {shown(key)!r} twice")
        result[key] = value
    return result


def _integer(digits: str) -> int:
    if len(digits) > 15:
        raise ValueError("an integer has more than 15 digits")
    if digits == "-0":  # zero for some readers, a float or an error for others
        raise ValueError("an integer is written -0")
    return int(digits)


def _refuse_number(text: str) -> Any:
    raise ValueError(f"{shown(text, 40)} is not an integer")


def _header_json(text: str) -> dict[str, Any]:
    body = text.rstrip(" ")
    if not (body.startswith("{") and body.endswith("}")):
        raise FormatError("json", "the header is not one JSON object padded with spaces")
    if _nesting(body) > _MAX_NESTING:
        raise FormatError("json", f"the header is nested deeper than {_MAX_NESTING} levels")
    try:
        content = json.loads(
            body,
            object_pairs_hook=_pairs,
            parse_int=_integer,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
        )
    except _DuplicateKey as error:
        raise FormatError("duplicate-key", str(error)) from None
    except (ValueError, RecursionError) as error:
        raise FormatError("json", f"the header is not valid JSON: {shown(error)}") from None
    assert isinstance(content, dict)  # it begins with a brace
    return content


def _nesting(text: str) -> int:
    """Return the deepest nesting of brackets outside of strings, before a recursive parser runs.

    Every character is looked at once: a string without an end is one token up to the end of the text.
    """
    depth = deepest = 0
    for token in _TOKEN.finditer(text):
        first = token[0][0]
        if first in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif first in "]}":
            depth -= 1
    return deepest


def _metadata(value: Any, rules: Rules) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise FormatError("metadata", "the header's metadata must map strings to strings")
    if len(value) > rules.metadata_entries:
        raise FormatError(
            "metadata", f"the header has {len(value)} metadata entries; at most {rules.metadata_entries}"
        )
    total = sum(len(key) + len(text) for key, text in value.items())
    if total > rules.metadata_bytes:
        raise FormatError(
            "metadata", f"the header's metadata has {total} characters; at most {rules.metadata_bytes}"
        )
    for key, text in value.items():
        if rules.printable and not (_PRINTABLE.fullmatch(key) and _PRINTABLE.fullmatch(text)):
            raise FormatError("metadata", f"the metadata entry {shown(key)!r} is not printable ASCII")
        if _SURROGATE.search(key) or _SURROGATE.search(text):  # the reference reader refuses the file
            raise FormatError("metadata", f"the metadata entry {shown(key)!r} has half a character")
    return value


def _tensor(key: str, value: Any, origin: int, rules: Rules) -> TensorInfo:
    label = shown(key, 120)
    if not (1 <= len(key) <= MAX_KEY_LENGTH and _PRINTABLE.fullmatch(key)):
        raise FormatError(
            "entry", f"the tensor name {label!r} is not 1 to {MAX_KEY_LENGTH} printable ASCII characters"
        )
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise FormatError("entry", f"the entry of {label!r} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not (
        isinstance(shape, list)
        and (0 if rules.numbers else 1) <= len(shape) <= _MAX_DIMENSIONS
        and all(type(size) is int and 1 <= size <= _MAX_DIMENSION for size in shape)
    ):
        raise FormatError("entry", f"the shape of {label!r} is not 1 to {_MAX_DIMENSIONS} positive integers")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(at) is int for at in offsets)):
        raise FormatError("entry", f"the offsets of {label!r} are not two integers")
    count = math.prod(shape)
    allowed = rules.numbers if count == 1 and rules.numbers else DTYPE_BYTES
    if not (isinstance(dtype, str) and dtype in allowed):
        raise FormatError("dtype", f"{label!r} has dtype {shown(dtype, 20)}; allowed: {', '.join(allowed)}")
    begin, end = offsets
    needed = count * allowed[dtype]
    if begin < 0 or end - begin != needed:
        raise FormatError(
            "offsets", f"{label!r} has {end - begin} bytes at {begin}; shape and dtype need {needed}"
        )
    return TensorInfo(dtype=dtype, shape=tuple(shape), start=origin + begin, end=origin + end)


def _check_layout(ordered: Mapping[str, TensorInfo], origin: int, total: int) -> None:
    """Demand that the tensors cover the data without gap, overlap or rest."""
    at = origin
    for key, info in ordered.items():
        if info.start != at:
            what = "overlaps the tensor before it" if info.start < at else "leaves a gap before it"
            raise FormatError("layout", f"{shown(key, 120)!r} {what} ({info.start} instead of {at})")
        at = info.end
    if at != total:
        raise FormatError("layout", f"the tensors end at byte {at}, the file at {total}")


def _check_spelling(text: str) -> None:
    """Demand the spelling of the known writers: what is spelled otherwise hides something, or from somebody.

    Args:
        text: the header, valid JSON.
    """
    body = text.rstrip(" ")
    if len(text) - len(body) > _MAX_PADDING:
        raise FormatError(
            "spelling",
            f"{len(text) - len(body)} spaces pad the header; at most {_MAX_PADDING} are needed",
        )
    if _BLANKS.search(_STRING.sub('""', body)):
        raise FormatError("spelling", "the header has line breaks, tabs or rows of spaces between its tokens")
    for found in _ESCAPE.finditer(body):
        if found[1] is None or found[1] == "/":
            raise FormatError("spelling", f"the header writes a plain character as {shown(found[0])}")


def _check_alignment(ordered: Mapping[str, TensorInfo]) -> None:
    for key, info in ordered.items():
        if info.start % DTYPE_BYTES[info.dtype]:
            raise FormatError(
                "alignment",
                f"{shown(key, 120)!r} begins at byte {info.start}, no multiple of the "
                f"{DTYPE_BYTES[info.dtype]} bytes of {info.dtype}",
            )
