"""What ``registry scan --explain`` tells of a rule: registry/data/rules.toml holds the words for people."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass
from functools import cache

from registry.errors import UsageError, shown
from registry.scanning.rules import RULES, Rule


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """A rule in full.

    Attributes:
        rule: its id, layer, severity, title and why it matters.
        do: what to do about a finding.
        example: what evidence looks like.
        limits: what it does not find, and when it is wrong.
    """

    rule: Rule
    do: str
    example: str
    limits: str


def explain(name: str) -> Explanation:
    """Return everything about a rule.

    Args:
        name: its id; case does not matter, and the beginning "ADP-" may be left out.

    Raises:
        UsageError: there is no such rule; the error names the nearest one.
    """
    wanted = name.strip().upper()
    found = next((one for one in (wanted, f"ADP-{wanted}") if one in RULES), None)
    if found is None:
        near = difflib.get_close_matches(wanted, RULES, n=1, cutoff=0.0)[0]
        raise UsageError(
            f"there is no rule {shown(name, 60)!r}",
            f"did you mean {near} ({RULES[near].title})? `registry scan --explain all` lists them",
        )
    words = _words().get(found, {})
    return Explanation(
        rule=RULES[found],
        do=words.get("do", ""),
        example=words.get("example", ""),
        limits=words.get("limits", ""),
    )


@cache
def _words() -> dict[str, dict[str, str]]:
    from importlib import resources

    return tomllib.loads(resources.files("registry").joinpath("data/rules.toml").read_text("utf-8"))
