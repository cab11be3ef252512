"""The command line of the trainer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from trainer.cli import main
from trainer.data.dataset import Dataset
from trainer.job import Job
from trainer.recipe import Recipe


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


def test_render_draws_a_portrait(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "new" / "portrait.png"
    words = [
        "render",
        "--seed",
        "7",
        "--domain",
        "human",
        "--expression",
        "happy=0.5",
        "-o",
        str(place),
        "--json",
    ]
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert json.loads(out)["expressions"] == {"happy": 0.5}
    assert Image.open(place).size == (64, 64)


@pytest.mark.parametrize("word", ["hapy=0.5", "happy", "happy=2", "happy=x", "happy=nan"])
def test_a_wrong_expression_is_a_usage_error(
    word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "render", "--seed", "1", "--expression", word, "-o", str(tmp_path / "x.png"))
    assert code == 2
    assert "choose from" in err or "0 to 1.5" in err


def test_a_missing_recipe_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "train", "nothing")
    assert code == 2
    assert "pixelsmile-portraits" in err
    code, out, _ = run(capsys, "train", "nothing", "--json")
    assert json.loads(out)["error"]["kind"] == "RecipeError"


def test_help_needs_no_torch() -> None:
    import subprocess
    import sys

    command = "import sys, trainer.cli, trainer.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0


def test_a_training_can_be_prepared_for_a_launcher_on_several_machines(
    tiny_recipe: Recipe, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(tiny_recipe.model_dump(mode="json", exclude_unset=True)))
    words = ["train", str(recipe), "--base", str(tiny_base), "--out", str(tmp_path / "run"), "--prepare-only"]
    code, out, err = run(capsys, *words, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert [stage["stage"] for stage in told["stages"]] == ["synthesise", "score", "triplets", "cache"]
    job = Job.read(Path(told["job"]))
    assert job.recipe.digest == tiny_recipe.digest == told["recipe"]
    assert job.out == tmp_path / "run" / "train"
    assert Dataset.open(job.dataset).triplets
    assert not (job.out / "adapter").exists()
