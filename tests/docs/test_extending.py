"""The pages that tell how to extend the product are followed, in a copy of the tree, with their own code.

A ``diff`` block is applied to the copy; a ``python`` or ``toml`` block with ``title="path"`` is added to the
end of that file, or makes it; what is indented in a list is taken out of it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from fakes.pipelines import small_recipe

pytestmark = [pytest.mark.integration, pytest.mark.slow]

PACKAGES = ("registry", "serving", "trainer", "tests")
_BLOCK = re.compile(r"^( *)```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


class Tree:
    """A copy of the code that a page changes."""

    def __init__(self, repository: Path, folder: Path) -> None:
        self.folder = folder
        for name in PACKAGES:
            ignored = shutil.ignore_patterns("__pycache__", "data" if name == "tests" else "")
            shutil.copytree(repository / name, folder / name, ignore=ignored)
        for name in ("pyproject.toml", "docs"):
            (folder / name).symlink_to(repository / name)

    def follow(self, page: Path) -> int:
        """Do what the blocks of a page say; return how many files were changed."""
        changed = 0
        for indent, language, title, text in _BLOCK.findall(page.read_text("utf-8")):
            code = textwrap.dedent(text) if indent else text
            if language == "diff":
                command = ["git", "apply", "--whitespace=nowarn", "--unidiff-zero", "-"]
                done = subprocess.run(command, cwd=self.folder, input=code, text=True, capture_output=True)
                assert done.returncode == 0, f"{page.name}: this does not apply: {done.stderr}\n{code}"
                changed += 1
            elif title:
                path = self.folder / title
                path.parent.mkdir(parents=True, exist_ok=True)
                before = path.read_text("utf-8").rstrip() + "\n\n\n" if path.is_file() else ""
                path.write_text(before + code, "utf-8")
                changed += 1
        return changed

    def run(self, *words: str, home: Path) -> subprocess.CompletedProcess[str]:
        """Run Python in the copy, with its code."""
        environment = {
            **os.environ,
            "PYTHONPATH": f"{self.folder}:{self.folder / 'tests'}",
            "ADAPTER_FOUNDRY_HOME": str(home),
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.run(
            [sys.executable, *words], cwd=self.folder, env=environment, capture_output=True, text=True
        )

    def command(self, tool: str, *words: str, home: Path) -> subprocess.CompletedProcess[str]:
        """Run a command of ours in the copy."""
        return self.run("-c", f"from {tool}.cli import main; main()", *words, home=home)

    def tested(self, *words: str, home: Path) -> str:
        """Run tests of the copy, which have to pass."""
        done = self.run("-m", "pytest", "-q", "-p", "no:cacheprovider", *words, home=home)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        return done.stdout


@pytest.fixture
def tree(repository: Path, tmp_path: Path) -> Tree:
    return Tree(repository, tmp_path / "tree")


def how_to(repository: Path, name: str) -> Path:
    return repository / "docs" / "how-to" / name


def test_a_loss(tree: Tree, repository: Path, home: Path, tmp_path: Path) -> None:
    page = how_to(repository, "add-a-loss.md")
    assert tree.follow(page) == 2
    recipe = yaml.safe_load(small_recipe(repository, tmp_path / "small.yaml").read_text())
    recipe["losses"] = {"huber": {"weight": 1.0}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "run"
    done = tree.command("trainer", "train", str(tmp_path / "small.yaml"), "--out", str(out), home=home)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (out / "train" / "loss.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    assert all(line["huber"] > 0 and "flow_matching" not in line for line in lines)
    (by_hand,) = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    done = tree.run("-c", textwrap.dedent(by_hand), home=home)
    assert done.returncode == 0, done.stderr
    tree.tested("tests/unit/trainer/test_losses.py", "-k", "registered", home=home)


def test_a_scan_rule(tree: Tree, repository: Path, home: Path) -> None:
    attack = "tests/attacks/test_twins.py"
    page = how_to(repository, "add-a-scan-rule.md")
    assert tree.follow(page) == 5
    told = tree.tested(attack, "tests/attacks/test_scanner.py::test_every_rule_has_an_attack", home=home)
    assert "3 passed" in told
    tree.tested("tests/unit/registry/test_scan_report.py", "-k", "explained or layer", home=home)
    # The attack is one: without the check it goes through.
    numerics = tree.folder / "registry" / "scanning" / "numerics.py"
    numerics.write_text(numerics.read_text("utf-8").replace("    findings += _twins(updates)\n", ""), "utf-8")
    done = tree.run("-m", "pytest", "-q", "-p", "no:cacheprovider", attack, home=home)
    assert done.returncode == 1
    assert "1 failed, 1 passed" in done.stdout


def test_a_base_family(tree: Tree, repository: Path, home: Path) -> None:
    page = how_to(repository, "add-a-base-family.md")
    assert tree.follow(page) == 8
    assert "5 passed" in tree.tested("tests/unit/registry/test_chroma.py", home=home)
