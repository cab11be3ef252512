"""A dataset of paid pictures and paid scores, killed in the middle of each: nothing is paid a second time.

Kills in every other stage are in tests/bench/kills.py, those of a training also in test_training_flow.py.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from bench.kills import kill_in
from fakes.edits import drawn, drawn_people, edited, knowing
from fakes.pipelines import command
from fakes.vendors import KEY, Fault, Vendor, images
from fakes.vlm import answer, vlm

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SEEDS, EXPRESSIONS, LEVELS = range(61_000, 61_006), ("fear", "surprised"), (0.5, 1.0)
EDITS = len(SEEDS) * len(EXPRESSIONS) * len(LEVELS)
FACES = EDITS + len(SEEDS)
#: A kill: the stage, and how many requests the vendor has got then, the last of which it never answers.
KILLS = (("synthesise", 7), ("synthesise", 15), ("score", 9))

PROGRAM = """
import sys
from pathlib import Path
from flows.server import attached, managed_server
from flows.settings import prepare
home = Path(sys.argv[1])
prepare(home)
with managed_server(home) as server:
    from flows.job import dataset
    from flows.parameters import RecipeChoice
    with attached(home, server.url):
        print(dataset(RecipeChoice(recipe=sys.argv[2]))["digest"])
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def vendors(place: Path) -> Iterator[Mapping[str, Vendor]]:
    """Who edits and who scores, by the stage that asks them."""
    people = drawn_people(place / "people", SEEDS)
    faces = [(None, 0.0), *((name, level) for name in EXPRESSIONS for level in LEVELS)]
    truth = {
        drawn(seed, name, level, 64).tobytes(): answer({name: level} if name else {})
        for seed in SEEDS
        for name, level in faces
    }
    draw = knowing(people, edited(people, "http://127.0.0.1:1", expressions=EXPRESSIONS))

    def see(pixels: np.ndarray, seed: int) -> Mapping[str, float]:
        return truth[pixels.tobytes()]

    # However late a kill comes, it finds the run at that very request.
    held = {
        stage: {number: Fault(kind="held") for where, number in KILLS if where == stage} for stage, _ in KILLS
    }
    with Vendor(held["synthesise"]) as editor, Vendor(held["score"]) as scorer:
        yield {"synthesise": images(editor, draw), "score": vlm(scorer, see)}


@pytest.fixture(scope="module")
def killed(place: Path, vendors: Mapping[str, Vendor]) -> Iterator[dict[str, Any]]:
    """What each kill found, and the dataset that came out in the end."""
    recipe = edited(
        place / "people",
        vendors["synthesise"].gemini,
        data={"intensities": list(LEVELS), "validation_share": 0.3},
        synthesis={"license": "CC0-1.0"},
        expressions=EXPRESSIONS,
    ).model_dump(mode="json", exclude_unset=True)
    eyes = {"scorer": "openai", "model": "fake-eyes", "endpoint": vendors["score"].openai}
    recipe["scoring"] = {**eyes, "license": "CC0-1.0"}
    file = place / "paid.yaml"
    file.write_text(yaml.safe_dump(recipe))
    home = place / "home"
    home.mkdir()
    words = ["-c", PROGRAM, str(home), str(file)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMINI_API_KEY", KEY)
        patch.setenv("OPENAI_API_KEY", KEY)
        left, answers = [], []
        for stage, requests in KILLS:
            vendor = vendors[stage]
            _, alive, _ = kill_in(
                home, words, stage, lambda _, vendor=vendor, requests=requests: len(vendor.log) >= requests
            )
            left.append(alive)
            answers.append((stage, len(vendor.log)))
        ended = command(home, *words)
        assert ended.returncode == 0, ended.stderr
        digest = ended.stdout.strip()
        paid = {stage: len(vendor.log) for stage, vendor in vendors.items()}
        again = command(home, *words)
        assert again.returncode == 0, again.stderr
        yield {
            "home": home,
            "left": left,
            "requests": answers,
            "digest": digest,
            "paid": paid,
            "again": (again.stdout.strip(), {stage: len(vendor.log) for stage, vendor in vendors.items()}),
        }


def asked(vendor: Vendor) -> Counter[bytes]:
    """How often each request came."""
    return Counter(one.asked.path.encode() + one.asked.body for one in vendor.log)


def test_the_kills_came_in_the_middle_and_left_nobody(killed: dict[str, Any]) -> None:
    assert killed["left"] == [0, 0, 0]
    assert killed["requests"] == list(KILLS)


@pytest.mark.parametrize(("stage", "total"), [("synthesise", EDITS), ("score", FACES)])
def test_only_what_was_under_way_at_a_kill_is_asked_again(
    stage: str, total: int, killed: dict[str, Any], vendors: Mapping[str, Vendor]
) -> None:
    """Nobody can keep an answer that had not arrived: one request at a time, so one for each kill."""
    kills = sum(where == stage for where, _ in KILLS)
    counts = asked(vendors[stage])
    assert len(counts) == total, "every picture was asked for"
    assert sum(counts.values()) == total + kills
    assert max(counts.values()) <= 1 + kills


def test_a_finished_dataset_asks_nobody(killed: dict[str, Any]) -> None:
    assert killed["again"] == (killed["digest"], killed["paid"])


def test_the_dataset_has_everybody(killed: dict[str, Any]) -> None:
    import pyarrow.parquet as pq

    (folder,) = killed["home"].glob("runs/*/synthesise-*")
    rows = pq.read_table(folder / "images.parquet").to_pylist()
    assert len(rows) == FACES
    assert all(row["image"] for row in rows)
    numbers = [row["number"] for row in rows]
    assert len(set(numbers)) == len(numbers)


def test_the_ledger_tells_what_the_vendors_got(killed: dict[str, Any], vendors: Mapping[str, Vendor]) -> None:
    words = ("-c", "from trainer.cli import main; main()", "apis", "ledger", "--json")
    told = json.loads(command(killed["home"], *words).stdout)["rows"]
    requests = {row["model"]: row["requests"] for row in told}
    assert requests["fake-image"] == len(vendors["synthesise"].log)
    assert requests["fake-eyes"] == len(vendors["score"].log)
