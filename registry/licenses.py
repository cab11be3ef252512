"""Licences: SPDX expressions, facts about them, and the policy for adapters.

The policy in one sentence: an adapter may be published under a licence when every ingredient's licence is
known and permits it. An adapter over an Apache-2.0 base may be proprietary; one non-commercial or unknown
ingredient refuses a commercial adapter, and the refusal names the ingredient. Facts about licences are data
below; they are a reading for machines, no legal advice.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from registry.errors import LicenseRefused, shown

if TYPE_CHECKING:
    from registry.manifest import AdapterCard, Ingredient

POLICY_VERSION: Final = 1
_MAX_EXPRESSION = 300
# What becomes part of the weights; code and judges only help to make them.
_FLOWS_INTO_WEIGHTS = frozenset({"base", "dataset", "identity-images", "adapter"})


@dataclass(frozen=True, kw_only=True, slots=True)
class LicenseFacts:
    """What the policy has to know about a licence.

    Attributes:
        commercial: commercial use of the material and of what is made with it is permitted.
        derivatives: changed versions may be published.
        share_alike: changed versions must keep this licence.
    """

    commercial: bool = True
    derivatives: bool = True
    share_alike: bool = False


_FREE = LicenseFacts()
_SHARE_ALIKE = LicenseFacts(share_alike=True)
_NON_COMMERCIAL = LicenseFacts(commercial=False)

FACTS: Final[dict[str, LicenseFacts]] = {
    **dict.fromkeys(
        (
            "0BSD",
            "Apache-2.0",
            "BSD-2-Clause",
            "BSD-3-Clause",
            "BSL-1.0",
            "CC-BY-3.0",
            "CC-BY-4.0",
            "CC0-1.0",
            "CDLA-Permissive-1.0",
            "CDLA-Permissive-2.0",
            "ISC",
            "MIT",
            "MIT-0",
            "ODC-By-1.0",
            "PDDL-1.0",
            "Unlicense",
            "Zlib",
        ),
        _FREE,
    ),
    # Material of the publisher itself, for which the publisher holds all rights.
    "LicenseRef-Proprietary": _FREE,
    # OpenRAIL licences restrict what one may do, not whether one may earn with it.
    "LicenseRef-CreativeML-OpenRAIL-M": _FREE,
    "LicenseRef-OpenRAIL++-M": _FREE,
    **dict.fromkeys(
        (
            "AGPL-3.0-only",
            "AGPL-3.0-or-later",
            "CC-BY-SA-3.0",
            "CC-BY-SA-4.0",
            "CDLA-Sharing-1.0",
            "GPL-2.0-only",
            "GPL-2.0-or-later",
            "GPL-3.0-only",
            "GPL-3.0-or-later",
            "LGPL-2.1-only",
            "LGPL-2.1-or-later",
            "LGPL-3.0-only",
            "LGPL-3.0-or-later",
            "MPL-2.0",
            "ODbL-1.0",
        ),
        _SHARE_ALIKE,
    ),
    **dict.fromkeys(
        (
            "CC-BY-NC-2.0",
            "CC-BY-NC-3.0",
            "CC-BY-NC-4.0",
            "LicenseRef-FLUX-1-dev-Non-Commercial",
            "LicenseRef-InsightFace-Non-Commercial",
            "LicenseRef-Stability-AI-Non-Commercial-Research",
        ),
        _NON_COMMERCIAL,
    ),
    **dict.fromkeys(("CC-BY-NC-SA-3.0", "CC-BY-NC-SA-4.0"), LicenseFacts(commercial=False, share_alike=True)),
    **dict.fromkeys(
        ("CC-BY-NC-ND-3.0", "CC-BY-NC-ND-4.0"), LicenseFacts(commercial=False, derivatives=False)
    ),
    **dict.fromkeys(("CC-BY-ND-3.0", "CC-BY-ND-4.0"), LicenseFacts(derivatives=False)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LicenseVerdict:
    """The answer of the policy.

    Attributes:
        license: the adapter's licence, as a normalised SPDX expression.
        commercial: the adapter may be used commercially.
        problems: why it is refused, one sentence each; empty when it is allowed.
    """

    license: str
    commercial: bool
    problems: tuple[str, ...]

    @property
    def allowed(self) -> bool:
        """Whether the adapter may be published under its licence."""
        return not self.problems


def normalize(expression: str) -> str | None:
    """Return an SPDX expression in its standard spelling, or None when it names unknown licences."""
    parsed = _parse(expression)
    return None if parsed is None else str(parsed)


def facts(expression: str) -> LicenseFacts | None:
    """Return what an SPDX expression permits, or None when that is not known.

    Of alternatives (OR) the most permissive counts, of combinations (AND) every restriction.
    """
    parsed = _parse(expression)
    return None if parsed is None else _facts_of(parsed)


@functools.cache
def _licensing() -> Any:
    """Return the parser; it reads the list of all SPDX licences, once."""
    from license_expression import get_spdx_licensing

    return get_spdx_licensing()


def _parse(expression: str) -> Any:
    """Return the parsed expression, or None. Foreign exceptions end here: the parser raises many kinds."""
    if len(expression) > _MAX_EXPRESSION:
        return None
    licensing = _licensing()
    try:
        parsed = licensing.parse(expression)
        unknown = set() if parsed is None else set(licensing.unknown_license_keys(parsed)) - set(FACTS)
    except Exception:
        return None
    return None if unknown else parsed


def _facts_of(node: Any) -> LicenseFacts | None:
    if getattr(node, "args", ()):
        parts = [_facts_of(part) for part in node.args]
        if node.operator.strip() == "OR":
            return max((part for part in parts if part is not None), key=_freedom, default=None)
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        return LicenseFacts(
            commercial=all(part.commercial for part in known),
            derivatives=all(part.derivatives for part in known),
            share_alike=any(part.share_alike for part in known),
        )
    # An exception ("GPL-2.0-only WITH ...") only adds permissions: the licence before it is the safe reading.
    symbol = getattr(node, "license_symbol", node)
    return FACTS.get(symbol.key)


def _freedom(found: LicenseFacts) -> tuple[bool, bool, bool]:
    return found.commercial, found.derivatives, not found.share_alike


def judge(card: AdapterCard, known_base_license: str | None = None) -> LicenseVerdict:
    """Return whether an adapter may be published under its licence.

    Args:
        card: the adapter's card (or the one inside a manifest).
        known_base_license: the licence that the base model is known to have, when it is known.
    """
    own = facts(card.license)
    problems = _missing_ingredients(card)
    if own is None:
        problems.append(f"the adapter's own licence {shown(card.license)!r} is not known")
    if known_base_license is not None and normalize(card.base.license) != normalize(known_base_license):
        problems.append(
            f"the base {shown(card.base.id)} is under {known_base_license}, "
            f"the card says {shown(card.base.license)!r}"
        )
    for ingredient in card.ingredients:
        problem = _conflict(ingredient, card.license, own)
        if problem:
            problems.append(f"{ingredient.kind} {shown(ingredient.name)!r}: {problem}")
    return LicenseVerdict(
        license=normalize(card.license) or card.license,
        commercial=own is not None and own.commercial,
        problems=tuple(problems),
    )


def require(verdict: LicenseVerdict) -> LicenseVerdict:
    """Return an allowing verdict as it is.

    Raises:
        LicenseRefused: the verdict does not allow it; the message names each ingredient at fault.
    """
    if verdict.allowed:
        return verdict
    raise LicenseRefused(
        f"the licence policy refuses an adapter under {shown(verdict.license)}: "
        + "; ".join(verdict.problems),
        "replace the ingredient, correct its SPDX licence in the card, or publish under a licence it permits",
    )


def _missing_ingredients(card: AdapterCard) -> list[str]:
    """Say which ingredients the card hides: every adapter has a base and a dataset."""
    problems = []
    bases = [found for found in card.ingredients if found.kind == "base"]
    if not any(found.name == card.base.id for found in bases):
        problems.append(f"the base {shown(card.base.id)!r} is not among the ingredients")
    for found in bases:
        if found.name == card.base.id and normalize(found.license) != normalize(card.base.license):
            problems.append(f"the base {shown(found.name)!r} is named with two licences")
    if not any(found.kind == "dataset" for found in card.ingredients):
        problems.append("no dataset is among the ingredients")
    return problems


def _conflict(ingredient: Ingredient, license: str, own: LicenseFacts | None) -> str | None:
    """Return why ``ingredient`` forbids an adapter under ``license``, or None."""
    found = facts(ingredient.license)
    if found is None:
        return f"its licence {shown(ingredient.license)!r} is not known"
    if own is None:
        return None
    if own.commercial and not found.commercial:
        return f"{ingredient.license} forbids commercial use, the adapter's licence {license} permits it"
    if ingredient.kind not in _FLOWS_INTO_WEIGHTS:
        return None
    if not found.derivatives:
        return f"{ingredient.license} forbids changed versions"
    if found.share_alike and normalize(ingredient.license) != normalize(license):
        return f"{ingredient.license} demands the same licence for what is made from it, not {license}"
    return None
