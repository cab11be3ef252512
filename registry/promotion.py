"""Promotion: aliases are moved, rolled back, taken away; versions are revoked and yanked.

An alias is moved only by a report of its gates (`registry.gates`), and only from the version that was seen
when they were looked at: of two promotions at the same moment one wins, and the other is told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from registry.errors import NotFound, UsageError
from registry.gates import GateReport, gates
from registry.reconcile import index_version
from registry.reference import Reference, check_alias, check_name
from registry.results import Listed, Promotion
from registry.storage import shelf
from registry.views import listed

if TYPE_CHECKING:
    from registry.client import Registry
    from registry.signing.trust import Target

_HISTORY: Final = 16


def promote(registry: Registry, report: GateReport, action: str = "promote") -> Promotion:
    """Sign that an alias means the version whose gates were looked at; MLflow is told afterwards.

    Raises:
        RegistryError: the first gate that did not pass.
        Conflict: the alias was moved since the gates were looked at.
    """
    if report.refusal is not None:
        raise report.refusal
    manifest, before = report.manifest, report.before
    reused = before is not None and before.digest == manifest.digest
    if not reused:
        registry.require_keys("approver")
        expected = None if before is None else before.digest
        details = {"alias": report.alias, "digest": str(manifest.digest), "before": expected}
        with registry.recorded(action, report.reference, details):
            registry.authority.set_alias(
                report.alias,
                manifest.digest,
                len(manifest.canonical_bytes()),
                {"version": manifest.version, "history": _history(before, manifest.version)},
                expected,
                report.beside,
            )
    registry.catalog.point(manifest.name, report.alias.partition("@")[2], manifest.digest)
    return Promotion(
        reference=report.alias,
        version=manifest.version,
        digest=manifest.digest,
        previous=next(iter(_history(before, manifest.version)), None),
        reused=reused,
    )


def _history(before: Target | None, version: int) -> list[int]:
    """The versions that an alias meant before, newest first, each once."""
    if before is None:
        return []
    older = [before.custom.get("version"), *before.custom.get("history", [])]
    kept = [number for number in dict.fromkeys(older) if isinstance(number, int) and number != version]
    return kept[:_HISTORY]


def rollback(registry: Registry, name: str, alias: str, to: int | None = None) -> Promotion:
    """Point an alias back to a version that it meant before; that version has to pass today's gates.

    All but the no-regression rules: whoever goes back does so because what the alias means now is bad.

    Args:
        registry: the registry.
        name: the adapter.
        alias: its alias.
        to: the version; None is the one before.

    Raises:
        NotFound: there is no such alias, or it never meant that version.
        RegistryError: the first gate that does not pass.
    """
    path = f"{check_name(name)}@{check_alias(alias)}"
    target = registry.authority.signing_state().aliases().get(path)
    if target is None:
        raise NotFound(f"there is no {path}", "`registry list` shows the aliases")
    history = [int(number) for number in target.custom.get("history", [])]
    if not history or (to is not None and to not in history):
        known = ", ".join(map(str, history)) or "none"
        raise NotFound(
            f"{path} has not meant {'another version' if to is None else f'version {to}'} before",
            f"versions that it meant: {known}; `registry promote` moves it to any other",
        )
    version = history[0] if to is None else to
    report = gates(registry, Reference(name=name, version=version), alias, back=True)
    return promote(registry, report, "rollback")


def demote(registry: Registry, name: str, alias: str) -> Promotion:
    """Take an alias away; what it meant stays and can still be pulled by version.

    Raises:
        NotFound: there is no such alias.
        Conflict: it was moved at the same moment.
    """
    path = f"{check_name(name)}@{check_alias(alias)}"
    target = registry.authority.signing_state().aliases().get(path)
    if target is None:
        raise NotFound(f"there is no {path}", "`registry list` shows the aliases")
    version = target.custom.get("version")
    registry.require_keys("approver")
    with registry.recorded("demote", f"{name}:{version}", {"alias": path, "digest": str(target.digest)}):
        registry.authority.remove_alias(path, target.digest)
    registry.catalog.point(name, alias, None)
    return Promotion(reference=path, version=None, digest=target.digest, previous=version, reused=False)


def revoke(registry: Registry, reference: Reference, reason: str) -> Listed:
    """Sign that a version must not be loaded any more, not even from a warm cache.

    Raises:
        UsageError: no reason was given.
        RegistryError: see the error tree.
    """
    if not reason.strip():
        raise UsageError("a revocation needs a reason", mend="say why; people will read it")
    return _withdraw(registry, reference, "revoke", reason)


def yank(registry: Registry, reference: Reference, reason: str | None) -> Listed:
    """Hide a version from lists and promotions (or show it again: None); it can still be pulled.

    Raises:
        UsageError: the reason is empty.
        RegistryError: see the error tree.
    """
    if reason is not None and not reason.strip():
        raise UsageError("a yank needs a reason", mend="say why; people will read it")
    return _withdraw(registry, reference, "yank" if reason is not None else "unyank", reason)


def _withdraw(registry: Registry, reference: Reference, action: str, reason: str | None) -> Listed:
    target = registry.authority.signing_state().resolve(reference)
    manifest = shelf.read_manifest(registry.store, target.digest)
    subject = f"{manifest.name}:{manifest.version}"
    registry.require_keys("approver")
    with registry.recorded(action, subject, {"digest": str(target.digest), "reason": reason}):
        if reason is None:
            state = registry.authority.unyank(target.digest)
        elif action == "yank":
            state = registry.authority.yank(target.digest, reason)
        else:
            state = registry.authority.revoke(target.digest, reason)
    index_version(registry, state, target.digest)
    return listed(state, manifest.name, manifest.version, target.digest)
