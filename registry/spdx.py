"""SPDX licence expressions: hostile text in, a standard spelling or its alternatives out.

An expression is read into its alternatives: each is a set of licences that all apply, and whoever takes the
material may choose one. "MIT AND (CC0-1.0 OR GPL-3.0-only)" has two. What cannot be read, is too long, or
names a licence that nobody knows, which look-alike letters do, has none.
"""

from __future__ import annotations

import functools
from typing import Any, Final

from registry.license_data import library

MAX_EXPRESSION: Final = 300
"""Longest expression that is read, in characters."""

_MAX_ALTERNATIVES: Final = 64

Alternative = frozenset[str]
"""One way to accept an expression: every licence in it applies."""


def normalize(expression: str) -> str | None:
    """Return an SPDX expression in its standard spelling, or None when it names unknown licences."""
    parsed = _parse(expression)
    return None if parsed is None else str(parsed)


@functools.cache
def _licensing() -> Any:
    """Return the parser; it reads the list of all SPDX licences, once."""
    from license_expression import get_spdx_licensing

    return get_spdx_licensing()


def _parse(expression: str) -> Any:
    """Return the parsed expression, or None. Foreign exceptions end here: the parser raises many kinds."""
    if len(expression) > MAX_EXPRESSION:
        return None
    licensing = _licensing()
    try:
        parsed = licensing.parse(expression)
        known = library().licenses
        unknown = set() if parsed is None else set(licensing.unknown_license_keys(parsed)) - set(known)
    except Exception:
        return None
    return None if unknown else parsed


def alternatives(expression: str) -> frozenset[Alternative] | None:
    """Return each way to accept an expression, or None when it has no way whose licences are all known."""
    parsed = _parse(expression)
    found = None if parsed is None else _ways(parsed)
    known = {id for id, facts in library().licenses.items() if facts.verified}
    believed = frozenset(one for one in found or () if one <= known)
    return believed or None


def _ways(node: Any) -> frozenset[Alternative] | None:
    if getattr(node, "args", ()):
        parts = [_ways(part) for part in node.args]
        result: frozenset[Alternative] = (
            frozenset() if node.operator.strip() == "OR" else frozenset({frozenset()})
        )
        for part in parts:
            if part is None:
                return None
            if node.operator.strip() == "OR":
                result |= part
            else:
                result = frozenset(left | right for left in result for right in part)
            if len(result) > _MAX_ALTERNATIVES:
                return None
        return result
    # An exception ("GPL-2.0-only WITH ...") only adds permissions: the licence before it is the safe reading.
    symbol = getattr(node, "license_symbol", node)
    return frozenset({frozenset({str(symbol.key)})})
