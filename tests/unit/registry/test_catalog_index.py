"""What the index should say about a version, and the MLflow model directory around its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fakes.adapters import card, changed, clean_adapter
from fakes.statements import row
from registry.digest import digest_bytes, file_entry
from registry.errors import Conflict, DigestMismatch
from registry.index import headlines, is_ours, manifest_tags, signed_tags
from registry.manifest import CARD_NAME, WEIGHTS_NAME, AdapterCard, AdapterManifest
from registry.results import StatementView
from registry.storage.base import file_key, model_prefix, read
from registry.storage.local import LocalObjects
from registry.storage.mlmodel import check_model, model_file, model_uri, write_model

FILES = clean_adapter()
DIGEST = digest_bytes(b"a manifest")


def manifest_of(name: str = "pixelsmile", version: int = 1, **card_changes: Any) -> AdapterManifest:
    values = card()
    for path, value in card_changes.items():
        values = changed(values, path.replace("__", "."), value)
    files = {**FILES, CARD_NAME: json.dumps(values).encode()}
    entries = tuple(file_entry(path, data) for path, data in files.items())
    return AdapterManifest.make(
        AdapterCard.parse(files[CARD_NAME]), name=name, version=version, files=entries
    )


def view(kind: str, predicate: dict[str, Any], *, signed: bool = True, key: str = "1") -> StatementView:
    return StatementView(
        key=f"{kind}.{key}",
        kind=kind,
        role="scanner",
        signed=signed,
        problem=None if signed else "nobody",
        key_ids=(),
        predicate=predicate if signed else {},
    )


# -- tags --


def test_tags_of_a_manifest() -> None:
    manifest = manifest_of(version=3)
    assert manifest_tags(manifest, DIGEST) == {
        "adapter_foundry.digest": str(DIGEST),
        "adapter_foundry.reference": "pixelsmile:3",
        "license": "LicenseRef-Proprietary",
        "base": "tests/tiny-base",
        "base_revision": "1",
        "rank": "4",
    }


def test_links_lead_to_the_signed_documents() -> None:
    tags = signed_tags(DIGEST, "s3://adapters/team", [])
    assert tags == {
        "adapter_foundry.manifest": f"s3://adapters/team/manifests/sha256/{DIGEST.hex}",
        "adapter_foundry.statements": f"s3://adapters/team/statements/{DIGEST.hex}",
    }


@pytest.mark.parametrize(
    ("statements", "expected"),
    [
        ([], {}),
        ([view("scan", {"result": "PASSED"})], {"scan": "pass"}),
        ([view("scan", {"result": "WARNED"})], {"scan": "review"}),
        ([view("scan", {"result": "whatever"})], {"scan": "fail"}),
        ([view("scan", {"result": "PASSED"}), view("scan", {"result": "FAILED"}, key="2")], {"scan": "fail"}),
        ([view("scan", {"result": "PASSED"}, signed=False)], {}),
        ([view("evaluation", {"verdict": "pass"})], {"evaluation": "pass"}),
        ([view("evaluation", {"verdict": "fail"})], {"evaluation": "fail"}),
        ([view("approval", {"verdict": "pass"})], {}),
    ],
)
def test_the_worst_believed_verdict_counts(statements: list[StatementView], expected: dict[str, str]) -> None:
    tags = signed_tags(DIGEST, "file:///store", statements)
    assert {key: value for key, value in tags.items() if "." not in key} == expected


def test_a_withdrawn_version_says_so_in_one_line() -> None:
    tags = signed_tags(DIGEST, "file:///store", [], revoked="backdoor\n\x1b[2J", yanked="old")
    assert tags["adapter_foundry.revoked"] == "backdoor\\n\\x1b[2J"
    assert tags["adapter_foundry.yanked"] == "old"


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        (None, {}),
        ({"top1": 0.93217}, {"metric.top1": "0.9322"}),
        ({"expression": {"top1": 1, "ok": True}}, {"metric.expression.top1": "1"}),
        (
            [
                {"name": "psnr", "value": {"value": 24.0}, "threshold": None},
                {"name": "top1_accuracy", "value": {"value": 0.5}, "threshold": 0.4},
                {"name": "broken", "value": None},
            ],
            {"metric.top1_accuracy": "0.5", "metric.psnr": "24"},
        ),
        (
            [
                row("psnr", 24.0),
                row("basic_accuracy", 0.75, max_regression=0.02),
                row("top1_accuracy", minimum=0.4),
            ],
            {"metric.basic_accuracy": "0.75", "metric.top1_accuracy": "0.9", "metric.psnr": "24"},
        ),
        ({"a/b c": 1.5, "text": "x"}, {"metric.a_b_c": "1.5"}),
    ],
)
def test_headlines_of_an_evaluation(metrics: Any, expected: dict[str, str]) -> None:
    assert headlines({"verdict": "pass", "metrics": metrics}) == expected


def test_headlines_are_few_and_those_with_thresholds_come_first() -> None:
    rows = [
        {"name": f"m{number}", "value": {"value": number}, "threshold": 1 if number > 30 else None}
        for number in range(40)
    ]
    found = headlines({"metrics": rows})
    assert len(found) == 12
    assert list(found)[:9] == [f"metric.m{number}" for number in range(31, 40)]


def test_what_belongs_to_the_registry() -> None:
    assert [
        key for key in ("scan", "metric.x", "adapter_foundry.y", "reviewer", "scanner") if is_ours(key)
    ] == [
        "scan",
        "metric.x",
        "adapter_foundry.y",
    ]


# -- the model directory --


@pytest.fixture
def store(tmp_path: Path) -> LocalObjects:
    store = LocalObjects(tmp_path / "objects")
    manifest = manifest_of()
    store.put(file_key(manifest.file(WEIGHTS_NAME)), FILES[WEIGHTS_NAME])
    return store


def test_the_model_file_is_what_mlflow_reads(store: LocalObjects) -> None:
    manifest = manifest_of()
    uri = write_model(store, manifest)
    assert uri == model_uri(store, manifest)
    content = yaml.safe_load(read(store, f"{model_prefix(manifest.file(WEIGHTS_NAME))}MLmodel"))
    assert content["flavors"]["diffusers"] == {
        "adapter_type": "lora",
        "adapter_weights": "adapter_weights",
        "base_model": "tests/tiny-base",
        "base_model_revision": "1",
        "weight_name": WEIGHTS_NAME,
    }
    assert content["metadata"] == {"weights": str(manifest.file(WEIGHTS_NAME).sha256)}


def test_versions_with_the_same_weights_share_one_directory(store: LocalObjects) -> None:
    assert write_model(store, manifest_of(version=1)) == write_model(store, manifest_of("other", version=2))
    check_model(store, manifest_of(version=1))
    check_model(store, manifest_of("other", version=2))


@pytest.mark.parametrize("change", [{"base__id": "other/base"}, {"base__revision": "2"}])
def test_the_same_weights_for_another_base_are_a_conflict(
    store: LocalObjects, change: dict[str, str]
) -> None:
    write_model(store, manifest_of())
    with pytest.raises(Conflict, match="tests/tiny-base at 1") as caught:
        write_model(store, manifest_of(**change))
    assert "card" in caught.value.mend


TAMPERED = {
    "another base": lambda data: data.replace(b"tests/tiny-base", b"evil/base"),
    "code to run": lambda data: data.replace(
        b"flavors:\n", b"flavors:\n  python_function:\n    loader_module: os\n"
    ),
    "other weights": lambda data: data.replace(b"pytorch_lora_weights", b"evil"),
    "nothing": lambda data: b"",
    "quotes": lambda data: data.replace(b'"tests/tiny-base"', b'"tests\\q"'),
    "too much": lambda data: data + b"#" * 100_000,
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_changed_model_file_is_refused(store: LocalObjects, case: str) -> None:
    manifest = manifest_of()
    write_model(store, manifest)
    key = f"{model_prefix(manifest.file(WEIGHTS_NAME))}MLmodel"
    data = TAMPERED[case](read(store, key))
    store.delete(key)
    store.put(key, data)
    with pytest.raises(DigestMismatch):
        check_model(store, manifest)
    if case != "another base":  # that one is as somebody honest could have written it
        with pytest.raises(DigestMismatch):
            write_model(store, manifest)


@pytest.mark.parametrize("name", ["adapter_weights/a.safetensors", "code/run.py", "requirements.txt"])
def test_a_file_that_does_not_belong_there_is_refused(store: LocalObjects, name: str) -> None:
    manifest = manifest_of()
    write_model(store, manifest)
    check_model(store, manifest)
    store.put(f"{model_prefix(manifest.file(WEIGHTS_NAME))}{name}", b"x")
    with pytest.raises(DigestMismatch):
        check_model(store, manifest)


def test_the_note_that_mlflow_leaves_is_ignored(store: LocalObjects) -> None:
    manifest = manifest_of()
    write_model(store, manifest)
    store.put(f"{model_prefix(manifest.file(WEIGHTS_NAME))}registered_model_meta", b"model_name: x")
    check_model(store, manifest)


def test_text_in_a_card_cannot_leave_its_line() -> None:
    """The pattern of a base forbids it already; the file would be safe all the same."""
    weights = manifest_of().file(WEIGHTS_NAME)
    hostile = 'x"\nflavors:\n  python_function: {loader_module: os}'
    content = yaml.safe_load(model_file(hostile, "1", weights))
    assert content["flavors"]["diffusers"]["base_model"] == hostile
    assert list(content["flavors"]) == ["diffusers"]
