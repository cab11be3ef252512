"""Signed evaluations in the trainer's form, schema 2, with as much of a report as the registry reads."""

from __future__ import annotations

from typing import Any

from registry.digest import Digest, digest_bytes


def row(
    name: str = "top1_accuracy",
    value: float = 0.9,
    *,
    difference: tuple[float, float, float] | None = None,
    direction: str = "higher",
    **more: Any,
) -> dict[str, Any]:
    """One metric: its value, within 0.05, and its difference as value, low and high, over 96 people."""
    gap = None if difference is None else dict(zip(("value", "low", "high"), difference, strict=True))
    return {
        "name": name,
        "title": name,
        "definition": "a share; 0 to 1",
        "direction": direction,
        "unit": "",
        "value": {"value": value, "low": value - 0.05, "high": value + 0.05, "n": 96, "samples": 1152},
        "minimum": None,
        "maximum": None,
        "max_regression": None,
        "passed": None,
        "difference": None if gap is None else {**gap, "p": 0.25, "p_holm": 0.5, "n": 96, "detectable": 0.02},
        "references": {},
        "examples": [],
        **more,
    }


def evaluation(
    weights: Digest, *rows: dict[str, Any], against: Digest | None = None, **more: Any
) -> dict[str, Any]:
    """What the registry signs of a report.

    Args:
        weights: of the adapter that was judged.
        rows: its metrics.
        against: weights of the adapter that it was compared with.
        more: keys that replace these.
    """
    compared = None if against is None else {"reference": "pixelsmile@prod", "weights": str(against)}
    return {
        "verdict": "pass",
        "failed": [],
        "reasons": [],
        "notes": [],
        "schema_version": 2,
        "code_version": "0.7.0",
        "digests": {
            "adapter": str(weights),
            "raw": None,
            "base": str(digest_bytes(b"base")),
            "judges": {"expression": str(digest_bytes(b"judge"))},
            "suite": str(digest_bytes(b"suite")),
            "code": str(digest_bytes(b"code")),
        },
        "judges": {"expression": "portraits judge", "identity": "portraits"},
        "suite": {"name": "portraits-v1", "definitions": "2"},
        "against": compared,
        "metrics": list(rows or (row(),)),
        **more,
    }
