"""The facts about licences and well-known materials that ship with the package (registry/data/licenses.toml).

Read once and only when something is judged. The file is part of the package and trusted like its code; it is
still read strictly, so that a mistake in it fails a test and not a user.
"""

from __future__ import annotations

import functools
import re
import tomllib
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from importlib import resources
from types import MappingProxyType
from typing import Any, Final, Literal

from registry.errors import UsageError, shown

SPDX_PAGE: Final = "https://spdx.org/licenses/{}.html"

# Whose ingredients a kind of material may hide among: a dataset can be made by an API, a judge be an encoder.
_HIDES_IN: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        "base": frozenset({"base", "adapter"}),
        "dataset": frozenset({"dataset", "identity-images"}),
        "auxiliary-model": frozenset({"auxiliary-model", "judge", "adapter", "dataset", "identity-images"}),
        "api": frozenset({"api", "judge", "dataset", "identity-images"}),
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LicenseFacts:
    """What is known about one licence.

    Attributes:
        id: its SPDX identifier or LicenseRef.
        title: its name, empty for licences of the SPDX list.
        commercial: commercial use of the material and of what is made with it is permitted.
        derivatives: changed versions may be published.
        share_alike: changed versions must keep this licence.
        requires: names of declarations without which it does not permit what it permits.
        conditions: duties that come with it, for people.
        source: the page that was read.
        read: the day, or that on which no source could be read.
        verified: a source could be read; otherwise nothing here is believed.
        note: what else to know about the source.
    """

    id: str
    title: str = ""
    commercial: bool = True
    derivatives: bool = True
    share_alike: bool = False
    requires: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    source: str
    read: date
    verified: bool = True
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Declaration:
    """A condition that no program can check; ``when`` says for which purposes it is needed."""

    id: str
    when: Literal["commercial", "any"]
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """A well-known base model, dataset, auxiliary model or API, and the licences that it comes under.

    Attributes:
        kind: "base", "dataset", "auxiliary-model" or "api".
        names: a base's ids; words that betray other materials in an ingredient's name or source.
        licenses: the licences that a card may state for it.
        source, read, verified, note: as for `LicenseFacts`.
    """

    kind: Literal["base", "dataset", "auxiliary-model", "api"]
    names: tuple[str, ...]
    licenses: tuple[str, ...]
    source: str
    read: date
    verified: bool = True
    note: str = ""

    def named_by(self, kind: str, name: str, source: str) -> str | None:
        """Return the name by which an ingredient of some kind, name and source is this material, or None."""
        if kind not in _HIDES_IN[self.kind]:
            return None
        # A base is its whole id; other materials are betrayed by a word.
        text = plain(name) if self.kind == "base" else f" {plain(name)} {plain(source)} "
        for known in self.names:
            if plain(known) == text if self.kind == "base" else f" {plain(known)} " in text:
                return known
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """Everything in the data file."""

    licenses: Mapping[str, LicenseFacts]
    declarations: Mapping[str, Declaration]
    materials: tuple[Material, ...]

    def base(self, id: str) -> Material | None:
        """Return what is known about a base model, whatever the case of its id."""
        return next(
            (one for one in self.materials if one.kind == "base" and one.named_by("base", id, "")), None
        )

    def explain(self, id: str) -> tuple[LicenseFacts | Declaration | Material, ...]:
        """Return everything that goes by a name: a licence, a declaration, materials.

        Raises:
            UsageError: nothing does.
        """
        found: list[LicenseFacts | Declaration | Material] = [
            facts for key, facts in self.licenses.items() if key.casefold() == id.casefold()
        ]
        found += [one for key, one in self.declarations.items() if key == id]
        found += [one for one in self.materials if plain(id) in map(plain, one.names)]
        if not found:
            raise UsageError(
                f"nothing is known about {shown(id)!r}, so it is refused",
                "`registry license list` shows every licence, material and declaration that is known",
            )
        return tuple(found)


@functools.cache
def library() -> Library:
    """Return the facts that ship with the package."""
    data = resources.files("registry") / "data" / "licenses.toml"
    return read_library(data.read_bytes())


def read_library(data: bytes) -> Library:
    """Return the facts in a data file.

    Raises:
        ValueError, TypeError, KeyError: the file is wrong.
    """
    content = tomllib.loads(data.decode("utf-8"))
    groups = content.pop("spdx")
    named = content.pop("licenses")
    declared = content.pop("declarations")
    materials = content.pop("materials")
    if content:
        raise ValueError(f"unknown tables: {', '.join(content)}")
    facts = [
        LicenseFacts(id=id, source=SPDX_PAGE.format(id), **_but(group, "ids"))
        for group in groups
        for id in group["ids"]
    ]
    facts += [LicenseFacts(id=id, **_tuples(fields)) for id, fields in named.items()]
    return Library(
        licenses=MappingProxyType({one.id: one for one in facts}),
        declarations=MappingProxyType({id: Declaration(id=id, **fields) for id, fields in declared.items()}),
        materials=tuple(
            Material(licenses=tuple(fields["license"]), **_tuples(_but(fields, "license")))
            for fields in materials
        ),
    )


def plain(text: str) -> str:
    """Return a name in the form that is compared: lower case, words with single spaces, nothing invisible.

    "antelopev2", "Antelope\\u00adV2" and full-width letters are the same word; so are "gpt-image-1" and
    "gpt image 1".
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    seen = "".join(letter for letter in folded if unicodedata.category(letter) != "Cf")
    return " ".join(re.findall(r"\w+", seen.replace("_", " ")))


def mixes_alphabets(text: str) -> bool:
    """Return whether a word has letters of several alphabets, as look-alikes of a known name have."""
    for word in plain(text).split():
        found = {unicodedata.name(letter, "?").split()[0] for letter in word if letter.isalpha()}
        if len(found & {"LATIN", "CYRILLIC", "GREEK", "ARMENIAN", "CHEROKEE"}) > 1:
            return True
    return False


def _but(fields: Mapping[str, Any], *without: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in without}


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
