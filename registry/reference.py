"""What a user writes to name an adapter: ``name@alias``, ``name:version`` or ``name@sha256:<hex>``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from registry.errors import UsageError, shown

if TYPE_CHECKING:
    from registry.digest import Digest

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,127}$"
ALIAS_PATTERN = r"^[a-z][a-z0-9_-]{0,63}$"
_NAME = re.compile(NAME_PATTERN.rstrip("$"), re.ASCII)
_ALIAS = re.compile(ALIAS_PATTERN.rstrip("$"), re.ASCII)
_VERSION = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)
# "latest" would be an implicit choice; v<digits> reads as a version, and the index reserves both.
_RESERVED = re.compile(r"latest|v[0-9]+", re.ASCII)
_FORMS = "write name@alias (pixelsmile@prod), name:version (pixelsmile:3) or name@sha256:<64 hex digits>"


def check_name(name: str) -> str:
    """Return ``name`` when it is a valid adapter name.

    Raises:
        UsageError: it is not.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{shown(name)!r} is not an adapter name",
            "use 1 to 128 of a-z, 0-9, '.', '_' and '-', beginning with a letter or a digit",
        )
    return name


def check_alias(alias: str) -> str:
    """Return ``alias`` when it is a valid alias.

    Raises:
        UsageError: it is not, or it is reserved ("latest" and "v<digits>").
    """
    if not _ALIAS.fullmatch(alias):
        raise UsageError(
            f"{shown(alias)!r} is not an alias",
            "use 1 to 64 of a-z, 0-9, '_' and '-', beginning with a letter, for example prod",
        )
    if _RESERVED.fullmatch(alias):
        raise UsageError(
            f"the alias {alias!r} is reserved", "choose a name that says who uses it, for example prod"
        )
    return alias


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """A name with exactly one of an alias, a version or a digest."""

    name: str
    alias: str | None = None
    version: int | None = None
    digest: Digest | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        if sum(part is not None for part in (self.alias, self.version, self.digest)) != 1:
            raise UsageError("a reference needs exactly one of alias, version and digest", _FORMS)
        if self.alias is not None:
            check_alias(self.alias)
        if self.version is not None and not _VERSION.fullmatch(str(self.version)):
            raise UsageError(f"{self.version} is not a version", "versions count from 1")

    @classmethod
    def of(cls, value: str | Reference) -> Reference:
        """Return a reference as it is, and text parsed.

        Raises:
            UsageError: as `parse`.
        """
        return value if isinstance(value, Reference) else cls.parse(value)

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Return the reference that ``text`` writes.

        Raises:
            UsageError: ``text`` is not a reference; a bare name is none, there is no implicit latest version.
        """
        from registry.digest import Digest

        name, at, rest = text.partition("@")
        if at:
            if rest.startswith("sha256:"):
                return cls(name=check_name(name), digest=Digest.parse(rest))
            return cls(name=check_name(name), alias=check_alias(rest))
        name, colon, rest = text.partition(":")
        check_name(name)
        if not colon:
            raise UsageError(f"{shown(text)!r} names no version", _FORMS)
        if not _VERSION.fullmatch(rest):
            raise UsageError(
                f"{shown(rest)!r} is not a version", "versions count from 1, for example pixelsmile:3"
            )
        return cls(name=name, version=int(rest))

    def __str__(self) -> str:
        if self.version is not None:
            return f"{self.name}:{self.version}"
        return f"{self.name}@{self.alias if self.alias is not None else self.digest}"
