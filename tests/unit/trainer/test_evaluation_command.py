"""`trainer evaluate` and `trainer compare` as people and programs call them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fakes.adapters import card, container, factors, folder
from fakes.registries import adapter_folder, copy_registry, objects, overwrite
from registry.client import Registry
from registry.errors import DigestMismatch, NotFound, Revoked, Unsigned
from registry.families import KNOWN_BASES
from registry.manifest import WEIGHTS_NAME
from registry.reference import Reference
from registry.storage.base import file_key
from trainer.cli import main
from trainer.evaluation import command, targets
from trainer.portraits.base import BASE_ID, build
from trainer.progress import silent

BASE = KNOWN_BASES[BASE_ID]
ASKED = ("fear", "surprised")
SUITE = """
name: tiny
source: renderer
identities: {human: 1, anime: 1}
first_identity: 900
intensities: [0.0, 1.0]
steps: 1
judge: {scorer: judge}
"""
RULE = """
[gates.prod.metrics.top1_accuracy]
min = {least}

[gates.staging]
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("base") / "portraits")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "mine", 1)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("suite") / "tiny.yaml"
    file.write_text(SUITE)
    return file


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADAPTER_FOUNDRY_HOME", str(tmp_path / "data"))
    return tmp_path / "data"


def write_adapter(path: Path, seed: int) -> Path:
    values = card(BASE)
    values["conditioning"]["expressions"] = list(ASKED)
    path.mkdir(parents=True)
    for name, data in folder(container(factors(BASE, seed=seed)), values).items():
        (path / name).write_bytes(data)
    return path


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


# -- a whole evaluation --


def test_an_evaluation_as_people_see_it(
    home: Path, base: Path, adapter: Path, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(RULE.format(least=0.99))
    words = ["evaluate", adapter, "--suite", suite, "--base", base, "--policy", policy]
    code, out, err = run(capsys, *words)
    assert code == 14
    place = home / "evaluations" / "mine-on-tiny"
    assert str(place / "report.html") in out
    assert "REFUSED: top1_accuracy" in out
    assert ">= 0.99, FAILS" in out
    assert "required" in next(line for line in out.splitlines() if line.startswith("metric "))
    assert f"registry push {adapter} --name NAME --evaluation {place / 'evaluation.json'}" in out
    assert "evaluate " in err, "progress goes to stderr"
    # The same again, for programs: nothing is edited, the figures are the same.
    code, out, err = run(capsys, *words, "--json")
    assert code == 14
    told = json.loads(out)
    report = json.loads((place / "evaluation.json").read_text())
    assert told["passed"] is False
    assert told["failed"] == report["verdict"]["failed"]
    assert told["metrics"]["top1_accuracy"]["min"] == 0.99
    assert {"value", "low", "high", "n", "base"} <= set(told["metrics"]["top1_accuracy"])
    assert "made before" in err


def test_a_gate_that_is_held_exits_with_0(
    home: Path, base: Path, adapter: Path, suite: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The alias decides whose rules count: prod of this data folder asks for something, staging does not."""
    (home / "registry").mkdir(parents=True)
    (home / "registry" / "policy.toml").write_text(RULE.format(least=0.99))
    words = ["evaluate", adapter, "--suite", suite, "--base", base, "--json"]
    refused, out, _ = run(capsys, *words)
    failed = set(json.loads(out)["failed"])
    assert refused == 14
    assert "top1_accuracy" in failed
    code, out, _ = run(capsys, *words, "--alias", "staging")
    assert set(json.loads(out)["failed"]) == failed - {"top1_accuracy"}
    assert code == (14 if failed - {"top1_accuracy"} else 0)


def test_a_comparison_as_people_and_programs_see_it(
    home: Path, base: Path, adapter: Path, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_adapter(tmp_path / "other", 2)
    words = ["compare", "base", adapter, other, "--suite", suite, "--base", base]
    code, out, _ = run(capsys, *words)
    assert code == 0
    head = next(line for line in out.splitlines() if line.startswith("metric "))
    assert head.split() == ["metric", "base", "mine", "other", "true", "answers"]
    assert "cannot be told apart on this suite" in out
    code, out, _ = run(capsys, *words, "--json", "--names", "none,A,B")
    told = json.loads(out)
    assert [one["name"] for one in told["adapters"]] == ["none", "A", "B"]
    assert Path(told["page"]).is_file()


# -- wrong inputs --


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["evaluate", "{home}/nowhere"], 11, "no folder"),
        (["evaluate", "justaname"], 11, "name@alias"),
        (["evaluate", "{empty}"], 1, "no adapter folder"),
        (["evaluate", "{adapter}", "--suite", "portraits-v9"], 2, "choose from"),
        (["evaluate", "{adapter}", "--tasks", "{empty}"], 2, "no place for --tasks"),
        (["evaluate", "{adapter}", "--base", "{empty}"], 1, "model_index.json is missing"),
        (["evaluate", "{adapter}", "--base", "{home}/nowhere"], 2, "does not exist"),
        (["evaluate", "{adapter}", "--policy", "{typo}"], 2, "did you mean"),
        (["evaluate", "{adapter}", "--against", "justaname"], 11, "name@alias"),
        (["compare", "{adapter}"], 2, "at least two"),
        (["compare", "base", "base"], 2, "different names"),
        (["compare", "{adapter}", "{adapter}"], 2, "different names"),
        (["compare", "{adapter}", "base", "--names", "one"], 2, "different names"),
    ],
)
def test_wrong_inputs_are_explained(
    words: list[str],
    code: int,
    said: str,
    home: Path,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "typo.toml").write_text("[gates.prod.metrics.top1_accuracy]\nminn = 0.9\n")
    places = {"home": home, "adapter": adapter, "empty": tmp_path / "empty", "typo": tmp_path / "typo.toml"}
    filled = [word.format(**places) for word in words]
    found, _, err = run(capsys, *filled)
    assert (found, said in err) == (code, True), err
    found, out, _ = run(capsys, *filled, "--json")
    told = json.loads(out)["error"]
    assert (found, told["exit_code"]) == (code, code)


def test_a_comparison_needs_an_adapter(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "compare", "base", "base", "--names", "a,b")
    assert code == 2
    assert "no prompts" in err


def test_a_rule_on_what_the_suite_does_not_measure_refuses(
    home: Path, base: Path, adapter: Path, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """This suite blends nobody."""
    policy = tmp_path / "policy.toml"
    policy.write_text("[gates.prod.metrics.blend_success]\nmin = 0.5\n")
    words = ["evaluate", adapter, "--suite", suite, "--base", base, "--policy", policy]
    code, out, _ = run(capsys, *words)
    assert code == 14
    assert "blend_success: this suite does not measure it" in " ".join(out.split())


def test_the_command_runs_as_a_process_and_its_help_names_every_flag() -> None:
    program = Path(sys.executable).with_name("trainer")
    for name, flags in (
        ("evaluate", ("--against", "--raw", "--policy", "--alias", "--training-data", "--tasks", "--json")),
        ("compare", ("--names", "--suite", "--base", "--out", "--json")),
    ):
        done = subprocess.run([program, name, "--help"], capture_output=True, text=True, check=True)
        assert all(flag in done.stdout for flag in flags)
    done = subprocess.run(
        [program, "evaluate", "nowhere", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 11
    assert json.loads(done.stdout)["error"]["kind"] == "NotFound"


# -- adapters of a registry --


@pytest.fixture
def registry(home: Path) -> Registry:
    return copy_registry(home)


def test_an_alias_that_means_nothing_yet_is_said_and_skipped(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    found = command._against(registry, "pixelsmile@staging", silent)
    assert found is None
    assert "pixelsmile@staging means no adapter yet" in capsys.readouterr().err


def test_no_registry_at_all_means_no_alias_either(home: Path) -> None:
    assert command._against(Registry.open(), "pixelsmile@prod", silent) is None


def test_a_version_is_fetched_and_verified(registry: Registry, tmp_path: Path) -> None:
    found = targets.target(registry, "pixelsmile@prod", tmp_path / "fetched")
    assert (found.label, found.reference) == ("pixelsmile@prod", "pixelsmile:1")
    assert found.called == "pixelsmile@prod (pixelsmile:1)"
    assert (found.folder / WEIGHTS_NAME).is_file()
    assert targets.target(registry, "pixelsmile:1", tmp_path / "fetched").folder == found.folder


def test_a_version_that_nobody_evaluated_yet_can_be_evaluated(home: Path, tmp_path: Path) -> None:
    """A pull refuses it, because the statement that is about to be made is missing."""
    registry = Registry.init(home)
    registry.push(adapter_folder(tmp_path / "adapter", 3), "fresh")
    with pytest.raises(Unsigned):
        registry.pull("fresh:1")
    assert targets.target(registry, "fresh:1", tmp_path / "fetched").reference == "fresh:1"


def test_a_revoked_version_is_refused(registry: Registry, tmp_path: Path) -> None:
    registry.revoke("pixelsmile:1", "it leaks")
    with pytest.raises(Revoked, match="it leaks"):
        targets.fetch(registry, Reference.parse("pixelsmile:1"), tmp_path / "fetched")


def test_bytes_that_the_store_changed_are_refused(registry: Registry, home: Path, tmp_path: Path) -> None:
    entry = registry.show("pixelsmile:1").manifest.file(WEIGHTS_NAME)
    overwrite(objects(home) / file_key(entry), b"something else")
    with pytest.raises((DigestMismatch, NotFound)):
        targets.fetch(registry, Reference.parse("pixelsmile:1"), tmp_path / "fetched")


def test_a_file_that_somebody_changed_after_the_download_is_fetched_again(
    registry: Registry, tmp_path: Path
) -> None:
    found = targets.target(registry, "pixelsmile:1", tmp_path / "fetched")
    weights = found.folder / WEIGHTS_NAME
    right = weights.read_bytes()
    weights.chmod(0o600)
    weights.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    again = targets.target(registry, "pixelsmile:1", tmp_path / "fetched")
    assert (again.folder / WEIGHTS_NAME).read_bytes() == right


def test_an_unknown_version_names_the_known_ones(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "evaluate", "pixelsmile:7")
    assert code == 11
    assert "pixelsmile:1" in err


def test_whose_alias_is_taken(registry: Registry, tmp_path: Path) -> None:
    own = targets.target(registry, "pixelsmile:1", tmp_path / "fetched")
    assert not command._taken(registry, own, "prod"), "prod means this very version"
    assert not command._taken(registry, own, "staging"), "staging means nothing"
    assert not command._taken(registry, targets.Target(folder=own.folder, label="mine"), "prod")
    registry.push(adapter_folder(tmp_path / "adapter", 3), "pixelsmile")
    assert command._taken(registry, targets.target(registry, "pixelsmile:2", tmp_path / "fetched"), "prod")
