"""A dataset from anybody may hold any text: in the report and in a terminal it stays text."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from fakes.datasets import drawn
from trainer.data import Dataset
from trainer.data.blobs import encode_png
from trainer.data.command import data as command
from trainer.data.dataset import Member, Triplet
from trainer.data.digests import pixel_digest
from trainer.data.inspection import inspect
from trainer.data.inspection_page import page
from trainer.data.manifest import Survival
from trainer.data.measures import look
from trainer.data.writing import DatasetWriter, provenance

SCRIPT = "</td></title><script>document.title='owned'</script><img src=x onerror=document.title='owned'>\"'"
TERMINAL = "\x1b]0;owned\x07\x1b[2J::error::"


def hostile(folder: Path) -> Path:
    """A dataset that is right in every way, whose author wrote markup wherever text may stand."""
    folder.mkdir()
    names = (f"fear{SCRIPT}", "surprised")
    rows = drawn({"human-100": "train"}, ("fear", "surprised"), (1.0,))
    with DatasetWriter(folder, names) as writer:
        numbers = []
        for row, expression in zip(rows, (None, *names), strict=True):
            seen = look(row["pixels"])
            numbers.append(
                writer.picture(
                    {
                        "pixels": pixel_digest(row["pixels"]), "height": 64, "width": 64, "split": "train",
                        "identity": SCRIPT, "expression": expression,
                        "intensity": 0.0 if expression is None else 1.0, "source": SCRIPT + TERMINAL,
                        "model": SCRIPT, "prompt": SCRIPT, "license": SCRIPT, "scorer": SCRIPT,
                        "sharpness": seen.sharpness, "pdq": seen.pdq, "pdq_quality": seen.quality,
                        **({} if expression is None else {f"score_{expression}": 0.5}),
                    },
                    (encode_png(row["pixels"]), "image/png"),
                )
            )  # fmt: skip
        a, b = (Member(image=row, expression=name, intensity=1.0)
                for row, name in zip(numbers[1:], names, strict=True))  # fmt: skip
        writer.triplet(Triplet(split="train", identity=SCRIPT, source=numbers[0], a=a, b=b))
        writer.reject({"what": SCRIPT, "filter": SCRIPT, "reason": SCRIPT + TERMINAL, "split": "train",
                       "identity": SCRIPT, "image": "../../../etc/passwd"})  # fmt: skip
    filters = [Survival(filter=SCRIPT, kept=3, left_out=1)]
    writer.complete(provenance(source=SCRIPT, license=SCRIPT, scorer=SCRIPT), filters, filters)
    return folder


@pytest.fixture
def report(tmp_path: Path) -> str:
    data = Dataset.open(hostile(tmp_path / SCRIPT.replace("/", "")))
    return page(data, inspect(data), title=SCRIPT)


def test_no_text_of_a_dataset_becomes_markup(report: str) -> None:
    assert report.count("owned") > 20, "the texts are there"
    assert "<script" not in report
    assert "onerror=document" in report
    assert not re.search(r"<img(?! alt=\"[a-z ]+\" width)", report), "every picture is one of ours"
    assert "\x1b" not in report
    assert "\\x1b[2J" in report


def test_a_browser_runs_nothing_of_it(report: str, tmp_path: Path) -> None:
    """The title tells: a script, or a handler of a broken picture, would have changed it."""
    from servers.watch import browser

    found = browser() or pytest.skip("no browser is installed (Debian: apt-get install chromium)")
    file = tmp_path / "report.html"
    file.write_text(report, "ascii")
    dumped = subprocess.run(
        [
            found, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=2000", "--dump-dom", file.as_uri(),
        ],
        check=True, capture_output=True, timeout=540, text=True,
    ).stdout  # fmt: skip
    assert "<title>Dataset &lt;/td&gt;" in dumped
    assert "<title>owned" not in dumped
    assert "<script" not in dumped


def test_a_terminal_gets_no_commands(tmp_path: Path) -> None:
    first, second = hostile(tmp_path / "a"), hostile(tmp_path / "b")
    (second / "manifest.json").unlink()
    for words in (["inspect", str(first)], ["verify", str(first)]):
        told = CliRunner().invoke(command, words)
        assert told.exit_code == 0, told.output
        assert "\x1b" not in told.output
        assert "::error::" not in told.output


def test_a_description_is_json_whatever_the_texts_are(tmp_path: Path) -> None:
    folder = hostile(tmp_path / "a")
    told = CliRunner().invoke(command, ["export", str(folder), "--format", "croissant"])
    assert told.exit_code == 0, told.output
    text = (folder / "croissant.json").read_text("ascii")
    assert json.loads(text)["license"] == SCRIPT


def test_names_of_files_in_shards_are_ours(tmp_path: Path) -> None:
    import tarfile

    folder = hostile(tmp_path / "a")
    out = tmp_path / "shards"
    told = CliRunner().invoke(command, ["export", str(folder), "--format", "webdataset", "--out", str(out)])
    assert told.exit_code == 0, told.output
    with tarfile.open(out / "train-000000.tar") as tar:
        names = tar.getnames()
    assert names
    assert all(re.fullmatch(r"\d{7}\.(json|(source|a|b)\.png)", name) for name in names)
