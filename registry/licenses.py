"""Licences: SPDX expressions, what they allow, and whether an adapter may serve a purpose.

The rule in one sentence: an adapter is allowed when its own licence and that of every ingredient are known
and permit both what the policy asks for and what the adapter's licence promises to others. Unknown is
refused. Facts about licences are data (registry/data/licenses.toml), each with the page that was read; they
are a reading for machines, no legal advice. docs/licences.md explains the decision step by step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from registry.errors import LicenseRefused, shown
from registry.license_data import LicenseFacts, library, mixes_alphabets
from registry.spdx import Alternative, alternatives, normalize

if TYPE_CHECKING:
    from registry.digest import Digest
    from registry.manifest import AdapterCard, Ingredient

Purpose = Literal[
    "internal-research", "research-redistribution", "commercial-use", "commercial-redistribution"
]

POLICY_VERSION: Final = 1
PROPRIETARY: Final = "LicenseRef-Proprietary"
# What becomes part of the weights; code, judges and encoders in a loss only help to make them.
_FLOWS_INTO_WEIGHTS = frozenset({"base", "dataset", "identity-images", "adapter", "api"})


class _Need(NamedTuple):
    """What a licence has to permit."""

    commercial: bool
    handed_out: bool


_NEEDS: Final[dict[Purpose, _Need]] = {
    "internal-research": _Need(False, False),
    "research-redistribution": _Need(False, True),
    "commercial-use": _Need(True, False),
    "commercial-redistribution": _Need(True, True),
}
PURPOSES: Final[tuple[Purpose, ...]] = tuple(_NEEDS)
"""From the least demanding to the most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IngredientVerdict:
    """The answer about one ingredient.

    Attributes:
        kind, name, license: as the card has them.
        allows: the purposes that its licence permits by itself; empty when it is not known.
        reasons: why it is refused, one sentence each.
        conditions: duties that come with its licence.
    """

    kind: str
    name: str
    license: str
    allows: tuple[Purpose, ...]
    reasons: tuple[str, ...]
    conditions: tuple[str, ...]

    @property
    def allowed(self) -> bool:
        """Whether the ingredient allows the adapter."""
        return not self.reasons


@dataclass(frozen=True, kw_only=True, slots=True)
class LicenseVerdict:
    """The answer about an adapter.

    Attributes:
        license: the adapter's licence, as a normalised SPDX expression.
        purpose: what was asked for.
        commercial: the adapter's licence permits commercial use.
        problems: why it is refused, one sentence each; empty when it is allowed.
        ingredients: the answer about each ingredient, in the card's order.
        policy: digest of the policy file that asked, if one did.
    """

    license: str
    purpose: Purpose
    commercial: bool
    problems: tuple[str, ...]
    ingredients: tuple[IngredientVerdict, ...] = ()
    policy: Digest | None = None

    @property
    def allowed(self) -> bool:
        """Whether the adapter may serve the purpose under its licence."""
        return not self.problems


def allows(expression: str, declared: Collection[str] = (), *, flows: bool = True) -> tuple[Purpose, ...]:
    """Return the purposes that an SPDX expression permits; none when it is not known.

    Of alternatives (OR) one has to permit the purpose, of combinations (AND) every licence.

    Args:
        expression: the licence of a material.
        declared: conditions that are said to be met.
        flows: the material becomes part of the weights; otherwise handing them out needs no permission.
    """
    found = alternatives(expression)
    return tuple(
        purpose
        for purpose, need in _NEEDS.items()
        if found is not None
        and not _refusals(found, _Need(need.commercial, need.handed_out and flows), declared)
    )


def conditions(expression: str) -> tuple[str, ...]:
    """Return what any licence of an expression ties its permissions to, for people."""
    known, ids = library(), frozenset[str]().union(*(alternatives(expression) or ()))
    return tuple(
        f"{id}: {text}"
        for id in sorted(ids)
        for text in (
            *(f"only if {known.declarations[name].text}" for name in known.licenses[id].requires),
            *known.licenses[id].conditions,
        )
    )


def judge(
    card: AdapterCard,
    known_base_license: str | None = None,
    *,
    purpose: Purpose | None = None,
    declared: Collection[str] = (),
    policy: Digest | None = None,
) -> LicenseVerdict:
    """Return whether an adapter may serve a purpose under its licence.

    Args:
        card: the adapter's card (or the one inside a manifest).
        known_base_license: the licence that the base model is known to have, when the caller knows it;
            bases in the shipped data are known anyway.
        purpose: what the adapter is meant for; None asks for what its own licence promises, and for a
            proprietary adapter for everything.
        declared: conditions of licences that are said to be met.
        policy: digest of the policy that asks, for the record.
    """
    own = alternatives(card.license)
    commercial = own is not None and not _refusals(own, _Need(True, False), library().declarations)
    if purpose is None:
        purpose = "commercial-redistribution" if commercial else "research-redistribution"
    asked = _NEEDS[purpose]
    # A proprietary adapter promises nobody anything; every other licence lets others have the weights.
    promised = (
        _Need(False, False) if own == frozenset({frozenset({PROPRIETARY})}) else _Need(commercial, True)
    )
    ingredients = tuple(
        _judge_ingredient(one, card.license, own, asked, promised, declared) for one in card.ingredients
    )
    problems = _own_problems(card.license, own, purpose, declared)
    if known_base_license is not None and normalize(card.base.license) != normalize(known_base_license):
        problems.append(
            f"the base {shown(card.base.id)} is under {known_base_license}, "
            f"the card says {shown(card.base.license)!r}"
        )
    problems += _missing_ingredients(card)
    problems += [f"{one.kind} {shown(one.name)!r}: {reason}" for one in ingredients for reason in one.reasons]
    return LicenseVerdict(
        license=normalize(card.license) or card.license,
        purpose=purpose,
        commercial=commercial,
        problems=tuple(dict.fromkeys(problems)),
        ingredients=ingredients,
        policy=policy,
    )


def require(verdict: LicenseVerdict) -> LicenseVerdict:
    """Return an allowing verdict as it is.

    Raises:
        LicenseRefused: the verdict does not allow it; the message names each ingredient at fault.
    """
    if verdict.allowed:
        return verdict
    raise LicenseRefused(
        f"the licence policy refuses an adapter under {shown(verdict.license)} for {verdict.purpose}: "
        + "; ".join(verdict.problems),
        "replace the ingredient, correct its SPDX licence in the card, publish under a licence it permits, "
        "or ask for less in the policy ([license] purpose)",
    )


def _refusals(ways: Iterable[Alternative], need: _Need, declared: Collection[str]) -> list[str]:
    """Return why no alternative permits what is needed: the reasons of the one that comes closest."""
    known = library().licenses
    each = (
        [reason for id in sorted(one) for reason in _refused_by(known[id], need, declared)] for one in ways
    )
    return min(each, key=lambda reasons: (len(reasons), reasons))


def _refused_by(facts: LicenseFacts, need: _Need, declared: Collection[str]) -> list[str]:
    reasons = []
    if need.commercial and not facts.commercial:
        reasons.append(f"{facts.id} forbids commercial use")
    if need.handed_out and not facts.derivatives:
        reasons.append(f"{facts.id} forbids changed versions to be handed out")
    for name in facts.requires:
        condition = library().declarations[name]
        if name not in declared and (need.commercial or condition.when == "any"):
            reasons.append(
                f"{facts.id} permits it only if {condition.text}; the policy does not declare {name}"
            )
    return reasons


def _own_problems(
    license: str, own: frozenset[Alternative] | None, purpose: Purpose, declared: Collection[str]
) -> list[str]:
    if own is None:
        return [f"the adapter's own licence {shown(license)!r} is not known"]
    need = _Need(_NEEDS[purpose].commercial, False)
    return [
        f"the adapter's own licence: {reason}, the policy asks for {purpose}"
        for reason in _refusals(own, need, declared)
    ]


def _missing_ingredients(card: AdapterCard) -> list[str]:
    """Say which ingredients the card hides: every adapter has a base and the dataset of its training."""
    problems = []
    bases = [found for found in card.ingredients if found.kind == "base"]
    if not any(found.name == card.base.id for found in bases):
        problems.append(f"the base {shown(card.base.id)!r} is not among the ingredients")
    for found in bases:
        if found.name == card.base.id and normalize(found.license) != normalize(card.base.license):
            problems.append(f"the base {shown(found.name)!r} is named with two licences")
    datasets = [found for found in card.ingredients if found.kind == "dataset"]
    if not datasets:
        problems.append("no dataset is among the ingredients")
    elif not any(found.digest == card.training.dataset for found in datasets):
        problems.append(f"the dataset of the training ({card.training.dataset}) is not among the ingredients")
    return problems


def _judge_ingredient(
    ingredient: Ingredient,
    license: str,
    own: frozenset[Alternative] | None,
    asked: _Need,
    promised: _Need,
    declared: Collection[str],
) -> IngredientVerdict:
    flows = ingredient.kind in _FLOWS_INTO_WEIGHTS
    found = alternatives(ingredient.license)
    reasons = _false_names(ingredient)
    if found is None:
        reasons.append(f"its licence {shown(ingredient.license)!r} is not known")
    else:
        handed_out = flows and (asked.handed_out or promised.handed_out)
        need = _Need(asked.commercial or promised.commercial, handed_out)
        asker = (
            "the policy asks for it" if asked.commercial else f"the adapter's licence {license} permits it"
        )
        # One alternative has to pass everything, not one the first question and another the second.
        each = [
            [*_refusals([one], need, declared), *(_share_alike(one, license, own) if flows and own else ())]
            for one in found
        ]
        reasons += [
            f"{reason}, {asker}" if reason.endswith("commercial use") else reason
            for reason in min(each, key=lambda why: (len(why), why))
        ]
    return IngredientVerdict(
        kind=ingredient.kind,
        name=ingredient.name,
        license=ingredient.license,
        allows=allows(ingredient.license, declared, flows=flows),
        reasons=tuple(reasons),
        conditions=conditions(ingredient.license),
    )


def _share_alike(one: Alternative, license: str, own: frozenset[Alternative]) -> list[str]:
    """Say which licences must be the adapter's too: the only one, in every alternative of it."""
    known = library().licenses
    return [
        f"{id} demands the same licence for what is made from it, not {shown(license)}"
        for id in sorted(one)
        if known[id].share_alike and own != frozenset({frozenset({id})})
    ]


def _false_names(ingredient: Ingredient) -> list[str]:
    """Say where an ingredient is a well-known material under another licence than its own."""
    reasons = []
    if mixes_alphabets(ingredient.name) or mixes_alphabets(ingredient.source):
        reasons.append("its name or source mixes alphabets, as look-alikes of other names do")
    for known in library().materials:
        name = known.named_by(ingredient.kind, ingredient.name, ingredient.source)
        if name is None:
            continue
        if not known.verified:
            reasons.append(f"the licence of {name} could not be verified")
        elif normalize(ingredient.license) not in {normalize(license) for license in known.licenses}:
            wanted = " or ".join(known.licenses)
            reasons.append(f"{name} is under {wanted}, the card says {shown(ingredient.license)!r}")
    return reasons
