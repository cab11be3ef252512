"""Digests of bytes and of files: sha256 is the name of the bytes, blake3 the fast check of a transfer."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from registry.errors import UsageError, shown

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_READ_BYTES = 1 << 20

FILE_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"


class Digest(str):
    """A sha256 digest, written ``sha256:<64 lower-case hex digits>``.

    The constructor checks the form, so that a ``Digest`` in a signature of a function is a well-formed one.

    Raises:
        ValueError: the text is not a digest.
    """

    __slots__ = ()

    def __new__(cls, value: str) -> Digest:
        if not _DIGEST.fullmatch(value):
            raise ValueError(f"not a digest: {shown(value)!r}; a digest is sha256:<64 lower-case hex digits>")
        return super().__new__(cls, value)

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Return the digest that a person typed.

        Raises:
            UsageError: the text is not a digest.
        """
        try:
            return cls(text)
        except ValueError as error:
            raise UsageError(str(error), "copy the whole digest from `registry show`") from None

    @property
    def hex(self) -> str:
        """The 64 hex digits alone."""
        return self[7:]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(
            cls,
            core_schema.str_schema(strict=True, max_length=71),
            serialization=core_schema.plain_serializer_function_ser_schema(str),
        )


class FileEntry(BaseModel):
    """One file of an adapter: its name, its size in bytes and both of its digests."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    path: Annotated[str, StringConstraints(pattern=FILE_NAME_PATTERN)]
    size: Annotated[int, Field(ge=0, le=1 << 40)]
    sha256: Digest
    blake3: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Digester:
    """Feeds one pass over bytes to sha256 and to blake3."""

    def __init__(self) -> None:
        from blake3 import blake3

        self._sha256 = hashlib.sha256()
        self._blake3 = blake3()
        self._size = 0

    def update(self, data: bytes | memoryview) -> None:
        """Add ``data`` to both digests."""
        self._sha256.update(data)
        self._blake3.update(data)
        self._size += len(data)

    def entry(self, name: str) -> FileEntry:
        """Return the entry of what was fed so far, under the file name ``name``."""
        return FileEntry(
            path=name,
            size=self._size,
            sha256=Digest("sha256:" + self._sha256.hexdigest()),
            blake3=self._blake3.hexdigest(),
        )


def digest_bytes(data: bytes | memoryview) -> Digest:
    """Return the sha256 digest of ``data``."""
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


def file_entry(path_name: str, data: bytes | memoryview) -> FileEntry:
    """Return the entry of a file called ``path_name`` with the content ``data``."""
    digester = Digester()
    view = memoryview(data)
    # Piece by piece, so that both digests read a piece while it is in the cache of the processor.
    for start in range(0, len(view), _READ_BYTES):
        digester.update(view[start : start + _READ_BYTES])
    return digester.entry(path_name)


def stream_entry(path_name: str, stream: BinaryIO) -> FileEntry:
    """Return the entry of a file called ``path_name``, reading ``stream`` to its end in one pass."""
    digester = Digester()
    while piece := stream.read(_READ_BYTES):
        digester.update(piece)
    return digester.entry(path_name)
