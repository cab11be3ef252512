"""The review queue: who waits, what a person decides, and how the next run takes it."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from fakes.vlm import images_folder
from trainer.errors import DataError
from trainer.portraits.expressions import EXPRESSIONS
from trainer.recipe import Recipe
from trainer.scoring import Picture, Scored, inputs, score
from trainer.scoring.command import scores as commands
from trainer.scoring.decisions import Decision, Decisions, now
from trainer.scoring.scorer import quarantined
from trainer.scoring.stage import decisions_of

FEAR = EXPRESSIONS.index("fear")


def row(fear: float) -> tuple[float, ...]:
    return tuple(fear if number == FEAR else 0.0 for number in range(12))


class Unsure:
    """Scores the first picture, is unsure of the second and third, and has nothing for the fourth."""

    name, expressions, ingredient = "unsure/1", EXPRESSIONS, None

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, pictures: list[Picture]) -> list[Scored]:
        self.calls += 1
        split = Scored(
            scores=row(0.4), confidence=0.5, disagreement=0.6, samples=(row(0.1), row(0.4), row(0.7)),
            status="review", reason="samples differ by 0.60 in fear",
        )  # fmt: skip
        return [Scored(scores=row(0.9), samples=(row(0.9),)), split, split, quarantined("no answer: why")]


@pytest.fixture
def run(tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict]]:
    """Returns a function that runs the stage (again) and gives its rows."""
    monkeypatch.setenv("ADAPTER_FOUNDRY_HOME", str(tmp_path / "home"))
    images_folder(tmp_path / "images", 4)

    def again(scorer: Any = None) -> list[dict]:
        score(tiny_recipe, tmp_path / "images", tmp_path / "scored", scorer=scorer or Unsure())
        return pq.read_table(tmp_path / "scored" / "scores.parquet").to_pylist()

    return again


def decide(tmp_path: Path, image: str, *words: str) -> Result:
    return CliRunner().invoke(commands, ["decide", str(tmp_path / "scored"), image, *words, "--by", "Ada"])


def waiting(tmp_path: Path) -> list[str]:
    return [json.loads(line)["image"] for line in (tmp_path / "scored" / "review.jsonl").open()]


def test_a_decision_counts_in_the_next_run(run: Callable[..., list[dict]], tmp_path: Path) -> None:
    before = run()
    assert [one["status"] for one in before] == ["scored", "review", "review", "quarantined"]
    assert waiting(tmp_path) == [before[1]["image"], before[2]["image"]]

    accepted = decide(
        tmp_path, before[1]["image"], "--accept", "--expression", "fear=0.55", "--reason", "wide"
    )
    rejected = decide(tmp_path, before[2]["image"].removeprefix("sha256:")[:12].upper(), "--reject")
    assert (accepted.exit_code, rejected.exit_code) == (0, 0), accepted.output + rejected.output
    after = run()
    assert [one["status"] for one in after] == ["scored", "scored", "quarantined", "quarantined"]
    assert after[1]["score_fear"] == pytest.approx(0.55)
    assert (after[1]["reason"], after[1]["confidence"]) == ("accepted by Ada: wide", 1.0)
    assert (after[2]["reason"], after[2]["score_fear"]) == ("rejected by Ada", None)
    assert (after[0], after[3]) == (before[0], before[3])
    assert waiting(tmp_path) == []

    # The last word counts, and a run without news does nothing.
    assert decide(tmp_path, before[2]["image"], *_all_twelve(0.25)).exit_code == 0
    assert run()[2]["score_fear"] == pytest.approx(0.25)
    quiet = Unsure()
    run(quiet)
    assert quiet.calls == 0


def _all_twelve(value: float) -> list[str]:
    return ["--accept", *(word for name in EXPRESSIONS for word in ("--expression", f"{name}={value}"))]


def test_a_person_can_score_what_no_model_did(run: Callable[..., list[dict]], tmp_path: Path) -> None:
    image = run()[3]["image"]
    bare = decide(tmp_path, image, "--accept", "--expression", "happy=1")
    assert isinstance(bare.exception, DataError)
    assert "has no score for angry" in str(bare.exception)
    assert decide(tmp_path, image, *_all_twelve(0.5)).exit_code == 0
    assert run()[3]["score_fear"] == 0.5


def test_a_decision_holds_for_its_scorer_alone(
    run: Callable[..., list[dict]], tmp_path: Path, tiny_recipe: Recipe
) -> None:
    image = run()[1]["image"]
    quiet = inputs(tiny_recipe)
    decide(tmp_path, image, "--accept")
    other = Unsure()
    other.name = "unsure/2"
    assert run(other)[1]["status"] == "review"
    assert run()[1]["status"] == "scored"
    assert inputs(tiny_recipe) == quiet, "the recipe's own scorer has no decisions"
    judged = Decision(time=now(), image=image, scorer=quiet["scorer"], decision="reject", by="Ada")
    decisions_of(tmp_path / "home").add(judged)
    assert inputs(tiny_recipe)["decisions"] != quiet["decisions"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--accept", "--expression", "joy=1"], "there is no expression 'joy'"),
        (["--accept", "--expression", "happy=1.2"], "needs a value from 0 to 1"),
        (["--accept", "--expression", "happy=nan"], "needs a value from 0 to 1"),
        (["--accept", "--expression", "happy"], "needs a value from 0 to 1"),
        (["--reject", "--expression", "happy=1"], "goes with --accept only"),
        ([], "say --accept or --reject"),
    ],
)
def test_wrong_words_are_explained(
    run: Callable[..., list[dict]], tmp_path: Path, words: list[str], said: str
) -> None:
    result = decide(tmp_path, run()[1]["image"], *words)
    assert result.exit_code == 2
    assert said in result.output
    assert not decisions_of(tmp_path / "home").path.exists()


@pytest.mark.parametrize("image", ["", "sha256:", "f" * 64, "zz\x1b[31m" * 9])
def test_a_picture_must_be_told_apart(run: Callable[..., list[dict]], tmp_path: Path, image: str) -> None:
    first, second = (row["image"].removeprefix("sha256:")[:3] for row in run()[:2])
    assert first != second
    for word in (image, first):  # three digits name one of four pictures, and another one tomorrow
        result = decide(tmp_path, word, "--reject")
        assert isinstance(result.exception, DataError)
        assert "\x1b" not in str(result.exception)


def test_a_name_of_several_lines_is_no_name(run: Callable[..., list[dict]], tmp_path: Path) -> None:
    image = run()[1]["image"]
    result = CliRunner().invoke(
        commands, ["decide", str(tmp_path / "scored"), image, "--reject", "--by", "Ada\nBob"]
    )
    assert result.exit_code == 2
    assert "by" in result.output


def _add(path: Path, number: int) -> None:
    image = f"sha256:{number:064x}"
    Decisions(path).add(Decision(time=now(), image=image, scorer="s", decision="reject", by="Ada"))


def test_decisions_that_are_made_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "reviews" / "decisions.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(_add, [path] * 80, range(80)))
    assert len(Decisions(path).read("s")) == 80


def test_a_decision_waits_for_the_one_that_is_being_written(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    _add(path, 1)
    before = path.read_bytes()
    with path.open("ab") as other, ThreadPoolExecutor(1) as pool:
        fcntl.flock(other, fcntl.LOCK_EX)
        adding = pool.submit(_add, path, 2)
        with pytest.raises(TimeoutError):
            adding.result(timeout=0.3)
        assert path.read_bytes() == before
        fcntl.flock(other, fcntl.LOCK_UN)
        adding.result(timeout=120)
    assert len(Decisions(path).read("s")) == 2


def test_a_damaged_line_is_named_and_a_torn_one_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    _add(path, 1)
    path.write_bytes(path.read_bytes() + b'{"format": "adapter-f')
    _add(path, 2)
    assert path.read_bytes().count(b"\n") == 3
    with pytest.raises(DataError, match=r"line 2 of .*decisions\.jsonl is no decision"):
        Decisions(path).read("s")
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[::2]))
    assert len(Decisions(path).read("s")) == 2


def test_the_page_shows_what_waits(run: Callable[..., list[dict]], tmp_path: Path) -> None:
    found = run()
    result = CliRunner().invoke(commands, ["review", str(tmp_path / "scored"), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["review"], told["quarantined"]) == (2, 1)
    page = Path(told["page"]).read_text()
    assert page.count("<figure>") == page.count("data:image/webp") == 2
    for one in found[1:3]:
        assert one["image"].removeprefix("sha256:")[:12] in page
    assert "no answer: why" in page
    assert "http" not in page.replace("http-equiv", "")
    shorter = CliRunner().invoke(commands, ["review", str(tmp_path / "scored"), "--limit", "1"])
    assert shorter.exit_code == 0
    assert Path(told["page"]).read_text().count("<figure>") == 1


def test_the_page_finds_pictures_that_lie_elsewhere(
    run: Callable[..., list[dict]], tmp_path: Path, tiny_recipe: Recipe
) -> None:
    """In a flow the folders of the stages have names with digests."""
    run()
    folder = tmp_path / "flow" / "score-0123"
    score(tiny_recipe, tmp_path / "images", folder, scorer=Unsure())
    assert CliRunner().invoke(commands, ["review", str(folder)]).exit_code == 0
    (tmp_path / "images").rename(tmp_path / "moved")
    lost = CliRunner().invoke(commands, ["review", str(folder)])
    assert isinstance(lost.exception, DataError)
    words = ["review", str(folder), "--images", str(tmp_path / "moved")]
    assert CliRunner().invoke(commands, words).exit_code == 0


def test_a_folder_without_a_queue_is_explained(tmp_path: Path) -> None:
    result = CliRunner().invoke(commands, ["review", str(tmp_path)])
    assert isinstance(result.exception, DataError)
    assert "cannot be read" in str(result.exception)
