"""Comparing the index with what is signed: every way in which they can differ, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from fakes.adapters import clean_adapter
from registry.digest import file_entry
from registry.index import CatalogModel, CatalogVersion, manifest_tags
from registry.manifest import CARD_NAME, AdapterCard, AdapterManifest
from registry.reconcile import Difference, Expected, ExpectedModel, compare

FILES = clean_adapter()
ENTRIES = tuple(file_entry(name, data) for name, data in FILES.items())
CARD = AdapterCard.parse(FILES[CARD_NAME])
NAME = "pixelsmile"


def expected(version: int) -> Expected:
    manifest = AdapterManifest.make(CARD, name=NAME, version=version, files=ENTRIES)
    tags = manifest_tags(manifest, manifest.digest) | {"scan": "pass"}
    return Expected(manifest=manifest, digest=manifest.digest, source=f"s3://a/models/{version}", tags=tags)


VERSIONS = {number: expected(number) for number in (1, 2, 3)}
SIGNED = {NAME: ExpectedModel(versions=VERSIONS, aliases={"prod": 2, "staging": 3})}


def entry(version: int, number: int | None = None, **tags: str) -> CatalogVersion:
    wanted = VERSIONS[version]
    return CatalogVersion(number=number or version, source=wanted.source, tags={**wanted.tags, **tags})


def view(
    *entries: CatalogVersion, aliases: Mapping[str, int] | None = None, name: str = NAME
) -> dict[str, CatalogModel]:
    pointing = {"prod": 2, "staging": 3} if aliases is None else aliases
    return {name: CatalogModel(name=name, versions=entries, aliases=pointing)}


HONEST = (entry(1), entry(2), entry(3))
STRANGER = CatalogVersion(number=4, source="s3://evil/x", tags={})


def told(differences: tuple[Difference, ...]) -> list[tuple[str, str]]:
    return [(one.kind, one.subject) for one in differences]


def test_nothing_differs() -> None:
    assert compare(SIGNED, view(*HONEST)) == ()


def test_tags_and_models_of_other_people_are_left_alone() -> None:
    others = view(STRANGER, name="fraud-detector", aliases={"champion": 4})
    others |= view(  # of another registry that shares the server
        CatalogVersion(
            number=1, source="s3://b/models/1", tags={"adapter_foundry.digest": "sha256:" + "1" * 64}
        ),
        name="frowns",
        aliases={"prod": 1},
    )
    mine = view(replace(entry(1), tags={**entry(1).tags, "reviewer": "Zoë"}), entry(2), entry(3))
    assert compare(SIGNED, others | mine) == ()


CASES: dict[str, tuple[dict[str, CatalogModel], list[tuple[str, str]]]] = {
    "alias moved": (
        view(*HONEST, aliases={"prod": 1, "staging": 3}),
        [("alias moved", "pixelsmile@prod")],
    ),
    "alias deleted": (view(*HONEST, aliases={"prod": 2}), [("alias missing", "pixelsmile@staging")]),
    "alias made by hand": (
        view(*HONEST, aliases={"prod": 2, "staging": 3, "Prod": 1}),
        [("alias nobody signed", "pixelsmile@Prod")],
    ),
    "version deleted, and its alias with it": (
        view(entry(1), entry(3), aliases={"staging": 3}),
        [("version missing", "pixelsmile:2"), ("alias missing", "pixelsmile@prod")],
    ),
    "model deleted": (
        {},
        [
            ("version missing", "pixelsmile:1"),
            ("version missing", "pixelsmile:2"),
            ("version missing", "pixelsmile:3"),
            ("alias missing", "pixelsmile@prod"),
            ("alias missing", "pixelsmile@staging"),
        ],
    ),
    "version that nobody signed": (view(*HONEST, STRANGER), [("version nobody signed", "pixelsmile 4")]),
    "version that claims a digest": (
        view(*HONEST, replace(STRANGER, tags={"adapter_foundry.digest": "sha256:" + "0" * 64})),
        [("version nobody signed", "pixelsmile 4")],
    ),
    "second entry of a version": (view(*HONEST, entry(2, 4)), [("version nobody signed", "pixelsmile 4")]),
    "alias on a second entry": (
        view(*HONEST, entry(2, 4), aliases={"prod": 4, "staging": 3}),
        [("version nobody signed", "pixelsmile 4"), ("alias moved", "pixelsmile@prod")],
    ),
    "licence rewritten": (
        view(entry(1), entry(2, license="MIT"), entry(3)),
        [("other tag", "pixelsmile:2")],
    ),
    "verdict removed": (
        view(
            entry(1),
            replace(entry(2), tags={key: value for key, value in VERSIONS[2].tags.items() if key != "scan"}),
            entry(3),
        ),
        [("other tag", "pixelsmile:2")],
    ),
    "tag of the registry added": (
        view(entry(1), entry(2, **{"adapter_foundry.revoked": "no"}), entry(3)),
        [("other tag", "pixelsmile:2")],
    ),
    "digest tag rewritten": (
        view(entry(1), entry(2, **{"adapter_foundry.digest": "x"}), entry(3)),
        [("other tag", "pixelsmile:2")],
    ),
    "source elsewhere": (
        view(entry(1), replace(entry(2), source="s3://evil/x"), entry(3)),
        [("other source", "pixelsmile:2")],
    ),
    "digest tag and source elsewhere": (
        view(entry(1), replace(STRANGER, number=2), entry(3)),
        [
            ("version nobody signed", "pixelsmile 2"),
            ("version missing", "pixelsmile:2"),
            ("alias moved", "pixelsmile@prod"),
        ],
    ),
    "model deleted and made anew in another order": (
        view(entry(3, 1), entry(1, 2), entry(2, 3), aliases={"prod": 3, "staging": 1}),
        [
            ("other number", "pixelsmile:1"),
            ("other number", "pixelsmile:2"),
            ("other number", "pixelsmile:3"),
        ],
    ),
    "numbers reused by strangers": (
        view(replace(STRANGER, number=1), replace(STRANGER, number=2), aliases={"prod": 1}),
        [
            ("version nobody signed", "pixelsmile 1"),
            ("version nobody signed", "pixelsmile 2"),
            ("version missing", "pixelsmile:1"),
            ("version missing", "pixelsmile:2"),
            ("version missing", "pixelsmile:3"),
            ("alias moved", "pixelsmile@prod"),
            ("alias missing", "pixelsmile@staging"),
        ],
    ),
    "digest tags exchanged": (
        view(replace(entry(1), tags=VERSIONS[2].tags), replace(entry(2), tags=VERSIONS[1].tags), entry(3)),
        [
            ("other number", "pixelsmile:1"),
            ("other source", "pixelsmile:1"),
            ("other number", "pixelsmile:2"),
            ("other source", "pixelsmile:2"),
            ("alias moved", "pixelsmile@prod"),
        ],
    ),
    "our versions under another name": (
        view(*HONEST)
        | view(entry(1), replace(entry(2), tags={}), STRANGER, name="pixelsmi1e", aliases={"prod": 4}),
        [("version nobody signed", "pixelsmi1e 1"), ("version nobody signed", "pixelsmi1e 2")],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_difference_is_told(case: str) -> None:
    found, expected_differences = CASES[case]
    assert sorted(told(compare(SIGNED, found))) == sorted(expected_differences)


def test_a_difference_says_what_was_signed_and_what_was_found() -> None:
    (moved,) = compare(SIGNED, view(*HONEST, aliases={"prod": 1, "staging": 3}))
    assert (moved.signed, moved.found) == ("version 2", "version 1 in MLflow")
    (tag,) = compare(SIGNED, view(entry(1), entry(2, license="MIT"), entry(3)))
    assert (tag.signed, tag.found) == ("license=LicenseRef-Proprietary", "license=MIT")


def test_an_alias_of_a_revoked_version_is_not_expected() -> None:
    revoked = {NAME: ExpectedModel(versions=VERSIONS, aliases={"staging": 3})}
    assert told(compare(revoked, view(*HONEST))) == [("alias nobody signed", "pixelsmile@prod")]
