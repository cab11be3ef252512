"""``registry license``: may an adapter serve a purpose, and what is known about licences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from registry.commands import Answer, command, table

if TYPE_CHECKING:
    from registry.license_data import Declaration, LicenseFacts, Material
    from registry.licenses import LicenseVerdict, Purpose
    from registry.manifest import AdapterCard

# Those of registry.licenses, which is not imported before a command runs; a test compares them.
PURPOSES = ("internal-research", "research-redistribution", "commercial-use", "commercial-redistribution")

_WORDS = {"internal-research": "use", "research-redistribution": "hand out", "commercial-use": "earn"}


@click.group("license")
def license_group() -> None:
    """Judge the licences of an adapter, and show what is known about licences."""


@command
@click.argument("adapter")
@click.option("--purpose", type=click.Choice(PURPOSES), help="What the adapter is meant for.")
@click.option(
    "--policy", type=click.Path(exists=True, dir_okay=False), help="Policy file, instead of the registry's."
)
def check(adapter: str, purpose: Purpose | None, policy: str | None) -> Answer:
    """Decide whether ADAPTER may serve a purpose; exit code 14 when it may not.

    ADAPTER is a folder with adapter.json, that file, or name@alias, name:version or name@sha256:<hex>. The
    purpose is that of the registry's policy, unless it or another policy file is given.
    """
    from pathlib import Path

    from registry.admission import judge_licences
    from registry.errors import LicenseRefused, UsageError
    from registry.policy import RegistryPolicy
    from registry.settings import layout

    if purpose is not None and policy is not None:
        raise UsageError("--purpose and --policy are two answers to one question", "give one of them")
    rules = RegistryPolicy.load(Path(policy) if policy is not None else layout().policy)
    if purpose is not None:
        asked = rules.license.model_copy(update={"purpose": purpose})
        rules = rules.model_copy(update={"license": asked})
    verdict = judge_licences(_card(adapter), rules.admission(None))
    return Answer(_data(verdict), _text(verdict), 0 if verdict.allowed else LicenseRefused.exit_code)


@click.option("--markdown", is_flag=True, help="Print the tables of docs/licences.md.")
def everything(markdown: bool) -> Answer:
    """Show every licence, declaration and material that is known, each with the page that was read.

    "use" is research inside, "hand out" to give the weights to others, "earn" to use them commercially.
    """
    from registry.license_data import library

    known = library()
    data = {
        "licenses": [_license(facts) for facts in known.licenses.values()],
        "declarations": [_declaration(one) for one in known.declarations.values()],
        "materials": [_material(one) for one in known.materials],
    }
    if markdown:
        return Answer(data, "\n\n".join(_markdown(rows) for rows in _tables()))
    return Answer(data, "\n\n".join([*(table(rows) for rows in _tables()), _NO_ADVICE]))


@command
@click.argument("name")
def explain(name: str) -> Answer:
    """Show what is known about NAME: a licence, a declaration or a material such as antelopev2."""
    from registry.license_data import Declaration, LicenseFacts, library

    data: dict[str, Any] = {"licenses": [], "declarations": [], "materials": []}
    lines = []
    for found in library().explain(name):
        if isinstance(found, LicenseFacts):
            data["licenses"].append(_license(found))
            lines += _license_lines(found)
        elif isinstance(found, Declaration):
            data["declarations"].append(_declaration(found))
            lines += [found.id, f"  needed   for {found.when} purposes", f"  says     {found.text}"]
        else:
            data["materials"].append(_material(found))
            lines += [
                ", ".join(found.names),
                f"  is       {found.kind}",
                f"  under    {' or '.join(found.licenses)}",
                *_source_lines(found),
            ]
    return Answer(data, "\n".join([*lines, "", _NO_ADVICE]))


_NO_ADVICE = "These facts are a reading for machines, no legal advice."


def _tables() -> Sequence[Sequence[tuple[str, ...]]]:
    """The licences, the declarations and the materials as rows, each table with its header."""
    from registry.license_data import library
    from registry.licenses import allows

    known = library()
    declared = tuple(known.declarations)
    licenses = [("LICENCE", "ALLOWS", "KEEPS ITS LICENCE", "ONLY IF", "SOURCE", "READ")]
    licenses += [
        (
            facts.id,
            _words(allows(facts.id, declared)) if facts.verified else "nothing (unverified)",
            "yes" if facts.share_alike else "",
            ", ".join(facts.requires),
            facts.source,
            facts.read.isoformat(),
        )
        for facts in known.licenses.values()
    ]
    declarations = [("DECLARATION", "NEEDED FOR", "SAYS")]
    declarations += [
        (one.id, f"{one.when} purposes" if one.when == "commercial" else "every purpose", one.text)
        for one in known.declarations.values()
    ]
    materials = [("MATERIAL", "KIND", "LICENCE", "SOURCE", "READ")]
    materials += [
        (
            name,
            one.kind,
            " or ".join(one.licenses) if one.verified else "unverified, so refused",
            one.source,
            one.read.isoformat(),
        )
        for one in known.materials
        for name in one.names
    ]
    return licenses, declarations, materials


def _markdown(rows: Sequence[tuple[str, ...]]) -> str:
    head, *body = rows
    names = [name.lower() for name in head]
    return "\n".join(f"| {' | '.join(row)} |" for row in (names, ["---"] * len(names), *body))


def _card(adapter: str) -> AdapterCard:
    from pathlib import Path

    from registry.client import Registry
    from registry.errors import NotFound
    from registry.manifest import CARD_NAME, MAX_CARD_BYTES, AdapterCard

    path = Path(adapter)
    if path.is_dir():
        path = path / CARD_NAME
    if path.is_file():
        with path.open("rb") as file:
            return AdapterCard.parse(file.read(MAX_CARD_BYTES + 1))
    if "/" in adapter or path.name == CARD_NAME:
        raise NotFound(f"{path} is not there", f"name a folder with {CARD_NAME}, or a published adapter")
    return Registry.open().show(adapter).manifest.card


def _data(verdict: LicenseVerdict) -> dict[str, Any]:
    return {
        "allowed": verdict.allowed,
        "purpose": verdict.purpose,
        "policy": None if verdict.policy is None else str(verdict.policy),
        "license": verdict.license,
        "commercial": verdict.commercial,
        "problems": [*verdict.problems],
        "ingredients": [
            {
                "name": one.name,
                "kind": one.kind,
                "license": one.license,
                "allows": [*one.allows],
                "allowed": one.allowed,
                "reasons": [*one.reasons],
                "conditions": [*one.conditions],
            }
            for one in verdict.ingredients
        ],
    }


def _text(verdict: LicenseVerdict) -> str:
    from registry.errors import shown

    rows = [("INGREDIENT", "KIND", "LICENCE", "ALLOWS", "VERDICT")]
    rows += [
        (
            shown(one.name),
            one.kind,
            shown(one.license),
            _words(one.allows),
            "pass" if one.allowed else "refused",
        )
        for one in verdict.ingredients
    ]
    lines = [table(rows), ""]
    conditions = dict.fromkeys(text for one in verdict.ingredients for text in one.conditions)
    if conditions:
        lines += ["These licences come with conditions:", *(f"  {text}" for text in conditions), ""]
    if verdict.allowed:
        lines.append(f"Allowed for {verdict.purpose} under {shown(verdict.license)}.")
    else:
        lines += [f"Refused for {verdict.purpose} under {shown(verdict.license)}:"]
        lines += [f"  {problem}" for problem in verdict.problems]
    return "\n".join(lines)


def _words(purposes: tuple[Purpose, ...]) -> str:
    return ", ".join(word for purpose, word in _WORDS.items() if purpose in purposes) or "nothing"


def _license(facts: LicenseFacts) -> dict[str, Any]:
    return {
        "id": facts.id,
        "title": facts.title,
        "commercial": facts.commercial,
        "derivatives": facts.derivatives,
        "share_alike": facts.share_alike,
        "requires": [*facts.requires],
        "conditions": [*facts.conditions],
        **_source(facts),
    }


def _license_lines(facts: LicenseFacts) -> list[str]:
    from registry.license_data import library
    from registry.licenses import allows

    lines = [facts.id, f"  allows   {_words(allows(facts.id, tuple(library().declarations)))}"]
    if facts.title:
        lines.insert(1, f"  is       {facts.title}")
    lines += [f"  only if  {library().declarations[name].text} ({name})" for name in facts.requires]
    if facts.share_alike:
        lines.append("  demands  that what is made from it keeps this licence")
    lines += [f"  demands  {text}" for text in facts.conditions]
    return lines + _source_lines(facts)


def _declaration(one: Declaration) -> dict[str, Any]:
    return {"id": one.id, "when": one.when, "text": one.text}


def _material(one: Material) -> dict[str, Any]:
    return {"kind": one.kind, "names": [*one.names], "licenses": [*one.licenses], **_source(one)}


def _source(one: LicenseFacts | Material) -> dict[str, Any]:
    return {"source": one.source, "read": one.read.isoformat(), "verified": one.verified, "note": one.note}


def _source_lines(one: LicenseFacts | Material) -> list[str]:
    lines = [f"  source   {one.source}, read {one.read}"]
    if not one.verified:
        lines.append("  believed no: the source could not be read")
    return lines + ([f"  note     {one.note}"] if one.note else [])


for _command in (check, command(everything, "list"), explain):
    license_group.add_command(_command)

COMMANDS = (license_group,)
