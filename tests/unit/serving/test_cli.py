"""`serving …` from typed words to a PNG, through a real registry, and the errors on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from fakes.registries import BASE, copy_registry, objects, overwrite
from registry.manifest import BaseModelRef
from serving.bases import folder_of, register
from serving.cli import main
from serving.images import read_facts

PORTRAITS = BaseModelRef(id=BASE.id, revision=BASE.revision, family=BASE.family, license=BASE.license)


@pytest.fixture(scope="session")
def full_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the sizes of the shipped portraits base, which the registry's adapter is made for."""
    from trainer.portraits.base import build

    head = BASE.config["attention_head_dim"]
    width = head * BASE.config["num_attention_heads"]
    folder = tmp_path_factory.mktemp("full") / "base"
    return build(folder, width=width, layers=BASE.config["num_layers"], head=head)


@pytest.fixture
def picture(tmp_path: Path, portrait: Image.Image) -> Path:
    path = tmp_path / "portrait.png"
    portrait.save(path)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.png"


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def _command(words: tuple[str, ...]) -> None:
    """`main` as a command, so that click's runner catches what it prints and its exit code."""
    main(words)


def run(*words: object) -> Result:
    return CliRunner().invoke(_command, [str(word) for word in words])


def edit(picture: Path, out: Path, *more: object) -> Result:
    words = ["edit", picture, "--adapter", "pixelsmile@prod", "--expression", "happy=0.8", "-o", out]
    return run(*words, "--steps", 1, *more)


def test_edit_pulls_verifies_edits_and_says_what_it_used(
    home: Path, full_base: Path, picture: Path, out: Path
) -> None:
    copy_registry(home)
    register(full_base, PORTRAITS)
    done = edit(picture, out, "--expression", "surprised=0.3", "--json")
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    said = json.loads(done.stdout)
    assert said.pop("output") == str(out)
    assert said.pop("asked") == "pixelsmile@prod"
    assert said["adapter"] == "pixelsmile:1"
    assert said["adapter_digest"].startswith("sha256:")
    assert (said["base"], said["base_revision"]) == (PORTRAITS.id, PORTRAITS.revision)
    assert said["expressions"] == {"happy": 0.8, "surprised": 0.3}
    assert read_facts(out) == said
    first = np.asarray(Image.open(out))

    again = edit(picture, out, "--expression", "surprised=0.3")
    assert again.exit_code == 0, again.output
    assert said["adapter_digest"] in again.stdout
    assert np.array_equal(np.asarray(Image.open(out)), first)
    assert {path.name for path in out.parent.iterdir()} == {"home", "portrait.png", "out.png"}


def test_sweep_writes_a_strip(home: Path, full_base: Path, picture: Path, out: Path) -> None:
    copy_registry(home)
    register(full_base, PORTRAITS)
    words = ["sweep", picture, "--adapter", "pixelsmile:1", "--expression", "happy", "--count", 3]
    done = run(*words, "-o", out, "--steps", 1, "--json")
    assert done.exit_code == 0, done.output
    assert Image.open(out).size == (3 * 64, 64)
    asked = [{"happy": 0.0}, {"happy": 0.75}, {"happy": 1.5}]
    assert json.loads(done.stdout)["expressions"] == read_facts(out)["expressions"] == asked


def test_a_tampered_byte_is_refused_and_nothing_is_written(home: Path, picture: Path, out: Path) -> None:
    copy_registry(home)
    (blob,) = objects(home).glob("models/*/adapter_weights/*")
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    overwrite(blob, bytes(data))
    refused = edit(picture, out)
    assert refused.exit_code == 13, refused.output
    assert not out.exists()
    assert refused.stdout == ""


def test_a_missing_base_says_what_to_do(home: Path, picture: Path, out: Path) -> None:
    copy_registry(home)
    refused = edit(picture, out)
    assert refused.exit_code == 11
    assert "serving register-base FOLDER --id adapter-foundry/portraits-base" in refused.stderr
    assert not out.exists()


def test_another_revision_of_the_base_is_refused(
    home: Path, tiny_base: Path, picture: Path, out: Path
) -> None:
    copy_registry(home)
    register(tiny_base, PORTRAITS.model_copy(update={"revision": "0"}))
    assert edit(picture, out).exit_code == 14


def test_an_adapter_of_other_shapes_is_refused(home: Path, tiny_base: Path, picture: Path, out: Path) -> None:
    copy_registry(home)
    register(tiny_base, PORTRAITS)
    refused = edit(picture, out)
    assert refused.exit_code == 14
    assert "does not fit the base model" in refused.stderr
    assert not out.exists()


def test_an_unknown_adapter_is_not_found(home: Path, picture: Path, out: Path) -> None:
    copy_registry(home)
    assert edit(picture, out, "--adapter", "nobody@prod").exit_code == 11


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--expression", "sad"), "is not an expression with an intensity"),
        (("--expression", "sad=much"), "is not an expression with an intensity"),
        (("--expression", "sad=nan"), "is not an expression with an intensity"),
        (("--expression", "happy=0.1"), "is given twice"),
        (("--adapter", "pixelsmile"), "names no version"),
        (("--adapter", "Pixel Smile@prod"), "is not an adapter name"),
        (("-o", "picture.jpg"), "is not a PNG file name"),
        (("-o", "nowhere/out.png"), "does not exist"),
        (("--seed", "one"), "not a valid integer"),
    ],
)
def test_wrong_words_are_explained_before_anything_runs(
    picture: Path, out: Path, more: tuple[str, ...], says: str
) -> None:
    refused = edit(picture, out, *more)
    assert refused.exit_code == 2, refused.output
    assert says in refused.stderr
    assert refused.stdout == ""
    assert "Traceback" not in refused.output


@pytest.mark.parametrize(
    ("more", "kind", "code"),
    [
        (("--adapter", "nobody@prod"), "NotFound", 11),
        (("--expression", "sad"), "UsageError", 2),
        (("--seed", "one"), "BadParameter", 2),
        (("--loud",), "NoSuchOption", 2),
        ((), "BaseNotFound", 11),
    ],
)
def test_with_json_an_error_is_one_object(
    home: Path, picture: Path, out: Path, more: tuple[str, ...], kind: str, code: int
) -> None:
    copy_registry(home)
    refused = edit(picture, out, "--json", *more)
    assert refused.exit_code == code
    error = json.loads(refused.stdout)["error"]
    assert (error["kind"], error["exit_code"]) == (kind, code)
    assert error["message"]
    assert error["mend"]
    assert refused.stderr == ""


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--expression", "surprise=0.4"), "did you mean 'surprised'"),
        (("--expression", "surprised=7"), "signed for 0 to 1.5"),
        (("--strength", "9"), "signed for 0 to 1.5"),
        (("--steps", "1000"), "steps"),
    ],
)
def test_what_the_adapter_does_not_offer_is_explained(
    home: Path, full_base: Path, picture: Path, out: Path, more: tuple[str, ...], says: str
) -> None:
    copy_registry(home)
    register(full_base, PORTRAITS)
    refused = edit(picture, out, *more)
    assert refused.exit_code == 2, refused.output
    assert says in refused.stderr
    assert not out.exists()


def test_the_input_is_never_overwritten(picture: Path, tmp_path: Path) -> None:
    before = picture.read_bytes()
    alias = tmp_path / "alias.png"
    alias.symlink_to(picture)
    twin = tmp_path / "twin.png"
    twin.hardlink_to(picture)
    for name in (picture, tmp_path / "home" / ".." / "portrait.png", alias, twin):
        refused = edit(picture, name)
        assert refused.exit_code == 2
        assert "is the input picture itself" in refused.stderr
    assert picture.read_bytes() == before


def test_a_bad_picture_is_refused_before_anything_is_fetched(tmp_path: Path, out: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not a picture")
    refused = edit(bad, out)
    assert refused.exit_code == 2
    assert "not a readable PNG, JPEG or WebP" in refused.stderr


def test_register_base(home: Path, tiny_base: Path) -> None:
    done = run("register-base", tiny_base, "--id", PORTRAITS.id, "--revision", "7", "--json")
    assert done.exit_code == 0, done.output
    place = folder_of(PORTRAITS.id)
    assert json.loads(done.stdout) == {
        "base": PORTRAITS.id, "base_revision": "7", "folder": str(place)
    }  # fmt: skip
    assert (place / "base.json").is_file()
    for words in (("--id", "who/knows", "--revision", "1"), ("--id", PORTRAITS.id, "--revision", "a b")):
        assert run("register-base", tiny_base, *words).exit_code == 2


def test_help_needs_no_models() -> None:
    script = (
        "import sys; from click.testing import CliRunner; from serving.cli import cli\n"
        "done = CliRunner().invoke(cli, ['edit', '--help']); assert done.exit_code == 0, done.output\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'peft', 'mlflow', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
