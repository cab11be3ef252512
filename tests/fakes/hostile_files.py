"""A corpus of hostile adapters: named cases, each with the layer that it attacks and what must stop it.

``case.files()`` is a folder, name -> bytes, whose weights are always ``WEIGHTS_NAME``. Every payload is
inert: pickles name functions and are never opened, archives hold nothing, scripts print nothing. The layers
are those of the literature's corpora. Here are container, metadata and pickle, ``BYTES``; schema, numeric and
weights, and the clean files, are in hostile_tensors.py, which puts all of them together.

The file is long because it is a list.
"""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from fakes.adapters import RANK, Factors, container, factors, padded, raw_container, table
from registry.formats import MAX_HEADER_BYTES
from registry.manifest import WEIGHTS_NAME

Layer = Literal["container", "metadata", "schema", "numeric", "weights", "pickle"]
Files = Mapping[str, bytes]

LAYERS: tuple[Layer, ...] = ("container", "metadata", "schema", "numeric", "weights", "pickle")
Q = "transformer.transformer_blocks.0.attn.to_q"


@dataclass(frozen=True, kw_only=True, slots=True)
class Hostile:
    """A hostile adapter.

    Attributes:
        name: what is wrong with it.
        layer: where the attack lies.
        build: makes the weights, or all files of the folder.
        rule: the rule that answers; others may answer, too.
        verdict: what the scanner says: "block", or "review" where a person has to decide.
        card: what the card says beside the defaults of `fakes.adapters.card`.
    """

    name: str
    layer: Layer
    build: Callable[[], bytes | Files]
    rule: str
    verdict: Literal["block", "review"] = "block"
    card: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def files(self) -> Files:
        """The folder."""
        found = self.build()
        return {WEIGHTS_NAME: found} if isinstance(found, bytes) else found


# --- builders -----------------------------------------------------------------------------------------------


def honest() -> tuple[dict[str, Any], bytes]:
    return table(factors())


def with_header(change: Callable[[dict[str, Any]], object]) -> bytes:
    """An honest container whose table of contents is changed."""
    entries, data = honest()
    change(entries)
    return raw_container(padded(json.dumps(entries)), data)


def with_text(change: Callable[[str], str | bytes]) -> bytes:
    """An honest container whose header's text is changed."""
    entries, data = honest()
    return raw_container(change(json.dumps(entries)), data)


def with_entry(name: str, value: Any) -> bytes:
    return with_header(lambda entries: entries[f"{Q}.lora_A.weight"].__setitem__(name, value))


def with_extra(piece: bytes) -> bytes:
    """A valid container whose last tensor's bytes are a stranger's."""
    entries, data = honest()
    piece = b"\0" * (len(piece) % 2) + piece
    offsets = [len(data), len(data) + len(piece)]
    entries["zz.weight"] = {"dtype": "BF16", "shape": [len(piece) // 2], "data_offsets": offsets}
    return raw_container(padded(json.dumps(entries)), data + piece)


def renamed_header(old: str, new: str) -> bytes:
    """The same tensors with another text in the header, of any length."""
    return with_text(lambda text: text.replace(old, new, 1))


def again(name: str, **changes: Any) -> bytes:
    """The header names a key a second time, as ``name``, with other values."""
    entries, data = honest()
    text = json.dumps(entries)
    second = json.dumps({**entries[f"{Q}.lora_A.weight"], **changes})
    return raw_container(padded(f'{text[:-1]}, "{name}": {second}}}'), data)


def zipped(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tarred(name: str, data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def imports(module: str = "os", name: str = "getcwd") -> bytes:
    """A pickle that would call a harmless function of another module."""
    return f"c{module}\n{name}\n)R.".encode()


def zip_by_absolute_offset() -> bytes:
    """The directory lies where the record says from the file's start, with a gap behind it."""
    archive = zipped({"data.pkl": imports()})
    end = archive.rfind(b"PK\x05\x06")
    gap = bytes(64)
    draft = with_extra(archive[:end] + gap + archive[end:])
    at = draft.rfind(b"PK\x01\x02")
    record = draft.rfind(b"PK\x05\x06")
    return draft[: record + 16] + at.to_bytes(4, "little") + draft[record + 20 :]


def tar_polyglot() -> bytes:
    """A valid container whose first 512 bytes are a header of the old tar format, with the right checksum.

    The fields of tar from byte 100 to 156 are octal digits; here they lie in the name of a tensor.
    """
    data = bytes(1536)

    def built(checksum: str) -> bytes:
        # Mode, owner and group have eight digits, size and time twelve; "0" behind them is a plain file.
        name = "n" * 90 + "0" * 48 + checksum + "0"
        entry = {"dtype": "BF16", "shape": [len(data) // 2], "data_offsets": [0, len(data)]}
        return raw_container(padded(json.dumps({name: entry})), data)

    block = built("00000000")[:512]
    return built(f"{sum(block) - sum(block[148:156]) + 8 * ord(' '):08o}")


def pickle_polyglot() -> bytes:
    """A valid container that is a valid pickle from its first byte on, with an import and a call in it.

    The header's length begins with the byte "X", which tells a pickle machine to jump over a text of as many
    bytes as the length's other bytes say. From there, instructions of "C" and a length jump through the
    header to the tensor, whose bytes are the rest of the pickle.
    """
    opening, data = '{"__metadata__":{"n":"', imports().ljust(1024, b"\0")
    closing = '"},"w":{"dtype":"BF16","shape":[512],"data_offsets":[0,1024]}}'
    reach = 8 + len(opening) - 5
    length = ord("X") + 256 * reach
    rest = length - len(opening)
    text, last = "", 110
    while rest - len(text) > 102 + 102 + last:
        text += "C" + chr(100) + "x" * 100
    middle = rest - len(text) - last
    first = middle // 2
    for size in (first, middle - first):
        text += "C" + chr(size - 2) + "x" * (size - 2)
    text += "C" + chr(last - 2) + "x" * (last - 2 - len(closing))
    return raw_container(opening + text + closing, data)


def bomb(levels: int) -> str:
    return '{"a": ' + "[" * levels + "]" * levels + "}"


def metadata(tags: Any) -> bytes:
    return container(factors(), metadata=tags)


def raw_metadata(text: str) -> bytes:
    """Metadata that is spelled by hand."""
    return with_text(lambda header: padded('{"__metadata__": ' + text + ", " + header[1:]))


def adapter_metadata(**values: Any) -> bytes:
    """What diffusers reads from the header: the configuration of the LoRA layers."""
    named = {f"transformer.{name}": value for name, value in values.items()}
    return metadata({"format": "pt", "lora_adapter_metadata": json.dumps({"transformer.r": RANK, **named})})


def starts_with(piece: bytes) -> bytes:
    """The first tensor's bytes begin with a stranger's; a BF16 file takes any."""
    entries, data = honest()
    return raw_container(padded(json.dumps(entries)), piece + data[len(piece) :])


def replaced(key: str, values: Any) -> Factors:
    return {**factors(), key: np.asarray(values, np.float32)}


def hole() -> bytes:
    entries, data = honest()
    for entry in entries.values():
        entry["data_offsets"] = [at + 64 for at in entry["data_offsets"]]
    return raw_container(padded(json.dumps(entries)), b"hidden!!" * 8 + data)


def alias() -> bytes:
    entries, data = honest()
    entries["alias"] = entries[min(entries)]
    return raw_container(padded(json.dumps(entries)), data)


def many(count: int) -> bytes:
    one = {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}
    return with_header(lambda entries: entries.update({f"t{index}": one for index in range(count)}))


def key_becomes(new: str) -> bytes:
    key = f"{Q}.lora_A.weight"
    return with_header(lambda entries: entries.update({new: entries.pop(key)}))


def indented() -> bytes:
    entries, data = honest()
    return raw_container(padded(json.dumps(entries, indent="\t")), data)


def misaligned() -> bytes:
    text = json.dumps(honest()[0])
    return raw_container(text + " " * (1 - len(text) % 2), honest()[1])


# --- the lists: name -> builder, rule -----------------------------------------------------------------------

_Row = tuple[Callable[[], bytes | Files], str]

CONTAINER: Mapping[str, _Row] = {
    "empty file": (lambda: b"", "ADP-CON-001"),
    "nothing but a length": (lambda: (2).to_bytes(8, "little"), "ADP-CON-001"),
    "header of no bytes": (lambda: raw_container("", b"x" * 64), "ADP-CON-003"),
    "header longer than the file": (lambda: raw_container("{}", b"x" * 64, length=1 << 16), "ADP-CON-003"),
    "header of 2^63 bytes": (lambda: raw_container("{}", b"x" * 64, length=1 << 63), "ADP-CON-003"),
    "header of 5 MB": (lambda: with_text(lambda text: text + " " * MAX_HEADER_BYTES), "ADP-CON-003"),
    "header that is no JSON": (lambda: raw_container("{nothing}", b"x" * 64), "ADP-CON-004"),
    "header that is a list": (lambda: raw_container("[1, 2, 3]", b"x" * 64), "ADP-CON-004"),
    "header behind a blank": (lambda: with_text(lambda text: " " + text), "ADP-CON-004"),
    "header behind a byte-order mark": (lambda: with_text(lambda text: "\ufeff" + text), "ADP-CON-004"),
    "header in UTF-16": (lambda: with_text(lambda text: text.encode("utf-16-le")), "ADP-CON-004"),
    "header padded with line breaks": (lambda: with_text(lambda text: text + "\n" * 8), "ADP-CON-004"),
    "header padded with zeros": (lambda: with_text(lambda text: text + "\0" * 8), "ADP-CON-004"),
    "header with a second object": (lambda: with_text(lambda text: text + "{}"), "ADP-CON-004"),
    "header nested 5,000 levels deep": (lambda: raw_container(bomb(5000), b"x" * 64), "ADP-CON-004"),
    "header nested five levels deep": (
        lambda: raw_container('{"__metadata__": {"a": {"b": [[]]}}}', b"x" * 64),
        "ADP-CON-004",
    ),
    "header with a comment": (lambda: renamed_header("{", "{/* */ "), "ADP-CON-004"),
    "header with a comma too many": (lambda: with_text(lambda text: text[:-1] + ",}"), "ADP-CON-004"),
    "offset NaN": (lambda: renamed_header("[0,", "[NaN,"), "ADP-CON-004"),
    "offset in floating point": (lambda: renamed_header("[0,", "[0.0,"), "ADP-CON-004"),
    "offset with an exponent": (lambda: renamed_header("[0,", "[0e0,"), "ADP-CON-004"),
    "offset of minus zero": (lambda: renamed_header("[0,", "[-0,"), "ADP-CON-004"),
    "offset with a zero before it": (lambda: renamed_header("[0,", "[00,"), "ADP-CON-004"),
    "offset of a hundred digits": (lambda: renamed_header("[0,", f"[{'9' * 100},"), "ADP-CON-004"),
    "offset of a million digits": (lambda: renamed_header("[0,", f"[{'9' * 10**6},"), "ADP-CON-004"),
    "name with a Cyrillic letter": (lambda: renamed_header("attn.to_q", "\u0430ttn.to_q"), "ADP-CON-004"),
    "name with an invisible character": (lambda: renamed_header("to_q", "to\u200b_q"), "ADP-CON-004"),
    "tensor named twice": (lambda: again(f"{Q}.lora_A.weight", shape=[32, RANK]), "ADP-CON-005"),
    "tensor named twice, once in escapes": (
        lambda: again("\\u0074" + f"{Q}.lora_A.weight"[1:], shape=[32, RANK]),
        "ADP-CON-005",
    ),
    "dtype named twice": (
        lambda: renamed_header('"dtype": "BF16"', '"dtype": "F16", "dtype": "BF16"'),
        "ADP-CON-005",
    ),
    "metadata named twice": (
        lambda: with_text(lambda text: '{"__metadata__": {}, "__metadata__": {}, ' + text[1:]),
        "ADP-CON-005",
    ),
    "no tensor": (lambda: raw_container("{}        ", b""), "ADP-CON-006"),
    "ten thousand tensors": (lambda: many(10_000), "ADP-CON-006"),
    "tensor of no size": (lambda: with_entry("shape", [0, 32]), "ADP-CON-006"),
    "tensor without a shape": (lambda: with_entry("shape", []), "ADP-CON-006"),
    "tensor of nine dimensions": (lambda: with_entry("shape", [1] * 7 + [RANK, 32]), "ADP-CON-006"),
    "negative sizes": (lambda: with_entry("shape", [-RANK, -32]), "ADP-CON-006"),
    "sizes whose product overflows": (lambda: with_entry("shape", [1 << 32, 1 << 32]), "ADP-CON-006"),
    "size that is true": (lambda: with_entry("shape", [True, 128]), "ADP-CON-006"),
    "entry with strides": (lambda: with_entry("strides", [1, 1]), "ADP-CON-006"),
    "name that clears the screen": (lambda: key_becomes("\x1b[2J"), "ADP-CON-006"),
    "name of half a character": (lambda: key_becomes(f"{Q}\ud800.lora_A.weight"), "ADP-CON-006"),
    "name with a zero byte": (lambda: key_becomes(f"{Q}.lora_A.weight\0.png"), "ADP-CON-006"),
    "empty name": (lambda: key_becomes(""), "ADP-CON-006"),
    "name of a thousand characters": (lambda: key_becomes("x" * 1000), "ADP-CON-006"),
    "eight-byte numbers": (lambda: container(factors(), "F64"), "ADP-CON-007"),
    "one-byte numbers": (lambda: with_entry("dtype", "F8_E4M3"), "ADP-CON-007"),
    "dtype in small letters": (lambda: with_entry("dtype", "bf16"), "ADP-CON-007"),
    "shape larger than its bytes": (lambda: with_entry("shape", [RANK, 33]), "ADP-CON-008"),
    "sizes whose product is zero in 64 bits": (lambda: with_entry("shape", [1 << 24] * 3), "ADP-CON-008"),
    "dtype larger than its bytes": (lambda: with_entry("dtype", "F32"), "ADP-CON-008"),
    "offsets in reverse": (lambda: with_entry("data_offsets", [512, 256]), "ADP-CON-008"),
    "offset before the data": (lambda: with_entry("data_offsets", [-256, 0]), "ADP-CON-008"),
    "two names of the same bytes": (alias, "ADP-CON-009"),
    "bytes hidden before the tensors": (hole, "ADP-CON-009"),
    "script behind the tensors": (lambda: container(factors()) + b"#!/bin/sh\n:\n", "ADP-CON-009"),
    "zip archive behind the tensors": (
        lambda: container(factors()) + zipped({"data.pkl": imports()}),
        "ADP-CON-002",
    ),
    "file cut short": (lambda: container(factors())[:-64], "ADP-CON-009"),
    "offset beyond the file": (lambda: with_entry("data_offsets", [1 << 40, (1 << 40) + 256]), "ADP-CON-009"),
    "header on many lines": (indented, "ADP-CON-011"),
    "names spelled in escapes": (
        lambda: with_text(lambda text: padded(text.replace("lora", "\\u006cora"))),
        "ADP-CON-011",
    ),
    "megabyte of blanks": (lambda: with_text(lambda text: text + " " * (1 << 20)), "ADP-CON-011"),
    "tensors at odd addresses": (misaligned, "ADP-CON-012"),
    "zip archive in the last tensor": (lambda: with_extra(zipped({"data.pkl": imports()})), "ADP-CON-002"),
    "empty zip archive in the last tensor": (lambda: with_extra(zipped({})), "ADP-CON-002"),
    "64-bit zip archive in the last tensor": (
        lambda: with_extra(b"PK\x06\x07" + bytes(16) + b"PK\x05\x06" + bytes(4) + b"\xff" * 12 + bytes(2)),
        "ADP-CON-002",
    ),
    "zip archive that counts from the start": (zip_by_absolute_offset, "ADP-CON-002"),
    "tar archive in the header": (tar_polyglot, "ADP-CON-002"),
    "pickle in the header": (pickle_polyglot, "ADP-CON-002"),
    "pickle in a tensor": (lambda: starts_with(imports()), "ADP-CON-013"),
    "tar archive in a tensor": (lambda: with_extra(tarred("run.sh", b":")), "ADP-CON-013"),
    "RAR archive in a tensor": (lambda: starts_with(b"Rar!\x1a\x07\x01\0"), "ADP-CON-013"),
}

METADATA: Mapping[str, _Row] = {
    "alpha that multiplies by a hundred": (lambda: adapter_metadata(lora_alpha=400), "ADP-MET-001"),
    "pattern that scales one module": (
        lambda: adapter_metadata(lora_alpha=4, alpha_pattern={"transformer_blocks.0.attn.to_q": 400}),
        "ADP-MET-001",
    ),
    "pattern that never ends": (
        lambda: adapter_metadata(lora_alpha=4, rank_pattern={"(a+)+$": 4}),
        "ADP-MET-001",
    ),
    "another scaling rule": (lambda: adapter_metadata(lora_alpha=64, use_rslora=True), "ADP-MET-001"),
    "whole modules": (lambda: adapter_metadata(modules_to_save=["proj_out"]), "ADP-MET-001"),
    "base that is changed first": (lambda: adapter_metadata(init_lora_weights="pissa"), "ADP-MET-001"),
    "kohya's alpha": (lambda: metadata({"format": "pt", "ss_network_alpha": "128"}), "ADP-MET-001"),
    "kohya's arguments": (
        lambda: metadata({"format": "pt", "ss_network_args": '{"conv_alpha": 64}'}),
        "ADP-MET-001",
    ),
    "metadata that is a list": (lambda: raw_metadata('["pt"]'), "ADP-CON-010"),
    "metadata with a number": (lambda: raw_metadata('{"format": 1}'), "ADP-CON-010"),
    "metadata that is nested": (lambda: raw_metadata('{"a": {"b": "c"}}'), "ADP-CON-010"),
    "hundred entries": (lambda: metadata({f"t{n}": "" for n in range(100)}), "ADP-CON-010"),
    "megabyte of text": (lambda: metadata({"base": "x " * (1 << 19)}), "ADP-CON-010"),
    "terminal escape": (lambda: metadata({"base": "\x1b]0;owned\x07"}), "ADP-CON-010"),
    "text that runs backwards": (lambda: metadata({"base": "\u202egpj.exe"}), "ADP-CON-010"),
    "look-alike letter": (lambda: metadata({"base": "\u0430pache"}), "ADP-CON-010"),
    "half a character": (lambda: metadata({"base": "\ud800"}), "ADP-CON-010"),
    "name of a Python method": (lambda: metadata({"__class__": "none"}), "ADP-CON-010"),
    "other framework": (lambda: metadata({"format": "tf"}), "ADP-CON-010"),
    "script for a page": (lambda: metadata({"title": "<script>void 0</script>"}), "ADP-CON-014"),
    "template that is expanded": (lambda: metadata({"title": "{{ config.items() }}"}), "ADP-CON-014"),
    "Python in YAML": (lambda: metadata({"title": "!!python/object/apply:os.getcwd []"}), "ADP-CON-014"),
    "long encoded word": (lambda: metadata({"notes": "QUJD" * 100}), "ADP-CON-014"),
    "path out of the folder": (lambda: metadata({"thumbnail": "../../etc/hostname"}), "ADP-CON-014"),
    "forged line of a build log": (lambda: metadata({"base": "::warning::x", "alpha": "1"}), "ADP-MET-001"),
}

PICKLES: Mapping[str, _Row] = {
    "pickle under the weights' name": (
        lambda: pickle.dumps({"weights": [1.0] * 50}, 4),
        "ADP-CON-002",
    ),
    "pickle that imports, protocol 0": (lambda: imports("posix", "getcwd"), "ADP-CON-002"),
    "pickle that imports, protocol 5": (lambda: pickle.dumps(json.dumps, 5), "ADP-CON-002"),
    "PyTorch archive under the weights' name": (
        lambda: zipped({"archive/data.pkl": imports(), "archive/version": b"3\n"}),
        "ADP-CON-002",
    ),
    "NumPy file with objects": (lambda: npy_with_objects(), "ADP-CON-002"),
    "compressed pickle": (lambda: compressed(imports() * 20), "ADP-CON-002"),
    "pickle in a tar archive": (lambda: tarred("data.pkl", imports()), "ADP-CON-002"),
    **{
        f"{name} beside the weights": (
            lambda name=name: {WEIGHTS_NAME: container(factors()), name: imports()},  # type: ignore[misc]
            "ADP-CON-020",
        )
        for name in (
            *("pytorch_lora_weights.bin", "adapter_model.pt", "model.ckpt", "optimizer.pkl", "weights.PTH"),
            *("notes.txt", "README"),
        )
    },
    "archive beside the weights": (
        lambda: {WEIGHTS_NAME: container(factors()), "thumbs.db": zipped({"data.pkl": imports()})},
        "ADP-CON-020",
    ),
    "second weights file": (
        lambda: {
            WEIGHTS_NAME: container(factors()),
            "pytorch_lora_weights-00002.safetensors": container(factors(seed=1)),
        },
        "ADP-CON-020",
    ),
    "weights file under another name": (
        lambda: {WEIGHTS_NAME: container(factors()), "preview.png": container(factors(seed=1))},
        "ADP-CON-020",
    ),
    "code beside the weights": (
        lambda: {WEIGHTS_NAME: container(factors()), "pipeline.py": b"# nothing\n"},
        "ADP-CON-020",
    ),
}


def npy_with_objects() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def compressed(data: bytes) -> bytes:
    import gzip

    return gzip.compress(data, mtime=0)


def _cases(layer: Layer, rows: Mapping[str, _Row]) -> tuple[Hostile, ...]:
    return tuple(
        Hostile(name=name, layer=layer, build=build, rule=rule) for name, (build, rule) in rows.items()
    )


def _of_bytes() -> tuple[Hostile, ...]:
    return (
        *_cases("container", CONTAINER),
        *_cases("metadata", METADATA),
        *_cases("pickle", PICKLES),
    )


BYTES: tuple[Hostile, ...] = _of_bytes()
"""The cases that are about bytes; those about tensors are in hostile_tensors.py."""
