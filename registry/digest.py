"""Digests of bytes and of files.

sha256 is what other tools know a file by; blake3, five times as fast here, names objects in the store and
verifies a transfer chunk by chunk.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from registry.content import CHUNK_BYTES, Content, chunks
from registry.errors import UsageError, shown

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_SLICE_BYTES = 1 << 20

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


Hex = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class FileEntry(BaseModel):
    """One file of an adapter: its name, its size in bytes and its digests.

    Attributes:
        path: the file's name.
        size: bytes.
        sha256: digest of the whole file.
        blake3: digest of the whole file; names it in the store.
        chunks: blake3 digest of each chunk of ``content.CHUNK_BYTES``; an empty file has none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    path: Annotated[str, StringConstraints(pattern=FILE_NAME_PATTERN)]
    size: Annotated[int, Field(ge=0, le=1 << 40)]
    sha256: Digest
    blake3: Hex
    chunks: Annotated[tuple[Hex, ...], Field(max_length=1 << 13)]

    @model_validator(mode="after")
    def _covered(self) -> Self:
        if len(self.chunks) != -(-self.size // CHUNK_BYTES):
            raise ValueError("the number of chunks does not fit the size")
        return self


class Fingerprint(BaseModel):
    """The fast half of a file entry: what a store needs to take a file in, before its sha256 is known."""

    model_config = ConfigDict(frozen=True)

    size: int
    blake3: str
    chunks: tuple[str, ...]

    @classmethod
    def of(cls, content: Content) -> Self:
        """Read a content once."""
        from blake3 import blake3

        whole, parts, size = blake3(), [], 0
        for chunk in chunks(content):
            whole.update(chunk)
            parts.append(blake3(chunk).hexdigest())
            size += len(chunk)
        return cls(size=size, blake3=whole.hexdigest(), chunks=tuple(parts))

    def entry(self, name: str, sha256: Digest) -> FileEntry:
        """Return the whole entry."""
        return FileEntry(path=name, size=self.size, sha256=sha256, blake3=self.blake3, chunks=self.chunks)


def digest_bytes(data: bytes | memoryview) -> Digest:
    """Return the sha256 digest of ``data``."""
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


def digest_content(content: Content) -> Digest:
    """Return the sha256 digest of a content, reading it once."""
    digester = hashlib.sha256()
    for chunk in chunks(content):
        digester.update(chunk)
    return Digest("sha256:" + digester.hexdigest())


def file_entry(name: str, content: Content) -> FileEntry:
    """Return the entry of a file called ``name``, reading its content once for all digests."""
    from blake3 import blake3

    sha256, whole, parts = hashlib.sha256(), blake3(), []
    for chunk in chunks(content):
        part, view = blake3(), memoryview(chunk)
        # Slice by slice, so that all digests read it while it is in the cache of the processor.
        for start in range(0, len(chunk), _SLICE_BYTES):
            piece = view[start : start + _SLICE_BYTES]
            sha256.update(piece)
            whole.update(piece)
            part.update(piece)
        parts.append(part.hexdigest())
    fingerprint = Fingerprint(size=len(content), blake3=whole.hexdigest(), chunks=tuple(parts))
    return fingerprint.entry(name, Digest("sha256:" + sha256.hexdigest()))
