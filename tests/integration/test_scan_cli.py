"""``registry scan``: everything that it can be pointed at, every form of report, every exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fakes import hostile_http as http
from fakes.adapters import BASES, RANK, card, clean_adapter, container, factors
from fakes.registries import NAME, adapter_folder, copy_registry, one, overwrite
from registry.digest import digest_bytes
from registry.errors import NotFound, UsageError
from registry.manifest import CARD_NAME, WEIGHTS_NAME
from registry.scanning.rules import RULES
from registry.scanning.targets import Options, scan_target

pytestmark = pytest.mark.integration

BASE = BASES["adapter-foundry/portraits-base"]


def registry(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "registry.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)


def answer(*arguments: str | Path, code: int = 0) -> Any:
    result = registry("scan", *arguments, "--json")
    assert result.returncode == code, result.stdout + result.stderr
    return json.loads(result.stdout)


def lay(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def reviewed() -> bytes:
    """Weights whose only flaw is one for a person to look at."""
    values = factors(BASE)
    values["transformer.transformer_blocks.0.attn.to_q.lora_B.weight"] *= 0
    return container(values)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Adapters of all kinds in one folder; each outcome is there."""
    root = tmp_path / "many"
    lay(root / "clean", dict(clean_adapter(BASE)))
    lay(root / "review", {**clean_adapter(BASE), WEIGHTS_NAME: reviewed()})
    lay(
        root / "deep" / "er" / "pickle", {**clean_adapter(BASE), "pytorch_lora_weights.bin": b"\x80\x04\x95x"}
    )
    lay(root / "lone", {"one.safetensors": clean_adapter(BASE)[WEIGHTS_NAME], "README.md": b"hello"})
    lay(
        root / "several",
        {name: clean_adapter(BASE)[WEIGHTS_NAME] for name in ("a.safetensors", "b.safetensors")},
    )
    lay(root / "linked", {CARD_NAME: json.dumps(card(BASE)).encode()})
    (root / "linked" / WEIGHTS_NAME).symlink_to(root / "clean" / WEIGHTS_NAME)
    lay(root / "documents", {"notes.txt": b"no adapter"})
    return root


# -- exit codes and forms --


def test_the_exit_code_is_the_verdict(tmp_path: Path) -> None:
    folder = lay(tmp_path / "adapter", dict(clean_adapter(BASE)))
    assert answer(folder)["verdict"] == "pass"
    (folder / WEIGHTS_NAME).write_bytes(reviewed())
    assert answer(folder, code=17)["verdict"] == "review"
    (folder / WEIGHTS_NAME).write_bytes(b"\x80\x04.")
    assert answer(folder, code=14)["verdict"] == "block"


def test_each_form_is_the_same_bytes_again(tmp_path: Path) -> None:
    folder = lay(tmp_path / "adapter", {**clean_adapter(BASE), WEIGHTS_NAME: reviewed()})
    documents = {}
    for form in ("text", "json", "sarif", "html"):
        first, second = (registry("scan", folder, "--format", form) for _ in range(2))
        assert (first.returncode, second.returncode) == (17, 17)
        assert first.stdout == second.stdout
        assert first.stdout.isascii()
        documents[form] = first.stdout
    assert "ADP-NUM-004" in documents["text"]
    assert json.loads(documents["json"]) == answer(folder, code=17)
    log = json.loads(documents["sarif"])
    assert log["version"] == "2.1.0"
    assert {row["level"] for row in log["runs"][0]["results"]} == {"none", "warning"}
    assert documents["html"].startswith("<!doctype html>")


def test_the_name_of_the_output_decides_its_form(tmp_path: Path) -> None:
    folder = lay(tmp_path / "adapter", dict(clean_adapter(BASE)))
    told = registry("scan", folder, "--output", tmp_path / "r.sarif")
    assert told.returncode == 0
    assert told.stdout.startswith("scan: pass")
    assert json.loads((tmp_path / "r.sarif").read_text())["version"] == "2.1.0"
    both = registry("scan", folder, "--output", tmp_path / "r.html", "--json")
    assert json.loads(both.stdout)["verdict"] == "pass"
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    nowhere = registry("scan", folder, "--output", tmp_path / "none" / "r.html")
    assert nowhere.returncode == 1
    assert "cannot be written" in nowhere.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "say what to scan"),
        (("adapter", "--explain", "ADP-CON-001"), 2, "say what to scan"),
        (("adapter", "--base", "Qwen/Qwen-Image-Edit-2511"), 2, "the card names the base"),
        (("adapter/pytorch_lora_weights.safetensors", "--base", "nobody/knows"), 2, "nobody/knows"),
        (("adapter", "--format", "pdf"), 2, "pdf"),
        (("adapter", "--behaviour", "adapter/adapter.json"), 2, "only the HTML report"),
        (("adapter", "--behaviour", "adapter/adapter.json", "--format", "html"), 2, "not valid"),
        (("nothing",), 11, "there is no nothing"),
        (("empty",), 11, "there is no adapter in"),
        (("--explain", "ADP-CON-9"), 2, "did you mean ADP-CON-009"),
    ],
)
def test_what_cannot_be_scanned_is_explained(
    arguments: tuple[str, ...], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay(tmp_path / "adapter", dict(clean_adapter(BASE)))
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    monkeypatch.chdir(tmp_path)
    refused = registry("scan", *arguments)
    assert refused.returncode == code, refused.stdout + refused.stderr
    assert said in refused.stderr
    assert not refused.stdout


def test_rules_are_explained() -> None:
    told = registry("scan", "--explain", "con-005")
    assert told.returncode == 0
    for part in ("ADP-CON-005", "layer container", "Why:", "What to do:", "Evidence looks like:", "Limits:"):
        assert part in told.stdout
    rows = answer("--explain", "all")["rules"]
    assert [row["rule"] for row in rows] == sorted(RULES)
    assert all(row["why"] and row["do"] for row in rows)


# -- folders --


def test_of_many_adapters_the_worst_decides(many: Path) -> None:
    told = answer(many, code=14)
    outcomes = {row["name"].removeprefix(f"{many}/"): row["outcome"] for row in told["adapters"]}
    assert outcomes == {
        "clean": "pass",
        "deep/er/pickle": "block",
        "linked": "not finished",
        "lone": "pass",
        "review": "review",
        "several/a.safetensors": "pass",
        "several/b.safetensors": "pass",
    }
    assert told["outcome"] == "block"
    (many / "deep/er/pickle/pytorch_lora_weights.bin").unlink()
    unfinished = registry("scan", many)
    assert unfinished.returncode == 1, "what could not be read is never a pass"
    assert "no plain file" in unfinished.stdout
    assert "7 adapters: " in unfinished.stdout


def test_a_pickle_beside_an_adapter_blocks(tmp_path: Path) -> None:
    folder = lay(tmp_path / "adapter", {**clean_adapter(BASE), "weights.dat": b"\x80\x04\x95\x00"})
    found = scan_target(str(folder), Options())
    assert [one.rule for one in found.subjects[0].report.findings] == ["ADP-CON-020"]  # type: ignore[union-attr]
    assert found.outcome == "block"


def test_a_folder_of_nothing_but_pickles_does_not_pass(tmp_path: Path) -> None:
    folder = lay(tmp_path / "pickles", {"a.bin": b"\x80\x04\x95x", "b.ckpt": b"PK\x03\x04"})
    assert scan_target(str(folder), Options()).outcome == "block"


def test_a_folder_of_too_many_files_is_refused(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from registry.scanning import targets

    monkeypatch.setattr(targets, "MAX_FILES", 5)
    with pytest.raises(UsageError, match="more than 5 files"):
        scan_target(str(many), Options())


def test_a_lone_file_is_read_with_the_configuration_beside_it(tmp_path: Path) -> None:
    values = {
        key.replace("transformer.", "base_model.model.", 1): value for key, value in factors(BASE).items()
    }
    folder = lay(tmp_path / "lone", {"x.safetensors": container(values, metadata={"format": "pt"})})
    targets = card(BASE)["lora"]["targets"]
    config = {"r": RANK, "lora_alpha": 4 * RANK, "peft_type": "LORA", "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    found = scan_target(str(folder / "x.safetensors"), Options()).subjects[0].report
    assert found is not None
    assert found.about["dialect"] == "PEFT"
    assert found.facts["strength_max"] == 4
    assert scan_target(str(folder), Options()).subjects[0].report == found


def test_progress_counts_every_byte_twice(tmp_path: Path) -> None:
    folder = lay(tmp_path / "adapter", dict(clean_adapter(BASE)))
    heard: list[tuple[str, int, int]] = []
    scan_target(str(folder), Options(progress=lambda stage, done, total: heard.append((stage, done, total))))
    size = (folder / WEIGHTS_NAME).stat().st_size
    assert {(stage, total) for stage, _, total in heard} == {("scan", 2 * size)}
    done = [row[1] for row in heard]
    assert done == sorted(done)
    assert done[-1] == 2 * size


# -- buckets --


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[http.HostileS3]:
    with http.running() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        for name, data in clean_adapter(BASE).items():
            server.objects[f"models/loras/clean/{name}"] = data
            server.objects[f"models/loras/second/{name}"] = data
        yield server


def test_an_object_and_a_prefix_are_scanned(bucket: http.HostileS3) -> None:
    target = f"s3://models/loras/clean/{WEIGHTS_NAME}"
    told = answer(target)
    assert (told["name"], told["verdict"]) == (target, "pass")
    assert told["weights"] == digest_bytes(bucket.objects[f"models/loras/clean/{WEIGHTS_NAME}"])
    assert answer("s3://models/loras/clean")["verdict"] == "pass"
    both = answer("s3://models/loras")
    assert [row["name"] for row in both["adapters"]] == [
        "s3://models/loras/clean",
        "s3://models/loras/second",
    ]
    assert {method for method, _ in bucket.requests} == {"GET", "HEAD"}
    bucket.objects["models/loras/second/evil.pkl"] = b"\x80\x04\x95x"
    assert scan_target("s3://models/loras/", Options()).outcome == "block"
    with pytest.raises(NotFound):
        scan_target("s3://models/nothing", Options())


def test_a_server_that_answers_half_is_no_pass(bucket: http.HostileS3) -> None:
    bucket.misbehave(http.status(403, b"<Error><Code>AccessDenied</Code></Error>"), method="GET")
    refused = registry("scan", f"s3://models/loras/clean/{WEIGHTS_NAME}")
    assert refused.returncode not in (0, 14, 17)
    assert "AccessDenied" in refused.stderr


# -- adapters of the registry --


def test_what_the_store_holds_under_a_name_is_scanned(home: Path) -> None:
    copy_registry(home)
    told = answer(f"{NAME}@prod")
    assert (told["target"], told["name"]) == (f"{NAME}@prod", f"{NAME}:1/{WEIGHTS_NAME}")
    assert told["verdict"] == "pass"
    assert answer(f"{NAME}:1")["weights"] == told["weights"]
    assert answer(f"{NAME}:9", code=11)["error"]["kind"] == "NotFound"
    weights = one(home, f"models/*/adapter_weights/{WEIGHTS_NAME}")
    overwrite(weights, b"\x00" * weights.stat().st_size)
    assert answer(f"{NAME}:1", code=13)["error"]["kind"] == "DigestMismatch"


def test_a_folder_named_like_a_reference_is_a_folder(home: Path, tmp_path: Path, monkeypatch: Any) -> None:
    adapter_folder(tmp_path / "pixelsmile@prod")
    monkeypatch.chdir(tmp_path)
    assert scan_target("pixelsmile@prod", Options()).subjects[0].name == "pixelsmile@prod"
