"""Every error of the registry, in one tree.

RegistryError                  1   anything else
 ├─ UsageError                 2   a reference, option or argument is wrong
 ├─ InvalidDocument            1   a manifest, card or statement cannot be read
 ├─ Conflict                   1   somebody else changed the registry at the same moment
 ├─ Unsigned                  10   a required statement is missing
 ├─ NotFound                  11   no such adapter, version, alias or file
 ├─ BadSignature              12   a signature or key does not hold
 ├─ DigestMismatch            13   bytes are not the bytes that were named
 │   └─ IdentityMismatch      13   a manifest is not the adapter that was asked for
 ├─ PolicyRefused             14   the policy says no
 │   ├─ LicenseRefused        14   a licence forbids it
 │   └─ ScanRefused           14   the scanner blocks the file
 ├─ Revoked                   15   the adapter was withdrawn
 ├─ StaleTrust                16   trust metadata is expired or rolled back
 ├─ NeedsReview               17   a person has to look first
 └─ NetworkError              20   try again later

The number is the exit code of the command line. Each error says what happened (``message``) and what to do
about it (``mend``).
"""

from __future__ import annotations

from typing import ClassVar

_MAX_SHOWN = 200


def shown(value: object, limit: int = _MAX_SHOWN) -> str:
    """Return a hostile value as one printable ASCII line.

    Control characters, ANSI escapes and line breaks are escaped, so that a name in a file can neither rewrite
    a terminal nor forge a line or a command (``::error::``, ``##[error]``) of a CI log; what is longer than
    ``limit`` characters is cut.
    """
    text = value if isinstance(value, str) else str(value)
    cut = text[:limit]
    escaped = cut.encode("unicode_escape").decode("ascii").replace("::", ":\\x3a").replace("##", "#\\x23")
    return escaped if len(text) <= limit else f"{escaped}... ({len(text)} characters)"


class Explained(Exception):
    """An error that explains itself: the base of every floor's tree.

    Attributes:
        exit_code: what the command line returns for it.
        message: what happened.
        mend: what the user can do about it; may be empty.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, mend: str = "") -> None:
        super().__init__(message, mend)
        self.message = message
        self.mend = mend

    def __str__(self) -> str:
        return f"{self.message}\n  What to do: {self.mend}" if self.mend else self.message


class RegistryError(Explained):
    """Base of all errors of the registry."""


class UsageError(RegistryError):
    """A reference, an option or an argument is wrong."""

    exit_code = 2


class InvalidDocument(RegistryError):
    """A manifest, adapter card or statement cannot be read."""


class Conflict(RegistryError):
    """Somebody else changed the registry at the same moment; they won, and nothing was written."""


class Unsigned(RegistryError):
    """A statement that the policy requires is missing."""

    exit_code = 10


class NotFound(RegistryError):
    """There is no such adapter, version, alias or file."""

    exit_code = 11


class BadSignature(RegistryError):
    """A signature does not hold, or its keys do not have the role."""

    exit_code = 12


class DigestMismatch(RegistryError):
    """Bytes are not the bytes that were named."""

    exit_code = 13


class IdentityMismatch(DigestMismatch):
    """A manifest, genuine by itself, is not the adapter that was asked for."""


class PolicyRefused(RegistryError):
    """The policy refuses the adapter."""

    exit_code = 14


class LicenseRefused(PolicyRefused):
    """A licence forbids what the adapter is meant for."""


class ScanRefused(PolicyRefused):
    """The scanner blocks the file."""


class Revoked(RegistryError):
    """The adapter was withdrawn by its registry."""

    exit_code = 15


class StaleTrust(RegistryError):
    """The trust metadata is expired, or older than what was seen before."""

    exit_code = 16


class NeedsReview(RegistryError):
    """A person has to look at the findings first."""

    exit_code = 17


class NetworkError(RegistryError):
    """The network or a service failed; trying again may help."""

    exit_code = 20
