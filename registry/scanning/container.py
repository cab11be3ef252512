"""First layer: is the file one safetensors container and nothing else, and is its metadata harmless?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from registry.content import Content
from registry.formats import FormatError, Header, Problem, read_header
from registry.scanning.report import Finding, finding

_RULE_OF: Final[Mapping[Problem, str]] = {
    "size": "ADP-CON-001",
    "header-length": "ADP-CON-003",
    "json": "ADP-CON-004",
    "duplicate-key": "ADP-CON-005",
    "entry": "ADP-CON-006",
    "dtype": "ADP-CON-007",
    "offsets": "ADP-CON-008",
    "layout": "ADP-CON-009",
    "metadata": "ADP-CON-010",
}
_ZIP_END = b"PK\x05\x06"
_ZIP64_LOCATOR = b"PK\x06\x07"
_ZIP_END_BYTES = 22
_ZIP_TAIL = (1 << 16) + _ZIP_END_BYTES
_MAGICS: Final = (
    (re.compile(rb"\x80[\x02-\x05](?:\x95|[\x58-\x7d\x28\x5d\x4b\x8a\x8c])"), "a pickle"),
    (re.compile(rb"PK[\x03\x05\x07]"), "a zip archive (as PyTorch writes)"),
    (re.compile(rb"\x1f\x8b"), "a gzip file"),
    (re.compile(rb"\x7fELF|MZ\x90"), "a program"),
    (re.compile(rb"\x89HDF"), "an HDF5 file"),
    (re.compile(rb"GGUF|GGML"), "a GGUF file"),
)
# Names that loaders look at to scale an adapter or to build it in another way.
_STRENGTH = re.compile(
    r"alpha|adapter_metadata|scal(e|ing)|rslora|rank_pattern|network_(dim|args)", re.IGNORECASE
)
_MAGIC_BYTES: Final = 16
_LABEL = re.compile(r"[a-z][a-z0-9_-]*(\.[a-z0-9_-]+)*", re.ASCII)


def check(weights: Content) -> tuple[Header | None, list[Finding]]:
    """Return the container's table of contents (None when it cannot be trusted) and the findings.

    Args:
        weights: the bytes of the file, hostile.
    """
    foreign = _foreign_format(weights)
    if foreign:
        return None, [finding("ADP-CON-002", "the file", foreign)]
    try:
        header = read_header(weights)
    except FormatError as error:
        return None, [finding(_RULE_OF[error.problem], "the header", error.message)]
    return header, list(_metadata_findings(header.metadata))


def _foreign_format(weights: Content) -> str | None:
    first = weights[:_MAGIC_BYTES]
    for pattern, name in _MAGICS:
        if pattern.match(first):
            return f"it begins like {name}"
    if _zip_at_end(weights):
        return "a zip archive ends within it, so that other programs read it as one"
    return None


def _zip_at_end(weights: Content) -> bool:
    """Return whether zip readers would find an archive in the file.

    They look for the end record in the last 64 KiB. Four bytes occur by chance in random weights, so a
    directory must stand where the record says, or the record must describe an empty or a 64-bit archive.
    """
    origin = max(0, len(weights) - _ZIP_TAIL)
    tail = weights[origin : len(weights)]
    at = tail.find(_ZIP_END)
    while at != -1:
        record = tail[at : at + _ZIP_END_BYTES]
        if len(record) == _ZIP_END_BYTES:
            size = int.from_bytes(record[12:16], "little")
            entries = int.from_bytes(record[10:12], "little")
            start = origin + at - size
            has_directory = size > 0 and start >= 0 and weights[start : start + 4] == b"PK\x01\x02"
            is_empty = entries == 0 and size == 0 and record[4:10] == bytes(6)
            before = weights[max(0, origin + at - 20) : origin + at]
            if has_directory or is_empty or before.startswith(_ZIP64_LOCATOR):
                return True
        at = tail.find(_ZIP_END, at + 1)
    return False


def _metadata_findings(metadata: Mapping[str, str]) -> list[Finding]:
    findings = []
    for key, value in metadata.items():
        if _STRENGTH.search(key):
            findings.append(finding("ADP-MET-001", f"metadata {key}", value[:100]))
        elif not _LABEL.fullmatch(key):
            findings.append(finding("ADP-CON-010", f"metadata {key}", "its name is not a lower-case label"))
        elif key == "format" and value != "pt":
            findings.append(finding("ADP-CON-010", "metadata format", f"{value!r} instead of 'pt'"))
    return findings
