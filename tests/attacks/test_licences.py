"""Attacks on the licence check: cards that hide an ingredient or lie about its licence.

Each begins with a clean card and changes what a publisher could change by hand. Without the check that it is
about it would be allowed; the evidence names that check. The second half takes real registries and commands.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fakes.adapters import card
from fakes.registries import PASSING, adapter_folder, copy_registry, objects
from registry import cli, licenses
from registry.client import Registry
from registry.errors import LicenseRefused
from registry.manifest import CARD_NAME, AdapterCard

Card = dict[str, Any]
NON_COMMERCIAL = "LicenseRef-InsightFace-Non-Commercial"
UNREAD = "stabilityai/stable-diffusion-3.5-large-turbo"
QWEN, FLUX = "Qwen/Qwen-Image-Edit-2511", "black-forest-labs/FLUX.1-dev"


def judged(values: Card, purpose: licenses.Purpose | None = "commercial-redistribution") -> str:
    """Every problem of a card; empty when it is allowed."""
    verdict = licenses.judge(AdapterCard.parse(json.dumps(values).encode()), purpose=purpose)
    try:
        licenses.require(verdict)
    except LicenseRefused as error:
        return error.message
    return ""


def of_base(id: str, license: str) -> Card:
    values = copy.deepcopy(card())
    values["base"] |= {"id": id, "license": license}
    values["ingredients"][0] |= {"name": id, "license": license}
    return values


def with_dataset(license: str, name: str = "tiny portraits", source: str = "rendered") -> Card:
    values = copy.deepcopy(card())
    values["ingredients"][1] |= {"license": license, "name": name, "source": source}
    return values


def with_ingredient(kind: str, license: str, name: str = "the thing", source: str = "somewhere") -> Card:
    values = copy.deepcopy(card())
    values["ingredients"].append({"kind": kind, "license": license, "name": name, "source": source})
    return values


def without(kind: str) -> Card:
    values = copy.deepcopy(card())
    values["ingredients"] = [found for found in values["ingredients"] if found["kind"] != kind]
    return values


def other_dataset(digest: str | None) -> Card:
    values = copy.deepcopy(card())
    values["ingredients"][1]["digest"] = digest
    return values


def two_licences() -> Card:
    values = copy.deepcopy(card())
    values["ingredients"][0]["license"] = "MIT"
    return values


def own(license: str, dataset: str) -> Card:
    return with_dataset(dataset) | {"license": license}


ENCODER = "auxiliary-model"

# name -> (the card, what the refusal has to say)
ATTACKS: dict[str, tuple[Callable[[], Card], str]] = {
    # an ingredient list that leaves something out
    "no base": (lambda: without("base"), "is not among the ingredients"),
    "no dataset": (lambda: without("dataset"), "no dataset is among the ingredients"),
    "another dataset than the training's": (
        lambda: other_dataset("sha256:" + "0" * 64),
        "the dataset of the training",
    ),
    "a dataset without a digest": (lambda: other_dataset(None), "the dataset of the training"),
    "two licences for the base": (two_licences, "is named with two licences"),
    # a free licence for what is known not to be free
    "proprietary claimed for a known base": (
        lambda: of_base(QWEN, "LicenseRef-Proprietary"),
        f"{QWEN} is under Apache-2.0, the card says 'LicenseRef-Proprietary'",
    ),
    "a known base in other letters": (lambda: of_base(QWEN.upper(), "MIT"), "is under Apache-2.0"),
    "Apache-2.0 claimed for FLUX.1 dev": (
        lambda: of_base(FLUX, "Apache-2.0"),
        "is under LicenseRef-FLUX-1-dev-Non-Commercial",
    ),
    "FLUX.1 dev as it is": (
        lambda: of_base(FLUX, "LicenseRef-FLUX-1-dev-Non-Commercial"),
        "forbids commercial use",
    ),
    "an adapter on FLUX.1 dev inside": (
        lambda: with_ingredient("adapter", "MIT", FLUX),
        "is under LicenseRef-FLUX-1-dev-Non-Commercial",
    ),
    "MIT claimed for antelopev2": (
        lambda: with_ingredient(ENCODER, "MIT", "antelopev2"),
        f"is under {NON_COMMERCIAL}",
    ),
    "antelopev2 as a judge": (lambda: with_ingredient("judge", "MIT", "AntelopeV2 by X"), "is under"),
    "antelopev2 in the source only": (
        lambda: with_ingredient(ENCODER, "MIT", "encoder", "models/antelopev2/glintr100.onnx"),
        "is under",
    ),
    "antelopev2 with a soft hyphen": (
        lambda: with_ingredient(ENCODER, "MIT", "antelope\u00adv2"),
        "is under",
    ),
    "antelopev2 in full-width letters": (
        lambda: with_ingredient(ENCODER, "MIT", "\uff41\uff4e\uff54elopev2"),
        "is under",
    ),
    "antelopev2 with a Cyrillic letter": (
        lambda: with_ingredient(ENCODER, "MIT", "\u0430ntelopev2"),
        "mixes alphabets",
    ),
    "antelopev2 as it is": (lambda: with_ingredient(ENCODER, NON_COMMERCIAL, "antelopev2"), "forbids comm"),
    "a grant for antelopev2 that nobody declares": (
        lambda: with_ingredient(ENCODER, "LicenseRef-InsightFace-Model-License", "antelopev2"),
        "does not declare insightface-model-license-held",
    ),
    "FFHQ as public domain": (lambda: with_dataset("CC0-1.0", "faces", "FFHQ, 1024 px"), "CC-BY-NC-SA-4.0"),
    "CelebA as identity images": (
        lambda: with_ingredient("identity-images", "CC0-1.0", "celeba_hq crops"),
        "is under LicenseRef-CelebA-Research",
    ),
    "pictures by an API as our own": (
        lambda: with_dataset("LicenseRef-Proprietary", "edits", "made with gpt-image-1"),
        "is under LicenseRef-OpenAI-Terms",
    ),
    # facts that nobody could verify are no facts
    "a licence that could not be verified": (
        lambda: with_ingredient("api", "LicenseRef-BFL-API-Terms"),
        "'LicenseRef-BFL-API-Terms' is not known",
    ),
    "OR with a licence that could not be verified": (
        lambda: with_dataset("LicenseRef-BFL-API-Terms OR CC-BY-NC-4.0"),
        "CC-BY-NC-4.0 forbids commercial use",
    ),
    "a base that could not be verified": (
        lambda: of_base(UNREAD, "LicenseRef-Stability-AI-Community"),
        f"the licence of {UNREAD} could not be verified",
    ),
    # OR: whoever gets the adapter may choose, whoever makes it may not choose what was never offered
    "OR with a free side for antelopev2": (
        lambda: with_ingredient(ENCODER, f"{NON_COMMERCIAL} OR MIT", "antelopev2"),
        f"the card says '{NON_COMMERCIAL} OR MIT'",
    ),
    "OR with a free side for a base": (
        lambda: of_base(FLUX, "MIT OR Apache-2.0"),
        "is under LicenseRef-FLUX",
    ),
    "one side passes the first question, the other the second": (
        lambda: own("MIT", "CC-BY-SA-4.0 OR CC-BY-NC-4.0"),
        "dataset 'tiny portraits'",
    ),
    "OR with an unknown side": (lambda: with_dataset("MIT OR LicenseRef-Whatever"), "is not known"),
    "the adapter offers a free side of its own": (
        lambda: own("CC-BY-NC-4.0 OR MIT", "CC-BY-NC-4.0"),
        "CC-BY-NC-4.0 forbids commercial use",
    ),
    # the adapter's own licence
    "an own licence that nobody knows": (lambda: own("LicenseRef-Mine", "MIT"), "adapter's own licence"),
    "an own licence that forbids what is asked": (
        lambda: own("CC-BY-NC-4.0", "MIT"),
        "the adapter's own licence: CC-BY-NC-4.0 forbids commercial use",
    ),
    # expressions that a parser dies on, or that only look right
    "unknown LicenseRef": (lambda: with_dataset("LicenseRef-Mine"), "'LicenseRef-Mine' is not known"),
    "OR without a right side": (lambda: with_dataset("MIT OR"), "'MIT OR' is not known"),
    "AND alone": (lambda: with_dataset("AND"), "is not known"),
    "WITH without an exception": (lambda: with_dataset("MIT WITH"), "is not known"),
    "open brackets": (lambda: with_dataset("(" * 299), "is not known"),
    "nested brackets": (lambda: with_dataset("(" * 148 + "GPL" + ")" * 148), "is not known"),
    "as long as a card permits": (lambda: with_dataset("MIT AND " * 36 + "GPL-1.0-only"), "is not known"),
    "very many alternatives": (
        lambda: with_dataset(
            " AND ".join(
                f"({a} OR {b})"
                for a, b in [
                    ("MIT", "ISC"),
                    ("0BSD", "Zlib"),
                    ("MIT-0", "PDDL-1.0"),
                    ("CC0-1.0", "BSL-1.0"),
                    ("Unlicense", "MPL-2.0"),
                    ("CC-BY-4.0", "CC-BY-3.0"),
                    ("GPL-3.0-only", "ODbL-1.0"),
                ]
            )
        ),
        "is not known",
    ),
    "Cyrillic M": (lambda: with_dataset("\u041cIT"), "u041cIT' is not known"),
    "full-width letters": (lambda: with_dataset("\uff2d\uff29\uff34"), "is not known"),
    "a licence in words": (lambda: with_dataset("free for everybody"), "is not known"),
    "two licences without an operator": (lambda: with_dataset("MIT Apache-2.0"), "is not known"),
    "a licence of another document": (lambda: with_dataset("DocumentRef-x:MIT"), "is not known"),
    "none": (lambda: with_dataset("NONE"), "is not known"),
    "no assertion": (lambda: with_dataset("NOASSERTION"), "is not known"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_card_that_lies_is_refused(name: str) -> None:
    make, evidence = ATTACKS[name]
    assert evidence in judged(make())


def test_the_honest_card_is_allowed() -> None:
    assert judged(card()) == ""
    assert judged(of_base(QWEN, "Apache-2.0")) == ""


def test_brackets_and_length_alone_change_nothing() -> None:
    assert judged(with_dataset("(" * 148 + "MIT" + ")" * 148)) == ""
    assert judged(with_dataset(" OR ".join(["MIT"] * 43))) == ""


def test_an_open_licence_promises_more_than_the_policy_asks_for() -> None:
    assert "the adapter's licence MIT permits it" in judged(own("MIT", "CC-BY-NC-4.0"), "internal-research")


def test_a_base_that_only_the_policy_knows_keeps_its_licence() -> None:
    parsed = AdapterCard.parse(json.dumps(of_base("our/own-base", "MIT")).encode())
    with pytest.raises(LicenseRefused, match=r"our/own-base is under Apache-2\.0, the card says 'MIT'"):
        licenses.require(licenses.judge(parsed, "Apache-2.0"))


def test_unknown_is_refused_for_every_purpose() -> None:
    for purpose in licenses.PURPOSES:
        assert "is not known" in judged(with_dataset("LicenseRef-Mine"), purpose)


# --- real registries ----------------------------------------------------------------------------------------


def adapter_with_antelopev2(folder: Path, license: str) -> Path:
    """An adapter whose identity loss looked through antelopev2, as the trainer records it."""
    path = adapter_folder(folder) / CARD_NAME
    values = json.loads(path.read_bytes())
    values["license"] = license
    values["ingredients"].append(
        {
            "name": "antelopev2/glintr100.onnx",
            "kind": ENCODER,
            "license": NON_COMMERCIAL,
            "source": "InsightFace model pack antelopev2; no MODEL.LICENSE in it",
        }
    )
    path.write_text(json.dumps(values))
    return folder


def policy(home: Path, purpose: str) -> None:
    path = home / "registry" / "policy.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'[license]\npurpose = "{purpose}"\n')


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    return int(caught.value.code or 0)


@pytest.mark.parametrize("license", ["Apache-2.0", "LicenseRef-Proprietary", "CC-BY-NC-4.0"])
def test_push_refuses_antelopev2_for_commercial_purposes(home: Path, tmp_path: Path, license: str) -> None:
    registry = copy_registry(home)
    folder = adapter_with_antelopev2(tmp_path / "adapter", license)
    before = sorted(objects(home).rglob("*"))
    with pytest.raises(LicenseRefused, match="antelopev2") as caught:
        registry.push(folder, "sold")
    assert caught.value.exit_code == 14
    assert sorted(objects(home).rglob("*")) == before


def test_what_was_published_for_research_is_not_promoted_or_pulled_for_money(
    home: Path, tmp_path: Path
) -> None:
    copy_registry(home)
    policy(home, "research-redistribution")
    registry = Registry.open(home)
    folder = adapter_with_antelopev2(tmp_path / "adapter", "CC-BY-NC-4.0")
    registry.push(folder, "faces", evaluation=PASSING)
    registry.approve("faces:1", "a person", "for research")
    registry.promote("faces:1", "research")
    assert Registry.open(home).verify("faces@research").digest

    policy(home, "commercial-redistribution")
    sold = Registry.open(home)
    attempts: list[Callable[[], object]] = [
        lambda: sold.promote("faces:1", "prod"),
        lambda: sold.pull("faces@research"),
        lambda: sold.load("faces:1"),
        lambda: sold.verify("faces@research"),
        lambda: sold.push(folder, "faces"),
    ]
    for attempt in attempts:
        with pytest.raises(LicenseRefused, match="antelopev2"):
            attempt()


def test_the_command_flags_antelopev2(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = adapter_with_antelopev2(tmp_path / "adapter", "CC-BY-NC-4.0")
    assert run("license", "check", str(folder), "--purpose", "commercial-redistribution") == 14
    shown = capsys.readouterr().out
    (row,) = [line.split() for line in shown.splitlines() if line.startswith("antelopev2/")]
    assert row == ["antelopev2/glintr100.onnx", ENCODER, NON_COMMERCIAL, "use,", "hand", "out", "refused"]
    assert f"{NON_COMMERCIAL} forbids commercial use" in shown

    assert run("license", "check", str(folder / CARD_NAME), "--json") == 14
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found["ingredients"] if not one["allowed"]] == [
        "antelopev2/glintr100.onnx"
    ]
    assert (found["allowed"], found["purpose"]) == (False, "commercial-redistribution")

    assert run("license", "check", str(folder), "--purpose", "internal-research") == 0
    assert "Allowed for internal-research" in capsys.readouterr().out


def test_the_command_judges_published_adapters_under_a_policy_file(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_registry(home)
    assert run("license", "check", "pixelsmile@prod") == 0
    assert "Allowed for commercial-redistribution" in capsys.readouterr().out
    policy(home, "research-redistribution")
    folder = adapter_with_antelopev2(tmp_path / "adapter", "CC-BY-NC-4.0")
    Registry.open(home).push(folder, "faces", evaluation=PASSING)
    assert run("license", "check", "faces:1") == 0
    strict = tmp_path / "strict.toml"
    strict.write_text('[license]\npurpose = "commercial-use"\n')
    assert run("license", "check", "faces:1", "--policy", str(strict)) == 14
    assert run("license", "check", "faces:1", "--policy", str(strict), "--purpose", "commercial-use") == 2
    assert run("license", "check", "faces:2") == 11
    assert run("license", "check", str(tmp_path / "nothing" / CARD_NAME)) == 11
    capsys.readouterr()


def test_the_signed_licence_statement_names_every_answer(home: Path) -> None:
    registry = copy_registry(home)
    (said,) = [view.predicate for view in registry.show("pixelsmile:1").statements if view.kind == "licence"]
    assert said["purpose"] == "commercial-redistribution"
    assert said["policy"]["digest"]["sha256"] == registry.policy.digest.hex
    assert [(one["kind"], one["verdict"]) for one in said["ingredients"]] == [
        ("base", "pass"),
        ("dataset", "pass"),
    ]
    assert said["ingredients"][0]["allows"] == [*licenses.PURPOSES]
