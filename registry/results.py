"""What the registry answers: plain values that the command line prints and pipelines keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from registry.attestation import Kind
from registry.digest import Digest
from registry.manifest import AdapterManifest


@dataclass(frozen=True, kw_only=True, slots=True)
class PushResult:
    """What a push did.

    Attributes:
        reference: ``name:version``.
        version: its number.
        digest: digest of its manifest.
        uploaded_bytes: how many bytes of files were sent.
        reused: the very same adapter was there before; nothing new was made.
        findings: ids of the rules for which the scanner wants a person to look at it.
    """

    reference: str
    version: int
    digest: Digest
    uploaded_bytes: int
    reused: bool
    findings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Attested:
    """A statement that was signed, or was there already.

    Attributes:
        reference: ``name:version``.
        kind: kind of the statement.
        digest: digest of the manifest that it is about.
        statement: key of the envelope in the store.
        reused: the same statement was there before.
        predicate: what it says.
    """

    reference: str
    kind: Kind
    digest: Digest
    statement: str
    reused: bool
    predicate: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Promotion:
    """An alias that was signed, was right already, or was taken away.

    Attributes:
        reference: ``name@alias``.
        version: the version that it means now; None if it was taken away.
        digest: digest of that version's manifest, or of the one that it meant.
        previous: the version that it meant before, if any.
        reused: it meant that version before.
    """

    reference: str
    version: int | None
    digest: Digest
    previous: int | None
    reused: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Pulled:
    """An adapter whose files were verified.

    Attributes:
        reference: ``name:version``.
        digest: digest of the manifest.
        manifest: the signed manifest.
        path: the folder that holds the files; None if nothing was kept.
        fetched_bytes: how many bytes came from the store; 0 from a warm cache.
        warnings: what a person should know, such as that the version was yanked.
    """

    reference: str
    digest: Digest
    manifest: AdapterManifest
    path: Path | None
    fetched_bytes: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """One signed version.

    Attributes:
        reference: ``name:version``.
        digest: digest of its manifest.
        aliases: aliases that mean it.
        revoked: the signed reason why it must not be used, or None.
        yanked: the signed reason why it should not be used for anything new, or None.
        facts: what its publisher signed about it for lists: base, licence, time.
    """

    reference: str
    digest: Digest
    aliases: tuple[str, ...]
    revoked: str | None
    yanked: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class StatementView:
    """A statement as it is shown to people.

    Attributes:
        key: where the store keeps it.
        kind: what it attests, or "unknown".
        role: whose keys must have signed it.
        signed: they did.
        problem: why it is not believed; None if it is.
        key_ids: keys that claim to have signed.
        predicate: what it says; empty if it is not believed.
    """

    key: str
    kind: str
    role: str
    signed: bool
    problem: str | None
    key_ids: tuple[str, ...]
    predicate: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """What is known about an adapter. The manifest is the signed one; nothing was loaded."""

    listed: Listed
    manifest: AdapterManifest
    statements: tuple[StatementView, ...]
