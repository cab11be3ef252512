"""The chain of the audit log: what a row is, what its digest covers, and what may follow it. No IO."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from registry.digest import Digest, digest_bytes
from registry.errors import DigestMismatch, InvalidDocument, shown
from registry.manifest import canonical_json

COLUMNS: Final = ("number", "time", "actor", "action", "subject", "details", "previous", "digest")
MEND: Final = "somebody has changed the database; find out who, and restore it from a backup"

FIRST_PREVIOUS: Final = digest_bytes(b"")
"""What the first row names as the digest before it, and the head of an empty log."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerHead:
    """The end of the chain.

    Attributes:
        length: number of rows, >= 0.
        digest: digest of the last row; that of no bytes if there is none.
    """

    length: int
    digest: Digest

    @classmethod
    def parse(cls, anchor: Mapping[str, Any]) -> Self:
        """Return the head that the trust metadata carries as ``{"length", "digest"}``.

        Raises:
            InvalidDocument: it is none.
        """
        length, digest = anchor.get("length"), anchor.get("digest")
        if isinstance(length, int) and not isinstance(length, bool) and length >= 0:
            with contextlib.suppress(ValueError):
                return cls(length=length, digest=Digest(str(digest)))
        raise InvalidDocument(
            "the trust metadata names the head of the audit log in a form that is not understood",
            mend="a newer version may have written it; upgrade adapter-foundry",
        )

    def facts(self) -> dict[str, Any]:
        """Return the head as JSON values, in the form of the trust metadata."""
        return {"length": self.length, "digest": str(self.digest)}


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerEntry:
    """One row as the database has it; only `Ledger.verify` says whether it is genuine.

    Attributes:
        index: its place, from 1.
        time: UTC, ISO 8601, in seconds.
        actor: who did it.
        action: what was done, such as "promote".
        subject: to what, such as "pixelsmile@prod".
        details: canonical JSON text.
        previous: digest of the row before it.
        digest: digest of all of the above.
    """

    index: int
    time: str
    actor: str
    action: str
    subject: str
    details: str
    previous: str
    digest: str

    def facts(self) -> dict[str, Any]:
        """Return everything except the digest, as JSON values: what the digest covers."""
        return {
            "index": self.index,
            "time": self.time,
            "actor": self.actor,
            "action": self.action,
            "subject": self.subject,
            "details": self.details,
            "previous": self.previous,
        }

    def expected(self) -> Digest:
        """Return the digest that a row with this content has."""
        return digest_bytes(canonical_json(self.facts()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """A chain that holds: its head, and how many of its rows the signed anchor covers."""

    head: LedgerHead
    anchored: int


EMPTY: Final = LedgerHead(length=0, digest=FIRST_PREVIOUS)
"""The head of a log without rows."""


def follow(entries: Iterable[LedgerEntry], anchor: LedgerHead | None) -> Verified:
    """Walk along a whole chain and compare it with the head that was signed.

    Raises:
        DigestMismatch: see `Ledger.verify`.
    """
    head = EMPTY
    for entry in entries:
        head = _next(head, entry)
        if anchor is not None and entry.index == anchor.length and entry.digest != anchor.digest:
            raise DigestMismatch(
                f"row {entry.index} of the audit log is not the one that was signed as its head: it, or rows "
                "before it, were written anew",
                MEND,
            )
    if anchor is not None and head.length < anchor.length:
        raise DigestMismatch(
            f"row {head.length + 1} of the audit log is missing: it has {head.length} rows, and "
            f"{anchor.length} were signed, so its tail was cut",
            MEND,
        )
    return Verified(head=head, anchored=0 if anchor is None else anchor.length)


def read_row(row: Mapping[str, Any]) -> LedgerEntry:
    """Return a row as a value; a database can hold other types than the table asks for."""
    number, *words = (row[column] for column in COLUMNS)
    if not isinstance(number, int) or not all(isinstance(word, str) for word in words):
        raise DigestMismatch(f"row {shown(number)} of the audit log was changed: it is no row", MEND)
    time, actor, action, subject, details, previous, digest = words
    return LedgerEntry(
        index=number,
        time=time,
        actor=actor,
        action=action,
        subject=subject,
        details=details,
        previous=previous,
        digest=digest,
    )


def _next(head: LedgerHead, entry: LedgerEntry) -> LedgerHead:
    """Return the head after a row that fits behind it."""
    number = head.length + 1
    if entry.index != number:
        what = "is missing" if entry.index > number else "does not belong there"
        raise DigestMismatch(f"row {min(number, entry.index)} of the audit log {what}", MEND)
    if entry.digest != entry.expected():
        raise DigestMismatch(f"row {number} of the audit log was changed: its digest does not fit", MEND)
    if entry.previous != head.digest:
        raise DigestMismatch(
            f"row {number} of the audit log does not continue the row before it: rows were moved, inserted "
            "or written anew",
            MEND,
        )
    return LedgerHead(length=number, digest=Digest(entry.digest))
