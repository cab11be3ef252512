"""Is a file that looks like safetensors something else to another program?

A safetensors file begins with eight bytes of its own and ends with numbers that anybody may choose. Formats
that are found by their end (zip), by a checksum (tar) or by walking from byte to byte (pickle) can therefore
live in the same bytes. All that is decided here by reading; nothing is opened, unpickled or unpacked.

Sources of the formats: PKWARE's APPNOTE 6.3.10 (4.3.15, 4.3.16), POSIX.1-2024 (pax, ustar header block), and
CPython's Lib/pickletools.py for the pickle machine's instructions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

from registry.content import Content
from registry.formats import Header

MAGIC_BYTES: Final = 64
"""What `named_by_magic` looks at."""

_MAGICS: Final = (
    (re.compile(rb"\x80[\x02-\x05](?:\x95|[\x58-\x7d\x28\x5d\x4b\x8a\x8c])"), "a pickle"),
    (re.compile(rb"PK(\x01\x02|\x03\x04|\x05\x06|\x07\x08)"), "a zip archive (as PyTorch writes)"),
    (re.compile(rb"\x1f\x8b"), "a gzip file"),
    (re.compile(rb"BZh[1-9]"), "a bzip2 file"),
    (re.compile(rb"\xfd7zXZ\x00|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!|\x04\x22\x4d\x18"), "a compressed archive"),
    (re.compile(rb"\x7fELF|MZ|\xcf\xfa\xed\xfe|\xca\xfe\xba\xbe"), "a program"),
    (re.compile(rb"#!|<\?php"), "a script"),
    (re.compile(rb"<script|<html|<!DOCTYPE", re.IGNORECASE), "a page"),
    (re.compile(rb"\x89HDF"), "an HDF5 file"),
    (re.compile(rb"GGUF|GGML|ggjt|lmgg|fmgg"), "a GGUF file"),
    (re.compile(rb"\x93NUMPY"), "a NumPy file (which may hold a pickle)"),
    (re.compile(rb"%PDF-|\x89PNG|GIF8|RIFF"), "a document or a picture"),
    # Protocols 0 and 1 of pickle have no mark; these are how objects with a class begin.
    (re.compile(rb"[(]?c[A-Za-z_][\w.]*\n[A-Za-z_][\w.]*\n|\(i[A-Za-z_][\w.]*\n|\(dp\d+\n|\(lp\d+\n"),
     "a pickle"),
)  # fmt: skip

# Two bytes begin one tensor in 65,536 by chance, and a pickle's three are not much better.
_SHORT: Final = frozenset({"a gzip file", "a program", "a script", "a pickle"})

_ZIP_END = b"PK\x05\x06"
_ZIP64_LOCATOR = b"PK\x06\x07"
_ZIP_DIRECTORY = b"PK\x01\x02"
_ZIP_END_BYTES = 22
_ZIP_TAIL = (1 << 16) + _ZIP_END_BYTES

_TAR_BLOCK = 512
_TAR_SUM = slice(148, 156)
_OCTAL = re.compile(rb" *([0-7]{1,8})[ \0]*")

_MAX_STEPS = 200
_MAX_LINE = 1 << 12
_IDENTIFIER = re.compile(rb"[A-Za-z_][\w.]*")
_LINES: Final[Mapping[int, int]] = {**dict.fromkeys(b"FILSVgpP", 1), **dict.fromkeys(b"ci", 2)}
_FIXED: Final[Mapping[int, int]] = {
    **dict.fromkeys(b"(012NQRabdelost)u]}\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94\x97\x98", 0),
    **dict.fromkeys(b"Khq\x80\x82", 1),
    **dict.fromkeys(b"M\x83", 2),
    **dict.fromkeys(b"jrJ\x84", 4),
    **dict.fromkeys(b"G\x95", 8),
}
_COUNTED: Final[Mapping[int, int]] = {
    **dict.fromkeys(b"UC\x8a\x8c", 1),
    **dict.fromkeys(b"TXB\x8b", 4),
    **dict.fromkeys(b"\x8d\x8e\x96", 8),
}
_TEXTS: Final = frozenset(b"USTVX\x8c\x8d")
_STOP, _STACK_GLOBAL = ord("."), 0x93


def polyglot(content: Content) -> str | None:
    """Return what else the file is, in a sentence, or None.

    Args:
        content: the bytes of the file, hostile; at most about 100 KiB of it are read, in bounded steps.
    """
    found = named_by_magic(content[:MAGIC_BYTES])
    if found:
        return f"it begins like {found}"
    if _zip_at_end(content):
        return "a zip archive ends within it, so that other programs read it as one"
    if is_tar(content[:_TAR_BLOCK]):
        return "its first 512 bytes are the header of a tar archive, with a checksum that holds"
    imported = pickle_import(content, 0)
    if imported:
        return f"unpickled from its first byte, it {imported}"
    return None


def hidden(content: Content, header: Header) -> Iterator[tuple[str, str]]:
    """Yield the tensors that begin like another format, and which: what a dropper would cut out.

    What lies deeper, or in the digits of the numbers, is the matter of `registry.scanning.mantissa`.
    """
    for key, info in header.tensors.items():
        first = content[info.start : min(info.start + _TAR_BLOCK, info.end)]
        name = named_by_magic(first[:MAGIC_BYTES])
        if is_tar(first):
            yield key, "a tar archive"
        elif name is not None and name not in _SHORT:
            yield key, name
        else:
            imported = pickle_import(content, info.start)
            if imported:
                yield key, f"a pickle: it {imported}"


def named_by_magic(first: bytes) -> str | None:
    """Return which format the first bytes of a file announce, of those that are refused; or None.

    A safetensors file whose header is 1,152 bytes long begins like a pickle. The brace at the ninth byte,
    behind a length below 16 MiB, tells them apart: no pickle goes on with the zeros before it.
    """
    if first[3:9] == b"\0\0\0\0\0{":  # gzip alone goes on so: a time of zero, and flags that nobody reads
        return "a gzip file" if first.startswith(b"\x1f\x8b\x08") else None
    return next((name for pattern, name in _MAGICS if pattern.match(first)), None)


def _zip_at_end(content: Content) -> bool:
    """Return whether zip readers would find an archive in the file.

    They look for the end record in the last 64 KiB. Four bytes occur by chance in random weights, so a
    directory must stand where the record says, counted from the start of the file or back from the record, or
    the record must describe an empty or a 64-bit archive.
    """
    origin = max(0, len(content) - _ZIP_TAIL)
    tail = content[origin : len(content)]
    at = tail.find(_ZIP_END)
    while at != -1:
        record = tail[at : at + _ZIP_END_BYTES]
        if len(record) == _ZIP_END_BYTES:
            entries = int.from_bytes(record[10:12], "little")
            size = int.from_bytes(record[12:16], "little")
            starts = (origin + at - size, int.from_bytes(record[16:20], "little"))
            has_directory = size > 0 and any(
                start >= 0 and content[start : start + 4] == _ZIP_DIRECTORY for start in starts
            )
            is_empty = entries == 0 and size == 0 and record[4:10] == bytes(6)
            before = content[max(0, origin + at - 20) : origin + at]
            if has_directory or is_empty or before.startswith(_ZIP64_LOCATOR):
                return True
        at = tail.find(_ZIP_END, at + 1)
    return False


def is_tar(block: bytes) -> bool:
    """Return whether a block of 512 bytes is a tar header: its checksum, in octal digits, holds.

    The checksum is the sum of the block's bytes, its own field counted as spaces. Readers of tar ask for
    nothing else: the format's name at byte 257 is missing in archives of the seventh Unix.
    """
    stored = _OCTAL.fullmatch(block[_TAR_SUM])
    if len(block) < _TAR_BLOCK or stored is None:
        return False
    rest = sum(block) - sum(block[_TAR_SUM])
    return int(stored[1], 8) == rest + 8 * ord(" ")


def pickle_import(content: Content, at: int) -> str | None:
    """Return what the pickle that begins at byte ``at`` imports, in words; None when there is no such pickle.

    The machine's instructions are walked without being carried out: strings are jumped over, and an
    instruction that does not exist ends the walk. Only an import can run code. A walk of two hundred
    instructions is no accident either.
    """
    texts = 0
    for _ in range(_MAX_STEPS):
        head = content[at : at + 9]
        if not head or head[0] == _STOP:
            return None
        code = head[0]
        if code == _STACK_GLOBAL and texts >= 2:
            return "imports an object whose name it puts together"
        if code in _LINES:
            lines = content[at + 1 : at + 1 + _MAX_LINE].split(b"\n", _LINES[code])
            if len(lines) <= _LINES[code]:
                return None
            if code in b"ci":
                named = all(_IDENTIFIER.fullmatch(line) for line in lines[:2])
                return "imports " + b".".join(lines[:2])[:80].decode("ascii") if named else None
            texts += code in _TEXTS and _IDENTIFIER.fullmatch(lines[0].strip(b"'\"")) is not None
            at += 2 + len(lines[0])
        elif code in _COUNTED:
            start = at + 1 + _COUNTED[code]
            at = start + int.from_bytes(head[1 : 1 + _COUNTED[code]], "little")
            texts += (
                code in _TEXTS and _IDENTIFIER.fullmatch(content[start : min(at, start + 256)]) is not None
            )
        elif code in _FIXED:
            at += 1 + _FIXED[code]
        else:
            return None
    return f"goes on for {_MAX_STEPS} instructions of a pickle"
