"""The shipped facts: complete, sourced, and not more generous than an independent list of licences."""

from __future__ import annotations

import json
import re
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from click.testing import CliRunner

from registry import licenses
from registry.cli import cli
from registry.commands import licenses as commands
from registry.errors import UsageError
from registry.families import KNOWN_BASES
from registry.license_data import Material, library, mixes_alphabets, plain, read_library
from registry.spdx import normalize

MISSION = {
    "Qwen/Qwen-Image-Edit-2511": "Apache-2.0",
    "stepfun-ai/Step1X-Edit": "Apache-2.0",
    "black-forest-labs/FLUX.1-schnell": "Apache-2.0",
    "black-forest-labs/FLUX.1-dev": "LicenseRef-FLUX-1-dev-Non-Commercial",
    "black-forest-labs/FLUX.1-Kontext-dev": "LicenseRef-FLUX-1-dev-Non-Commercial",
    "black-forest-labs/FLUX.2-dev": "LicenseRef-FLUX-Non-Commercial",
    "black-forest-labs/FLUX.2-klein-4B": "Apache-2.0",
    "black-forest-labs/FLUX.2-klein-9B": "LicenseRef-FLUX-Non-Commercial",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "LicenseRef-CreativeML-OpenRAIL-M",
    "stabilityai/stable-diffusion-xl-base-1.0": "LicenseRef-CreativeML-OpenRAIL-PlusPlus-M",
    "stabilityai/stable-diffusion-3.5-large": "LicenseRef-Stability-AI-Community",
    "stabilityai/stable-diffusion-3.5-medium": "LicenseRef-Stability-AI-Community",
    "kandinsky-community/kandinsky-2-2-decoder": "Apache-2.0",
    "warp-ai/wuerstchen": "MIT",
}


@pytest.mark.parametrize("id", MISSION)
def test_the_bases_of_the_mission_are_known(id: str) -> None:
    found = library().base(id)
    assert found is not None
    assert found.licenses == (MISSION[id],)
    assert library().base(id.upper()) is found


def test_a_base_that_is_known_by_its_licence_alone_is_not_one_that_adapters_can_be_made_for() -> None:
    assert set(MISSION) - set(KNOWN_BASES) == {
        "stepfun-ai/Step1X-Edit",
        "black-forest-labs/FLUX.1-schnell",
        "black-forest-labs/FLUX.2-dev",
        "black-forest-labs/FLUX.2-klein-9B",
        "kandinsky-community/kandinsky-2-2-decoder",
        "warp-ai/wuerstchen",
    }


def test_bases_with_shapes_have_the_licence_of_the_data() -> None:
    for id, facts in KNOWN_BASES.items():
        known = library().base(id)
        assert known is None or known.licenses == (facts.license,)


def test_every_fact_has_a_source_and_a_day() -> None:
    for one in (*library().licenses.values(), *library().materials):
        assert re.match(r"https://[a-z.]+/\S+$", one.source), one
        assert one.read >= date(2026, 11, 1)


def test_every_name_in_the_data_is_defined_there() -> None:
    known = library()
    for facts in known.licenses.values():
        assert normalize(facts.id) == facts.id
        assert set(facts.requires) <= set(known.declarations)
    for one in known.materials:
        assert set(one.licenses) <= set(known.licenses), one


def test_licence_refs_are_legal_spdx() -> None:
    refs = [id for id in library().licenses if id.startswith("LicenseRef-")]
    assert refs
    assert all(re.fullmatch(r"LicenseRef-[A-Za-z0-9.-]+", id) for id in refs)


def test_no_spdx_licence_is_read_more_generously_than_by_others() -> None:
    """The ScanCode LicenseDB, which the parser ships, sorts licences into categories."""
    files = metadata.files("license-expression") or []
    (index,) = [file for file in files if file.name == "scancode-licensedb-index.json"]
    category = {
        one["spdx_license_key"]: one["category"]
        for one in json.loads(Path(index.locate()).read_text("utf-8"))
    }
    allowed = {
        (True, True, False): {"Permissive", "Public Domain"},
        (True, True, True): {"Copyleft", "Copyleft Limited"},
    }
    checked = 0
    for facts in library().licenses.values():
        if facts.id.startswith("LicenseRef-"):
            continue
        kind = (facts.commercial, facts.derivatives, facts.share_alike)
        assert category[facts.id] in allowed.get(kind, {"Source-available"}), facts
        checked += 1
    assert checked > 40


def test_unverified_facts_are_unknown() -> None:
    data = (Path(licenses.__file__).parent / "data" / "licenses.toml").read_text("utf-8")
    text = data.replace('title = "FLUX.1 [dev]', 'verified = false\ntitle = "FLUX.1 [dev]')
    assert not read_library(text.encode()).licenses["LicenseRef-FLUX-1-dev-Non-Commercial"].verified
    with pytest.raises(TypeError):
        read_library(text.replace("verified = false", "verifed = false").encode())
    with pytest.raises(ValueError, match="more"):
        read_library((data + "\n[more]\n").encode())


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("AntelopeV2", "antelopev2"),
        ("antelope\u00adv2", "antelopev2"),
        ("\uff41ntelopev2", "antelopev2"),
        ("gpt-image-1", "gpt image 1"),
        ("buffalo_L", "buffalo l"),
    ],
)
def test_names_are_compared_in_a_plain_form(text: str, form: str) -> None:
    assert plain(text) == form


@pytest.mark.parametrize(
    ("text", "mixed"),
    [
        ("\u0430ntelopev2", True),
        ("antelopev2", False),
        ("\u043f\u043e\u0440\u0442\u0440\u0435\u0442\u044b", False),
    ],
)
def test_look_alikes_mix_alphabets(text: str, mixed: bool) -> None:
    assert mixes_alphabets(text) is mixed


def test_explain_finds_by_any_name_and_says_when_it_does_not() -> None:
    assert library().explain("mit")[0].id == "MIT"  # type: ignore[union-attr]
    assert library().explain("AntelopeV2")
    assert library().explain("annual-revenue-below-1m-usd")
    with pytest.raises(UsageError, match="nothing is known"):
        library().explain("my-licence")


def test_the_command_offers_the_purposes_that_there_are() -> None:
    assert commands.PURPOSES == licenses.PURPOSES


def test_the_page_has_the_tables_of_the_data(repository: Path) -> None:
    page = (repository / "docs" / "licences.md").read_text("utf-8")
    tables = CliRunner().invoke(cli, ["license", "list", "--markdown"]).output
    assert tables.count("\n|") > 90
    assert page.endswith(tables), "run: registry license list --markdown, and put it at the end of the page"
    assert "no legal advice" in page


def test_the_page_names_every_purpose_and_kind_of_ingredient(repository: Path) -> None:
    page = (repository / "docs" / "licences.md").read_text("utf-8")
    assert [purpose for purpose in licenses.PURPOSES if f"| `{purpose}` |" not in page] == []
    assert [kind for kind in get_args(get_type_hints(Material)["kind"]) if f"| {kind} |" not in page] == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["explain", "LicenseRef-Stability-AI-Community"], "only if  the licensee and its affiliates"),
        (["explain", "antelopev2"], "under    LicenseRef-InsightFace-Non-Commercial or"),
        (["explain", "stabilityai/stable-diffusion-3.5-large-turbo"], "believed no: the source"),
        (["explain", "annual-revenue-below-1m-usd"], "needed   for commercial purposes"),
        (["list"], "nothing (unverified)"),
    ],
)
def test_facts_are_shown_to_people_and_programs(arguments: list[str], expected: str) -> None:
    assert expected in CliRunner().invoke(cli, ["license", *arguments]).output
    found = json.loads(CliRunner().invoke(cli, ["license", *arguments, "--json"]).output)
    assert set(found) == {"licenses", "declarations", "materials"}
    assert any(found.values())
