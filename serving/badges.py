"""What a page shows of an adapter: its signed card, today's scan, and who signed what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from registry.views import statement_view

if TYPE_CHECKING:
    from registry.belief import Keys
    from registry.manifest import AdapterManifest
    from registry.results import StatementView
    from registry.scanning.report import ScanReport

_SAID: Final = ("verdict", "result", "outcome", "by", "reason", "at")
"""What is shown of a predicate, where it has that and it is text."""
_VERDICTS: Final = {"PASSED": "pass", "WARNED": "review", "FAILED": "block"}


def facts(
    manifest: AdapterManifest, statements: Iterable[bytes], trust: Keys, scan: ScanReport | None
) -> Mapping[str, Any]:
    """Return the facts of an adapter, ready for JSON.

    Args:
        manifest: the signed one.
        statements: envelopes about it; what is not signed by its role is marked so.
        trust: the keys of the roles.
        scan: the scan that ran when the adapter was loaded; None takes what a signed scan says.
    """
    views = [statement_view(trust, manifest.digest, "", data) for data in statements]
    views.sort(key=lambda view: (view.kind, view.key_ids))
    said = {view.kind: view for view in views if view.signed}
    return {
        "base": manifest.base.model_dump(mode="json"),
        "license": manifest.license,
        "description": manifest.description or None,
        "expressions": list(manifest.conditioning.expressions),
        "neutral": manifest.conditioning.neutral,
        "template": manifest.conditioning.template,
        "strength_min": manifest.conditioning.strength_min,
        "strength_max": manifest.conditioning.strength_max,
        "rank": manifest.lora.rank,
        "ingredients": [
            {"name": one.name, "kind": one.kind, "license": one.license, "source": one.source}
            for one in manifest.ingredients
        ],
        "scan": _scanned(scan, said.get("scan")),
        "statements": [_statement(view) for view in views],
    }


def _scanned(scan: ScanReport | None, signed: StatementView | None) -> Mapping[str, Any] | None:
    if scan is not None:
        return {"verdict": scan.verdict, "findings": len(scan.findings) + scan.omitted}
    if signed is None:
        return None
    warned = signed.predicate.get("warnedTests")
    return {
        "verdict": _VERDICTS.get(str(signed.predicate.get("result")), "block"),
        "findings": len(warned) if isinstance(warned, list) else 0,
    }


def _statement(view: StatementView) -> Mapping[str, Any]:
    """A statement; of its predicate only what is short and for people."""
    told = {name: view.predicate[name] for name in _SAID if isinstance(view.predicate.get(name), str)}
    return {
        "kind": view.kind,
        "role": view.role,
        "signed": view.signed,
        "key_ids": list(view.key_ids),
        "problem": view.problem,
        **told,
    }
