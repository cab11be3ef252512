"""Pictures edited by one paid API and scored by another one, from portraits to a signed release.

Both vendors are fakes that speak the true protocols and misbehave; what they billed is what the ledger says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fakes.edits import drawn, drawn_people, edited, knowing
from fakes.pipelines import command
from fakes.vendors import KEY, Fault, Vendor, images
from fakes.vlm import INPUT_TOKENS, OUTPUT_TOKENS, answer, vlm
from trainer.data.dataset import Dataset

EXPRESSIONS, LEVELS, SEEDS = ("fear", "surprised"), (0.5, 1.0), range(51_000, 51_006)
EDITS = len(SEEDS) * len(EXPRESSIONS) * len(LEVELS)
FACES = EDITS + len(SEEDS)
IMAGE_PRICE, INPUT_PRICE, OUTPUT_PRICE = 0.05, 2.0, 8.0

EDIT_FAULTS = {
    2: Fault(kind="status", status=429, headers={"Retry-After": "0"}),
    4: Fault(kind="status", status=503),
    6: Fault(kind="truncated"),
    9: Fault(kind="refusal"),
    12: Fault(kind="wrong-image"),
}
SCORE_FAULTS = {
    1: Fault(kind="status", status=429, headers={"Retry-After": "0"}),
    3: Fault(kind="prose"),
    5: Fault(kind="range"),
    6: Fault(kind="missing"),
    8: Fault(kind="html"),
    11: Fault(kind="refusal"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("paid")


@pytest.fixture(scope="module")
def vendors(place: Path) -> Iterator[tuple[Vendor, Vendor]]:
    """Who edits, by Gemini's protocol, and who scores, by OpenAI's."""
    people = drawn_people(place / "people", SEEDS)
    faces = [(None, 0.0), *((name, level) for name in EXPRESSIONS for level in LEVELS)]
    truth = {
        drawn(seed, name, level, 64).tobytes(): answer({name: level} if name else {})
        for seed in SEEDS
        for name, level in faces
    }
    with Vendor(EDIT_FAULTS) as editor, Vendor(SCORE_FAULTS) as scorer:
        images(editor, knowing(people, edited(people, editor.gemini, expressions=EXPRESSIONS)))
        vlm(scorer, lambda pixels, _: truth[pixels.tobytes()])
        yield editor, scorer


def recipe(place: Path, vendors: tuple[Vendor, Vendor], **terms: str) -> Path:
    """Write the recipe of the two vendors, with the terms of what they make."""
    editor, scorer = vendors
    eyes = {"input": INPUT_PRICE, "output": OUTPUT_PRICE}
    value = edited(
        place / "people",
        editor.gemini,
        data={"intensities": list(LEVELS), "validation_share": 0.3},
        synthesis={"license": terms.get("synthesis", "CC0-1.0")},
        api={"prices": {"fake-image": {"image": IMAGE_PRICE}, "fake-eyes": eyes}},
        expressions=EXPRESSIONS,
    ).model_dump(mode="json", exclude_unset=True)
    value["scoring"] = {
        "scorer": "openai", "model": "fake-eyes", "endpoint": scorer.openai, "license": "CC0-1.0",
    }  # fmt: skip
    value["optimiser"] |= {"steps": 6}
    value["evaluation"] = {
        "identities": {"human": 2}, "first_identity": 90_000, "intensities": [0.0, 1.0], "steps": 1,
    }  # fmt: skip
    file = place / f"{'-'.join(['paid', *terms])}.yaml"
    file.write_text(yaml.safe_dump(value))
    return file


@pytest.fixture(scope="module")
def keys() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMINI_API_KEY", KEY)
        patch.setenv("OPENAI_API_KEY", KEY)
        yield


@pytest.fixture(scope="module")
def first(place: Path, vendors: tuple[Vendor, Vendor], keys: None) -> dict[str, Any]:
    """The summary of the first run."""
    done = command(place / "home", "-m", "flows.pipeline", str(recipe(place, vendors)), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def ledger(place: Path) -> dict[str, Any]:
    done = command(place / "home", "-c", "from trainer.cli import main; main()", "apis", "ledger", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def stage(summary: dict[str, Any], name: str) -> Path:
    return Path(next(stage["folder"] for stage in summary["stages"] if stage["stage"] == name))


@pytest.mark.slow
def test_one_picture_is_refused_and_nothing_that_was_made_is_lost(first: dict[str, Any]) -> None:
    import pyarrow.parquet as pq

    rows = pq.read_table(stage(first, "synthesise") / "images.parquet").to_pylist()
    refused = [row for row in rows if row["refused"]]
    assert len(rows) == FACES
    assert len(refused) == 1
    assert refused[0]["image"] is None
    scores = pq.read_table(stage(first, "score") / "scores.parquet").to_pylist()
    assert len(scores) == FACES - 1
    assert sorted({row["status"] for row in scores}) == ["quarantined", "scored"]
    assert sum(row["status"] == "quarantined" for row in scores) == 1, "others were asked again"


@pytest.mark.slow
def test_the_ledger_says_what_the_vendors_billed(
    place: Path, first: dict[str, Any], vendors: tuple[Vendor, Vendor]
) -> None:
    editor, scorer = (vendor.billed() for vendor in vendors)
    told = {row["model"]: row for row in ledger(place)["rows"]}
    image, eyes = told["fake-image"], told["fake-eyes"]
    assert image["requests"] + eyes["requests"] == sum(len(vendor.log) for vendor in vendors)
    # One edit was cut on its way, one score hidden by a gateway: billed, and nobody here can know.
    assert image["images"] == editor["images"] - 1
    assert image["usd"] == pytest.approx(editor["images"] * IMAGE_PRICE)
    assert image["unsure_usd"] == pytest.approx(IMAGE_PRICE)
    answers = scorer["answers"] - 1
    assert eyes["input_tokens"] == answers * INPUT_TOKENS
    assert eyes["usd"] - eyes["unsure_usd"] == pytest.approx(answers * price_of_a_score())
    assert eyes["unsure_usd"] > 0


def price_of_a_score() -> float:
    """Dollars that the fake takes for looking at a picture."""
    return (INPUT_TOKENS * INPUT_PRICE + OUTPUT_TOKENS * OUTPUT_PRICE) / 1e6


@pytest.mark.slow
def test_the_adapter_names_both_vendors_and_their_terms(place: Path, first: dict[str, Any]) -> None:
    card = json.loads((stage(first, "train") / "adapter" / "adapter.json").read_bytes())
    asked = {item["name"]: item["license"] for item in card["ingredients"] if item["kind"] == "api"}
    assert asked == {"fake-image": "CC0-1.0", "fake-eyes": "CC0-1.0"}
    assert Dataset.open(stage(first, "triplets")).provenance["license"] == "CC0-1.0"


@pytest.mark.slow
def test_a_second_run_asks_nobody(place: Path, first: dict[str, Any], vendors: tuple[Vendor, Vendor]) -> None:
    before = [len(vendor.log) for vendor in vendors]
    done = command(place / "home", "-m", "flows.pipeline", str(recipe(place, vendors)), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["digest"] == first["digest"]
    assert [len(vendor.log) for vendor in vendors] == before


@pytest.mark.slow
def test_terms_that_nobody_knows_are_refused_before_anything_is_paid(
    place: Path, vendors: tuple[Vendor, Vendor], keys: None
) -> None:
    before = [len(vendor.log) for vendor in vendors]
    unknown = recipe(place, vendors, synthesis="LicenseRef-whatever-they-say")
    done = command(place / "other-home", "-m", "flows.pipeline", str(unknown), "--json")
    assert done.returncode == 14
    assert "LicenseRef-whatever-they-say" in done.stdout
    assert [len(vendor.log) for vendor in vendors] == before


@pytest.mark.slow
def test_the_keys_are_nowhere_on_the_disk(place: Path, first: dict[str, Any]) -> None:
    files = [path for path in place.rglob("*") if path.is_file()]
    assert len(files) > 100
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
