"""What people do with a dataset: look at it, compare two, check one, hand it on to others."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from fakes.datasets import Row, drawn, resigned, small_dataset, true_scores, write_stages
from registry.digest import Digest, digest_bytes
from registry.errors import Explained
from trainer.apis.ledger import Ledger, Line
from trainer.apis.request import Usage
from trainer.data import Dataset, build_triplets
from trainer.data.blobs import Blobs
from trainer.data.command import data as command
from trainer.data.difference import Difference, difference
from trainer.data.inspection import BINS, Inspection, distribution, inspect
from trainer.data.inspection_page import page
from trainer.data.inspection_sheets import PEOPLE, Lot
from trainer.data.webdataset import export
from trainer.errors import DataError
from trainer.recipe import Recipe

PEOPLE_OF = {"human-100": "train", "human-101": "train", "anime-102": "train", "human-103": "validation"}


def built(recipe: Recipe, folder: Path, rows: list[Row], scores: list[Row]) -> Path:
    names = recipe.conditioning.expressions
    images, scored = write_stages(folder, rows, scores, names)
    build_triplets(recipe, images, scored, folder / "dataset")
    return folder / "dataset"


@pytest.fixture(scope="module")
def material(tiny_recipe: Recipe) -> tuple[list[Row], list[Row]]:
    """Pictures and scores; human-101 is said to show no fear at 0.5, so one picture is left out."""
    names = tiny_recipe.conditioning.expressions
    rows = drawn(PEOPLE_OF, names, tiny_recipe.data.intensities)
    scores = true_scores(rows, names)
    for row, score in zip(rows, scores, strict=True):
        if (row["identity"], row["expression"], row["intensity"]) == ("human-101", "fear", 0.5):
            score["score_fear"] = 0.01
    return rows, scores


@pytest.fixture(scope="module")
def made(
    tiny_recipe: Recipe, material: tuple[list[Row], list[Row]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return built(tiny_recipe, tmp_path_factory.mktemp("made"), *material)


@pytest.fixture(scope="module")
def found(made: Path) -> Inspection:
    return inspect(Dataset.open(made))


def run(*words: object) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words])


# --- inspect ---


def test_counts_are_those_of_the_files(made: Path, found: Inspection) -> None:
    data = Dataset.open(made)
    files = [path for path in (made / "blobs").rglob("*") if path.is_file()]
    assert found.version == str(data.digest)
    assert found.counts["pictures"] == len(files)
    assert found.counts["bytes"] == sum(path.stat().st_size for path in files)
    assert found.counts["people"] == {"train": 3, "validation": 1}
    assert sum(found.counts["triplets"].values()) == len(data.triplets)
    assert found.made["license"] == {"Apache-2.0": len(files)}
    assert found.sizes == {"64 x 64": len(files)}
    assert sum(one.train + one.validation for one in found.pairs) == len(data.triplets)
    assert {frozenset((one.first, one.second)) for one in found.pairs} == {
        frozenset(("fear", "surprised")),
        frozenset(("angry", "disgust")),
    }


def test_the_funnel_ends_with_what_is_there(found: Inspection) -> None:
    kept = [one["kept"] for one in found.filters["triplets"]]
    assert kept[-1] == sum(found.counts["triplets"].values())
    picture = next(one for one in found.rejects if (one.what, one.filter) == ("picture", "score"))
    assert picture.count == 1
    assert "fear at 0.5" in picture.reasons[0]
    assert len(picture.examples) == 1


def test_scores_are_told_by_expression_and_intensity(found: Inspection) -> None:
    fear = next(one for one in found.expressions if one.name == "fear")
    assert fear.pictures == 7, "four people at two intensities, but for the one that was left out"
    assert [(level.asked, level.pictures, level.median) for level in fear.levels] == [
        (0.5, 3, 0.5),
        (1.0, 4, 1.0),
    ]
    assert fear.score is not None
    assert sum(fear.score.bins) == 7


def test_look_alikes_of_different_people_are_found(tmp_path: Path) -> None:
    rows = drawn({"human-100": "train", "human-101": "train"}, ("fear", "surprised"), (1.0,))
    first, second = ([row["pixels"] for row in rows if row["identity"] == name] for name in
                     ("human-100", "human-101"))  # fmt: skip
    again = [first[0] ^ np.uint8(1), *second[1:]]
    folder = small_dataset(tmp_path / "d", [("train", "anna", first), ("train", "berta", again)])
    found = inspect(Dataset.open(folder))
    assert found.alike_total == 1
    assert found.alike[0].names == ("anna", "berta")
    apart = small_dataset(tmp_path / "e", [("train", "anna", first), ("train", "berta", second)])
    assert inspect(Dataset.open(apart)).alike == ()


@given(st.lists(st.floats(-5, 5) | st.just(float("nan")), max_size=60), st.booleans())
def test_a_histogram_counts_everything_once(values: list[float], fixed: bool) -> None:
    spread = distribution(np.asarray(values, np.float64), (-1.0, 1.0) if fixed else None)
    there = [value for value in values if value == value]
    if spread is None:
        assert not there
        return
    assert len(spread.bins) == BINS
    assert sum(spread.bins) == spread.count == len(there)
    assert spread.missing == len(values) - len(there)
    assert spread.low < spread.high
    assert spread.p5 <= spread.median <= spread.p95


def test_the_page_is_whole_the_same_each_time_and_needs_nothing(made: Path, found: Inspection) -> None:
    data = Dataset.open(made)
    text = page(data, found, title="a dataset", elsewhere=[Blobs(made.parent / "images" / "blobs")])
    assert text == page(data, found, title="a dataset", elsewhere=[Blobs(made.parent / "images" / "blobs")])
    for forbidden in ("http://", "https://", "<script", "<link", "@import", "url(", "javascript:"):
        assert forbidden not in text
    for wanted in (found.version, "fear and surprised", "Apache-2.0", "fear at 0.5 is seen at 0.01 only"):
        assert wanted in text
    without = page(data, found, title="a dataset")
    assert text.count("<img") == without.count("<img") + 1, "what was left out lies elsewhere"


def test_contact_sheets_are_bounded_and_drawn_by_lot(
    made: Path, monkeypatch: pytest.MonkeyPatch, tiny_recipe: Recipe
) -> None:
    opened: list[int] = []
    pictures = Dataset.pictures

    def counting(self: Dataset, rows: Any) -> list[np.ndarray]:
        opened.extend(rows)
        return pictures(self, rows)

    monkeypatch.setattr(Dataset, "pictures", counting)
    data = Dataset.open(made)
    first, again, other = Lot(data, 0), Lot(data, 0), Lot(data, 5)
    sheet = first.people()
    assert sheet is not None
    assert len(opened) <= PEOPLE * (1 + len(tiny_recipe.conditioning.expressions))
    assert sheet.tobytes() == again.people().tobytes()  # type: ignore[union-attr]
    assert sheet.tobytes() != other.people().tobytes()  # type: ignore[union-attr]


def test_cost_is_known_if_the_ledger_knows_every_request(
    tiny_recipe: Recipe, material: tuple[list[Row], list[Row]], tmp_path: Path, home: Path
) -> None:
    rows = [{**row, "request": str(digest_bytes(str(row["number"]).encode()))} for row in material[0]]
    folder = built(tiny_recipe, tmp_path, rows, material[1])
    assert inspect(Dataset.open(folder)).cost is None, "nobody knows"
    (home / "apis").mkdir()
    ledger = Ledger(home / "apis")
    for row in rows:
        for attempt in (1, 2):
            ledger.append(_attempt(str(row["request"]), attempt, 0.25))
    told = json.loads(run("inspect", folder, "--json").stdout)
    assert told["cost"] == pytest.approx(0.5 * told["counts"]["pictures"])
    # What else a run took is not of the kept edits, and not said to be all that was paid.
    ledger.append(replace(_attempt("sha256:" + "5" * 64, 1, 7.0), kind="score"))
    ledger.append(replace(_attempt("sha256:" + "6" * 64, 1, 7.0), status="refused"))
    assert json.loads(run("inspect", folder, "--json").stdout)["cost"] == told["cost"]
    (line,) = [line for line in run("inspect", folder).stdout.splitlines() if "US dollars" in line]
    assert line.split("  ")[0].strip() == "paid for kept edits"
    assert f"{told['cost']:.2f} US dollars" in line
    ledger.append(_attempt(str(rows[0]["request"]), 3, None))
    assert json.loads(run("inspect", folder, "--json").stdout)["cost"] is None, "one has no price"


def _attempt(request: str, attempt: int, usd: float | None) -> Line:
    return Line(
        id=f"{request}-{attempt}", time="2026-01-01T00:00:00Z", run="r", provider="gemini", model="m",
        kind="edit", request=Digest(request), attempt=attempt, status="ok", billed="yes", usage=Usage(),
        usd=usd, seconds=1.0,
    )  # fmt: skip


def test_drawn_pictures_are_not_paid_for(made: Path) -> None:
    assert inspect(Dataset.open(made), {}).cost == inspect(Dataset.open(made), None).cost == 0.0


def test_the_command_writes_the_report_and_says_the_same_in_json(made: Path, tmp_path: Path) -> None:
    report = tmp_path / "new" / "report.html"
    told = run("inspect", made, "--out", report, "--json")
    assert told.exit_code == 0, told.output
    value = json.loads(told.stdout)
    assert value["report"] == str(report)
    assert value["counts"]["pictures"] == inspect(Dataset.open(made)).counts["pictures"]
    assert report.read_text("ascii").startswith("<!doctype html>")
    shown = run("inspect", made)
    assert "fear, surprised" in shown.stdout
    assert "report:" not in shown.stdout


# --- diff ---


def compared(first: Path, second: Path) -> Difference:
    return difference(Dataset.open(first), Dataset.open(second))


def test_a_dataset_is_equal_to_its_copy(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "copy")
    found = compared(made, tmp_path / "copy")
    assert found.equal
    for one in (found.people, found.pictures, found.triplets, found.rejects):
        assert (one.added, one.removed, one.changed) == (0, 0, 0)
    assert (found.about, found.scores, found.values) == ({}, (), {})
    assert run("diff", made, tmp_path / "copy").exit_code == 0


def test_everything_that_differs_is_told(
    tiny_recipe: Recipe, material: tuple[list[Row], list[Row]], made: Path, tmp_path: Path
) -> None:
    rows, scores = ([dict(row) for row in some] for some in material)
    for row, score in zip(rows, scores, strict=True):
        if row["identity"] == "anime-102":
            row["license"] = "CC-BY-4.0"
        if row["identity"] == "human-100" and row["expression"] == "angry":
            row["pixels"] = row["pixels"] ^ np.uint8(1)
        if row["identity"] == "human-103" and row["intensity"] == 1.0:
            score["score_" + row["expression"]] = 0.9
    gone = [number for number, row in enumerate(rows) if row["identity"] == "human-101"]
    kept = [number for number in range(len(rows)) if number not in gone]
    other = built(tiny_recipe, tmp_path, [rows[at] for at in kept], [scores[at] for at in kept])
    found = compared(made, other)
    assert not found.equal
    assert (found.people.added, found.people.removed) == (0, 1)
    assert found.people.examples["removed"] == ["human-101"]
    pictures = Dataset.open(made).table("images").column("identity").to_pylist()
    assert found.pictures.removed == pictures.count("human-101")
    assert (found.pictures.added, found.pictures.changed) == (0, 2)
    assert found.about == {"license": pictures.count("anime-102")}
    moved = {one.expression: (one.pictures, round(one.largest, 4)) for one in found.scores}
    assert moved == dict.fromkeys(tiny_recipe.conditioning.expressions, (1, 0.1))
    assert found.values["license"] == ("Apache-2.0", "Apache-2.0 AND CC-BY-4.0")
    assert found.values["pictures under CC-BY-4.0"][0] is None
    assert found.rejects.removed == 2, "the picture and its triplet"
    back = compared(other, made)
    assert (back.people.added, back.pictures.added) == (1, found.pictures.removed)
    assert (back.triplets.added, back.triplets.removed) == (found.triplets.removed, found.triplets.added)


def test_triplets_of_the_same_pictures_differ_by_what_is_said_of_them(tmp_path: Path) -> None:
    """In a folder of one's own a line may give pictures of another line other intensities."""
    rows = drawn({"human-100": "train", "human-103": "validation"}, ("fear", "surprised"), (1.0,))
    people = [(split, name, [row["pixels"] for row in rows if row["identity"] == name])
              for split, name in (("train", "human-100"), ("validation", "human-103"))]  # fmt: skip

    def said(name: str, *levels: float) -> Path:
        folder = small_dataset(tmp_path / name, people)
        table = pq.read_table(folder / "triplets.parquet")
        first = table.to_pylist()[0]
        lines = [*table.to_pylist(), *({**first, "a_intensity": level} for level in levels)]
        resigned(folder, "triplets", pa.Table.from_pylist(lines, schema=table.schema))
        return folder

    one, other, more = said("one", 0.9), said("other", 0.7), said("more", 0.9, 0.7)
    found = compared(one, other)
    assert not found.equal
    assert (found.triplets.added, found.triplets.removed, found.triplets.same) == (1, 1, 2)
    assert (found.pictures.added, found.pictures.removed, found.pictures.changed) == (0, 0, 0)
    assert found.triplets.examples["added"] == [
        "human-100 neutral / human-100 fear 1 as fear 0.7 / human-100 surprised 1"
    ]
    assert "human-100 fear 1 as fear 0.7" in run("diff", one, other, "--json").stdout
    found = compared(one, more)
    assert (found.triplets.added, found.triplets.removed, found.triplets.same) == (1, 0, 3)


def test_the_exit_code_is_that_of_diff(made: Path, tmp_path: Path) -> None:
    other = small_dataset(tmp_path / "d", [("train", "a", [row["pixels"] for row in
                                                           drawn({"human-9": "train"}, ("fear", "surprised"),
                                                                 (1.0,))])])  # fmt: skip
    told = run("diff", made, other, "--json")
    assert told.exit_code == 1
    assert json.loads(told.stdout)["equal"] is False
    assert "human-100" in run("diff", made, other).stdout
    (other / "manifest.json").unlink()
    with pytest.raises(Explained) as caught:
        CliRunner().invoke(command, ["diff", str(made), str(other)], standalone_mode=False,
                           catch_exceptions=False)  # fmt: skip
    assert caught.value.exit_code == 2


def test_verify_says_what_is_damaged(made: Path, tmp_path: Path) -> None:
    told = run("verify", made, "--json")
    assert json.loads(told.stdout)["version"] == str(Dataset.open(made).digest)
    broken = shutil.copytree(made, tmp_path / "broken")
    victim = next(path for path in (broken / "blobs").rglob("*.png"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    told = run("verify", broken)
    assert told.exit_code != 0
    assert isinstance(told.exception, DataError)
    assert victim.name in told.exception.message


# --- export: WebDataset ---


@pytest.fixture
def shards(made: Path, tmp_path: Path) -> Path:
    export(Dataset.open(made), tmp_path / "shards", shard_bytes=60_000)
    return tmp_path / "shards"


def test_the_same_dataset_gives_the_same_bytes(made: Path, shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(made, tmp_path / "elsewhere" / "copy")
    for path in copy.rglob("*"):
        path.touch()
    again = tmp_path / "again"
    export(Dataset.open(copy), again, shard_bytes=60_000)
    first, second = (
        {path.name: path.read_bytes() for path in folder.iterdir()} for folder in (shards, again)
    )
    assert first == second
    assert len(first) > 3, "several shards and their index"


def test_the_index_names_every_shard(made: Path, shards: Path) -> None:
    index = json.loads((shards / "shards.json").read_bytes())
    assert index["dataset"] == str(Dataset.open(made).digest)
    assert {one["name"] for one in index["shards"]} == {path.name for path in shards.glob("*.tar")}
    for one in index["shards"]:
        data = (shards / one["name"]).read_bytes()
        assert one["digest"] == f"sha256:{hashlib.sha256(data).hexdigest()}"
        assert one["bytes"] == len(data)
        assert one["name"].startswith(one["split"])


def test_webdataset_reads_back_what_is_in_the_dataset(made: Path, shards: Path) -> None:
    import webdataset

    data = Dataset.open(made)
    seen: Counter[int] = Counter()
    for split in ("train", "validation"):
        tars = sorted(map(str, shards.glob(f"{split}-*.tar")))
        for sample in webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"):
            told = sample["json"]
            one = data.triplets[told["triplet"]]
            seen[told["triplet"]] += 1
            assert (one.split, one.identity) == (split, told["identity"])
            rows = {"source": one.source, "a": one.a.image, "b": one.b.image}
            for side, row in rows.items():
                assert np.array_equal(sample[f"{side}.png"], data.pictures([row])[0])
                assert told[side]["image"] == str(data.files[row])
                assert told[side]["license"] == "Apache-2.0"
            assert told["a"]["expression"] == one.a.expression
            assert told["b"]["intensity"] == one.b.intensity
            assert told["a"]["scores"][one.a.expression] == pytest.approx(one.a.intensity)
    assert seen == Counter(range(len(data.triplets))), "each triplet once"


def test_an_export_replaces_an_export_and_nothing_else(made: Path, shards: Path, tmp_path: Path) -> None:
    data = Dataset.open(made)
    before = (shards / "shards.json").read_bytes()
    export(data, shards, shard_bytes=10_000_000)
    assert (shards / "shards.json").read_bytes() != before
    assert len(list(shards.glob("*.tar"))) == 2
    other = tmp_path / "photos"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="no export"):
        export(data, other)
    assert (other / "mine.txt").read_text() == "mine"
    assert run("export", made, "--format", "webdataset").exit_code == 2, "it needs --out"


def test_a_picture_that_changed_is_not_exported(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "broken")
    data = Dataset.open(folder)
    victim = data.blobs.path(data.files[0])
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError, match=r"not the one"):
        export(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- export: Croissant ---


def test_mlcroissant_reads_every_record(tmp_path: Path) -> None:
    import mlcroissant

    rows = drawn({"human-100": "train", "human-101": "validation"}, ("fear", "surprised"), (1.0,))
    people = [(split, name, [row["pixels"] for row in rows if row["identity"] == name])
              for name, split in (("human-100", "train"), ("human-101", "validation"))]  # fmt: skip
    folder = small_dataset(tmp_path / "d", people)
    told = run("export", folder, "--format", "croissant", "--json")
    assert told.exit_code == 0, told.output
    read = mlcroissant.Dataset(jsonld=json.loads(told.stdout)["croissant"])
    assert read.metadata.ctx.issues.errors == set()
    assert read.metadata.license == ["CC0-1.0"]
    data = Dataset.open(folder)
    images = list(read.records(record_set="images"))
    assert [one["images/image"].decode() for one in images] == list(map(str, data.files))
    triplets = list(read.records(record_set="triplets"))
    assert [
        (one["triplets/source"], one["triplets/a_image"], one["triplets/b_image"]) for one in triplets
    ] == [one.rows for one in data.triplets]
    pictures = {one["pictures-by-digest/sha256"].decode(): np.asarray(one["pictures-by-digest/picture"])
                for one in read.records(record_set="pictures-by-digest")}  # fmt: skip
    assert set(pictures) == {digest.hex for digest in data.files}
    for row, digest in enumerate(data.files):
        assert np.array_equal(pictures[digest.hex], data.pictures([row])[0])


def test_croissant_tells_where_it_comes_from(made: Path) -> None:
    told = run("export", made, "--format", "croissant", "--json")
    file = Path(json.loads(told.stdout)["croissant"])
    value = json.loads(file.read_bytes())
    tables = {one["name"]: one for one in value["distribution"] if one["@type"] == "cr:FileObject"}
    assert tables["images.parquet"]["sha256"] == digest_bytes((made / "images.parquet").read_bytes()).hex
    assert "none of them exists" in value["rai:personalSensitiveInformation"][0]
    assert value["rai:dataCollectionType"] == ["Synthetic"]
    assert any("score (asked for: 0.2): 1 left out" in one for one in value["rai:dataPreprocessingProtocol"])
    Dataset.open(made)  # the description is no part of what is checked
    with pytest.raises(DataError, match="no place"):
        CliRunner().invoke(
            command, ["export", str(made), "--format", "croissant", "--out", str(made / "manifest.json")],
            standalone_mode=False, catch_exceptions=False,
        )  # fmt: skip
