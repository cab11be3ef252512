"""A corpus of hostile adapters against the whole scanner, and honest files beside it.

The files are data, in tests/fakes/hostile_files.py and hostile_tensors.py. One process judges all of them, as
a user's would; here is what it must have said. Without the rule that a case names, the case fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fakes.adapters import container, factors
from fakes.hostile_files import LAYERS, Hostile, imports, pickle_polyglot, tar_polyglot
from fakes.hostile_tensors import CASES, clean, of_layer
from registry.content import FileContent
from registry.digest import digest_bytes
from registry.manifest import WEIGHTS_NAME
from registry.scanning.container import beside, check

Judged = Mapping[tuple[str, str], Mapping[str, Any]]

MAX_SECONDS, MAX_MEGABYTES = 60, 500


@pytest.fixture(scope="module")
def judged(repository: Path) -> Judged:
    """(layer, name) -> what the scanner says."""
    found = subprocess.run(
        [sys.executable, "-m", "fakes.hostile_judge"],
        env={**os.environ, "PYTHONPATH": str(repository / "tests"), "OMP_NUM_THREADS": "1"},
        cwd=repository,
        capture_output=True,
        check=False,
        timeout=600,
    )
    assert found.returncode == 0, found.stderr.decode()[-2000:]
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    return {(line["layer"], line["name"]): line for line in lines}


@pytest.mark.parametrize("case", CASES, ids=[f"{case.layer}: {case.name}" for case in CASES])
def test_a_hostile_file_is_stopped_by_its_rule(case: Hostile, judged: Judged) -> None:
    found = judged[case.layer, case.name]
    assert case.rule in found["rules"], found["text"]
    assert found["verdict"] == case.verdict
    assert "ADP-SCN-001" not in found["rules"], found["text"]  # stopped by a rule, not by an accident
    assert found["text"].isascii()
    assert "::" not in found["text"]


@pytest.mark.parametrize("name", clean())
def test_an_honest_file_raises_no_alarm(name: str, judged: Judged) -> None:
    found = judged["clean", name]
    assert found["verdict"] == "pass", found["text"]
    assert found["rules"] == []


def test_no_file_takes_long_or_much(judged: Judged) -> None:
    seconds = {name: found["seconds"] for name, found in judged.items() if "seconds" in found}
    slowest = max(seconds, key=lambda name: seconds[name])
    assert seconds[slowest] < MAX_SECONDS, slowest
    assert judged["process", "peak"]["megabytes"] < MAX_MEGABYTES


def test_the_corpus_is_large_and_of_every_layer() -> None:
    assert len({(case.layer, case.name) for case in CASES}) == len(CASES) >= 100
    least = {"container": 34, "metadata": 10, "schema": 35, "numeric": 7, "weights": 7, "pickle": 8}
    assert {layer: len(of_layer(layer)) >= least[layer] for layer in LAYERS} == dict.fromkeys(LAYERS, True)


def test_only_what_needs_a_person_gets_a_review() -> None:
    """Files whose numbers are each plausible: everything else is blocked."""
    reviewed = {case.rule for case in CASES if case.verdict == "review"}
    assert reviewed == {"ADP-WGT-001", "ADP-NUM-004", "ADP-NUM-007", "ADP-STR-008", "ADP-STR-015"}


# --- files that two programs read as two things -------------------------------------------------------------


def test_the_polyglots_are_what_they_claim() -> None:
    """The attacks are real: the reference reader opens the file, and the other program would, too."""
    import io
    import pickletools
    import tarfile

    import safetensors

    assert len(safetensors.deserialize(pickle_polyglot())) == 1
    steps = [step.name for step, _, _ in pickletools.genops(pickle_polyglot())]
    assert steps[-4:] == ["GLOBAL", "EMPTY_TUPLE", "REDUCE", "STOP"]
    assert len(safetensors.deserialize(tar_polyglot())) == 1
    with tarfile.open(fileobj=io.BytesIO(tar_polyglot())) as archive:
        assert len(archive.getnames()) == 1


# --- what lies beside the weights ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["a.bin", "a.pt", "a.PTH", "a.ckpt", "a.pkl", "a.safetensors", "a.pkl.txt", "a.bin.", "a.pkl ", "a.PyC"],
)
def test_a_loadable_name_beside_the_weights_is_refused(name: str) -> None:
    found = beside({WEIGHTS_NAME: b"", name: b"harmless"}, WEIGHTS_NAME)
    assert [(item.rule, item.where.strip()) for item in found] == [("ADP-CON-020", name.strip())]


def test_a_pickle_beside_the_weights_is_not_read_beyond_its_beginning() -> None:
    class Watched(bytes):
        reached = 0

        def __getitem__(self, where: Any) -> Any:
            Watched.reached = max(Watched.reached, where.stop)
            return super().__getitem__(where)

    data = Watched(imports() + bytes(1 << 20))
    assert [item.rule for item in beside({"notes": data}, WEIGHTS_NAME)] == ["ADP-CON-020"]
    assert Watched.reached < 1 << 13


def test_a_link_beside_the_weights_is_refused() -> None:
    assert [item.rule for item in beside({"elsewhere": None}, WEIGHTS_NAME)] == ["ADP-CON-020"]


def test_documents_beside_the_weights_are_left_alone() -> None:
    files = {
        "adapter.json": b'{"a": 1}',
        "README.md": b"# A portrait adapter\n",
        "LICENSE": b"(c) somebody\n",
        "preview.png": b"\x89PNG\r\n\x1a\n" + bytes(64),
        "scan.html": b"<!DOCTYPE html>\n<p>fine</p>\n",
    }
    assert beside({WEIGHTS_NAME: container(factors()), **files}, WEIGHTS_NAME) == []


# --- as large as files may be -------------------------------------------------------------------------------


def test_of_a_file_of_the_largest_size_little_is_read(tmp_path: Path) -> None:
    """Four gigabytes, a hole on the disk: the header is read, and the beginning of each tensor."""

    from registry.formats import MAX_WEIGHTS_BYTES

    rows = (MAX_WEIGHTS_BYTES - 4096) // (2 * 4096)
    entry = {"dtype": "BF16", "shape": [rows, 4096], "data_offsets": [0, rows * 8192]}
    text = json.dumps({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": entry}).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + rows * 8192)
    read = []

    class Counting(FileContent):
        def __getitem__(self, where: slice) -> bytes:
            found = super().__getitem__(where)
            read.append(len(found))
            return found

    with Counting(path) as content:
        header, findings = check(content)
    assert header is not None
    assert findings == []
    assert 0 < sum(read) < 1 << 20, "the header and the beginnings"
    assert digest_bytes(text)  # the digest of the whole is not the container layer's work
