"""What a prompt of OpenAI's clients means to an adapter: expressions with intensities, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from registry.errors import shown
from serving.conditioning import usual_strength
from serving.http.answers import Invalid
from serving.schema import MAX_EXPRESSIONS

if TYPE_CHECKING:
    from serving.backend import AdapterStatus

_INTENSITY = re.compile(r"[+-]?([0-9]{1,9}(\.[0-9]{0,12})?|\.[0-9]{1,12})")


def parse_prompt(prompt: str, status: AdapterStatus) -> dict[str, float]:
    """Return the expressions that a prompt names, with their intensities.

    Args:
        prompt: see the docstring of this file.
        status: of the adapter; its signed card has the expressions, the neutral word and the template.

    Raises:
        Invalid: the prompt says something else.
    """
    facts: Mapping[str, Any] = status.facts or {}
    known: Sequence[str] = facts.get("expressions") or ()
    neutral = facts.get("neutral")
    usual = usual_strength(facts.get("strength_min", 1.0), facts.get("strength_max", 1.0))
    head, _, tail = str(facts.get("template") or "{}").partition("{}")
    text = prompt.strip()
    if len(text) > len(head) + len(tail) and text.startswith(head) and text.endswith(tail):
        text = text[len(head) : len(text) - len(tail)]
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = (word.strip() for word in part.partition("="))
        wrong = bool(equals) and not _INTENSITY.fullmatch(number)
        if wrong or not 0 < len(name) <= 64 or (known and name not in known and name != neutral):
            raise Invalid(
                f"the prompt says {shown(part.strip(), 80)!r}, which is no expression of this adapter",
                "write for example " + _example(known), "prompt",
            )  # fmt: skip
        if name in found:
            raise Invalid(
                f"the prompt names {shown(name, 80)!r} twice", "name each expression once", "prompt"
            )
        found[name] = float(number) if equals else usual
    if isinstance(neutral, str):
        found.pop(neutral, None)
    if len(found) > MAX_EXPRESSIONS:
        raise Invalid(f"a prompt has at most {MAX_EXPRESSIONS} expressions", "name fewer", "prompt")
    return found


def _example(known: Sequence[str]) -> str:
    if not known:
        return "happy=0.8, surprised=0.3"
    blend = f"{known[0]}=0.8" + (f", {known[1]}=0.3" if len(known) > 1 else "")
    return f"{blend}; this adapter has {', '.join(known)}"
