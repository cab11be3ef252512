"""Templates of prompts: text with names in braces, and nothing else in them."""

from __future__ import annotations

import difflib
import string
from collections.abc import Mapping, Sequence


def check(template: str, known: Sequence[str], needed: Sequence[str] = ()) -> None:
    """Look whether a template can be filled.

    Args:
        template: the text; a brace that is meant as such is doubled.
        known: names that may stand in braces.
        needed: of them those that must.

    Raises:
        ValueError: another name stands there, or anything but a name, or a needed one is missing.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"the braces are not right ({error}); write {{{{ for a brace itself") from None
    found = []
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if name not in known or spec or conversion:
            written = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"did you mean {{{near[0]}}}? " if near else ""
            may = ", ".join(f"{{{one}}}" for one in known) or "nothing"
            raise ValueError(f"{{{written}}} is unknown; {hint}{may} may stand in braces")
        found.append(name)
    missing = [name for name in needed if name not in found]
    if missing:
        raise ValueError(f"{', '.join(f'{{{name}}}' for name in missing)} is missing")


def fill(template: str, values: Mapping[str, str]) -> str:
    """Return a checked template with its names filled in; braces in the values stay as they are."""
    parts = string.Formatter().parse(template)
    return "".join(text + (values[name] if name is not None else "") for text, name, _, _ in parts)
